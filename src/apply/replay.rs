//! The serial way: source transactions one by one, change by change, each a transaction of its own on the target.
//!
//! It is the judge (I5): what it can apply is right, whatever the set-based way said; what it cannot apply stops the
//! migration with the transaction, the table and the key.

use std::time::Duration;

use tokio::sync::mpsc;

use super::assemble::{MARKER_PREFIX, UnitEnd};
use super::layout::Layout;
use super::net::hash_key;
use crate::decode::{Datum, Message, OldTuple, Tuple, decode};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::board::StatusBoard;
use crate::observe::status::ConflictKind;
use crate::queue::{Entry, Reader, TransactionHead};
use crate::target::serial;
use crate::target::writer::Writer;

/// How many bytes are read ahead of the target at once; an entry can be larger.
const READ_AHEAD_BYTES: usize = 1 << 20;

/// Applies one transaction, and commits it with every session's row in the ledger.
pub struct Replay<'a> {
    /// The tables.
    pub layout: &'a Layout,
    /// The session.
    pub writer: &'a mut Writer,
    /// How far each session had come: what one has committed already is left out (after a crash between the commits).
    pub progress: &'a mut [Lsn],
    /// Where a divergence is counted.
    pub board: &'a StatusBoard,
}

/// What happened to a row.
enum Change<'a> {
    Insert(Tuple<'a>),
    Update(Option<OldTuple<'a>>, Tuple<'a>),
    Delete(OldTuple<'a>),
}

impl Replay<'_> {
    /// Applies the transactions of a reader up to the one that ends at `through`, or only the first of them. Calls
    /// `applied` after each commit.
    ///
    /// # Errors
    /// `Divergence`, or what the server says, naming the transaction. Earlier transactions stay committed.
    pub async fn run(&mut self, reader: Reader, through: Option<Lsn>, mut applied: impl FnMut(UnitEnd)) -> Result<()> {
        let mut entries = Entries::read_ahead(reader)?;
        while let Some(entry) = entries.next().await? {
            let end = match entry {
                Entry::Begin(head) => self.transaction(head, &mut entries).await?,
                Entry::Position(lsn) => UnitEnd { end_lsn: lsn, ..UnitEnd::default() },
                Entry::Data(_) | Entry::Commit { .. } => return Err(broken_queue()),
            };
            let whole_transaction = end.transactions > 0;
            let end_lsn = end.end_lsn;
            if whole_transaction {
                applied(end);
            }
            if through.map_or(whole_transaction, |through| end_lsn >= through) {
                return Ok(());
            }
        }
        Err(broken_queue())
    }

    async fn transaction(&mut self, head: TransactionHead, entries: &mut Entries) -> Result<UnitEnd> {
        let naming = || format!("applying transaction {} that commits at {}", head.xid, head.commit_lsn);
        let outcome = self.changes(head, entries).await;
        if outcome.is_err() {
            // What the server said of the change says more than that it could not be taken back.
            if let Err(error) = self.writer.roll_back().await {
                tracing::debug!(%error, "rolling back after a failed replay");
            }
        }
        let end = outcome.context(naming)?;
        self.writer.commit().await.context(naming)?;
        for position in self.progress.iter_mut() {
            *position = end.end_lsn.max(*position);
        }
        Ok(end)
    }

    /// All that is done before the commit, the ledger's rows included.
    async fn changes(&mut self, head: TransactionHead, entries: &mut Entries) -> Result<UnitEnd> {
        self.writer.begin().await?;
        let mut end = UnitEnd { transactions: 1, commit_time: head.commit_time, ..UnitEnd::default() };
        loop {
            match entries.next().await?.ok_or_else(broken_queue)? {
                Entry::Data(bytes) => self.change(&head, decode(&bytes)?, &mut end).await?,
                Entry::Commit { end_lsn } => {
                    end.end_lsn = end_lsn;
                    let behind = |position: &Lsn| *position < end_lsn;
                    let sessions: Vec<(i32, Lsn)> =
                        (0..).zip(self.progress.iter().copied()).filter(|(_, position)| behind(position)).collect();
                    self.writer.advance(&sessions, end_lsn).await?;
                    return Ok(end);
                }
                Entry::Begin(_) | Entry::Position(_) => return Err(broken_queue()),
            }
        }
    }

    async fn change(&mut self, head: &TransactionHead, message: Message<'_>, end: &mut UnitEnd) -> Result<()> {
        let layout = self.layout;
        match message {
            Message::Relation(relation) => return layout.check_relation(&relation),
            Message::Logical { prefix, content, .. } if prefix == MARKER_PREFIX => {
                end.markers.push(String::from_utf8_lossy(content).into_owned());
            }
            Message::Truncate { relids, restart_identity, .. } => {
                let mut places = Vec::new();
                for relid in relids {
                    let place = layout.place(relid)?;
                    if !layout.copy_has_seen(place, head.xid, head.commit_lsn) {
                        places.push(place);
                    }
                }
                if !places.is_empty() {
                    end.changes += 1;
                    serial::truncate(self.writer, layout, &places, restart_identity).await?;
                }
            }
            Message::Insert { relid, new } => self.row(head, relid, Change::Insert(new), end).await?,
            Message::Update { relid, old, new } => self.row(head, relid, Change::Update(old, new), end).await?,
            Message::Delete { relid, old } => self.row(head, relid, Change::Delete(old), end).await?,
            _ => {}
        }
        Ok(())
    }

    /// One change of a row.
    async fn row(&mut self, head: &TransactionHead, relid: u32, change: Change<'_>, end: &mut UnitEnd) -> Result<()> {
        let layout = self.layout;
        let place = layout.place(relid)?;
        if layout.copy_has_seen(place, head.xid, head.commit_lsn) {
            return Ok(());
        }
        end.changes += 1;
        let table = &layout.tables[place].table;
        match &change {
            Change::Insert(new) => layout.check_row(place, *new)?,
            Change::Update(old, new) => {
                layout.check_row(place, *new)?;
                old.map_or(Ok(()), |old| layout.check_row(place, old.tuple()))?;
            }
            Change::Delete(old) => layout.check_row(place, old.tuple())?,
        }
        let (outcome, conflict) = match change {
            Change::Insert(new) if self.is_covered(place, new, None, head) => return Ok(()),
            Change::Insert(new) => (serial::insert(self.writer, table, new).await, ConflictKind::InsertFoundRow),
            Change::Delete(old) if self.is_covered(place, old.tuple(), None, head) => return Ok(()),
            Change::Delete(old) => (serial::delete(self.writer, table, old).await, ConflictKind::DeleteFoundNone),
            Change::Update(old, new) => {
                let before = old.map(|old| old.tuple());
                let old_is_done = self.is_covered(place, before.unwrap_or(new), None, head);
                let new_is_done = self.is_covered(place, new, before, head);
                let outcome = match (old_is_done, new_is_done, old) {
                    (true, true, _) => return Ok(()),
                    (false, false, _) => serial::update(self.writer, table, old, new).await,
                    // A changed key, of which one session had committed its half before a crash.
                    (false, true, Some(old)) => serial::delete(self.writer, table, old).await,
                    _ if new.columns().all(|datum| datum != Datum::Unchanged) => {
                        serial::insert(self.writer, table, new).await
                    }
                    _ => Err(Error::new(
                        ErrorKind::Divergence,
                        format!(
                            "a row of {} whose key changed lost an unchanged TOASTed value in a crash",
                            table.qualified()
                        ),
                    )),
                };
                (outcome, ConflictKind::UpdateFoundNone)
            }
        };
        if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Divergence) {
            self.board.conflicts(conflict, 1);
        }
        outcome
    }

    /// Whether the session that this row is routed to has committed the transaction already.
    fn is_covered(&self, place: usize, row: Tuple<'_>, before: Option<Tuple<'_>>, head: &TransactionHead) -> bool {
        let entry = &self.layout.tables[place];
        let hash = hash_key(entry.table.relid, &entry.table.key, row, before);
        let worker = entry.routing.worker(entry.table.relid, hash, self.layout.workers);
        self.progress.get(worker).is_some_and(|applied| *applied > head.commit_lsn)
    }
}

