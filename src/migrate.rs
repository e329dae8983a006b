//! A whole migration, phase after phase. What a phase does is in the modules; this file knows their order, and goes on where
//! the ledger says (I2).
//!
//! ```text
//!   identify ► check ► prepare ──► copy + index ──► catch up ──► finish the schema ──► follow ──► cutover
//!                        │ slot        ▲                ▲                                ▲
//!                        └────► receive into the queue, from the slot's first moment to the cutover ►
//! ```
//!
//! After the cutover, the way back is the same again with both servers in each other's place, from "follow" on (`way_back.rs`).
//!
//! Every phase can be interrupted anywhere. A transient error (a server restarts, a connection breaks) makes the phases begin
//! again from the ledger, after a pause; any other error ends the process, and the same command goes on later.

mod after_cutover;
mod background;
mod follow;
mod heal;
mod hypertables;
mod identify;
mod phases;
mod prepare;
mod repair;
mod schema_only;
mod stall;
mod standby;
mod way_back;

pub(crate) use background::{keep_status, write_status};
pub(crate) use identify::{application_name, new_id};
pub(crate) use prepare::end_sessions;
pub use schema_only::schema_only;
pub(crate) use way_back::finish_without_process;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::apply::conflict::OnConflict;
use crate::apply::gate::Gate;
use crate::care;
use crate::care::connections::Jobs;
use crate::care::tune::{COPY_JOBS, Tune};
use crate::care::wal::GivenUp;
use crate::connection::ConnectionSpec;
use crate::control::{self, ControlServer, CutoverRequest, RepairRequest, Requests};
use crate::cutover::Automatic;
use crate::error::{Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::board::{Side, StatusBoard};
use crate::observe::status::{Level, Phase as ShownPhase};
use crate::observe::{http, metrics};
use crate::pause::Pause;
use crate::queue;
use crate::record::{self, Recorder, past};
use crate::source::ddl::Key;
use crate::source::receive;
use crate::source::scope::Scope;
use crate::source::standby::Standbys;
use crate::state_directory::{LockedDirectory, StateDirectory};
use crate::target::index;
use crate::target::ledger::{self, Migration, Phase};
use crate::timescale::Caggs;
use crate::unstreamed::large_object::Owners;

/// The longest pause before the phases begin again.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// How long the server that was left may take to answer, after a cutover.
const LEFT_SERVER_MAX: Duration = Duration::from_secs(10);

/// How a migration is to be done.
#[derive(Clone)]
pub struct Config {
    /// The server that is moved away from.
    pub source: ConnectionSpec,
    /// The server that is moved to.
    pub target: ConnectionSpec,
    /// Standbys of the source that do the reading.
    pub standbys: Standbys,
    /// The state directory.
    pub directory: PathBuf,
    /// A table of more bytes is copied in ranges.
    pub split_above_bytes: u64,
    /// How indexes are built; by fewer sessions where the connections do not suffice.
    pub index: index::Options,
    /// Sessions that apply changes, where the connections suffice. Fixed when the migration begins.
    pub apply_workers: usize,
    /// Care for the source, and how much is copied at once.
    pub care: care::Options,
    /// The queue on disk.
    pub queue: queue::Options,
    /// Where metrics are served; `None` for nowhere.
    pub http_address: Option<SocketAddr>,
    /// What is brought right before it goes on.
    pub heal: Heal,
    /// Who owns what on the target, and who may do what.
    pub owners: Owners,
    /// Who wins when somebody else has written to the target.
    pub on_conflict: OnConflict,
    /// Whether tables without a usable replica identity get `REPLICA IDENTITY FULL` for the time of the migration.
    pub replica_identity_full: bool,
    /// Whether the source's TimescaleDB jobs rest for the time of the migration.
    pub pause_source_jobs: bool,
    /// What becomes of the rows of TimescaleDB's continuous aggregates. Fixed when the migration begins.
    pub caggs: Caggs,
    /// Whether a way back is made ready while following.
    pub reverse: bool,
    /// Whether DDL is replicated. Fixed when the migration begins.
    pub replicate_ddl: bool,
    /// What of the database is moved.
    pub scope: Scope,
    /// When it is to cut over by itself.
    pub automatic: Option<Automatic>,
}

impl Config {
    /// With connections that are counted, and with as many jobs as fit below the most that there may be.
    fn fitted(mut self, board: &StatusBoard) -> Result<Config> {
        let caps = self.care.caps;
        self.source = self.source.with_connections_max(caps.source);
        self.target = self.target.with_connections_max(caps.target);
        let wanted =
            Jobs { copy: self.care.copy_jobs.unwrap_or(COPY_JOBS), index: self.index.jobs, apply: self.apply_workers };
        let jobs = caps.fit(wanted)?;
        if jobs != wanted {
            let text = format!(
                "to fit below the most connections: {} copy jobs, {} index jobs, {} apply workers",
                jobs.copy, jobs.index, jobs.apply
            );
            board.event(Level::Info, text);
        }
        (self.index.jobs, self.apply_workers) = (jobs.index, jobs.apply);
        Ok(self)
    }

    /// What is done at once at the start.
    fn jobs(&self, copy: usize) -> Jobs {
        Jobs { copy, index: self.index.jobs, apply: self.apply_workers }
    }
}

/// What is compared with the source again, and copied again where it differs, before a migration goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heal {
    /// Nothing: it goes on where the ledger says.
    Nothing,
    /// These tables (`--recopy`), while the stream goes on where it is.
    Tables(Vec<String>),
    /// Every table (`walferry resync`), with a new slot.
    Everything,
}

