//! The net effect on a table whose rows are named by nothing but all of their values (REPLICA IDENTITY FULL without a key, H26).
//!
//! Its rows are a multiset. A row that goes takes back an equal one that came in the same batch, else it is one of the target's; an
//! update is a row that goes and one that comes. In a history that the target shares, as many rows are there before the batch as are left
//! here to go, so to take them out first and to put in what came afterwards gives what the history gives.
//!
//! Rows are equal here when their bytes are. Rows that the server takes for equal though their bytes differ do not cancel each other
//! out; then a statement does not meet what it should, and the batch is replayed row by row (I5).

use bytes::Bytes;
use hashbrown::HashTable;
use xxhash_rust::xxh3::xxh3_64;

use super::net::{Effect, NeedsSerialReplay, Net, filled_from, is_whole};
use crate::decode::{KeptTuple, OldTuple, Tuple};

/// The net effect of the changes of one such table.
#[derive(Debug, Default)]
pub(super) struct EqualRows {
    /// Rows that came, in their order; nothing where one went again.
    came: Vec<Option<KeptTuple>>,
    /// Hashes and places of those that came; made when the first row goes, because most batches only bring rows.
    places: Option<HashTable<(u64, usize)>>,
    /// Rows of before that go, and how many equal ones.
    went: Vec<(KeptTuple, u32)>,
    places_of_went: HashTable<(u64, usize)>,
}

impl EqualRows {
    pub(super) fn len(&self) -> usize {
        self.came.len() + self.went.len()
    }

    /// What there is, those that go first; begins anew.
    pub(super) fn take(&mut self) -> Vec<Net> {
        let EqualRows { came, went, .. } = std::mem::take(self);
        let went = went.into_iter().map(|(row, times)| Net { hash: 0, effect: Effect::Delete, row, times });
        let came = came.into_iter().flatten().map(|row| Net { hash: 0, effect: Effect::Insert, row, times: 1 });
        went.chain(came).collect()
    }

    pub(super) fn insert(&mut self, row: KeptTuple) {
        if let Some(places) = &mut self.places {
            let hash = hash(&row);
            places.insert_unique(hash, (hash, self.came.len()), |entry| entry.0);
        }
        self.came.push(Some(row));
    }

    pub(super) fn delete(&mut self, message: &Bytes, old: OldTuple<'_>) -> Result<(), NeedsSerialReplay> {
        let OldTuple::Full(old) = old else { return Err(NeedsSerialReplay) };
        self.remove(KeptTuple::of(message, old))
    }

    pub(super) fn update(
        &mut self,
        message: &Bytes,
        old: Option<OldTuple<'_>>,
        new: Tuple<'_>,
    ) -> Result<(), NeedsSerialReplay> {
        let Some(OldTuple::Full(old)) = old else { return Err(NeedsSerialReplay) };
        let before = KeptTuple::of(message, old);
        let after = filled_from(KeptTuple::of(message, new), &before, None);
        if !is_whole(&after) {
            return Err(NeedsSerialReplay);
        }
        self.remove(before)?;
        self.insert(after);
        Ok(())
    }

    fn remove(&mut self, row: KeptTuple) -> Result<(), NeedsSerialReplay> {
        if !is_whole(&row) {
            return Err(NeedsSerialReplay);
        }
        let (hash, came) = (hash(&row), &mut self.came);
        let places = self.places.get_or_insert_with(|| {
            let mut places = HashTable::with_capacity(came.len());
            for (place, row) in came.iter().enumerate() {
                let hash = row.as_ref().map_or(0, self::hash);
                places.insert_unique(hash, (hash, place), |entry: &(u64, usize)| entry.0);
            }
            places
        });
        let is_equal = |other: &KeptTuple| other.tuple().encoded() == row.tuple().encoded();
        let of_batch = places.find_entry(hash, |&(other, place)| {
            other == hash && came.get(place).is_some_and(|came| came.as_ref().is_some_and(is_equal))
        });
        if let Ok(entry) = of_batch {
            let ((_, place), _) = entry.remove();
            came[place] = None;
            return Ok(());
        }
        let went = &mut self.went;
        match self.places_of_went.find(hash, |&(other, place)| other == hash && is_equal(&went[place].0)) {
            Some(&(_, place)) => went[place].1 += 1,
            None => {
                self.places_of_went.insert_unique(hash, (hash, went.len()), |entry| entry.0);
                went.push((row, 1));
            }
        }
        Ok(())
    }
}

