//! The net effect of a batch on one table: what is left to write once later changes of a row have swallowed earlier ones.
//!
//! | before ↓ then → | insert | update | delete |
//! |---|---|---|---|
//! | *untouched* | insert | update | delete |
//! | insert | – | insert | nothing |
//! | update | – | update | delete |
//! | delete | replace | – | – |
//! | replace | – | replace | delete |
//! | nothing | insert | – | – |
//!
//! A dash cannot come from a history that the target shares: the batch is then replayed row by row, which finds out what is
//! wrong and stops there (I5, I6). A change of the key is a delete of the old and an insert of the new row. A TOASTed column that
//! an update left unchanged keeps what the batch has of it, or else what the target has; an insert needs every column, so a
//! changed key with such a column that the batch does not know goes the serial way.
//!
//! Rows stay as they came over the wire, slices of the queue's blocks; only merged rows are made anew.

use bytes::{BufMut, Bytes, BytesMut};
use hashbrown::HashTable;
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::equal::EqualRows;
use crate::decode::{Datum, KeptTuple, OldTuple, Tuple};

/// A row with its unchanged columns taken from an earlier one; `only` limits that to some columns.
pub(super) fn filled_from(row: KeptTuple, earlier: &KeptTuple, only: Option<&[usize]>) -> KeptTuple {
    if is_whole(&row) {
        return row;
    }
    let (own, earlier) = (row.tuple(), earlier.tuple());
    let mut columns = BytesMut::with_capacity(own.encoded().len() + earlier.encoded().len());
    for (at, (own, before)) in own.columns().zip(earlier.columns()).enumerate() {
        let take = own == Datum::Unchanged && only.is_none_or(|only| only.contains(&at));
        put_datum(&mut columns, if take { before } else { own });
    }
    KeptTuple::new(own.len() as u16, columns.freeze())
}

pub(super) fn is_whole(row: &KeptTuple) -> bool {
    row.tuple().columns().all(|datum| datum != Datum::Unchanged)
}

/// A column as it is on the wire.
pub(super) fn put_datum(columns: &mut BytesMut, datum: Datum<'_>) {
    match datum {
        Datum::Null => columns.put_u8(b'n'),
        Datum::Unchanged => columns.put_u8(b'u'),
        Datum::Text(value) => put(columns, b't', value),
        Datum::Binary(value) => put(columns, b'b', value),
    }
}

fn put(columns: &mut BytesMut, kind: u8, value: &[u8]) {
    columns.put_u8(kind);
    columns.put_u32(value.len() as u32);
    columns.put_slice(value);
}

/// What is left of the changes of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A row that was not there.
    Insert,
    /// New values for a row that was there; columns may be unchanged.
    Update,
    /// A whole new row in the place of one that was there.
    Replace,
    /// No row any more.
    Delete,
    /// A row came and went.
    Nothing,
}

/// The net effect on one row.
#[derive(Clone, Debug)]
pub struct Net {
    /// Hash of the key, for the route.
    pub hash: u64,
    /// What to do.
    pub effect: Effect,
    /// The new row; for a delete what named the old one. It has the key's columns in any case.
    pub row: KeptTuple,
    /// To how many rows: more than one only where equal rows go that nothing else names.
    pub times: u32,
}

/// The batch has a history that its net effect cannot tell; it has to be replayed row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedsSerialReplay;

/// The net effect of the changes of one table.
#[derive(Debug, Default)]
pub struct NetChanges {
    /// Positions of the key's columns; empty for a table that only gets inserts.
    key: Vec<usize>,
    relid: u32,
    rows: Vec<Net>,
    places: HashTable<usize>,
    /// Instead of all that: rows that are named by all of their values.
    equal: Option<EqualRows>,
}

impl NetChanges {
    /// Nothing yet, for a table with this key.
    pub fn new(relid: u32, key: &[usize]) -> NetChanges {
        NetChanges { key: key.to_vec(), relid, ..NetChanges::default() }
    }