/// A migration at work.
struct Running {
    config: Config,
    board: StatusBoard,
    directory: LockedDirectory,
    /// What all of our sessions call themselves: `walferry/` and the migration's id.
    application_name: String,
    /// What the operator holds.
    pause: Pause,
    /// How the operator wants it copied.
    tune: Tune,
    /// A snapshot waits for transactions of others (H1): nothing moves, and nothing is wrong.
    waits_for_snapshot: AtomicBool,
    /// Where the apply is held for a moment, for a comparison.
    gate: Gate,
    direction: Direction,
    /// What proves messages of DDL, once it was read: the event triggers are made only before the slot.
    ddl_key: OnceCell<Option<Key>>,
}

/// How a migration in one direction is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    /// An earlier process had cut over.
    Before,
    /// This one has.
    Now,
}

/// Which way the changes go.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Direction {
    /// From the server that is moved away from to the one that is moved to.
    There,
    /// From the one that took over, to keep the old one current.
    Back,
}

/// Migrates, until the cutover has gone through.
///
/// # Errors
/// `Blocked` when a precondition does not hold (nothing is changed then); `Interrupted` on SIGINT and SIGTERM; otherwise what
/// stopped it. Run again, it goes on.
pub async fn run(config: Config, board: &StatusBoard) -> Result<()> {
    let config = config.fitted(board)?;
    let directory = StateDirectory::at(&config.directory).lock()?;
    let shown = directory.directory().clone();
    let record = config.source.record().map(|record| record.recorder().clone());
    let mut past = None;
    if let Some(record) = &record {
        record::shorten(shown.path())?;
        record.open();
        past = Some(past::Keeper::new(shown.path(), record.clone(), board.clone()));
    }
    let outcome = tokio::select! {
        outcome = begin(config.clone(), board, directory) => outcome,
        error = stop_signal() => Err(error),
        never = async { tokio::join!(keep_past(&mut past), keep_record(&record, &config)).0 } => match never {},
    };
    let outcome = outcome.map_err(|error| match error.next_step() {
        Some(_) => error,
        None => error.hint(
            "Mend what the error names, then run the same command again: it goes on where it was, and nothing is lost.",
        ),
    });
    if let Err(error) = &outcome {
        if error.kind() == ErrorKind::Interrupted {
            board.event(Level::Info, "stopped by the operator; the same command goes on from here");
        } else {
            board.fail(error);
        }
        background::lift_fence_if_possible(&config, board).await;
    }
    background::write_status(&shown, board);
    if let Some(past) = &mut past {
        past.tick();
    }
    if let (Some(record), Ok(())) = (&record, &outcome) {
        record.write_counts();
        // The last of it; where the target does not answer, the state directory has it.
        let carried = record::ledger::Mirror::default().carry(record, &config.target, "walferry").await;
        carried.unwrap_or_else(|error| tracing::debug!(%error, "the record's copy in the ledger lacks its end"));
    }
    outcome
}