fn hash(row: &KeptTuple) -> u64 {
    xxh3_64(row.tuple().encoded())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::{BufMut, BytesMut};
    use proptest::prelude::*;

    use super::*;
    use crate::decode::{Message, decode};

    fn row(bytes: &mut BytesMut, part: u8, value: u8) {
        bytes.put_slice(&[part, 0, 1, b't', 0, 0, 0, 1, value]);
    }

    /// A change as pgoutput writes it: of one row to another, or with nothing on one side.
    fn change(rows: &mut EqualRows, before: Option<u8>, after: Option<u8>) -> Result<(), NeedsSerialReplay> {
        let kind = match (before, after) {
            (None, _) => b'I',
            (_, None) => b'D',
            _ => b'U',
        };
        let mut bytes = BytesMut::from(&[kind, 0, 0, 0, 9][..]);
        before.into_iter().for_each(|value| row(&mut bytes, b'O', value));
        after.into_iter().for_each(|value| row(&mut bytes, b'N', value));
        let bytes = bytes.freeze();
        match decode(&bytes).unwrap() {
            Message::Insert { new, .. } => {
                rows.insert(KeptTuple::of(&bytes, new));
                Ok(())
            }
            Message::Update { old, new, .. } => rows.update(&bytes, old, new),
            Message::Delete { old, .. } => rows.delete(&bytes, old),
            other => panic!("{other:?}"),
        }
    }

    fn value(row: &KeptTuple) -> u8 {
        *row.tuple().encoded().last().unwrap()
    }

    #[test]
    fn what_names_a_row_by_a_key_only_goes_the_serial_way() {
        let mut rows = EqualRows::default();
        let bytes = Bytes::from_static(b"D\0\0\0\x09K\0\x01t\0\0\0\x01a");
        let Message::Delete { old, .. } = decode(&bytes).unwrap() else { panic!() };
        assert_eq!(rows.delete(&bytes, old), Err(NeedsSerialReplay));
    }

    proptest! {
        /// The rows that are left to go are there before the batch, and with what came they give what the history gives.
        #[test]
        fn the_net_effect_on_equal_rows_is_that_of_the_history(
            begin in proptest::collection::vec(b'a'..b'd', 0..8),
            steps in proptest::collection::vec((proptest::option::of(b'a'..b'd'), proptest::option::of(b'a'..b'd')), 0..40),
        ) {
            let mut table: BTreeMap<u8, i64> = BTreeMap::new();
            begin.iter().for_each(|value| *table.entry(*value).or_default() += 1);
            let (mut history, mut rows) = (table.clone(), EqualRows::default());
            for (before, after) in steps {
                if before.is_none() && after.is_none() || before.is_some_and(|before| history.get(&before).is_none_or(|there| *there == 0)) {
                    continue;
                }
                before.into_iter().for_each(|before| *history.entry(before).or_default() -= 1);
                after.into_iter().for_each(|after| *history.entry(after).or_default() += 1);
                change(&mut rows, before, after).unwrap();
            }
            for net in rows.take() {
                let there = table.entry(value(&net.row)).or_default();
                *there += if net.effect == Effect::Insert { 1 } else { -i64::from(net.times) };
                prop_assert!(*there >= 0, "a row goes that is not there");
            }
            table.retain(|_, rows| *rows > 0);
            history.retain(|_, rows| *rows > 0);
            prop_assert_eq!(table, history);
            prop_assert_eq!(rows.len(), 0);
        }
    }
}