    /// Nothing yet, for a table without a key whose rows are named by all of their values.
    pub fn of_equal_rows() -> NetChanges {
        NetChanges { equal: Some(EqualRows::default()), ..NetChanges::default() }
    }

    /// Takes what there is, in the order in which the rows came first, and begins anew.
    pub fn take(&mut self) -> Vec<Net> {
        if let Some(equal) = &mut self.equal {
            return equal.take();
        }
        self.places.clear();
        std::mem::take(&mut self.rows)
    }

    /// How many rows have an effect, or had one that was undone.
    pub fn len(&self) -> usize {
        self.equal.as_ref().map_or(self.rows.len(), EqualRows::len)
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A new row.
    ///
    /// # Errors
    /// When the batch has that row already.
    pub fn insert(&mut self, message: &Bytes, new: Tuple<'_>) -> Result<(), NeedsSerialReplay> {
        if let Some(equal) = &mut self.equal {
            equal.insert(KeptTuple::of(message, new));
            return Ok(());
        }
        self.insert_row(KeptTuple::of(message, new))
    }

    /// New values of a row, and perhaps another key.
    ///
    /// # Errors
    /// When the batch cannot tell the outcome.
    pub fn update(
        &mut self,
        message: &Bytes,
        old: Option<OldTuple<'_>>,
        new: Tuple<'_>,
    ) -> Result<(), NeedsSerialReplay> {
        if let Some(equal) = &mut self.equal {
            return equal.update(message, old, new);
        }
        if self.key.is_empty() {
            return Err(NeedsSerialReplay);
        }
        let mut row = KeptTuple::of(message, new);
        if let Some(old) = old {
            let before = KeptTuple::of(message, old.tuple());
            row = match old {
                OldTuple::Full(_) => filled_from(row, &before, None),
                OldTuple::Key(_) => filled_from(row, &before, Some(&self.key)),
            };
            if !self.same_key(&before, &row) {
                return self.change_key(before, row);
            }
        }
        let hash = self.hash(&row);
        match self.find(hash, &row) {
            None => self.push(Net { hash, effect: Effect::Update, row, times: 1 }),
            Some(place) => {
                let net = &mut self.rows[place];
                match net.effect {
                    Effect::Insert | Effect::Update | Effect::Replace => net.row = filled_from(row, &net.row, None),
                    Effect::Delete | Effect::Nothing => return Err(NeedsSerialReplay),
                }
            }
        }
        Ok(())
    }

    /// A row that goes.
    ///
    /// # Errors
    /// When the batch does not have the row that should go.
    pub fn delete(&mut self, message: &Bytes, old: OldTuple<'_>) -> Result<(), NeedsSerialReplay> {
        if let Some(equal) = &mut self.equal {
            return equal.delete(message, old);
        }
        if self.key.is_empty() {
            return Err(NeedsSerialReplay);
        }
        self.delete_row(KeptTuple::of(message, old.tuple()))
    }

    fn change_key(&mut self, before: KeptTuple, mut row: KeptTuple) -> Result<(), NeedsSerialReplay> {
        if !is_whole(&row)
            && let Some(place) = self.find(self.hash(&before), &before)
        {
            row = filled_from(row, &self.rows[place].row, None);
        }
        if !is_whole(&row) {
            return Err(NeedsSerialReplay);
        }
        self.delete_row(before)?;
        self.insert_row(row)
    }

    fn insert_row(&mut self, row: KeptTuple) -> Result<(), NeedsSerialReplay> {
        if self.key.is_empty() {
            self.rows.push(Net { hash: 0, effect: Effect::Insert, row, times: 1 });
            return Ok(());
        }
        let hash = self.hash(&row);
        match self.find(hash, &row) {
            None => self.push(Net { hash, effect: Effect::Insert, row, times: 1 }),
            Some(place) => {
                let net = &mut self.rows[place];
                net.effect = match net.effect {
                    Effect::Delete => Effect::Replace,
                    Effect::Nothing => Effect::Insert,
                    Effect::Insert | Effect::Update | Effect::Replace => return Err(NeedsSerialReplay),
                };
                net.row = row;
            }
        }
        Ok(())
    }

    fn delete_row(&mut self, key: KeptTuple) -> Result<(), NeedsSerialReplay> {
        let hash = self.hash(&key);
        match self.find(hash, &key) {
            None => self.push(Net { hash, effect: Effect::Delete, row: key, times: 1 }),
            Some(place) => {
                let net = &mut self.rows[place];
                net.effect = match net.effect {
                    Effect::Insert => Effect::Nothing,
                    Effect::Update | Effect::Replace => Effect::Delete,
                    Effect::Delete | Effect::Nothing => return Err(NeedsSerialReplay),
                };
                net.row = key;
            }
        }
        Ok(())
    }

    fn push(&mut self, net: Net) {
        let (hash, place) = (net.hash, self.rows.len());
        self.rows.push(net);
        let rows = &self.rows;
        self.places.insert_unique(hash, place, |&place| rows[place].hash);
    }

    fn find(&self, hash: u64, key: &KeptTuple) -> Option<usize> {
        self.places
            .find(hash, |&place| self.rows[place].hash == hash && self.same_key(&self.rows[place].row, key))
            .copied()
    }

    /// Hash of the key's columns; the route hangs on it, so it must never change.
    fn hash(&self, row: &KeptTuple) -> u64 {
        hash_key(self.relid, &self.key, row.tuple(), None)
    }

    fn same_key(&self, one: &KeptTuple, other: &KeptTuple) -> bool {
        self.key.iter().all(|&at| one.tuple().columns().nth(at) == other.tuple().columns().nth(at))
    }
}

/// The hash by which the rows of a table are spread over sessions (H21: it must be the same in every version).
///
/// A key's column that an update left unchanged and that is TOASTed stands in the row `before` only.
pub fn hash_key(relid: u32, key: &[usize], tuple: Tuple<'_>, before: Option<Tuple<'_>>) -> u64 {
    fn in_tuple<'a>(tuple: Tuple<'a>, at: usize) -> Option<&'a [u8]> {
        match tuple.columns().nth(at) {
            Some(Datum::Text(value) | Datum::Binary(value)) => Some(value),
            Some(Datum::Null | Datum::Unchanged) | None => None,
        }
    }
    let value =
        |at: usize| in_tuple(tuple, at).or_else(|| before.and_then(|before| in_tuple(before, at))).unwrap_or_default();
    if let [only] = key {
        return xxh3_64_with_seed(value(*only), u64::from(relid));
    }
    let mut hasher = Xxh3::with_seed(u64::from(relid));
    for &at in key {
        hasher.update(&(value(at).len() as u64).to_be_bytes());
        hasher.update(value(at));
    }
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::decode::{Message, decode};

    /// A tuple on the wire: `None` is null, `Some("~")` an unchanged TOASTed value.
    fn wire(columns: &[Option<&str>]) -> Vec<u8> {
        let mut bytes = (columns.len() as u16).to_be_bytes().to_vec();
        for column in columns {
            match column {
                None => bytes.push(b'n'),
                Some("~") => bytes.push(b'u'),
                Some(value) => {
                    bytes.push(b't');
                    bytes.extend_from_slice(&(value.len() as u32).to_be_bytes());
                    bytes.extend_from_slice(value.as_bytes());
                }
            }
        }
        bytes
    }

    fn message(kind: u8, parts: &[(u8, &[Option<&str>])]) -> Bytes {
        let mut bytes = vec![kind, 0, 0, 0, 9];
        for (part, columns) in parts {
            bytes.push(*part);
            bytes.extend(wire(columns));
        }
        Bytes::from(bytes)
    }

    fn feed(net: &mut NetChanges, bytes: &Bytes) -> Result<(), NeedsSerialReplay> {
        match decode(bytes).unwrap() {
            Message::Insert { new, .. } => net.insert(bytes, new),
            Message::Update { old, new, .. } => net.update(bytes, old, new),
            Message::Delete { old, .. } => net.delete(bytes, old),
            other => panic!("{other:?}"),
        }
    }

    fn insert(columns: &[Option<&str>]) -> Bytes {
        message(b'I', &[(b'N', columns)])
    }

    fn update(columns: &[Option<&str>]) -> Bytes {
        message(b'U', &[(b'N', columns)])
    }

    fn rekey(old: &str, columns: &[Option<&str>]) -> Bytes {
        message(b'U', &[(b'K', &[Some(old), None, None]), (b'N', columns)])
    }

    fn delete(key: &str) -> Bytes {
        message(b'D', &[(b'K', &[Some(key), None, None])])
    }

    fn text(row: &KeptTuple) -> Vec<String> {
        let show = |datum| match datum {
            Datum::Null => "null".to_owned(),
            Datum::Unchanged => "~".to_owned(),
            Datum::Text(value) | Datum::Binary(value) => String::from_utf8_lossy(value).into_owned(),
        };
        row.tuple().columns().map(show).collect()
    }

    fn outcome(changes: &[Bytes]) -> Result<Vec<(Effect, Vec<String>)>, NeedsSerialReplay> {
        let mut net = NetChanges::new(9, &[0]);
        for change in changes {
            feed(&mut net, change)?;
        }
        Ok(net.take().iter().map(|net| (net.effect, text(&net.row))).collect())
    }

    #[test]
    fn later_changes_of_a_row_swallow_earlier_ones() {
        let row = |value| [Some("1"), Some(value), None];
        let cases: [(&[Bytes], Effect); 6] = [
            (&[insert(&row("a")), update(&row("b"))], Effect::Insert),
            (&[insert(&row("a")), delete("1")], Effect::Nothing),
            (&[update(&row("a")), update(&row("b"))], Effect::Update),
            (&[update(&row("a")), delete("1")], Effect::Delete),
            (&[delete("1"), insert(&row("b"))], Effect::Replace),
            (&[insert(&row("a")), delete("1"), insert(&row("b"))], Effect::Insert),
        ];
        for (changes, effect) in cases {
            let net = outcome(changes).unwrap();
            assert_eq!(net.len(), 1);
            assert_eq!(net[0].0, effect);
            if !matches!(effect, Effect::Nothing | Effect::Delete) {
                assert_eq!(net[0].1, ["1", "b", "null"]);
            }
        }
    }

    #[test]
    fn an_unchanged_toasted_column_keeps_what_the_batch_has_of_it() {
        let net = outcome(&[insert(&[Some("1"), Some("a"), Some("big")]), update(&[Some("1"), Some("b"), Some("~")])]);
        assert_eq!(net.unwrap(), [(Effect::Insert, vec!["1".to_owned(), "b".into(), "big".into()])]);
        let net = outcome(&[update(&[Some("1"), Some("b"), Some("~")])]).unwrap();
        assert_eq!(net[0].1, ["1", "b", "~"], "nothing is known: the target's value stays");
    }

    #[test]
    fn a_changed_key_is_a_delete_and_an_insert() {
        let net = outcome(&[rekey("1", &[Some("2"), Some("a"), None])]).unwrap();
        assert_eq!(net[0], (Effect::Delete, vec!["1".to_owned(), "null".into(), "null".into()]));
        assert_eq!(net[1].0, Effect::Insert);
        let known =
            outcome(&[update(&[Some("1"), Some("a"), Some("big")]), rekey("1", &[Some("2"), Some("a"), Some("~")])]);
        assert_eq!(known.unwrap()[1].1, ["2", "a", "big"]);
    }

    #[test]
    fn what_the_batch_cannot_tell_goes_the_serial_way() {
        let row = [Some("1"), Some("a"), None];
        assert!(outcome(&[rekey("1", &[Some("2"), Some("a"), Some("~")])]).is_err());
        assert!(outcome(&[insert(&row), insert(&row)]).is_err());
        assert!(outcome(&[delete("1"), update(&row)]).is_err());
        assert!(outcome(&[delete("1"), delete("1")]).is_err());
    }

    #[test]
    fn a_table_without_a_key_takes_inserts_only() {
        let mut net = NetChanges::new(9, &[]);
        for _ in 0..2 {
            feed(&mut net, &insert(&[Some("1"), None, None])).unwrap();
        }
        assert_eq!(feed(&mut net, &delete("1")), Err(NeedsSerialReplay));
        assert_eq!(net.take().len(), 2);
    }

    /// What a step of a random history does to a key.
    #[derive(Clone, Debug)]
    enum Step {
        Upsert(u8, u8, bool),
        Delete(u8),
        Rekey(u8, u8, bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..6u8, any::<u8>(), any::<bool>()).prop_map(|(key, value, toast)| Step::Upsert(key, value, toast)),
            (0..6u8).prop_map(Step::Delete),
            (0..6u8, 0..6u8, any::<bool>()).prop_map(|(from, to, toast)| Step::Rekey(from, to, toast)),
        ]
    }

    proptest! {
        /// The net effect on the rows that were there gives what the history gives, step by step.
        #[test]
        fn the_net_effect_is_that_of_the_history(present in proptest::collection::btree_set(0..6u8, 0..6), steps in proptest::collection::vec(step(), 0..40)) {
            type Table = BTreeMap<String, (String, String)>;
            let begin: Table = present.iter().map(|key| (key.to_string(), ("old".to_owned(), format!("big{key}")))).collect();
            let mut history = begin.clone();
            let mut net = NetChanges::new(9, &[0]);
            let mut serial = false;
            for (number, step) in steps.iter().enumerate() {
                let change = match step {
                    Step::Upsert(key, value, keep) => {
                        let (key, value) = (key.to_string(), value.to_string());
                        match history.get(&key).cloned() {
                            Some((_, big)) => {
                                let fresh = format!("new{number}");
                                let big = if *keep { big } else { fresh.clone() };
                                history.insert(key.clone(), (value.clone(), big));
                                update(&[Some(&key), Some(&value), Some(if *keep { "~" } else { &fresh })])
                            }
                            None => {
                                history.insert(key.clone(), (value.clone(), "first".into()));
                                insert(&[Some(&key), Some(&value), Some("first")])
                            }
                        }
                    }
                    Step::Delete(key) => {
                        if history.remove(&key.to_string()).is_none() { continue }
                        delete(&key.to_string())
                    }
                    Step::Rekey(from, to, keep) => {
                        let (from, to) = (from.to_string(), to.to_string());
                        if from == to || history.contains_key(&to) { continue }
                        let Some((value, big)) = history.remove(&from) else { continue };
                        let fresh = format!("new{number}");
                        let new = if *keep { big } else { fresh.clone() };
                        history.insert(to.clone(), (value.clone(), new));
                        rekey(&from, &[Some(&to), Some(&value), Some(if *keep { "~" } else { &fresh })])
                    }
                };
                if feed(&mut net, &change).is_err() {
                    serial = true;
                    break;
                }
            }
            if !serial {
                let mut table = begin;
                let rows = net.take();
                for net in rows.iter().filter(|net| net.effect == Effect::Delete) {
                    prop_assert!(table.remove(&text(&net.row)[0]).is_some());
                }
                for net in rows.iter().filter(|net| matches!(net.effect, Effect::Update | Effect::Replace)) {
                    let row = text(&net.row);
                    let Some(was) = table.get_mut(&row[0]) else { panic!("updates a row that is not there") };
                    was.0.clone_from(&row[1]);
                    if row[2] != "~" {
                        was.1.clone_from(&row[2]);
                    }
                    prop_assert!(net.effect == Effect::Update || row[2] != "~");
                }
                for net in rows.iter().filter(|net| net.effect == Effect::Insert) {
                    let row = text(&net.row);
                    prop_assert!(row[2] != "~");
                    prop_assert!(table.insert(row[0].clone(), (row[1].clone(), row[2].clone())).is_none());
                }
                prop_assert_eq!(table, history);
            }
        }
    }
}
