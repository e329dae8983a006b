//! Markers: commits of our own in the stream. What was committed before a marker has come when the marker has come.
//!
//! A marker is a transaction that holds nothing but a logical message, so it changes no row and needs no table. Before PostgreSQL
//! 14 pgoutput leaves the message out, but not its transaction: it sends the `Begin` and the `Commit` of every transaction that wrote
//! anything to the WAL, empty or not (only 15 leaves empty ones out). So there the marker is known by its transaction's id, and
//! `of_empty_transaction` puts into an empty transaction, on its way into the queue, what a newer server would have sent.

use tokio_postgres::Client;
use tokio_postgres::types::{PgLsn, ToSql, Type};

use super::version::Version;
use crate::error::{Context, Result};
use crate::lsn::Lsn;

/// The prefix of our own logical messages.
pub const PREFIX: &str = "walferry";

/// A marker that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Where the message is in the WAL; its commit is behind it.
    pub lsn: Lsn,
    /// What comes over the stream.
    pub content: String,
}

/// Sends a marker; `content` is a text that no other has.
///
/// # Errors
/// Whatever the server says.
pub async fn send(source: &Client, content: &str) -> Result<Sent> {
    let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&PREFIX, Type::TEXT), (&content, Type::TEXT)];
    let row = source
        .query_typed_one(
            "SELECT pg_catalog.pg_logical_emit_message(true, $1, $2), pg_catalog.txid_current(), \
                    pg_catalog.current_setting('server_version_num')::int4 / 10000",
            &parameters,
        )
        .await
        .context(|| "sending a marker into the stream".into())?;
    let (lsn, xid): (PgLsn, i64) = (row.get(0), row.get(1));
    let version = Version(u32::try_from(row.get::<_, i32>(2)).unwrap_or_default());
    // The stream has the lower 32 bits.
    let content = if version.streams_messages() { content.to_owned() } else { of_xid(xid as u32) };
    Ok(Sent { lsn: lsn.into(), content })
}

fn of_xid(xid: u32) -> String {
    format!("xid {xid}")
}

/// Whether a marker may be nobody's: any empty transaction of an older server.
pub fn is_of_empty_transaction(content: &str) -> bool {
    content.starts_with("xid ")
}

/// The message of pgoutput that stands for a marker in an empty transaction of a server that sends none ("Logical Replication
/// Message Formats", Message).
pub(super) fn of_empty_transaction(xid: u32, commit_lsn: Lsn) -> Vec<u8> {
    const TRANSACTIONAL: u8 = 1;
    let content = of_xid(xid);
    let mut message = vec![b'M', TRANSACTIONAL];
    message.extend_from_slice(&commit_lsn.0.to_be_bytes());
    message.extend_from_slice(PREFIX.as_bytes());
    message.push(0);
    // "xid " and ten digits at most.
    message.extend_from_slice(&(content.len() as u32).to_be_bytes());
    message.extend_from_slice(content.as_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Message, decode};

    #[test]
    fn what_stands_for_a_marker_decodes_as_one() {
        let message = of_empty_transaction(u32::MAX, Lsn(7));
        match decode(&message).unwrap() {
            Message::Logical { prefix, content, .. } => {
                assert_eq!((prefix, content), (PREFIX, b"xid 4294967295".as_slice()));
            }
            other => panic!("{other:?}"),
        }
    }
}
