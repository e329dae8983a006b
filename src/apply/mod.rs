//! From the queue to the target's tables.
//!
//! ```text
//!  queue ─► Assembler (thread) ──chunk──► N writers ── all write ──┬── barrier ── all commit, each with its ledger row
//!           decode, leave out what                                │
//!           the copies have seen (I3),                             └─ one refuses: all roll back, and the unit is replayed
//!           net effect, route, encode                                  row by row in the source's order (I5)
//! ```
//!
//! Progress: a writer's row in the ledger says up to which end LSN *its share* of the changes is on the target. All rows
//! agree, except after a crash between the commits of one unit. Then [`Apply::run`] makes exactly that unit again, whose
//! chunks are the same because they depend on the queue's bytes alone, and the writers that had committed leave theirs out.
//!
//! How it dies: before the commits, nothing of the unit is on the target; between them, see above; after them, the ledger
//! says so. A target that crashes takes back rows and ledger together; the queue still has the transactions (I2).

pub mod assemble;
pub mod change;
pub mod conflict;
pub mod ddl;
mod equal;
pub mod gate;
pub mod layout;
pub mod net;
pub mod reconcile;
pub mod replay;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::{mpsc, watch};

use assemble::{Assembled, Assembler, Chunk, UnitEnd};
use change::{Adoption, Change};
use conflict::OnConflict;
use gate::Gate;
use layout::Layout;
use replay::Replay;

use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::board::{AppliedBatch, StatusBoard};
use crate::observe::status::Level;
use crate::pause::{self, Paused};
use crate::queue::Queue;
use crate::target::writer::{WriteError, Writer};
use crate::timescale::live::OwnWork;

/// How long apply sessions live (H25).
const SESSION_AGE_MAX: Duration = Duration::from_secs(600);

/// How far the apply is, for whoever waits for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Everything that ends here or before is committed on the target (perhaps not yet flushed).
    pub end_lsn: Lsn,
    /// The newest markers that went all the way, the oldest first. More than one: whoever waits for the last but one may be late.
    markers: VecDeque<Marker>,
    /// Row changes since the process began.
    pub changes: u64,
}

/// How many markers are remembered. Before PostgreSQL 14 every empty transaction is one (`source::marker`).
const MARKERS_MAX: usize = 256;

impl Applied {
    /// The marker that says this, if it went all the way and is not long ago.
    pub fn marker(&self, content: &str) -> Option<&Marker> {
        self.markers.iter().rev().find(|marker| marker.content == content)
    }

    fn advance(&mut self, end: &UnitEnd) {
        self.end_lsn = end.end_lsn;
        for Marker { content, changes } in &end.markers {
            if self.markers.len() == MARKERS_MAX {
                self.markers.pop_front();
            }
            self.markers.push_back(Marker { content: content.clone(), changes: self.changes + changes });
        }
        self.changes += end.changes;
    }
}

/// One of our messages in the stream, seen at the far end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    /// What it says.
    pub content: String,
    /// Row changes that came before it, since the process began; in a unit, since the unit began.
    pub changes: u64,
}

/// The apply: its sessions are given, it opens none.
pub struct Apply {
    /// The tables. What is adopted becomes part of it; then the sessions are to be renewed, because they have prepared for the
    /// tables as they were.
    pub layout: Arc<Layout>,
    /// Changes of tables that the target has been found to fit.
    pub adoptions: Vec<Adoption>,
    /// Set when a run stops at a table that is not what it was, and that is in none of the adoptions.
    pub change: Option<Change>,
    /// Where the transactions come from.
    pub queue: Queue,
    /// One session for each place in `progress`.
    pub writers: Vec<Writer>,
    /// How far each session has come, as the ledger says.
    pub progress: Vec<Lsn>,
    /// Who wins when somebody else has written to the target.
    pub on_conflict: OnConflict,
    /// Where it is shown.
    pub board: StatusBoard,
    /// Whether it is to rest; it does so between units.
    pub paused: watch::Receiver<Paused>,
    /// Where it is held at an exact position, for somebody who compares.
    pub gate: Gate,
    /// Where others wait for it.
    pub applied: watch::Sender<Applied>,
}

