//! The initial copy: every table's rows as one snapshot saw them, straight from COPY to COPY, never parsed.
//!
//! ```text
//!   plan ──► parts ──► job ─┐   source: BEGIN; SET TRANSACTION SNAPSHOT; LOCK; is it the same file (H4)? COPY … TO STDOUT
//!                      job ─┼─►                                    │ bytes, 128 KiB at a time
//!                      job ─┘   target: BEGIN; COPY … FROM STDIN; the part's row in the ledger; COMMIT
//! ```
//!
//! Progress: a part and its mark are one transaction on the target (I2), so a part is there as a whole or not at all. All
//! parts of a table come from one snapshot; when that is gone before the table is complete, the table starts over
//! under another (H3), and [`SnapshotData::sees`](crate::source::snapshot::SnapshotData::sees) tells the apply which changes
//! the rows hold already (I3).
//!
//! A table that the target has rows of already is compared with the snapshot instead (`exchange`).
//!
//! Care for the source: a transaction is as short as one part, and is ended when anybody waits behind its lock (H9). Every chunk
//! waits for its turn (`care::pace`), and the number of jobs may change at any time: more begin at once, and those that are too
//! many end after their part (H28). A pause holds between two parts.

mod exchange;
mod part;
mod plan;
pub(crate) mod watchdog;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tracing::Instrument;

use crate::care::pace::Pace;
use crate::care::tune::Tune;
use crate::connection::ConnectionSpec;
use crate::connection::wire::RawSession;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::status::Level;
use crate::pause::{self, Paused};
use crate::source::catalog::Table;
use crate::target::ledger::Part;
use crate::target::role::ApplyRole;
use crate::timescale::copying;
use crate::timescale::declaration::Hypertable;
use crate::timescale::exchange::Hypertables;

pub use plan::plan;

/// Copies all rows of a table in the transaction that the target's session has open, under no snapshot: nobody writes to it.
/// Answers how many there were.
///
/// # Errors
/// Whatever the servers say.
pub async fn whole(source: &Client, target: &Client, table: &Table) -> Result<u64> {
    let columns = if table.columns.is_empty() { String::new() } else { format!(" ({})", table.column_list()) };
    let statement = format!("COPY {}{columns} TO STDOUT (FORMAT {})", table.qualified(), part::format_of(table));
    part::send_rows(source, &statement, target, table, None, &Pace::new()).await
}

/// How long a part waits before it is copied again after it made way for somebody's lock.
const WAIT_AFTER_MAKING_WAY: Duration = Duration::from_secs(1);

/// What every job of a copy needs.
pub struct Copier {
    /// The server that is copied from.
    pub source: ConnectionSpec,
    /// The server that is copied to.
    pub target: ConnectionSpec,
    /// What our sessions call themselves.
    pub application_name: String,
    /// The tables by their relid.
    pub tables: HashMap<u32, Table>,
    /// In which role rows are written.
    pub role: ApplyRole,
    /// Where progress is shown.
    pub board: StatusBoard,
    /// Whether it is to rest; it does so between parts.
    pub paused: watch::Receiver<Paused>,
    /// How many jobs there are to be, and how fast.
    pub tune: Tune,
    /// Whether a large table may get a new file, to arrive frozen. Not where foreign keys refer to it already: they forbid TRUNCATE.
    pub freezes: bool,
    /// Tables whose rows are read in the order of a column, by their relid.
    pub sorted: HashMap<u32, String>,
    /// Tables that are hypertables on the target.
    pub declared: Vec<Hypertable>,
}

/// What became of a part.
enum Outcome {
    /// It is on the target; `true` when its table is complete with it.
    Copied(bool),
    /// The snapshot no longer shows the table's rows: it was rewritten or emptied since (H4).
    Stale,
    /// The transaction made way for somebody who waited behind its lock (H9).
    MadeWay,
}

