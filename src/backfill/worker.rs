//! The pieces, some at once: each worker takes the next one, with a session on either side.

use std::collections::{HashSet, VecDeque};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio_postgres::Client;

use super::ledger::Recorded;
use super::piece::{self, Copied, How, Ways};
use super::{Options, Seen};
use crate::care::tune::Tune;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::status::{Level, TableState};
use crate::pause::{self, Pause};
use crate::timescale::target as to;
use crate::verify::RangeHash;

/// The first and the longest pause before a piece is tried again after an outage.
const BACKOFF: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// What all workers have in common.
pub(super) struct Shared<'a> {
    options: &'a Options,
    seen: &'a Seen,
    name: &'a str,
    board: &'a StatusBoard,
    pause: &'a Pause,
    tune: &'a Tune,
    /// Table and piece.
    waiting: Mutex<VecDeque<(usize, usize)>>,
    done: Mutex<Done>,
    /// Pieces of each table that are not there yet.
    left: Vec<Mutex<usize>>,
}

/// What was done.
#[derive(Default)]
pub(super) struct Done {
    pub(super) how: Vec<How>,
    pub(super) compressed: usize,
}

impl<'a> Shared<'a> {
    pub(super) fn new(
        options: &'a Options,
        seen: &'a Seen,
        name: &'a str,
        board: &'a StatusBoard,
        pause: &'a Pause,
        tune: &'a Tune,
        known: &[Recorded],
    ) -> Shared<'a> {
        let copied: HashSet<(&str, &str)> = known
            .iter()
            .filter(|piece| piece.copied)
            .map(|piece| (piece.relation.as_str(), piece.place.as_str()))
            .collect();
        let mut waiting = VecDeque::new();
        let mut left = Vec::new();
        for (at, work) in seen.work.iter().enumerate() {
            let name = work.table.qualified();
            let open =
                (0..work.pieces.len()).filter(|piece| !copied.contains(&(&name, work.pieces[*piece].place.as_str())));
            let before = waiting.len();
            waiting.extend(open.map(|piece| (at, piece)));
            left.push(Mutex::new(waiting.len() - before));
        }
        let (waiting, done) = (Mutex::new(waiting), Mutex::default());
        Shared { options, seen, name, board, pause, tune, waiting, done, left }
    }

    /// Brings all of them.
    ///
    /// # Errors
    /// The first error that trying again does not help; the pieces that were committed stay.
    pub(super) async fn run(self) -> Result<Done> {
        // What the tables have in common is asked once for each.
        let mut hashes = Vec::new();
        for work in &self.seen.work {
            hashes.push(RangeHash::new((&work.table, &self.seen.source), (&work.table, &self.seen.target)).await?);
        }
        let jobs = *self.tune.copy_jobs().borrow();
        self.board.set_copy_jobs(jobs);
        let mut workers = Vec::new();
        for _ in 0..jobs.max(1) {
            workers.push(self.worker(&hashes));
        }
        let watchdog = crate::copy::watchdog::run(&self.options.source, self.name, self.board);
        let outcome = tokio::select! {
            outcome = try_join_all(workers) => outcome,
            never = watchdog => match never {},
        };
        self.board.set_copy_jobs(0);
        outcome?;
        Ok(self.done.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Boxed: its type must not depend on a lifetime, or the whole could not be spawned.
    fn worker<'b>(&'b self, hashes: &'b [RangeHash]) -> Pin<Box<dyn Future<Output = Result<()>> + Send + 'b>> {
        Box::pin(self.work(hashes))
    }

    async fn work(&self, hashes: &[RangeHash]) -> Result<()> {
        let mut sessions: Option<(Client, Client)> = None;
        let mut paused = self.pause.subscribe();
        let mut backoff = BACKOFF;
        loop {
            let next = lock(&self.waiting).pop_front();
            let Some(next) = next else { return Ok(()) };
            loop {
                pause::copy_may_go_on(&mut paused).await;
                match self.piece(&mut sessions, hashes, next).await {
                    Ok(()) => {
                        backoff = BACKOFF;
                        break;
                    }
                    Err(error) if error.is_transient() => {
                        self.board.event(Level::Warn, format!("trying again: {error}"));
                        tokio::time::sleep(backoff).await;
                        backoff = (backoff * 2).min(BACKOFF_MAX);
                        // It may have been committed all the same, and only the answer was lost.
                        sessions = None;
                        if self.is_there(next).await.unwrap_or(false) {
                            self.note(next, How::Found, 0);
                            break;
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }

    async fn is_there(&self, (table, piece): (usize, usize)) -> Result<bool> {
        let work = &self.seen.work[table];
        let target = self.options.target.connect(self.name).await?;
        let statement = "SELECT copied FROM walferry.backfill_piece WHERE relation = $1 AND place = $2";
        let row = target.query_one(statement, &[&work.table.qualified(), &work.pieces[piece].place]).await?;
        Ok(row.get(0))
    }

    async fn piece(
        &self,
        sessions: &mut Option<(Client, Client)>,
        hashes: &[RangeHash],
        (table, at): (usize, usize),
    ) -> Result<()> {
        if sessions.as_ref().is_none_or(|(source, target)| source.is_closed() || target.is_closed()) {
            *sessions =
                Some(tokio::try_join!(self.options.source.connect(self.name), self.options.target.connect(self.name))?);
        }
        let Some((source, target)) = sessions.as_ref() else {
            return Err(Error::new(ErrorKind::Other, "there is no session"));
        };
        let work = &self.seen.work[table];
        let ways = Ways {
            work,
            there: &self.seen.there[table],
            extension_schema: self.seen.extension.as_deref(),
            hash: &hashes[table],
            role: self.seen.role,
            on_conflict: self.options.on_conflict,
            pace: self.tune.pace(),
        };
        let begin_part = || self.board.table(work.table.relid).map(|progress| progress.begin_part());
        let Copied { how, rows, to_compress } =
            piece::copy(&ways, &work.pieces[at], source, target, begin_part).await?;
        tracing::debug!(
            table = work.table.qualified(),
            piece = work.pieces[at].place,
            how = how.name(),
            rows,
            "a piece is there"
        );
        let mut compressed = 0;
        if let (Some(chunk), Some(schema)) = (to_compress, &self.seen.extension) {
            // Lost with a crash, it is made good at the end.
            to::compress(target, schema, &chunk).await?;
            compressed = 1;
        }
        self.note((table, at), how, compressed);
        Ok(())
    }

    fn note(&self, (table, _): (usize, usize), how: How, compressed: usize) {
        let mut done = lock(&self.done);
        done.how.push(how);
        done.compressed += compressed;
        let mut left = lock(&self.left[table]);
        *left -= 1;
        if *left == 0
            && let Some(progress) = self.board.table(self.seen.work[table].table.relid)
        {
            progress.set_state(TableState::Done);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