fn broken_queue() -> Error {
    Error::new(ErrorKind::Queue, "the queue ended in the middle of a transaction that it had as a whole")
}

/// The queue's entries, read in a thread of its own.
struct Entries {
    batches: mpsc::Receiver<Result<Vec<Entry>>>,
    batch: std::vec::IntoIter<Entry>,
}

impl Entries {
    /// Begins to read.
    fn read_ahead(mut reader: Reader) -> Result<Entries> {
        let (sender, batches) = mpsc::channel(1);
        std::thread::Builder::new().name("replay".into()).spawn(move || {
            while !sender.is_closed() {
                let batch = read_batch(&mut reader);
                let failed = batch.is_err();
                let nothing_came = batch.as_ref().is_ok_and(Vec::is_empty);
                if !nothing_came && sender.blocking_send(batch).is_err() || failed {
                    break;
                }
            }
        })?;
        Ok(Entries { batches, batch: Vec::new().into_iter() })
    }

    async fn next(&mut self) -> Result<Option<Entry>> {
        loop {
            if let Some(entry) = self.batch.next() {
                return Ok(Some(entry));
            }
            match self.batches.recv().await {
                Some(batch) => self.batch = batch?.into_iter(),
                None => return Ok(None),
            }
        }
    }
}

/// What there is, up to so many bytes.
fn read_batch(reader: &mut Reader) -> Result<Vec<Entry>> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < READ_AHEAD_BYTES {
        let wait = if batch.is_empty() { Duration::from_millis(50) } else { Duration::ZERO };
        let entry = match reader.next(wait) {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            // What is there before it is good; the error comes again.
            Err(_) if !batch.is_empty() => break,
            Err(error) => return Err(error),
        };
        if let Entry::Data(data) = &entry {
            bytes += data.len();
        }
        bytes += size_of::<Entry>();
        batch.push(entry);
    }
    Ok(batch)
}
