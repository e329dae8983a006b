//! A table that the stream announces otherwise than it was: what was announced, and what becomes of it (I11).
//!
//! The transaction that brings the announcement goes the serial way, after everything before it is committed. There it stops,
//! unless [`reconcile`](super::reconcile) has found the target mended and given an [`Adoption`]: then the rest of the
//! transaction is read in the new shape, and its commit on the target carries the new definition into the ledger. So the
//! ledger's definition is at every moment that of the position beside it, wherever the process dies.

use bytes::{Bytes, BytesMut};

use super::net::put_datum;
use crate::decode::{Datum, OldTuple, Relation, ReplicaIdentity as WireIdentity, Tuple};
use crate::queue::TransactionHead;
use crate::source::catalog::{ReplicaIdentity, Table};
use crate::target::route::Routing;

/// A table as the stream announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Its OID on the source.
    pub relid: u32,
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// What names a row.
    pub identity: ReplicaIdentity,
    /// The columns, in the order of the rows that follow.
    pub columns: Vec<AnnouncedColumn>,
}

/// A column of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnnouncedColumn {
    /// Name, unquoted.
    pub name: String,
    /// The type's OID on the source.
    pub type_oid: u32,
    /// `atttypmod`.
    pub type_modifier: i32,
    /// Whether it is part of the replica identity.
    pub is_key: bool,
}

impl Announced {
    /// Keeps a message.
    pub fn of(relation: &Relation<'_>) -> Announced {
        let column = |column: crate::decode::RelationColumn<'_>| AnnouncedColumn {
            name: column.name.to_owned(),
            type_oid: column.type_oid,
            type_modifier: column.type_modifier,
            is_key: column.is_key,
        };
        Announced {
            relid: relation.relid,
            schema: relation.schema.to_owned(),
            name: relation.name.to_owned(),
            identity: match relation.identity {
                WireIdentity::Default => ReplicaIdentity::Default,
                WireIdentity::Nothing => ReplicaIdentity::Nothing,
                WireIdentity::Full => ReplicaIdentity::Full,
                WireIdentity::Index => ReplicaIdentity::Index,
            },
            columns: relation.columns().map(column).collect(),
        }
    }
}

impl Announced {
    /// What the stream would announce of a table as the catalog has it.
    pub fn of_table(table: &Table) -> Announced {
        let column = |(at, column): (usize, &crate::source::catalog::Column)| AnnouncedColumn {
            name: column.name.clone(),
            type_oid: column.type_oid,
            type_modifier: column.type_modifier,
            is_key: table.identity == ReplicaIdentity::Full || table.key.contains(&at),
        };
        Announced {
            relid: table.relid,
            schema: table.schema.clone(),
            name: table.name.clone(),
            identity: table.identity,
            columns: table.columns.iter().enumerate().map(column).collect(),
        }
    }
}

/// Where the apply met a table that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The transaction that brings it: everything before it is on the target, and nothing of it.
    pub head: TransactionHead,
    /// The table as it is from there on.
    pub announced: Announced,
}

/// The target has been found to fit a change: how to go on with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Adoption {
    /// Which change.
    pub change: Change,
    /// The table from there on; its columns are the announced ones.
    pub table: Table,
    /// How its changes are spread from the next transaction on.
    pub routing: Routing,
    /// Added columns by their number, with the value that the rows have that were there: text.
    pub missing: Vec<(i16, String)>,
    /// Objects of the catalog's fingerprint that are dealt with: their hashes now, `None` for those that are gone.
    pub fingerprint: Vec<(String, Option<String>)>,
}

/// How rows of the old shape are written to a target that has the new one already: in the transaction that changed the table,
/// before it did.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The table as it is to be named on the target: without the columns that are gone, and by the new names.
    pub table: Table,
    /// The same for new rows: with the added columns that have a missing value, because the default can be another by now.
    pub table_for_inserts: Table,
    /// The positions of the columns that are left, in a row of the stream.
    kept: Vec<usize>,
    /// The values of the added columns.
    missing: Vec<String>,
}

impl View {
    /// Of a table that becomes another. A column is the same when its number is.
    pub fn new(before: &Table, adoption: &Adoption) -> View {
        let after = &adoption.table;
        let mut table = Table { schema: after.schema.clone(), name: after.name.clone(), ..before.clone() };
        let mut kept = Vec::new();
        table.columns.clear();
        for (at, column) in before.columns.iter().enumerate() {
            if let Some(now) = after.columns.iter().find(|now| now.number == column.number) {
                kept.push(at);
                table.columns.push(crate::source::catalog::Column { name: now.name.clone(), ..column.clone() });
            }
        }
        let place = |key: &usize| kept.iter().position(|at| at == key);
        table.key = before.key.iter().map(place).collect::<Option<Vec<usize>>>().unwrap_or_default();
        let mut table_for_inserts = table.clone();
        let mut missing = Vec::new();
        for (number, value) in &adoption.missing {
            if let Some(column) = after.columns.iter().find(|column| column.number == *number) {
                table_for_inserts.columns.push(column.clone());
                missing.push(value.clone());
            }
        }
        View { table, table_for_inserts, kept, missing }
    }

    /// A new row: the columns that are left, and what was missing.
    pub fn project_insert(&self, row: Tuple<'_>) -> Projected {
        let left = self.project(row);
        let mut columns = BytesMut::from(&left.columns[..]);
        for value in &self.missing {
            put_datum(&mut columns, Datum::Text(value.as_bytes()));
        }
        Projected { count: left.count + self.missing.len() as u16, columns: columns.freeze() }
    }

    /// The columns of a row that are left.
    pub fn project(&self, row: Tuple<'_>) -> Projected {
        let mut columns = BytesMut::with_capacity(row.encoded().len());
        let values: Vec<_> = row.columns().collect();
        for datum in self.kept.iter().filter_map(|&at| values.get(at)) {
            put_datum(&mut columns, *datum);
        }
        Projected { count: self.kept.len() as u16, columns: columns.freeze() }
    }
}

/// A row of which some columns were taken out.
#[derive(Clone, Debug)]
pub struct Projected {
    count: u16,
    columns: Bytes,
}

impl Projected {
    /// To read it.
    pub fn tuple(&self) -> Tuple<'_> {
        Tuple::of_encoded(self.count, &self.columns)
    }

    /// The same as what identifies a row.
    pub fn old<'a>(&'a self, like: OldTuple<'_>) -> OldTuple<'a> {
        match like {
            OldTuple::Key(_) => OldTuple::Key(self.tuple()),
            OldTuple::Full(_) => OldTuple::Full(self.tuple()),
        }
    }
}
