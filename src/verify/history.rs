//! What the stream brings while a common point is looked for, read from the queue beside the apply.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::prefix::Streamed;
use crate::apply::assemble::MARKER_PREFIX;
use crate::decode::{Message, decode};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::queue::{Entry, Queue, Reader};
use crate::source::marker;
use crate::source::snapshot::SnapshotData;

/// How long the queue is waited for before it is looked at whether anybody still wants to know.
const READ_WAIT: Duration = Duration::from_millis(100);

/// A marker that is applied.
pub(super) struct CaughtUp {
    /// Stands behind it.
    pub(super) stream: Stream,
    /// Where its transaction ends.
    pub(super) end: Lsn,
}

/// The transactions of the stream from a position on that the apply has reached: so those that it has not applied are all among them.
pub(super) struct History {
    /// Nothing that ends here or before is in it, and everything after it is.
    pub(super) start: Lsn,
    pub(super) stream: Stream,
    pub(super) begun: Instant,
    /// Assigned after all that is not in the history had committed: whatever committed before it has a smaller one.
    first_xid: u64,
}

/// What is read of the queue. Shared with the thread that reads: a try that takes too long leaves it at work.
pub(super) struct Stream(Arc<Mutex<Reading>>);

struct Reading {
    reader: Reader,
    /// What was read.
    streamed: Vec<Streamed>,
}

impl History {
    pub(super) async fn begin(source: &Client, CaughtUp { stream, end }: CaughtUp) -> Result<History> {
        let doing = || "asking the source for a transaction's id".to_owned();
        // Its transaction ends with the statement, so that every later snapshot has a larger xmax.
        let row = source.query_typed_one("SELECT pg_catalog.txid_current()::text", &[]).await.context(doing)?;
        let assigned: &str = row.get(0);
        let first_xid = assigned
            .parse()
            .map_err(|_| Error::new(ErrorKind::Other, format!("{assigned} is not a transaction's id")))?;
        lock(&stream.0).streamed.clear();
        Ok(History { start: end, stream, begun: Instant::now(), first_xid })
    }

    pub(super) fn streamed(&self) -> Vec<Streamed> {
        lock(&self.stream.0).streamed.clone()
    }

    /// The transactions that run in a snapshot and may have committed before this history.
    pub(super) fn in_question(&self, snapshot: &SnapshotData) -> Vec<u64> {
        let streamed = self.streamed();
        let is_known = |xid: u64| streamed.iter().any(|streamed| streamed.xid == xid as u32);
        snapshot.running.range(..self.first_xid).copied().filter(|&xid| !is_known(xid)).collect()
    }
}

impl Stream {
    /// What comes from now on.
    pub(super) fn open(queue: &Queue) -> Result<Stream> {
        let reader = queue.reader(queue.written_end())?;
        Ok(Stream(Arc::new(Mutex::new(Reading { reader, streamed: Vec::new() }))))
    }

    /// Reads up to a marker of ours; answers where its transaction ends.
    pub(super) async fn read_up_to(&self, content: &str) -> Result<Lsn> {
        loop {
            let (reading, content) = (Arc::clone(&self.0), content.to_owned());
            let read = tokio::task::spawn_blocking(move || lock(&reading).read_up_to(&content)).await;
            let found =
                read.map_err(|error| Error::new(ErrorKind::Other, format!("reading the queue failed: {error}")))?;
            if let Some(end) = found? {
                return Ok(end);
            }
        }
    }
}

impl Reading {
    /// Reads what comes soon; the end of the transaction with the marker, when it came.
    fn read_up_to(&mut self, marker: &str) -> Result<Option<Lsn>> {
        let mut head = None;
        let mut has_marker = false;
        while let Some(entry) = self.reader.next(READ_WAIT)? {
            match entry {
                Entry::Begin(begun) => head = Some(begun),
                Entry::Data(bytes) if bytes.first() == Some(&b'M') => {
                    if let Message::Logical { prefix, content, .. } = decode(&bytes)? {
                        has_marker |= prefix == MARKER_PREFIX && content == marker.as_bytes();
                    }
                }
                Entry::Commit { end_lsn } => {
                    if let Some(head) = head.take() {
                        self.streamed.push(Streamed { xid: head.xid, commit_lsn: head.commit_lsn, end_lsn });
                    }
                    if has_marker {
                        return Ok(Some(end_lsn));
                    }
                }
                Entry::Data(_) | Entry::Position(_) => {}
            }
        }
        Ok(None)
    }
}

fn lock(reading: &Mutex<Reading>) -> MutexGuard<'_, Reading> {
    // What a reader that panicked left behind is whole transactions.
    reading.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends a marker through the stream; answers what it says.
pub(super) async fn marker(source: &Client) -> Result<String> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let content = format!("verify {}-{}", std::process::id(), now.as_nanos());
    Ok(marker::send(source, &content).await?.content)
}