impl Copier {
    /// Copies parts under a snapshot, with as many jobs as the operator wants. Sends the relid of each table that becomes complete.
    ///
    /// Answers with the tables that this snapshot cannot serve, because they were rewritten or emptied after it (H4): they
    /// need another.
    ///
    /// # Errors
    /// The first error of a job; the parts that were committed stay.
    pub async fn run(
        self: &Arc<Copier>,
        snapshot: &str,
        parts: Vec<Part>,
        completed: &mpsc::UnboundedSender<u32>,
    ) -> Result<BTreeSet<u32>> {
        let work = Arc::new(Mutex::new(Work::of(parts)));
        let stale = Arc::new(Mutex::new(BTreeSet::new()));
        let mut wanted = self.tune.copy_jobs();
        let jobs = async {
            let mut running = JoinSet::new();
            loop {
                let begun = lock(&work).begin(*wanted.borrow_and_update());
                for _ in 0..begun {
                    let job = Job {
                        copier: Arc::clone(self),
                        snapshot: snapshot.to_owned(),
                        work: Arc::clone(&work),
                        wanted: self.tune.copy_jobs(),
                        stale: Arc::clone(&stale),
                        completed: completed.clone(),
                    };
                    running.spawn(job.run().in_current_span());
                }
                self.board.set_copy_jobs(lock(&work).jobs);
                tokio::select! {
                    ended = running.join_next() => match ended {
                        None => return Result::<()>::Ok(()),
                        // With the first error the others are ended too; what they had begun is taken back by its transaction.
                        Some(ended) => ended.unwrap_or_else(|error| {
                            Err(Error::new(ErrorKind::Other, format!("a copy job failed: {error}")))
                        })?,
                    },
                    // Whoever tunes it is in here too, and never gone.
                    _ = wanted.changed() => lock(&work).most = usize::MAX,
                }
            }
        };
        let _shown = Shown(&self.board);
        tokio::select! {
            outcome = jobs => outcome?,
            never = watchdog::run(&self.source, &self.application_name, &self.board) => match never {},
        }
        Ok(lock(&stale).clone())
    }
}

/// The status shows no job any more when this is dropped.
struct Shown<'a>(&'a StatusBoard);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        self.0.set_copy_jobs(0);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is to be done, and by how many.
struct Work {
    waiting: VecDeque<Part>,
    /// Those that have begun and not ended.
    jobs: usize,
    /// No more than these, until the operator wants another number: a server has no connection for another.
    most: usize,
}

impl Work {
    fn of(parts: Vec<Part>) -> Work {
        Work { waiting: parts.into(), jobs: 0, most: usize::MAX }
    }

    /// Ends a job that cannot connect, and leaves its part to the others. Not where there are none: answers whether it did.
    fn leave_to_others(&mut self, part: Part) -> bool {
        if self.jobs <= 1 {
            return false;
        }
        self.waiting.push_front(part);
        self.jobs -= 1;
        self.most = self.jobs;
        true
    }

    /// How many jobs are to begin, which from now on count; for each there is a part.
    fn begin(&mut self, wanted: usize) -> usize {
        let count = wanted.min(self.most).max(1).saturating_sub(self.jobs).min(self.waiting.len());
        self.jobs += count;
        count
    }

    /// The next part for a job that has ended one. None where it is one too many, or nothing is left; then the job has ended.
    fn next(&mut self, wanted: usize) -> Option<Part> {
        let next = if self.jobs > wanted.max(1) { None } else { self.waiting.pop_front() };
        self.jobs -= usize::from(next.is_none());
        next
    }
}

impl Copier {
    /// Compares tables that the target has already with a snapshot, one after the other, and copies what differs. Sends the
    /// relid of each that is done; answers with those that this snapshot cannot serve (H4).
    ///
    /// # Errors
    /// The first error; the tables that were committed stay.
    pub async fn compare(
        &self,
        snapshot: &str,
        parts: &[Part],
        completed: &mpsc::UnboundedSender<u32>,
    ) -> Result<BTreeSet<u32>> {
        let _shown = Shown(&self.board);
        let all = async {
            let mut stale = BTreeSet::new();
            let (mut pairs, mut hypertables) = (Vec::new(), Hypertables::default());
            let mut paused = self.paused.clone();
            for part in parts {
                loop {
                    pause::copy_may_go_on(&mut paused).await;
                    self.tune.pace().may_go_on().await;
                    let jobs = *self.tune.copy_jobs().borrow();
                    self.board.set_copy_jobs(1);
                    match exchange::exchange(self, snapshot, part, jobs, &mut pairs, &mut hypertables).await? {
                        Outcome::Copied(_) => {
                            // The receiver outlives the copy; if it is gone, so is the migration.
                            let _ = completed.send(part.relid);
                        }
                        Outcome::Stale => drop(stale.insert(part.relid)),
                        Outcome::MadeWay => {
                            tokio::time::sleep(WAIT_AFTER_MAKING_WAY).await;
                            continue;
                        }
                    }
                    break;
                }
            }
            Ok(stale)
        };
        tokio::select! {
            outcome = all => outcome,
            never = watchdog::run(&self.source, &self.application_name, &self.board) => match never {},
        }
    }
}

struct Job {
    copier: Arc<Copier>,
    snapshot: String,
    work: Arc<Mutex<Work>>,
    wanted: watch::Receiver<usize>,
    stale: Arc<Mutex<BTreeSet<u32>>>,
    completed: mpsc::UnboundedSender<u32>,
}

