//! The messages, and the fields of each in the order of the wire. The tag has been read already.

use std::iter::FusedIterator;

use super::error::Mismatch;
use super::reader::Reader;
use super::relation::Relation;
use super::tuple::{OldTuple, Tuple};
use crate::lsn::Lsn;

/// One message of the stream. Names and values point into the bytes that were decoded.
///
/// A transaction is `Begin`, perhaps `Origin`, its changes, `Commit`. `Relation` comes before the first change of a
/// table in a stream and again after its definition changed, `Type` before the `Relation` that uses it. Only a
/// `Logical` message that is not transactional stands outside of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction begins; it has committed already.
    Begin {
        /// Where its commit record begins; the same in its `Commit`.
        commit_lsn: Lsn,
        /// In microseconds since 2000-01-01 00:00 UTC, by the clock of the server where it was made: for a
        /// transaction with an `Origin` that is not the source.
        commit_time: i64,
        /// The transaction's identifier, without the epoch (H6).
        xid: u32,
    },
    /// The transaction's end.
    Commit {
        /// Where its commit record begins.
        commit_lsn: Lsn,
        /// Just past its commit record: what is confirmed when the transaction is durable.
        end_lsn: Lsn,
        /// As in its `Begin`.
        commit_time: i64,
    },
    /// The transaction was replicated to the source from elsewhere.
    Origin {
        /// Where it was committed, in the origin's own log.
        commit_lsn: Lsn,
        /// The replication origin's name on the source.
        name: &'a str,
    },
    /// The description of a table.
    Relation(Relation<'a>),
    /// The name of a type that is not built in.
    Type {
        /// The type's OID on the source.
        oid: u32,
        /// The schema's name; `pg_catalog` where the wire has the empty string.
        schema: &'a str,
        /// The type's name.
        name: &'a str,
    },
    /// A new row.
    Insert {
        /// The table's OID on the source.
        relid: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// A changed row.
    Update {
        /// The table's OID on the source.
        relid: u32,
        /// What identifies the old row; `None` when the key columns of `new` do.
        old: Option<OldTuple<'a>>,
        /// The row as it is now.
        new: Tuple<'a>,
    },
    /// A row that is gone.
    Delete {
        /// The table's OID on the source.
        relid: u32,
        /// What identifies the row.
        old: OldTuple<'a>,
    },
    /// One or more tables were emptied at once.
    Truncate {
        /// The tables' OIDs on the source; those that CASCADE reached are among them, if they are published.
        relids: RelationIds<'a>,
        /// It said CASCADE.
        cascade: bool,
        /// It said RESTART IDENTITY.
        restart_identity: bool,
    },
    /// What somebody gave to `pg_logical_emit_message`.
    Logical {
        /// Whether it is part of the transaction around it, or was sent at once.
        transactional: bool,
        /// Just past the message's own record: what `pg_logical_emit_message` returned.
        lsn: Lsn,
        /// Says whose message it is.
        prefix: &'a str,
        /// Any bytes.
        content: &'a [u8],
    },
}

/// The OIDs of the tables of a `Truncate`, in the order of the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelationIds<'a> {
    /// A multiple of four bytes.
    bytes: &'a [u8],
}

impl Iterator for RelationIds<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let (relid, rest) = self.bytes.split_first_chunk()?;
        self.bytes = rest;
        Some(u32::from_be_bytes(*relid))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = self.bytes.len() / size_of::<u32>();
        (count, Some(count))
    }
}

impl ExactSizeIterator for RelationIds<'_> {}
impl FusedIterator for RelationIds<'_> {}

const RELID: &str = "a relation's OID";
const COMMIT_LSN: &str = "the commit LSN";
const COMMIT_TIME: &str = "the commit time";

pub(super) fn begin<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    Ok(Message::Begin {
        commit_lsn: reader.lsn(COMMIT_LSN)?,
        commit_time: reader.i64(COMMIT_TIME)?,
        xid: reader.u32("the transaction's xid")?,
    })
}

pub(super) fn commit<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    reader.flags(0, "no flags (0)")?;
    Ok(Message::Commit {
        commit_lsn: reader.lsn(COMMIT_LSN)?,
        end_lsn: reader.lsn("the end LSN")?,
        commit_time: reader.i64(COMMIT_TIME)?,
    })
}

pub(super) fn origin<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    Ok(Message::Origin {
        commit_lsn: reader.lsn("the commit LSN on the origin")?,
        name: reader.string("the origin's name in UTF-8")?,
    })
}

pub(super) fn relation<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    Relation::read(reader).map(Message::Relation)
}

pub(super) fn data_type<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    Ok(Message::Type {
        oid: reader.u32("a type's OID")?,
        schema: reader.schema()?,
        name: reader.string("a type's name in UTF-8")?,
    })
}

pub(super) fn insert<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    let relid = reader.u32(RELID)?;
    let expected = "the mark of a new tuple (N)";
    let kind = reader.byte(expected)?;
    if kind != b'N' {
        return Err(reader.unexpected_byte(kind, expected));
    }
    Ok(Message::Insert { relid, new: Tuple::read(reader)? })
}

pub(super) fn update<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    let relid = reader.u32(RELID)?;
    let mut expected = "the mark of a key, an old or a new tuple (K, O or N)";
    let mut kind = reader.byte(expected)?;
    let old = OldTuple::read(kind, reader)?;
    if old.is_some() {
        expected = "the mark of a new tuple (N)";
        kind = reader.byte(expected)?;
    }
    if kind != b'N' {
        return Err(reader.unexpected_byte(kind, expected));
    }
    Ok(Message::Update { relid, old, new: Tuple::read(reader)? })
}

pub(super) fn delete<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    let relid = reader.u32(RELID)?;
    let expected = "the mark of a key or an old tuple (K or O)";
    let kind = reader.byte(expected)?;
    match OldTuple::read(kind, reader)? {
        Some(old) => Ok(Message::Delete { relid, old }),
        None => Err(reader.unexpected_byte(kind, expected)),
    }
}

pub(super) fn truncate<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    let count = reader.i32("a number of relations")?;
    let options = reader.flags(0b11, "options of TRUNCATE (0 to 3)")?;
    let bytes = reader.u32s(count, "the OIDs of as many relations as announced")?;
    Ok(Message::Truncate {
        relids: RelationIds { bytes },
        cascade: options & 0b01 != 0,
        restart_identity: options & 0b10 != 0,
    })
}

pub(super) fn logical<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, Mismatch> {
    Ok(Message::Logical {
        transactional: reader.flags(1, "a logical message's flags (0 or 1)")? == 1,
        lsn: reader.lsn("the message's LSN")?,
        prefix: reader.string("the message's prefix in UTF-8")?,
        content: reader.counted("the length of the content")?,
    })
}
