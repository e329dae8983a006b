//! A table's description, which the server sends before the first change of it, and again when it changed.

use std::iter::FusedIterator;

use super::error::Mismatch;
use super::reader::Reader;

/// A table and its published columns, as they were when the changes that follow were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// The table's OID on the source; the changes name it by this.
    pub relid: u32,
    /// The schema's name; `pg_catalog` where the wire has the empty string.
    pub schema: &'a str,
    /// The table's name.
    pub name: &'a str,
    /// What identifies a row in updates and deletes.
    pub identity: ReplicaIdentity,
    column_count: u16,
    /// Exactly `column_count` columns that have been read once without error.
    columns: &'a [u8],
}

impl<'a> Relation<'a> {
    /// The columns in the order of the tuples' columns. Generated columns are not among them, but where
    /// a publication of PostgreSQL 18 or newer says so.
    pub fn columns(&self) -> RelationColumns<'a> {
        RelationColumns { left: self.column_count, reader: Reader::new(self.columns) }
    }

    pub(super) fn read(reader: &mut Reader<'a>) -> Result<Relation<'a>, Mismatch> {
        let relid = reader.u32("a relation's OID")?;
        let schema = reader.schema()?;
        let name = reader.string("a relation's name in UTF-8")?;
        let identity = ReplicaIdentity::read(reader)?;
        let column_count = reader.column_count()?;
        let start = *reader;
        for _ in 0..column_count {
            RelationColumn::read(reader)?;
        }
        Ok(Relation { relid, schema, name, identity, column_count, columns: reader.since(&start) })
    }
}

/// What identifies a row in updates and deletes (`pg_class.relreplident`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// `d`: the primary key, if there is one.
    Default,
    /// `n`: nothing.
    Nothing,
    /// `f`: all columns.
    Full,
    /// `i`: a chosen unique index.
    Index,
}

impl ReplicaIdentity {
    fn read(reader: &mut Reader<'_>) -> Result<ReplicaIdentity, Mismatch> {
        let expected = "a replica identity (d, n, f or i)";
        match reader.byte(expected)? {
            b'd' => Ok(ReplicaIdentity::Default),
            b'n' => Ok(ReplicaIdentity::Nothing),
            b'f' => Ok(ReplicaIdentity::Full),
            b'i' => Ok(ReplicaIdentity::Index),
            unknown => Err(reader.unexpected_byte(unknown, expected)),
        }
    }
}

/// One column of a [`Relation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationColumn<'a> {
    /// Whether it is part of the replica identity; under `REPLICA IDENTITY FULL` every column is.
    pub is_key: bool,
    /// The column's name.
    pub name: &'a str,
    /// The type's OID on the source.
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`: what stands in the type's parentheses, in the type's own encoding; -1 for nothing.
    pub type_modifier: i32,
}

impl<'a> RelationColumn<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<RelationColumn<'a>, Mismatch> {
        Ok(RelationColumn {
            is_key: reader.flags(1, "a column's flags (0 or 1)")? == 1,
            name: reader.string("a column's name in UTF-8")?,
            type_oid: reader.u32("a column's type OID")?,
            type_modifier: reader.i32("a column's type modifier")?,
        })
    }
}

/// The columns of a [`Relation`], in order.
#[derive(Clone, Debug)]
pub struct RelationColumns<'a> {
    left: u16,
    reader: Reader<'a>,
}

impl<'a> Iterator for RelationColumns<'a> {
    type Item = RelationColumn<'a>;

    fn next(&mut self) -> Option<RelationColumn<'a>> {
        self.left = self.left.checked_sub(1)?;
        // Never an error: the same bytes were read when the relation was made.
        RelationColumn::read(&mut self.reader).ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for RelationColumns<'_> {}
impl FusedIterator for RelationColumns<'_> {}
