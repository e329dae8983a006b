//! The serial way: source transactions one by one, change by change, each a transaction of its own on the target.
//!
//! It is the judge (I5): what it can apply is right, whatever the set-based way said; what it cannot apply stops the
//! migration with the transaction, the table and the key.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Marker;
use super::assemble::{MARKER_PREFIX, UnitEnd};
use super::change::{Adoption, Announced, Change};
use super::conflict::{self, OnConflict};
use super::layout::Layout;
use super::net::hash_key;
use crate::decode::{Datum, Message, OldTuple, Relation, Tuple, decode};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::board::StatusBoard;
use crate::observe::status::ConflictKind;
use crate::queue::{Entry, Reader, TransactionHead};
use crate::source::catalog::Table;
use crate::target::writer::Writer;
use crate::target::{adopt, serial};
use crate::timescale::live::{self, OwnWork};

/// How many bytes are read ahead of the target at once; an entry can be larger.
const READ_AHEAD_BYTES: usize = 1 << 20;

/// Applies one transaction, and commits it with every session's row in the ledger.
pub struct Replay<'a> {
    /// The tables; what is adopted on the way is in it afterwards.
    pub layout: Arc<Layout>,
    /// Changes of tables that the target has been found to fit.
    pub adoptions: &'a [Adoption],
    /// The change of a table that it stopped at.
    pub change: Option<Change>,
    /// The session.
    pub writer: &'a mut Writer,
    /// How far each session had come: what one has committed already is left out (after a crash between the commits).
    pub progress: &'a mut [Lsn],
    /// Who wins when a change does not meet what it should.
    pub on_conflict: OnConflict,
    /// The conflicts of the transaction at work, by schema, table and kind: counted when it is over, because one that is given up
    /// for another reason comes again.
    pub conflicts: BTreeMap<(String, String, ConflictKind), u64>,
    /// What TimescaleDB does by itself in the transaction at work.
    pub own_work: OwnWork,
    /// Statements of DDL of the transaction at work.
    pub ddl_replayed: u64,
    /// Where conflicts are counted.
    pub board: &'a StatusBoard,
}

