//! pgoutput bytes → typed messages, borrowed from the buffer.
//!
//! ```text
//!  one XLogData payload          decode()               Message<'_>
//! ┌─────────────────────┐  ┌────────────────────┐  ┌───────────────────────────────┐
//! │ tag │ fields │ tuple├─►│ reader → tuple,    ├─►│ Insert { relid, new: Tuple }  │
//! └─────────────────────┘  │ relation, message  │  │ names and values point into   │
//!                          └─────────┬──────────┘  │ the payload; nothing copied   │
//!                                    ▼             └───────────────────────────────┘
//!                               DecodeError
//! ```
//!
//! [`decode`] looks at every byte once. It allocates nothing, does no I/O and panics on no input: what it returns is
//! valid as a whole, so [`Tuple::columns`], [`Relation::columns`] and [`RelationIds`] cannot fail afterwards. What
//! it does not look at is the inside of values: whether a text is a number is the target's business.
//!
//! # The format
//!
//! pgoutput's protocol **version 1**: a transaction comes whole, after its commit. The messages of later versions
//! (streamed and prepared transactions, and the xid they put into the others) are refused as unknown. The layouts
//! are those of the manual's "Logical Replication Message Formats"; the writer of each is the named function in
//! PostgreSQL's `src/backend/replication/logical/proto.c`. Integers are big-endian. A *string* ends with a zero byte
//! and is UTF-8, because every session of walferry has `client_encoding` UTF8.
//!
//! | tag | message | fields in order | written by |
//! |---|---|---|---|
//! | `B` | Begin | i64 commit LSN, i64 commit time, i32 xid | `logicalrep_write_begin` |
//! | `C` | Commit | i8 flags (0), i64 commit LSN, i64 end LSN, i64 commit time | `logicalrep_write_commit` |
//! | `O` | Origin | i64 commit LSN on the origin, string name | `logicalrep_write_origin` |
//! | `R` | Relation | i32 relid, string schema, string name, i8 replica identity, i16 n, n × (i8 flags: 1 = in the key, string name, i32 type OID, i32 type modifier) | `logicalrep_write_rel`, `logicalrep_write_attrs` |
//! | `Y` | Type | i32 OID, string schema, string name | `logicalrep_write_typ` |
//! | `I` | Insert | i32 relid, `N` tuple | `logicalrep_write_insert` |
//! | `U` | Update | i32 relid, (`K` tuple or `O` tuple, where needed), `N` tuple | `logicalrep_write_update` |
//! | `D` | Delete | i32 relid, `K` tuple or `O` tuple | `logicalrep_write_delete` |
//! | `T` | Truncate | i32 n, i8 options: 1 = CASCADE, 2 = RESTART IDENTITY, n × i32 relid | `logicalrep_write_truncate` |
//! | `M` | Logical message | i8 flags: 1 = transactional, i64 LSN, string prefix, i32 n, n bytes | `logicalrep_write_message` |
//! | | *tuple* | i16 n, n × (`n` null, `u` unchanged TOAST, or `t` text / `b` binary with i32 m, m bytes) | `logicalrep_write_tuple` |
//!
//! An empty schema stands for `pg_catalog` (`logicalrep_write_namespace`). Flags outside of the table are refused:
//! their meaning would be lost.

mod error;
mod message;
mod reader;
mod relation;
mod tuple;

#[cfg(test)]
mod tests;

pub use error::DecodeError;
pub use message::{Message, RelationIds};
pub use relation::{Relation, RelationColumn, RelationColumns, ReplicaIdentity};
pub use tuple::{Datum, KeptTuple, OldTuple, Tuple, TupleColumns};

use error::{Found, Mismatch};
use reader::Reader;

/// Calls `each` with the OID of every table whose rows a message changes, without decoding the rows; not at all for a message
/// that changes none, or is no message.
pub fn for_each_changed_relation(bytes: &[u8], mut each: impl FnMut(u32)) {
    match bytes {
        [b'I' | b'U' | b'D', a, b, c, d, ..] => each(u32::from_be_bytes([*a, *b, *c, *d])),
        [b'T', ..] => {
            if let Ok(Message::Truncate { relids, .. }) = decode(bytes) {
                relids.for_each(each);
            }
        }
        _ => {}
    }
}

/// Decodes one message: the whole payload of one XLogData, or one row of `pg_logical_slot_get_binary_changes`.
///
/// # Errors
///
/// A [`DecodeError`] when the bytes are not exactly one message of protocol version 1: an unknown tag, kind or flag, a
/// message that ends early, a negative length or one past the end, a name that is not UTF-8, or bytes left over.
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, DecodeError> {
    let mut reader = Reader::new(bytes);
    let tag = reader.byte("a message tag").map_err(|mismatch| mismatch.of("pgoutput"))?;
    let (name, decoded) = match tag {
        b'I' => ("Insert", message::insert(&mut reader)),
        b'U' => ("Update", message::update(&mut reader)),
        b'D' => ("Delete", message::delete(&mut reader)),
        b'B' => ("Begin", message::begin(&mut reader)),
        b'C' => ("Commit", message::commit(&mut reader)),
        b'O' => ("Origin", message::origin(&mut reader)),
        b'R' => ("Relation", message::relation(&mut reader)),
        b'Y' => ("Type", message::data_type(&mut reader)),
        b'T' => ("Truncate", message::truncate(&mut reader)),
        b'M' => ("Logical", message::logical(&mut reader)),
        unknown => {
            let expected = "the tag of a protocol version 1 message";
            return Err(Mismatch { expected, offset: 0, found: Found::Byte(unknown) }.of("pgoutput"));
        }
    };
    let whole = decoded.and_then(|message| reader.end().map(|()| message));
    whole.map_err(|mismatch| mismatch.of(name))
}