/// Keeps what happens for the report.
async fn keep_past(past: &mut Option<past::Keeper>) -> Infallible {
    match past {
        Some(past) => past.keep().await,
        None => std::future::pending().await,
    }
}

/// Keeps the record's copy in the ledger.
async fn keep_record(record: &Option<Recorder>, config: &Config) -> Infallible {
    match record {
        Some(record) => record::ledger::keep(record.clone(), config.target.clone(), "walferry").await,
        None => std::future::pending().await,
    }
}

async fn begin(config: Config, board: &StatusBoard, directory: LockedDirectory) -> Result<()> {
    board.set_phase(ShownPhase::Preparing);
    board.set_servers(config.source.describe(), config.target.describe());
    let (senders, mut requests, mut finish) = control::requests();
    let cutovers_by_itself = senders.cutovers.clone();
    board.show_connections(config.source.connections(), config.target.connections());
    board.set_source_wal_max(config.care.source_wal_max);
    let pause = Pause::restore(directory.directory(), board);
    let copy_jobs_max = config.care.caps.copy_jobs_max(config.jobs(0));
    let tune = Tune::restore(directory.directory(), board, &config.care, copy_jobs_max)?;
    let _control = ControlServer::start(directory.directory(), board.clone(), pause.clone(), tune.clone(), senders)?;
    let _http = match config.http_address {
        Some(address) => Some(http::serve(address, board.clone(), metrics::install()?).await?),
        None => None,
    };
    let _ticker = board.start_ticker();
    let _status = background::keep_status(directory.directory().clone(), board.clone());

    let mut backoff = Backoff::new();
    let automatic = config.automatic.clone().map(|automatic| automatic.run(board.clone(), cutovers_by_itself));
    let mut automatically = JoinSet::new();
    automatic.map(|automatic| automatically.spawn(automatic.in_current_span()));
    let application_name = loop {
        let identified = async {
            background::let_ourselves_in(&config, directory.directory(), board).await?;
            identify::identify(&config, config.jobs(tune.now().copy_jobs), &directory, board).await
        };
        match identified.await {
            // Once begun, a server that is away for a while is waited for.
            Err(error) if error.is_transient() && directory.directory().identity()?.is_some() => {
                board.try_again(&error);
                backoff.wait().await;
            }
            identified => break identified?,
        }
    };
    let migration = Running {
        config,
        board: board.clone(),
        directory,
        application_name,
        pause,
        tune,
        waits_for_snapshot: AtomicBool::new(false),
        gate: Gate::open(),
        direction: Direction::There,
        ddl_key: OnceCell::new(),
    };
    // Boxed, as below: the states of whole migrations together are more than a thread's stack should hold.
    let over = tokio::select! {
        outcome = Box::pin(migration.go(&mut requests)) => outcome?,
        never = way_back::refuse_to_finish(&mut finish) => match never {},
    };
    Box::pin(migration.keep_the_old_primary_current(over, &mut requests, &mut finish)).await
}