/// Why a run of the assembler ended.
enum Ended {
    /// The goal is reached, or the sessions are old: the caller decides what next.
    AtBoundary,
    /// The unit was refused, or has a transaction that only the serial way can do: replay from where the ledger stands. With
    /// an LSN through that one; without, one transaction.
    Replay(Option<Lsn>),
    /// Bring the sessions up to this LSN, then replay one transaction.
    UpTo(Lsn),
    /// Bring the sessions up to this LSN, then look again: a table comes that nobody knows.
    Before(Lsn),
    /// Nothing more may be begun for now.
    Held,
}

impl Apply {
    /// Applies until everything up to `until` is committed, or its sessions are to be renewed.
    ///
    /// # Errors
    /// `SchemaChanged` when the stream announces a table otherwise than it was: [`Apply::change`] says how, and everything before
    /// that transaction is on the target. `Divergence` when the target is not what the source's history says (I6), naming the transaction; `Gap` when the queue no
    /// longer holds what the ledger needs; `Transient` when a session is lost, or somebody else has applied meanwhile.
    pub async fn run(&mut self, until: Option<Lsn>) -> Result<()> {
        if self.writers.len() != self.layout.workers || self.progress.len() != self.layout.workers {
            let text = format!(
                "{} apply sessions were opened and the ledger speaks of {}, but the changes are spread over {}",
                self.writers.len(),
                self.progress.len(),
                self.layout.workers
            );
            return Err(Error::new(ErrorKind::Other, text)
                .hint("Somebody changed the ledger (walferry.apply_progress). Start anew: `walferry clean`, then `walferry migrate`."));
        }
        let (mut replay_after, mut stop_after) = (None, None);
        let begun_with = Arc::clone(&self.layout);
        loop {
            let (least, most) = self.range();
            // After a crash between the commits, exactly the unit that was being committed.
            let recovering = least < most;
            // Sessions that do not agree are at no position, so they are not held.
            let limit = if recovering { None } else { self.gate.pass(least).await };
            let unit = if recovering { Some(most) } else { replay_after.or(stop_after.take()).or(limit) };
            let reader = self.queue.reader(least)?;
            let assembler = Assembler::start(Arc::clone(&self.layout), reader, least, unit, recovering)?;
            match self.consume(assembler, unit, until).await? {
                Ended::Replay(through) => {
                    replay_after = None;
                    self.replay(through).await?;
                }
                Ended::UpTo(complete) => replay_after = Some(complete),
                Ended::Before(complete) => stop_after = Some(complete),
                // What cannot be merged is met again afterwards.
                Ended::AtBoundary | Ended::Held if !self.gate.may_pass(self.range().0) => replay_after = None,
                Ended::AtBoundary if replay_after.take().is_some() => self.replay(None).await?,
                Ended::AtBoundary | Ended::Held => {}
            }
            let (least, most) = self.range();
            let reached = until.is_some_and(|until| least >= until);
            let renew = self.sessions_are_old() || !Arc::ptr_eq(&begun_with, &self.layout);
            if least == most && replay_after.is_none() && stop_after.is_none() && (reached || renew) {
                return Ok(());
            }
        }
    }

    /// How far the slowest and the fastest session have come.
    fn range(&self) -> (Lsn, Lsn) {
        let least = self.progress.iter().copied().min().unwrap_or(Lsn::ZERO);
        (least, self.progress.iter().copied().max().unwrap_or(least))
    }

    fn sessions_are_old(&self) -> bool {
        self.writers.first().is_some_and(|writer| writer.opened().elapsed() > SESSION_AGE_MAX)
    }

