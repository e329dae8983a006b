//! What goes on beside the phases: trimming the queue, watching the source, writing the status down.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_postgres::types::PgLsn;

use super::{Config, Running};
use crate::care::wal::{self, OnSourceWalMax};
use crate::connection::ConnectionSpec;
use crate::crashsafe;
use crate::cutover;
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::board::StatusBoard;
use crate::observe::format::size;
use crate::observe::status::{Level, Phase, TableState};
use crate::queue::Queue;
use crate::source::slot;
use crate::state_directory::{Identity, StateDirectory};
use crate::target::ledger::{self, Migration};

const TRIM_INTERVAL: Duration = Duration::from_secs(2);
const SOURCE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a server may take to answer what costs it nothing.
const ANSWER_MAX: Duration = Duration::from_secs(30);
const STATUS_INTERVAL: Duration = Duration::from_secs(2);

/// How many tables the status has when no process answers: of tens of thousands it would be megabytes, written again and again.
const TABLES_WRITTEN_DOWN: usize = 1000;

/// The parts of a migration that the background needs.
pub(super) struct Background {
    source: ConnectionSpec,
    stream_source: ConnectionSpec,
    target: ConnectionSpec,
    application_name: String,
    slot: String,
    queue: String,
    directory: StateDirectory,
    on_source_wal_max: OnSourceWalMax,
    source_wal_max: Option<u64>,
    /// Set when the slot is to be given up.
    given_up: OnceLock<wal::GivenUp>,
    board: StatusBoard,
}

impl Running {
    pub(super) fn background(&self, migration: &Migration) -> Background {
        Background {
            source: self.config.source.clone(),
            stream_source: self.config.stream_source().clone(),
            target: self.config.target.clone(),
            application_name: self.application_name.clone(),
            slot: migration.slot.clone(),
            queue: migration.queue.clone(),
            directory: self.directory.directory().clone(),
            on_source_wal_max: self.config.care.on_source_wal_max,
            source_wal_max: self.config.care.source_wal_max,
            given_up: OnceLock::new(),
            board: self.board.clone(),
        }
    }
}

impl Background {
    /// Removes from the queue what is durable on the target (I2), until it is dropped.
    pub(super) async fn trim(&self, queue: Queue) -> Result<()> {
        loop {
            if let Err(error) = self.trim_while_connected(&queue).await {
                tracing::debug!(%error, "trimming the queue waits for the target");
            }
            tokio::time::sleep(TRIM_INTERVAL).await;
        }
    }

    async fn trim_while_connected(&self, queue: &Queue) -> Result<()> {
        let target = self.target.connect(&self.application_name).await?;
        let mut committed: Option<(Lsn, Lsn)> = None;
        loop {
            // The insert position is read after the progress became visible, so its commit record is before it.
            let row = answer(target.query_typed_one(
                "SELECT (SELECT min(applied) FROM walferry.apply_progress), pg_catalog.pg_current_wal_insert_lsn(), \
                        pg_catalog.pg_current_wal_flush_lsn()",
                &[],
            ))
            .await?;
            let (applied, insert, flush): (Option<PgLsn>, PgLsn, PgLsn) = (row.get(0), row.get(1), row.get(2));
            match committed {
                // Flushed past the commit: the target's crash can no longer take it back.
                Some((applied, insert)) if Lsn::from(flush) >= insert => {
                    queue.trim(applied)?;
                    committed = None;
                }
                Some(_) => {}
                None => committed = applied.map(|applied| (applied.into(), insert.into())),
            }
            tokio::time::sleep(TRIM_INTERVAL).await;
        }
    }

    /// Shows where the source's WAL is and how much of it our slot holds back, until it is dropped.
    ///
    /// # Errors
    /// `Blocked` when it is so much that the slot is to be given up, which is written down then.
    pub(super) async fn watch_source(&self) -> Result<()> {
        let mut watch = wal::Watch::new(Instant::now());
        loop {
            match self.watch_source_while_connected(&mut watch).await {
                Err(error) if self.given_up().is_some() => return Err(error),
                Err(error) => tracing::debug!(%error, "watching the source waits for a connection"),
                Ok(()) => {}
            }
            tokio::time::sleep(SOURCE_INTERVAL).await;
        }
    }