impl Job {
    async fn run(self) -> Result<()> {
        let Some(mut next) = self.next() else { return Ok(()) };
        let copier = &self.copier;
        let sessions = tokio::try_join!(
            RawSession::connect(&copier.source, &copier.application_name),
            copier.target.connect(&copier.application_name)
        );
        let (mut source, mut target) = match sessions {
            // What others have copied stays: the end of one job would be the end of all, and of their snapshot.
            Err(error) if error.is_transient() && lock(&self.work).leave_to_others(next.clone()) => {
                let text = format!(
                    "a copy job could not begin, and the copy goes on with {} of them: {error}",
                    lock(&self.work).jobs
                );
                copier.board.event(Level::Warn, text);
                return Ok(());
            }
            sessions => sessions?,
        };
        let mut paused = copier.paused.clone();
        loop {
            pause::copy_may_go_on(&mut paused).await;
            if !source.is_usable() {
                // It made way, perhaps only while the target committed the part.
                drop(source);
                source = RawSession::connect(&copier.source, &copier.application_name).await?;
            }
            let Some(table) = copier.tables.get(&next.relid) else {
                return Err(Error::new(
                    ErrorKind::Other,
                    format!("the ledger has a part of an unknown table {}", next.relid),
                ));
            };
            if !self.is_stale(next.relid) {
                if let Some(chunk) = table.chunk.as_ref().filter(|chunk| chunk.is_late) {
                    copying::open_chunk(&target, chunk).await?;
                }
                if !next.is_whole() {
                    copying::open_chunks(&mut source, &target, table, &next, &copier.declared).await?;
                }
                let frozen = copier.freezes && part::may_freeze(table, &next);
                let what = (table, &next, frozen);
                match part::copy(&mut source, &mut target, &self.snapshot, what, copier).await? {
                    Outcome::Copied(complete) => {
                        if complete {
                            // The receiver outlives the copy; if it is gone, so is the migration.
                            let _ = self.completed.send(next.relid);
                        }
                    }
                    Outcome::Stale => {
                        let text = format!(
                            "{} was emptied or rewritten on the source; it is copied under a newer snapshot",
                            table.qualified()
                        );
                        copier.board.event(Level::Warn, text);
                        lock(&self.stale).insert(next.relid);
                    }
                    Outcome::MadeWay => {
                        copier.board.event(
                            Level::Info,
                            format!("the copy of {} made way for a lock on the source", table.qualified()),
                        );
                        tokio::time::sleep(WAIT_AFTER_MAKING_WAY).await;
                        continue;
                    }
                }
            }
            match self.next() {
                Some(part) => next = part,
                None => return Ok(()),
            }
        }
    }

    fn next(&self) -> Option<Part> {
        lock(&self.work).next(*self.wanted.borrow())
    }

    fn is_stale(&self, relid: u32) -> bool {
        lock(&self.stale).contains(&relid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(parts: i32) -> Work {
        let part = |part| Part { relid: 1, part, first_page: 0, end_page: None };
        Work::of((0..parts).map(part).collect())
    }

    #[test]
    fn as_many_jobs_begin_as_are_wanted_and_have_a_part() {
        let mut work = work(5);
        assert_eq!(work.begin(2), 2);
        assert_eq!(work.begin(2), 0);
        assert_eq!(work.begin(3), 1, "one more is wanted now");
        assert!((0..3).all(|_| work.next(3).is_some()));
        assert_eq!(work.begin(100), 2, "no more than there are parts");
    }

    #[test]
    fn h28_jobs_that_are_too_many_end_after_their_part_and_nothing_is_left_undone() {
        let mut work = work(10);
        assert_eq!(work.begin(4), 4);
        assert!((0..4).all(|_| work.next(4).is_some()));
        assert!((0..3).all(|_| work.next(1).is_none()), "three of four end");
        assert_eq!(work.jobs, 1);
        assert!((0..6).all(|_| work.next(1).is_some()), "the last one does the rest");
        assert!(work.next(1).is_none());
        assert_eq!((work.jobs, work.begin(4)), (0, 0));
    }

    #[test]
    fn h28_a_job_for_which_a_server_has_no_connection_leaves_its_part_to_the_others() {
        let mut work = work(3);
        assert_eq!(work.begin(2), 2);
        let part = work.next(2).unwrap();
        assert!(work.leave_to_others(part));
        assert_eq!(work.begin(2), 0, "it is not tried again and again");
        assert!((0..3).all(|_| work.next(2).is_some()), "the other one does all");
        let last = Part { relid: 1, part: 9, first_page: 0, end_page: None };
        assert!(!work.leave_to_others(last), "the last one says what is wrong");
    }
}