impl Running {
    /// All that comes after the check.
    async fn go(&self, requests: &mut Requests) -> Result<Over> {
        let mut backoff = Backoff::new();
        let mut heal = self.config.heal.clone();
        let taken_up = loop {
            match self.take_up(&mut heal).await {
                Err(error) if error.is_transient() => {
                    self.board.try_again(&error);
                    backoff.wait().await;
                }
                taken_up => break taken_up?,
            }
        };
        let Some((migration, mut held, applied)) = taken_up else { return self.is_over().await };

        let start = migration.consistent_point.ok_or_else(|| Error::new(ErrorKind::Other, "the ledger has no slot"))?;
        self.directory.discard_queues(Some(&migration.queue))?;
        let directory = self.directory.directory().queue(&migration.queue);
        let (queue, appender) = match queue::open(&directory, start, self.config.queue) {
            Err(error) => return Err(self.explain(error).await),
            opened => opened?,
        };
        // What the ledger has already needs no room in the queue.
        if let Some(least) = applied.into_iter().min() {
            queue.trim(least)?;
        }
        let subscription = receive::Subscription {
            slot: migration.slot.clone(),
            publications: vec![migration.publication.clone(), migration.insert_only_publication.clone()],
            binary: migration.binary,
            source_system: migration.source_system.clone(),
            source_timeline: u32::try_from(migration.source_timeline).unwrap_or_default(),
            application_name: self.application_name.clone(),
            on_standby: self.config.standbys.stream.is_some(),
        };
        // Tasks of their own, so that receiving never waits for a phase; they end with this set.
        let mut beside = JoinSet::new();
        let (source, to_queue, board) = (self.config.stream_source().clone(), queue.clone(), self.board.clone());
        beside.spawn(receive::run(source, subscription, to_queue, appender, board).in_current_span());
        let background = Arc::new(self.background(&migration));
        let (watching, trimming, to_trim) = (Arc::clone(&background), Arc::clone(&background), queue.clone());
        beside.spawn(async move { trimming.trim(to_trim).await }.in_current_span());
        beside.spawn(async move { watching.watch_source().await }.in_current_span());
        self.watch_standby(&migration, &mut beside);
        let point_taker = self.point_taker(&migration, &queue);
        let Requests { cutovers, points, repairs } = requests;
        let outcome = tokio::select! {
            ended = beside.join_next() => match ended {
                Some(Ok(Err(error))) => Err(error),
                _ => Err(Error::new(ErrorKind::Other, "the stream from the source has ended")),
            },
            outcome = self.phases_until_cutover(&queue, &mut held, cutovers, repairs) => outcome,
            never = point_taker.serve(points) => match never {},
        };
        // The queue writes its last block before the directory's lock goes.
        beside.shutdown().await;
        match (outcome, background.given_up()) {
            // Our own stream has ended, so nothing reads from the slot any more.
            (Err(_), Some(given_up)) => Err(self.give_up(given_up).await),
            (Err(error), None) => Err(self.explain(error).await),
            (Ok(()), _) => Ok(Over::Now),
        }
    }

    async fn is_over(&self) -> Result<Over> {
        // Locks that a dead process left on the server that was left; it may be gone.
        let ending = tokio::time::timeout(LEFT_SERVER_MAX, self.end_sessions(&self.config.source)).await;
        if !matches!(ending, Ok(Ok(()))) {
            tracing::debug!("the server that was left does not answer");
        }
        background::finish_cutover(&self.config, &self.board).await?;
        self.board.set_phase(ShownPhase::CutOver);
        let text = match self.direction {
            Direction::There => "this migration has been cut over already",
            Direction::Back => "this migration has been switched back already",
        };
        self.board.event(Level::Info, text);
        Ok(Over::Before)
    }

    /// Ends what an earlier process left, prepares what is not prepared, and reads how far the apply is. May be called again
    /// after an error: what counts is in the ledger, and is read from there.
    ///
    /// `None` when it has been cut over: until it ended, a session of a walferry that was killed could still commit that decision.
    async fn take_up(&self, heal: &mut Heal) -> Result<Option<(Migration, Option<prepare::Held>, Vec<Lsn>)>> {
        // What is left on the target could still decide; once it has, the source may be gone.
        self.end_sessions(&self.config.target).await?;
        let mut target = self.target().await?;
        let migration = self.load(&target).await?;
        self.board.goes_on();
        if migration.phase == Phase::CutOver {
            return Ok(None);
        }
        self.end_sessions(&self.config.source).await?;
        self.end_sessions_on_standbys().await;
        background::lift_fence(&self.config, &self.board).await?;
        self.config.care.caps.fit_apply_workers(migration.apply_workers)?;
        ledger::renew_fingerprint(&self.config.source, &mut target, &self.application_name).await?;
        if *heal != Heal::Everything
            && let Some(given_up) = GivenUp::of(self.directory.directory(), &migration)?
        {
            return Err(self.give_up(&given_up).await);
        }
        self.let_source_jobs_rest_or_run(&mut target).await?;
        let (migration, held) = match self.prepare(&mut target, migration).await? {
            (migration, None) => self.heal(&mut target, migration, heal).await?,
            // Its snapshot is that of a new slot: nothing can be wrong yet.
            prepared => prepared,
        };
        let applied = ledger::apply_progress(&target).await?;
        // The queue is trimmed by it: the target's crash must not be able to take it back (I2).
        ledger::make_durable(&target).await?;
        Ok(Some((migration, held, applied)))
    }