    async fn watch_source_while_connected(&self, watch: &mut wal::Watch) -> Result<()> {
        let source = self.source.connect(&self.application_name).await?;
        let standby = match self.stream_source.describe() != self.source.describe() {
            true => Some(self.stream_source.connect(&self.application_name).await?),
            false => None,
        };
        loop {
            let position: PgLsn =
                answer(source.query_typed_one("SELECT pg_catalog.pg_current_wal_lsn()", &[])).await?.get(0);
            // A slot that was invalidated keeps nothing back, and that is no good news: the stream says what it is.
            let state = answer(slot::state(standby.as_ref().unwrap_or(&source), &self.slot)).await?;
            if let Some(retained) = state.and_then(|state| state.retained_bytes) {
                let retained = retained.max(0).cast_unsigned();
                self.board.source_position(position.into(), retained);
                self.judge(watch, retained)?;
            }
            tokio::time::sleep(SOURCE_INTERVAL).await;
        }
    }
}

impl Background {
    /// Says when our slot keeps too much WAL, or gives it up.
    fn judge(&self, watch: &mut wal::Watch, retained: u64) -> Result<()> {
        let Some(max) = self.source_wal_max else { return Ok(()) };
        match watch.judge(retained, max) {
            wal::Verdict::Nothing => {}
            wal::Verdict::FineAgain => {
                let text = format!("the source keeps {} of WAL for our slot: no longer too much", size(retained));
                self.board.event(Level::Info, text);
            }
            wal::Verdict::TooMuch => {
                if let Some(text) = self.board.snapshot().source.too_much_wal() {
                    self.board.event(Level::Warn, text);
                }
            }
        }
        let gives_up = watch.gives_up(retained, max, Instant::now());
        // A cutover ends within seconds, and with it the need for the slot.
        let switches = matches!(self.board.phase(), Phase::CuttingOver | Phase::CutOver);
        let wanted = self.on_source_wal_max == OnSourceWalMax::GiveUp && !switches;
        if gives_up && wanted {
            let given_up = wal::GivenUp {
                slot: self.slot.clone(),
                queue: self.queue.clone(),
                retained_bytes: retained,
                max_bytes: max,
            };
            // Where that cannot be written down, the source comes first all the same: a later start then says that the slot is gone.
            if let Err(error) = given_up.write(&self.directory) {
                self.board.event(Level::Warn, error.to_string());
            }
            return Err(self.given_up.get_or_init(|| given_up).error());
        }
        Ok(())
    }

    /// The slot, when it is to be given up.
    pub(super) fn given_up(&self) -> Option<&wal::GivenUp> {
        self.given_up.get()
    }
}

impl Running {
    /// Drops the slot that was given up, however often that has to be tried; answers what the migration ends with.
    pub(super) async fn give_up(&self, given_up: &wal::GivenUp) -> Error {
        let mut backoff = super::Backoff::new();
        loop {
            let dropped = async {
                let source = self.config.stream_source().connect(&self.application_name).await?;
                slot::drop(&source, &given_up.slot).await
            };
            match dropped.await {
                Ok(()) => break,
                Err(error) if error.is_transient() => {
                    self.board.event(Level::Warn, format!("dropping the slot, trying again: {error}"));
                    backoff.wait().await;
                }
                Err(error) => {
                    let by_hand = format!("Run on the source: SELECT pg_drop_replication_slot('{}')", given_up.slot);
                    return given_up.error().context(format!("the slot could not be dropped ({error})")).hint(by_hand);
                }
            }
        }
        // A cutover may have been given up with its fence still there, and nobody else would lift it now.
        while let Err(error) = lift_fence(&self.config, &self.board).await {
            self.board.event(Level::Warn, format!("looking for a cutover's fence, trying again: {error}"));
            backoff.wait().await;
        }
        given_up.error()
    }
}

/// A query that takes no time, on a connection that may be dead without looking it.
async fn answer<T, E: Into<Error>>(query: impl Future<Output = Result<T, E>>) -> Result<T> {
    match tokio::time::timeout(ANSWER_MAX, query).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(Error::new(ErrorKind::Transient, format!("no answer within {} seconds", ANSWER_MAX.as_secs()))),
    }
}

/// Opens the source again if a cutover was cut off before its decision, and says so.
///
/// # Errors
/// Whatever the servers say: then the fence may still be up, and this has to be called again.
pub(super) async fn lift_fence(config: &Config, board: &StatusBoard) -> Result<()> {
    let target = config.target.connect("walferry").await?;
    let Some(migration) = ledger::load(&target).await? else { return Ok(()) };
    if !cutover::is_fence_left_over(&target).await? {
        return Ok(());
    }
    let name = super::application_name(&migration.id);
    if let Some(lifted) =
        Box::pin(cutover::lift_left_over_fence(&config.source, &target, &config.target, &name)).await?
    {
        let text = format!(
            "a cutover had been cut off during {} ({}): the source's database is open to writers again",
            lifted.given_up.step, lifted.given_up.reason
        );
        board.event(Level::Warn, text);
        if let Some(error) = lifted.on_abort {
            board.event(Level::Warn, error.to_string());
        }
        board.set_given_up(lifted.given_up);
    }
    Ok(())
}