/// What happened to a row.
#[derive(Clone, Copy)]
pub enum RowChange<'a> {
    /// It came.
    Insert(Tuple<'a>),
    /// It became another; what it was found by, if that is not in the new one.
    Update(Option<OldTuple<'a>>, Tuple<'a>),
    /// It went.
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
        let before = Arc::clone(&self.layout);
        for adoption in self.adoptions.iter().filter(|adoption| adoption.change.head == head) {
            Arc::make_mut(&mut self.layout).foresee(adoption);
        }
        self.conflicts.clear();
        self.ddl_replayed = 0;
        self.own_work = OwnWork::default();
        let mut at = None;
        let outcome = self.changes(head, entries, &mut at).await;
        if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Divergence) {
            self.count_conflicts();
        }
        if let Some(refused) = at.filter(|_| self.change.is_none())
            && outcome.as_ref().is_err_and(|error| !error.is_transient())
        {
            self.look_ahead(head, refused, entries).await;
        }
        if outcome.is_err() {
            self.layout = before;
            // What the server said of the change says more than that it could not be taken back.
            if let Err(error) = self.writer.roll_back().await {
                tracing::debug!(%error, "rolling back after a failed replay");
            }
        }
        let end = outcome.context(naming).map_err(what_the_target_refuses)?;
        self.writer.commit().await.context(naming).map_err(what_the_target_refuses)?;
        self.count_conflicts();
        self.board.ddl_replayed(self.ddl_replayed);
        for position in self.progress.iter_mut() {
            *position = end.end_lsn.max(*position);
        }
        Ok(end)
    }

    /// A target that has been mended already may refuse rows of the old shape: then what changed the table is further on in the same
    /// transaction. Changes of other tables have nothing to do with it: they come when this one is mended.
    async fn look_ahead(&mut self, head: TransactionHead, refused: u32, entries: &mut Entries) {
        while let Ok(Some(Entry::Data(bytes))) = entries.next().await {
            if let Ok(Message::Relation(relation)) = decode(&bytes)
                && relation.relid == refused
                && self.relation(&head, &relation).is_err()
            {
                return;
            }
        }
    }

    fn count_conflicts(&mut self) {
        for ((schema, table, kind), changes) in std::mem::take(&mut self.conflicts) {
            self.board.conflicts(&schema, &table, kind, changes);
        }
    }

    /// All that is done before the commit, the ledger's rows included. `at` is the table of the row that it has come to.
    async fn changes(&mut self, head: TransactionHead, entries: &mut Entries, at: &mut Option<u32>) -> Result<UnitEnd> {
        self.writer.begin().await?;
        let mut adopted: Vec<Adoption> = Vec::new();
        let mut end = UnitEnd { transactions: 1, commit_time: head.commit_time, ..UnitEnd::default() };
        loop {
            match entries.next().await?.ok_or_else(broken_queue)? {
                Entry::Data(bytes) => match decode(&bytes)? {
                    Message::Relation(relation) => adopted.extend(self.relation(&head, &relation)?),
                    message => {
                        *at = match &message {
                            Message::Insert { relid, .. }
                            | Message::Update { relid, .. }
                            | Message::Delete { relid, .. } => Some(*relid),
                            _ => None,
                        };
                        self.change(&head, message, &mut end).await?;
                    }
                },
                Entry::Commit { end_lsn } => {
                    for adoption in &adopted {
                        adopt::redefine_in(self.writer, &adoption.table, adoption.routing, &adoption.fingerprint)
                            .await?;
                    }
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

    /// What the stream announces of a table: what it was, or a change that the target has been found to fit.
    fn relation(&mut self, head: &TransactionHead, relation: &Relation<'_>) -> Result<Option<Adoption>> {
        let Err(error) = self.layout.check_relation(relation, head.xid, head.commit_lsn) else { return Ok(None) };
        let change = Change { head: *head, announced: Announced::of(relation) };
        let Some(adoption) = self.adoptions.iter().find(|adoption| adoption.change == change) else {
            self.change = Some(change);
            return Err(error);
        };
        Arc::make_mut(&mut self.layout).adopt(adoption);
        Ok(Some(adoption.clone()))
    }

    async fn change(&mut self, head: &TransactionHead, message: Message<'_>, end: &mut UnitEnd) -> Result<()> {
        let layout = Arc::clone(&self.layout);
        match message {
            Message::Logical { prefix, content, .. } if prefix == MARKER_PREFIX => {
                let content = String::from_utf8_lossy(content).into_owned();
                end.markers.push(Marker { content, changes: end.changes });
            }
            Message::Logical { prefix, content, .. } if layout.is_ddl(prefix) => {
                Box::pin(self.ddl(head, content)).await?;
            }
            Message::Logical { prefix, .. } => self.own_work.note(prefix),
            Message::Truncate { relids, restart_identity, .. } => {
                let mut emptied = Vec::new();
                let mut is_whole = true;
                for relid in relids {
                    if self.own_work.covers(&layout, relid) {
                        continue;
                    }
                    let place = layout.place(relid)?;
                    if layout.copy_has_seen(place, head.xid, head.commit_lsn) {
                        is_whole = false;
                    } else {
                        emptied.push(&layout.tables[place].table);
                    }
                }
                if !emptied.is_empty() {
                    end.changes += 1;
                    if emptied.iter().any(|table| table.chunk.is_some()) {
                        live::truncate(self.writer, &layout, &emptied, restart_identity).await?;
                    } else if is_whole {
                        serial::truncate(self.writer, &emptied, restart_identity).await?;
                    } else {
                        serial::empty(self.writer, &emptied).await?;
                    }
                }
            }
            Message::Insert { relid, new } => self.row(head, relid, RowChange::Insert(new), end).await?,
            Message::Update { relid, old, new } => self.row(head, relid, RowChange::Update(old, new), end).await?,
            Message::Delete { relid, old } => self.row(head, relid, RowChange::Delete(old), end).await?,
            _ => {}
        }
        Ok(())
    }

    /// One change of a row.
    async fn row(
        &mut self,
        head: &TransactionHead,
        relid: u32,
        change: RowChange<'_>,
        end: &mut UnitEnd,
    ) -> Result<()> {
        let layout = Arc::clone(&self.layout);
        if self.own_work.covers(&layout, relid) {
            return Ok(());
        }
        let place = layout.place(relid)?;
        if layout.copy_has_seen(place, head.xid, head.commit_lsn) {
            return Ok(());
        }
        end.changes += 1;
        match &change {
            RowChange::Insert(new) => layout.check_row(place, *new)?,
            RowChange::Update(old, new) => {
                layout.check_row(place, *new)?;
                old.map_or(Ok(()), |old| layout.check_row(place, old.tuple()))?;
            }
            RowChange::Delete(old) => layout.check_row(place, old.tuple())?,
        }
        let entry = &layout.tables[place];
        let Some(change) = self.not_covered(place, change, head)? else { return Ok(()) };
        match &entry.view {
            None => self.write(&entry.table, change).await,
            Some(view) => match change {
                RowChange::Insert(new) => {
                    let new = view.project_insert(new);
                    self.write(&view.table_for_inserts, RowChange::Insert(new.tuple())).await
                }
                RowChange::Update(old, new) => {
                    let old = old.map(|old| (old, view.project(old.tuple())));
                    let old = old.as_ref().map(|(like, row)| row.old(*like));
                    self.write(&view.table, RowChange::Update(old, view.project(new).tuple())).await
                }
                RowChange::Delete(old) => {
                    self.write(&view.table, RowChange::Delete(view.project(old.tuple()).old(old))).await
                }
            },
        }
    }

    /// What is left of a change, when the sessions that had committed this transaction before a crash leave their share out.
    fn not_covered<'a>(
        &self,
        place: usize,
        change: RowChange<'a>,
        head: &TransactionHead,
    ) -> Result<Option<RowChange<'a>>> {
        let covered = |row, before| self.is_covered(place, row, before, head);
        Ok(match change {
            RowChange::Insert(new) => (!covered(new, None)).then_some(change),
            RowChange::Delete(old) => (!covered(old.tuple(), None)).then_some(change),
            RowChange::Update(old, new) => {
                let before = old.map(|old| old.tuple());
                match (covered(before.unwrap_or(new), None), covered(new, before), old) {
                    (true, true, _) => None,
                    (false, false, _) => Some(change),
                    // A changed key, of which one session had committed its half.
                    (false, true, Some(old)) => Some(RowChange::Delete(old)),
                    _ if new.columns().all(|datum| datum != Datum::Unchanged) => Some(RowChange::Insert(new)),
                    _ => {
                        let table = self.layout.tables[place].table.qualified();
                        let text =
                            format!("a row of {table} whose key changed lost an unchanged TOASTed value in a crash");
                        return Err(Error::new(ErrorKind::Divergence, text));
                    }
                }
            }
        })
    }

    /// Writes a change, as the target's table is.
    async fn write(&mut self, table: &Table, change: RowChange<'_>) -> Result<()> {
        let conflicts = &mut self.conflicts;
        let mut met = |kind| *conflicts.entry((table.schema.clone(), table.name.clone(), kind)).or_insert(0) += 1;
        conflict::write(self.writer, table, change, self.on_conflict, &mut met).await
    }

    /// Whether the session that this row is routed to has committed the transaction already.
    fn is_covered(&self, place: usize, row: Tuple<'_>, before: Option<Tuple<'_>>, head: &TransactionHead) -> bool {
        let entry = &self.layout.tables[place];
        let hash = hash_key(entry.table.relid, &entry.table.key, row, before);
        let worker = entry.routing.worker(entry.table.routed_as(), hash, self.layout.workers);
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

/// What waiting does not heal, and what nobody has said more of.
fn what_the_target_refuses(error: Error) -> Error {
    if error.kind() != ErrorKind::Server || error.next_step().is_some() {
        return error;
    }
    error.hint(
        "Nothing of that transaction or of later ones was applied, and the queue keeps them. Look for what makes the target refuse it and the source not (a \
         constraint, a trigger, a type, a setting that only the target has), mend the target, and start the same command again: it goes on with this \
         transaction. --log-detail logs what else the server says, values of rows included.",
    )
}