    /// The phases, begun again from the ledger after each transient error.
    async fn phases_until_cutover(
        &self,
        queue: &queue::Queue,
        held: &mut Option<prepare::Held>,
        requested: &mut mpsc::Receiver<CutoverRequest>,
        repairs: &mut mpsc::Receiver<RepairRequest>,
    ) -> Result<()> {
        let mut backoff = Backoff::new();
        loop {
            let begun = std::time::Instant::now();
            let (outcome, stalled) = tokio::select! {
                outcome = Box::pin(self.phases(queue, held, requested)) => (outcome, false),
                error = self.stall() => (Err(error), true),
                request = self.repair_requested(repairs) => {
                    self.repair(request).await;
                    continue;
                }
            };
            if stalled {
                // Its session may be the silent one, and would not answer when it is asked whether it lives.
                *held = None;
            }
            match outcome {
                Err(error) if error.is_transient() => {
                    self.board.try_again(&error);
                    self.board.reconnected(Side::Target);
                    if begun.elapsed() > BACKOFF_MAX {
                        backoff = Backoff::new();
                    }
                    backoff.wait().await;
                    // What the phases had open there could still commit, and would meet what they begin again.
                    while let Err(error) = self.end_sessions(&self.config.target).await {
                        self.board.try_again(&error);
                        backoff.wait().await;
                    }
                }
                outcome => return outcome,
            }
        }
    }

    async fn phases(
        &self,
        queue: &queue::Queue,
        held: &mut Option<prepare::Held>,
        requested: &mut mpsc::Receiver<CutoverRequest>,
    ) -> Result<()> {
        // Before anything else: a cutover may have been cut off, and applications wait.
        background::lift_fence(&self.config, &self.board).await?;
        let mut target = self.target().await?;
        let migration = self.load(&target).await?;
        if migration.phase == Phase::CutOver {
            // Decided, though the answer got lost.
            background::finish_cutover(&self.config, &self.board).await?;
            self.board.set_phase(ShownPhase::CutOver);
            return Ok(());
        }
        if self.direction == Direction::Back {
            self.fit_the_old_primary(&target).await?;
        }
        if migration.post_data_restored && self.take_up_all_chunks(&mut target).await? {
            return Box::pin(self.phases(queue, held, requested)).await;
        }
        let tables = self.show_tables(&target).await?;
        if !migration.post_data_restored && migration.phase <= Phase::Copying {
            self.make_timescaledb(&target).await?;
        }
        if !migration.pre_data_restored {
            Box::pin(self.restore_pre_data(&mut target, &tables)).await?;
        }
        if migration.phase <= Phase::Copying {
            Box::pin(self.copy_and_index(&mut target, held)).await?;
        }
        *held = None;
        self.restoring(&target, false).await?;
        let mut layout = self.layout(&target, &migration).await?;
        if !migration.post_data_restored {
            self.catch_up(queue, &layout).await?;
            self.finish_schema(&mut target).await?;
            // The source may have changed tables meanwhile.
            layout = self.layout(&target, &migration).await?;
        }
        drop(target);
        self.follow(queue, &layout, requested).await
    }
}

/// Longer and longer pauses between attempts.
struct Backoff(Duration);

impl Backoff {
    fn new() -> Backoff {
        Backoff(Duration::from_millis(500))
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(BACKOFF_MAX);
    }
}

/// Waits for SIGINT or SIGTERM; answers the error with which a command then ends.
pub async fn stop_signal() -> Error {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Error::new(ErrorKind::Interrupted, "stopped by a signal")
        .hint("Nothing is lost. Run the same command again to go on.")
}