    async fn consume(
        &mut self,
        mut assembler: mpsc::Receiver<Result<Assembled>>,
        unit: Option<Lsn>,
        until: Option<Lsn>,
    ) -> Result<Ended> {
        let mut begun: Option<Instant> = None;
        let gate = self.gate.clone();
        let recovering = self.is_recovering();
        let is_held = |unit| !recovering && !gate.may_begin(unit);
        loop {
            let assembled = tokio::select! {
                assembled = assembler.recv() => assembled,
                () = gate.closes_for(unit), if begun.is_none() && !recovering => return Ok(Ended::Held),
            };
            let Some(assembled) = assembled else { break };
            let mut chunk = match assembled? {
                Assembled::Chunk(chunk) => chunk,
                Assembled::Serial { complete } => {
                    self.roll_back().await?;
                    let (least, most) = self.range();
                    let replay_now = complete <= least || least < most;
                    if replay_now && is_held(unit) {
                        return Ok(Ended::Held);
                    }
                    return Ok(if replay_now { Ended::Replay(None) } else { Ended::UpTo(complete) });
                }
                Assembled::Unknown { complete, change } => {
                    self.roll_back().await?;
                    if complete > self.range().0 && !self.is_recovering() {
                        return Ok(Ended::Before(complete));
                    }
                    let announced = &change.announced;
                    let name = crate::sql::qualified(&announced.schema, &announced.name);
                    self.change = Some(*change);
                    return Err(Error::new(ErrorKind::SchemaChanged, format!("{name} is new on the source")));
                }
            };
            if begun.is_none() {
                pause::apply_may_go_on(&mut self.paused).await;
                if is_held(unit) {
                    return Ok(Ended::Held);
                }
            }
            let since = *begun.get_or_insert_with(Instant::now);
            let end = chunk.end.take();
            let outcome = match &end {
                Some(end) if chunk.small => self.write_small(&mut chunk, end).await,
                _ => self.write(&mut chunk, end.as_ref()).await,
            };
            match outcome {
                Ok(()) => {}
                Err(WriteError::Failed(error)) => return Err(error),
                // All had written this unit before the crash, so the rows are not to blame. A replay would have less to go on:
                // what the unit knows of TOASTed values has been moved to other sessions' rows by then.
                Err(WriteError::Refused(error)) if self.is_recovering() && error.is_transient() => return Err(error),
                Err(WriteError::Refused(error)) => {
                    self.board
                        .event(Level::Warn, format!("the target refused a batch; replaying it row by row: {error}"));
                    self.roll_back().await?;
                    let (least, _) = self.range();
                    let complete = end.map_or(chunk.complete, |end| end.end_lsn);
                    return Ok(Ended::Replay((complete > least).then_some(complete)));
                }
            }
            if let Some(end) = end {
                begun = None;
                gate.reach(end.end_lsn);
                publish(&self.applied, &self.board, &end, since.elapsed());
                let reached = |goal: Option<Lsn>| goal.is_some_and(|goal| end.end_lsn >= goal);
                if reached(unit) || reached(until) || self.sessions_are_old() {
                    return Ok(Ended::AtBoundary);
                }
            }
        }
        Err(Error::new(ErrorKind::Other, "the assembler has ended without saying why"))
    }

    /// Whether some sessions have committed a unit that others have not.
    fn is_recovering(&self) -> bool {
        let (least, most) = self.range();
        least < most
    }

    /// The ledger's rows of these sessions, as they are now.
    fn rows_of(&self, sessions: impl IntoIterator<Item = usize>) -> Vec<(i32, Lsn)> {
        let row = |session: usize| Some((i32::try_from(session).ok()?, *self.progress.get(session)?));
        sessions.into_iter().filter_map(row).collect()
    }

    /// A small unit: one session writes it, and everybody's row in the ledger, as one transaction.
    async fn write_small(&mut self, chunk: &mut Chunk, end: &UnitEnd) -> Result<(), WriteError> {
        let layout = Arc::clone(&self.layout);
        let everybody = self.rows_of(0..self.progress.len());
        let (Some(writer), Some(writes)) = (self.writers.first_mut(), chunk.writes.first_mut()) else { return Ok(()) };
        writer.write_and_advance(&*layout, writes, &everybody, end.end_lsn).await?;
        writer.commit().await?;
        self.progress.fill(end.end_lsn);
        Ok(())
    }