/// Behind the fence `connections` the source refuses us too: it is opened before anything else is asked of it.
///
/// # Errors
/// Whatever the servers say.
pub(super) async fn let_ourselves_in(config: &Config, directory: &StateDirectory, board: &StatusBoard) -> Result<()> {
    let Some(identity) = directory.identity()? else { return Ok(()) };
    // On the way back it is the new primary that refuses, and the ledger that says so stands on the old one, which may be gone.
    if let Err(error) = let_in(&config.clone().reversed(), &identity, board).await {
        tracing::debug!(%error, "could not look whether a switchback was cut off");
    }
    let_in(config, &identity, board).await
}

async fn let_in(config: &Config, identity: &Identity, board: &StatusBoard) -> Result<()> {
    let target = config.target.connect("walferry").await?;
    let ours = ledger::load(&target).await?.is_some_and(|migration| migration.id == identity.id);
    if !ours || !cutover::may_refuse_connections(&target).await? {
        return Ok(());
    }
    finish_cutover(config, board).await?;
    lift_fence(config, board).await
}

/// Does what a cutover that went through had left to do when its process died.
///
/// # Errors
/// Whatever the target says.
pub(super) async fn finish_cutover(config: &Config, board: &StatusBoard) -> Result<()> {
    let target = config.target.connect("walferry").await?;
    for problem in Box::pin(cutover::finish_pending(&config.source, &target, &config.target)).await? {
        board.event(Level::Warn, problem);
    }
    Ok(())
}

/// A process that was told to stop has seconds, and a server that does not answer takes all of them.
const LIFT_AT_THE_END: Duration = Duration::from_secs(3);

/// The same at the end of the process, when it cannot wait. Done at the next start when it cannot be done now.
pub(super) async fn lift_fence_if_possible(config: &Config, board: &StatusBoard) {
    let both_ways = async {
        lift_fence(config, board).await?;
        let migration = ledger::load(&config.target.connect("walferry").await?).await?;
        match migration {
            Some(migration) if migration.way_back == Some(ledger::WayBack::Armed) => {
                lift_fence(&config.clone().reversed(), board).await
            }
            _ => Ok(()),
        }
    };
    match tokio::time::timeout(LIFT_AT_THE_END, both_ways).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "could not look for a fence that was left over"),
        Err(_) => tracing::debug!("looking for a fence that was left over took too long"),
    }
}

/// Writes the status into the state directory every few seconds, so that `walferry status` has something to show when no
/// process answers. Ends when the handle is dropped, and nothing of it is written after that.
pub(crate) fn keep_status(directory: StateDirectory, board: StatusBoard) -> StatusWriter {
    let goes_on = Arc::new(Mutex::new(true));
    let may_write = Arc::clone(&goes_on);
    let task = tokio::spawn(async move {
        loop {
            {
                let may_write = may_write.lock().unwrap_or_else(PoisonError::into_inner);
                if *may_write {
                    write_status(&directory, &board);
                }
            }
            tokio::time::sleep(STATUS_INTERVAL).await;
        }
    });
    StatusWriter { task, goes_on }
}

/// See [`keep_status`].
pub(crate) struct StatusWriter {
    task: JoinHandle<()>,
    goes_on: Arc<Mutex<bool>>,
}

impl Drop for StatusWriter {
    fn drop(&mut self) {
        // Waits for the one that is being written, a few milliseconds: else that one, older, could replace the last one.
        *self.goes_on.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.task.abort();
    }
}

/// Writes the status down once.
pub(crate) fn write_status(directory: &StateDirectory, board: &StatusBoard) {
    let mut status = board.snapshot();
    // Those that are not complete first; the totals stand beside them.
    status.tables.sort_by_key(|table| table.state == TableState::Done);
    status.tables.truncate(TABLES_WRITTEN_DOWN);
    let written = serde_json::to_vec(&status).map(|json| crashsafe::replace(&directory.status(), &json));
    if let Ok(Err(error)) = written {
        tracing::debug!(%error, "the status could not be written down");
    }
}
