//! Which apply session a change goes to.
//!
//! All changes of one row must go to one session, in order. A table is routed by key when equal keys are equal bytes
//! (H20: `1.0` and `1.00` are one key to the index, two to a hash) and when no other constraint lets rows with different
//! keys contend for one value; two sessions would then wait for each other at the barrier, which PostgreSQL cannot see. Every
//! other table goes whole to one session.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::source::catalog::Table;

/// How the changes of a table are spread over the apply sessions. It stands in the ledger (H21).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// By a hash of the key.
    ByKey,
    /// All to one session.
    Whole,
}

impl Routing {
    /// The class that is safe for a table.
    pub fn of(table: &Table) -> Routing {
        let by_key =
            !table.key.is_empty() && !table.has_other_unique && table.key_columns().all(|column| column.byte_equal);
        // Whoever makes a chunk, or decompresses a segment, holds what a sibling would wait for at the barrier.
        let by_key = by_key && table.hypertable.is_none();
        if by_key { Routing::ByKey } else { Routing::Whole }
    }

    /// As it stands in the ledger.
    pub fn name(self) -> &'static str {
        match self {
            Routing::ByKey => "by_key",
            Routing::Whole => "whole",
        }
    }

    /// Reads what [`Routing::name`] wrote.
    pub fn parse(name: &str) -> Option<Routing> {
        [Routing::ByKey, Routing::Whole].into_iter().find(|routing| routing.name() == name)
    }

    /// The session, of `workers`, for a row of a table. The same on every machine and in every version, because after a
    /// crash the sessions that have not committed must get exactly what they had.
    pub fn worker(self, relid: u32, key_hash: u64, workers: usize) -> usize {
        let hash = match self {
            Routing::ByKey => key_hash,
            Routing::Whole => xxh3_64_with_seed(&relid.to_be_bytes(), 0),
        };
        (hash % workers.max(1) as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::catalog::{Column, ReplicaIdentity};

    fn table(byte_equal: bool, has_other_unique: bool, key: Vec<usize>) -> Table {
        let column = Column {
            name: "k".into(),
            number: 1,
            type_oid: 1700,
            type_name: "numeric".into(),
            type_modifier: -1,
            not_null: true,
            identity_always: false,
            binary_safe: true,
            byte_equal,
            equality_schema: Some("pg_catalog".into()),
        };
        Table {
            relid: 7,
            schema: "public".into(),
            name: "t".into(),
            unlogged: false,
            is_partition: false,
            identity: ReplicaIdentity::Default,
            columns: vec![column],
            key,
            has_other_unique,
            pages: 0,
            bytes: 0,
            estimated_rows: 0.0,
            updates_and_deletes: 0,
            relfilenode: None,
            firing: Vec::new(),
            hypertable: None,
        }
    }

    #[test]
    fn h20_only_keys_that_are_equal_as_bytes_are_spread() {
        assert_eq!(Routing::of(&table(true, false, vec![0])), Routing::ByKey);
        assert_eq!(Routing::of(&table(false, false, vec![0])), Routing::Whole);
        assert_eq!(Routing::of(&table(true, true, vec![0])), Routing::Whole);
        assert_eq!(Routing::of(&table(true, false, vec![])), Routing::Whole);
    }

    #[test]
    fn h21_the_route_is_the_same_in_every_version() {
        // Fixed numbers: a change here would send half a batch to the wrong session after an upgrade in mid-crash.
        let whole: Vec<usize> = (1..9).map(|relid| Routing::Whole.worker(relid, 99, 4)).collect();
        assert_eq!(whole, [3, 1, 3, 1, 3, 2, 0, 3]);
        assert_eq!(Routing::ByKey.worker(7, 10, 4), 2);
    }
}