    /// All sessions write their share; with the last chunk of the unit each writes its own row in the ledger, then all commit.
    async fn write(&mut self, chunk: &mut Chunk, end: Option<&UnitEnd>) -> Result<(), WriteError> {
        let layout = &*self.layout;
        let (_, most) = self.range();
        let recovering = self.is_recovering();
        // A session that had committed this unit before the crash leaves its share out.
        let covered = |session: usize| recovering && self.progress.get(session) == Some(&most);
        for (session, writes) in chunk.writes.iter_mut().enumerate() {
            if covered(session) {
                writes.clear();
            }
        }
        // With the last chunk, the rows of the ledger that each session writes: its own; the first also those of the sessions that
        // have nothing to do.
        let mut rows = vec![Vec::new(); self.writers.len()];
        if end.is_some() {
            for (session, row) in (0..self.writers.len()).flat_map(|at| Some((at, self.rows_of([at]).pop()?))) {
                let busy = self.writers[session].in_transaction() || !chunk.writes[session].is_empty();
                rows[if busy { session } else { 0 }].push(row);
            }
        }
        let shares = self.writers.iter_mut().zip(&mut chunk.writes).zip(&rows);
        let writes = shares.filter(|((_, writes), rows)| !writes.is_empty() || !rows.is_empty());
        let writes = writes.map(|((writer, writes), rows)| async move {
            match end {
                Some(end) if !rows.is_empty() => writer.write_and_advance(layout, writes, rows, end.end_lsn).await,
                _ => writer.write(layout, writes).await,
            }
        });
        for outcome in join_all(writes).await {
            outcome?;
        }
        let Some(end) = end else { return Ok(()) };
        // The barrier: nobody commits before all have written, and nothing but the commit is left to do.
        let commits = self.writers.iter_mut().filter(|writer| writer.in_transaction()).map(Writer::commit);
        for outcome in join_all(commits).await {
            // Whether it was committed is only in the ledger now; the caller reads it again.
            outcome.map_err(WriteError::Failed)?;
        }
        self.progress.fill(end.end_lsn);
        Ok(())
    }

    async fn roll_back(&mut self) -> Result<()> {
        for writer in &mut self.writers {
            writer.roll_back().await?;
        }
        Ok(())
    }

    async fn replay(&mut self, through: Option<Lsn>) -> Result<()> {
        let (least, _) = self.range();
        let reader = self.queue.reader(least)?;
        let Some(writer) = self.writers.first_mut() else { return Ok(()) };
        self.board.serial_replay();
        let (board, applied) = (&self.board, &self.applied);
        let mut replay = Replay {
            layout: Arc::clone(&self.layout),
            adoptions: &self.adoptions,
            change: None,
            writer,
            progress: &mut self.progress,
            on_conflict: self.on_conflict,
            conflicts: BTreeMap::new(),
            own_work: OwnWork::default(),
            ddl_replayed: 0,
            board,
        };
        let outcome = replay.run(reader, through, |end| publish(applied, board, &end, Duration::ZERO)).await;
        (self.layout, self.change) = (replay.layout, replay.change);
        outcome
    }
}

/// Tells everybody that a unit is committed.
fn publish(applied: &watch::Sender<Applied>, board: &StatusBoard, end: &UnitEnd, elapsed: Duration) {
    applied.send_modify(|applied| applied.advance(end));
    board.applied(AppliedBatch {
        transactions: end.transactions,
        changes: end.changes,
        end_lsn: end.end_lsn,
        commit_time: end.commit_time,
        elapsed,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_found_though_others_came_behind_it_and_not_all_are_kept() {
        let marker = |number: u64| Marker { content: format!("xid {number}"), changes: 1 };
        let unit = |number: u64| UnitEnd { changes: 2, markers: vec![marker(number)], ..UnitEnd::default() };
        let mut applied = Applied::default();
        (0..1000).for_each(|number| applied.advance(&unit(number)));
        assert_eq!(
            applied.marker("xid 900").map(|marker| marker.changes),
            Some(1801),
            "all before it, and none behind it"
        );
        assert_eq!((applied.marker("xid 1"), applied.markers.len()), (None, MARKERS_MAX));
    }
}
