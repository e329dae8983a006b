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
//! Care for the source: a transaction is as short as one part, and is ended when anybody waits behind its lock (H9).

mod exchange;
mod part;
mod plan;
mod watchdog;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::connection::ConnectionSpec;
use crate::connection::wire::RawSession;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::status::Level;
use crate::pause::{self, Paused};
use crate::source::catalog::Table;
use crate::target::ledger::Part;

pub use plan::plan;

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
    /// Where progress is shown.
    pub board: StatusBoard,
    /// Whether it is to rest; it does so between parts.
    pub paused: watch::Receiver<Paused>,
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
    /// Copies parts under a snapshot with several jobs. Sends the relid of each table that becomes complete.
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
        jobs: usize,
        completed: &mpsc::UnboundedSender<u32>,
    ) -> Result<BTreeSet<u32>> {
        let waiting = Arc::new(Mutex::new(VecDeque::from(parts)));
        let stale = Arc::new(Mutex::new(BTreeSet::new()));
        let mut running = JoinSet::new();
        for _ in 0..jobs.max(1) {
            let job = Job {
                copier: Arc::clone(self),
                snapshot: snapshot.to_owned(),
                waiting: Arc::clone(&waiting),
                stale: Arc::clone(&stale),
                completed: completed.clone(),
            };
            running.spawn(job.run());
        }
        let jobs = async {
            while let Some(ended) = running.join_next().await {
                // With the first error the others are ended too; what they had begun is taken back by its transaction.
                ended
                    .unwrap_or_else(|error| Err(Error::new(ErrorKind::Other, format!("a copy job failed: {error}"))))?;
            }
            Result::<()>::Ok(())
        };
        tokio::select! {
            outcome = jobs => outcome?,
            never = watchdog::run(&self.source, &self.application_name, &self.board) => match never {},
        }
        let stale = stale.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(stale.clone())
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
        jobs: usize,
        completed: &mpsc::UnboundedSender<u32>,
    ) -> Result<BTreeSet<u32>> {
        let all = async {
            let mut stale = BTreeSet::new();
            let mut pairs = Vec::new();
            let mut paused = self.paused.clone();
            for part in parts {
                loop {
                    pause::copy_may_go_on(&mut paused).await;
                    match exchange::exchange(self, snapshot, part, jobs, &mut pairs).await? {
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
    waiting: Arc<Mutex<VecDeque<Part>>>,
    stale: Arc<Mutex<BTreeSet<u32>>>,
    completed: mpsc::UnboundedSender<u32>,
}

impl Job {
    async fn run(self) -> Result<()> {
        let Some(mut next) = self.next() else { return Ok(()) };
        let copier = &self.copier;
        let mut source = RawSession::connect(&copier.source, &copier.application_name).await?;
        let mut target = copier.target.connect(&copier.application_name).await?;
        let mut paused = copier.paused.clone();
        loop {
            pause::copy_may_go_on(&mut paused).await;
            if !source.is_usable() {
                // It made way, perhaps only while the target committed the part.
                source = RawSession::connect(&copier.source, &copier.application_name).await?;
            }
            let Some(table) = copier.tables.get(&next.relid) else {
                return Err(Error::new(
                    ErrorKind::Other,
                    format!("the ledger has a part of an unknown table {}", next.relid),
                ));
            };
            if !self.is_stale(next.relid) {
                match part::copy(&mut source, &mut target, &self.snapshot, table, &next, &copier.board).await? {
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
                        self.stale.lock().unwrap_or_else(PoisonError::into_inner).insert(next.relid);
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
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn is_stale(&self, relid: u32) -> bool {
        self.stale.lock().unwrap_or_else(PoisonError::into_inner).contains(&relid)
    }
}
