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

/// How many entries are read ahead of the target.
const READ_AHEAD: usize = 256;

/// Applies one transaction, and commits it with every session's row in the ledger.
pub struct Replay<'a> {
    /// The tables.
    pub layout: &'a Layout,
    /// The session.
    pub writer: &'a mut Writer,
    /// How far each session had come: what one has committed already is left out (after a crash between the commits).
    pub progress: Vec<Lsn>,
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
        let mut entries = read_ahead(reader)?;
        while let Some(entry) = entries.recv().await {
            let end = match entry? {
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

    async fn transaction(
        &mut self,
        head: TransactionHead,
        entries: &mut mpsc::Receiver<Result<Entry>>,
    ) -> Result<UnitEnd> {
        let naming = || format!("applying transaction {} that commits at {}", head.xid, head.commit_lsn);
        let outcome = self.changes(head, entries).await;
        if outcome.is_err() {
            self.writer.roll_back().await.context(naming)?;
        }
        let end = outcome.context(naming)?;
        // Those that had committed this one before a crash stand there already.
        let sessions: Vec<(i32, Lsn)> =
            (0..).zip(self.progress.iter().copied()).filter(|(_, applied)| *applied < end.end_lsn).collect();
        self.writer.commit(&sessions, end.end_lsn).await.context(naming)?;
        for position in &mut self.progress {
            *position = end.end_lsn.max(*position);
        }
        Ok(end)
    }

    async fn changes(&mut self, head: TransactionHead, entries: &mut mpsc::Receiver<Result<Entry>>) -> Result<UnitEnd> {
        self.writer.begin().await?;
        let mut end = UnitEnd { transactions: 1, commit_time: head.commit_time, ..UnitEnd::default() };
        loop {
            match entries.recv().await.ok_or_else(broken_queue)?? {
                Entry::Data(bytes) => self.change(&head, decode(&bytes)?, &mut end).await?,
                Entry::Commit { end_lsn } => {
                    end.end_lsn = end_lsn;
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

/// Reads the queue in a thread of its own.
fn read_ahead(mut reader: Reader) -> Result<mpsc::Receiver<Result<Entry>>> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    std::thread::Builder::new().name("replay".into()).spawn(move || {
        while !sender.is_closed() {
            let entry = match reader.next(Duration::from_millis(50)) {
                Ok(None) => continue,
                Ok(Some(entry)) => Ok(entry),
                Err(error) => Err(error),
            };
            let failed = entry.is_err();
            if sender.blocking_send(entry).is_err() || failed {
                break;
            }
        }
    })?;
    Ok(receiver)
}
