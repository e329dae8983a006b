//! The one place where the parts of the migration say how they are doing. How all of it is read is in `board/read.rs`.

mod read;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

use crate::connection::ConnectionCount;
use crate::cutover::GivenUpTry;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::observe::history::{History, Point};
use crate::observe::lag::Pending;
use crate::observe::metrics;
use crate::observe::rates::{Counters, RateWindow};
use crate::observe::status::{
    ConflictKind, CutoverOutlook, Event, Failure, Level, Phase, Queue, Source, Target, WayBack,
};
use crate::observe::table_progress::TableProgress;
use crate::observe::wall_clock;
use crate::verify::Verification;

pub(crate) use read::LAG_UNKNOWN;

/// Events that are kept.
const EVENTS_MAX: usize = 50;
/// How often rates are sampled and metrics brought up to date.
const TICK: Duration = Duration::from_secs(1);

/// Where the migration writes how it is doing, and where everybody reads it. Clones are one board.
#[derive(Clone, Debug)]
pub struct StatusBoard {
    shared: Arc<Shared>,
}

/// A batch that the target has committed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AppliedBatch {
    /// Transactions of the source in it.
    pub transactions: u64,
    /// Changes of rows in it, before they were merged into their net effect.
    pub changes: u64,
    /// End LSN of its last transaction.
    pub end_lsn: Lsn,
    /// Commit time of its last transaction: microseconds since 2000-01-01 UTC, as the stream has it.
    pub commit_time: i64,
    /// From its first statement to its commit.
    pub elapsed: Duration,
}

/// Which server a connection goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that is moved away from.
    Source,
    /// The one that is moved to.
    Target,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    /// Where this is one of several migrations of the process: its own. Otherwise the process's.
    metrics: Option<metrics::OfDatabase>,
    received_bytes: AtomicU64,
    received_transactions: AtomicU64,
    received_changes: AtomicU64,
    source_wal_lsn: AtomicU64,
    streamed_lsn: AtomicU64,
    /// The source's clock minus ours (`started.elapsed()`), microseconds; `i64::MIN` before it was heard of.
    source_clock_offset: AtomicI64,
    /// The source's clock when it was last heard.
    source_heard_at: AtomicI64,
    connected: AtomicBool,
    reconnects: [AtomicU64; 2],
    applied_transactions: AtomicU64,
    applied_changes: AtomicU64,
    applied_batches: AtomicU64,
    serial_replays: AtomicU64,
    ddl_replayed: AtomicU64,
    /// By schema, table and kind.
    conflicts: Mutex<BTreeMap<(String, String, ConflictKind), u64>>,
    indexes_total: AtomicU64,
    indexes_done: AtomicU64,
    apply_paused: AtomicBool,
    apply_held: AtomicBool,
    copy_paused: AtomicBool,
    copy_jobs: AtomicU64,
    copy_limits: Mutex<CopyLimits>,
    /// To the source and to the target.
    connections: Mutex<Option<[ConnectionCount; 2]>>,
    pending: Mutex<Pending>,
    queue: Mutex<Queue>,
    tables: Mutex<Tables>,
    rates: Mutex<RateWindow>,
    /// What the plots show.
    history: Mutex<History>,
    text: Mutex<Text>,
}

/// What holds the copy back.
#[derive(Clone, Debug, Default)]
struct CopyLimits {
    jobs: usize,
    rate: Option<u64>,
    waits_for: Option<String>,
}

#[derive(Debug, Default)]
struct Tables {
    in_order: Vec<Arc<TableProgress>>,
    by_relid: HashMap<u32, Arc<TableProgress>>,
}

#[derive(Debug)]
struct Text {
    phase: Phase,
    /// The changes go from the server that took over to the one that was left.
    turned_back: bool,
    way_back: WayBack,
    /// Why the way back is not ready.
    way_back_lacks: Option<String>,
    /// What a cutover that went through has left to be done.
    left_by_cutover: Option<String>,
    /// Why metrics and page are not served.
    not_served: Option<String>,
    /// What is waited for and tried again.
    waits: Option<String>,
    blockers: Vec<String>,
    cutover: CutoverOutlook,
    source: Source,
    target: Target,
    events: VecDeque<Event>,
    error: Option<Failure>,
    verification: Option<Verification>,
}

impl Text {
    /// The phase of the whole: while the way back follows, the migration is cut over.
    fn shown_phase(&self) -> Phase {
        match self.phase {
            Phase::CutOver if self.turned_back => Phase::Reversed,
            Phase::Preparing | Phase::CatchingUp | Phase::Following if self.turned_back => Phase::CutOver,
            phase => phase,
        }
    }
}

impl Default for StatusBoard {
    fn default() -> StatusBoard {
        StatusBoard::new()
    }
}

impl StatusBoard {
    /// A board of a migration that prepares.
    pub fn new() -> StatusBoard {
        StatusBoard::with_metrics(None)
    }

    /// The same for one of several migrations of this process.
    ///
    /// # Errors
    /// As [`metrics::OfDatabase::new`].
    pub fn of_database(database: &str) -> Result<StatusBoard> {
        Ok(StatusBoard::with_metrics(Some(metrics::OfDatabase::new(database)?)))
    }

    fn with_metrics(metrics: Option<metrics::OfDatabase>) -> StatusBoard {
        let text = Text {
            phase: Phase::Preparing,
            turned_back: false,
            way_back: WayBack::None,
            way_back_lacks: None,
            left_by_cutover: None,
            not_served: None,
            waits: None,
            blockers: Vec::new(),
            cutover: CutoverOutlook::default(),
            source: Source::default(),
            target: Target::default(),
            events: VecDeque::with_capacity(EVENTS_MAX),
            error: None,
            verification: None,
        };
        let shared = Shared {
            started: Instant::now(),
            metrics,
            received_bytes: AtomicU64::new(0),
            received_transactions: AtomicU64::new(0),
            received_changes: AtomicU64::new(0),
            source_wal_lsn: AtomicU64::new(0),
            streamed_lsn: AtomicU64::new(0),
            source_clock_offset: AtomicI64::new(i64::MIN),
            source_heard_at: AtomicI64::new(i64::MIN),
            connected: AtomicBool::new(false),
            reconnects: Default::default(),
            applied_transactions: AtomicU64::new(0),
            applied_changes: AtomicU64::new(0),
            applied_batches: AtomicU64::new(0),
            serial_replays: AtomicU64::new(0),
            ddl_replayed: AtomicU64::new(0),
            conflicts: Default::default(),
            indexes_total: AtomicU64::new(0),
            indexes_done: AtomicU64::new(0),
            apply_paused: AtomicBool::new(false),
            apply_held: AtomicBool::new(false),
            copy_paused: AtomicBool::new(false),
            copy_jobs: AtomicU64::new(0),
            copy_limits: Mutex::default(),
            connections: Mutex::default(),
            pending: Mutex::default(),
            queue: Mutex::default(),
            tables: Mutex::default(),
            rates: Mutex::default(),
            history: Mutex::default(),
            text: Mutex::new(text),
        };
        StatusBoard { shared: Arc::new(shared) }
    }

    /// Says what the migration does now, as an event.
    pub fn set_phase(&self, phase: Phase) {
        let changed = {
            let mut text = lock(&self.shared.text);
            text.waits = None;
            std::mem::replace(&mut text.phase, phase) != phase
        };
        if changed {
            let shown = lock(&self.shared.text).shown_phase();
            self.event(Level::Info, format!("phase: {}", shown.title()));
        }
    }

    /// From now on it is about the way back: from the server that took over to the one that was left, as `set_servers` would name them.
    pub fn turn_back(&self, source: impl Into<String>, target: impl Into<String>) {
        *lock(&self.shared.tables) = Tables::default();
        *lock(&self.shared.pending) = Pending::default();
        *lock(&self.shared.queue) = Queue::default();
        self.set_indexes(0, 0);
        for position in [&self.shared.source_wal_lsn, &self.shared.streamed_lsn] {
            position.store(0, Relaxed);
        }
        self.shared.source_clock_offset.store(i64::MIN, Relaxed);
        self.set_connected(false);
        let mut text = lock(&self.shared.text);
        text.turned_back = true;
        (text.way_back, text.way_back_lacks) = (WayBack::Open, None);
        text.phase = Phase::Preparing;
        text.blockers = Vec::new();
        text.source = Source { description: source.into(), ..Source::default() };
        text.target = Target { description: target.into(), ..Target::default() };
    }

    /// Whether it is about the way back: [`StatusBoard::turn_back`].
    pub fn is_turned_back(&self) -> bool {
        lock(&self.shared.text).turned_back
    }

    /// Something does not answer, or refuses for now, and is tried again: an event, and in the status until something goes on.
    pub fn try_again(&self, error: &Error) {
        self.event(Level::Warn, format!("trying again: {error}"));
        lock(&self.shared.text).waits = Some(format!("it waits, and tries again: {error}"));
    }

    /// What was tried again goes on.
    pub fn goes_on(&self) {
        lock(&self.shared.text).waits = None;
    }

    /// What the migration does now; on the way back, as if it were a migration of its own.
    pub fn phase(&self) -> Phase {
        lock(&self.shared.text).phase
    }

    /// Keeps an event for the status, and logs it. The text must hold no secret and no row's values.
    pub fn event(&self, level: Level, text: impl Into<String>) {
        let text = text.into();
        match level {
            Level::Info => tracing::info!("{text}"),
            Level::Warn => tracing::warn!("{text}"),
            Level::Error => tracing::error!("{text}"),
        }
        let events = &mut lock(&self.shared.text).events;
        if events.len() == EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(Event { time: wall_clock::now_rfc3339(), level, text });
    }

    /// The migration stopped with an error: phase `failed`, an event, and `error` in the status.
    pub fn fail(&self, error: &Error) {
        lock(&self.shared.text).error = Some(Failure::from(error));
        self.event(Level::Error, error.to_string());
        self.set_phase(Phase::Failed);
    }

    /// How far the way back is, and why it is not ready where something is in its way.
    pub fn set_way_back(&self, way_back: WayBack, lacks: Option<String>) {
        let mut text = lock(&self.shared.text);
        (text.way_back, text.way_back_lacks) = (way_back, lacks);
    }

    /// What a cutover that went through has left to be done, where there is something.
    pub fn set_left_by_cutover(&self, left: Option<String>) {
        lock(&self.shared.text).left_by_cutover = left;
    }

    /// Why metrics and page are not served, while they are not.
    pub fn set_not_served(&self, why: Option<String>) {
        lock(&self.shared.text).not_served = why;
    }

    /// What besides the phase, a pause and a lost source stands in the way of a cutover.
    pub fn set_blockers(&self, blockers: Vec<String>) {
        lock(&self.shared.text).blockers = blockers;
    }

    /// What was measured of the way that a cutover waits for.
    pub fn set_expected_downtime(&self, downtime_ms: f64, marker_ms: f64, measured_at: String) {
        let mut text = lock(&self.shared.text);
        let last_given_up = text.cutover.last_given_up.take();
        text.cutover = CutoverOutlook {
            expected_downtime_ms: Some(downtime_ms),
            marker_ms: Some(marker_ms),
            measured_at: Some(measured_at),
            last_given_up,
        };
    }

    /// The cutover that was given up last.
    pub fn set_given_up(&self, given_up: GivenUpTry) {
        lock(&self.shared.text).cutover.last_given_up = Some(given_up);
    }

    /// Says what the last comparison of both sides came to.
    pub fn set_verification(&self, verification: Option<Verification>) {
        lock(&self.shared.text).verification = verification;
    }

    /// Names both servers: host, port, database, version; no user, no password.
    pub fn set_servers(&self, source: impl Into<String>, target: impl Into<String>) {
        let mut text = lock(&self.shared.text);
        text.source.description = source.into();
        text.target.description = target.into();
    }

    /// Adds a table to copy, by its OID on the source; the same one again is the one that is there.
    pub fn add_table(&self, relid: u32, schema: &str, name: &str, bytes_estimated: u64) -> Arc<TableProgress> {
        let mut tables = lock(&self.shared.tables);
        if let Some(table) = tables.by_relid.get(&relid) {
            return Arc::clone(table);
        }
        let table = Arc::new(TableProgress::new(schema, name, bytes_estimated));
        tables.in_order.push(Arc::clone(&table));
        tables.by_relid.insert(relid, Arc::clone(&table));
        table
    }

    /// A table that was added.
    pub fn table(&self, relid: u32) -> Option<Arc<TableProgress>> {
        lock(&self.shared.tables).by_relid.get(&relid).cloned()
    }

    /// Says how many indexes and constraints there are to build, and how many an earlier process built.
    pub fn set_indexes(&self, total: u64, done: u64) {
        self.shared.indexes_total.store(total, Relaxed);
        self.shared.indexes_done.store(done, Relaxed);
    }

    /// One more index or constraint is built.
    pub fn index_done(&self) {
        self.shared.indexes_done.fetch_add(1, Relaxed);
    }

    /// The positions from which a process goes on: the end of the last transaction in the queue, and of the last one
    /// applied. Also for a new direction, whose LSNs are another server's.
    pub fn resume_stream(&self, received_lsn: Lsn, applied_lsn: Lsn) {
        self.shared.source_wal_lsn.store(received_lsn.max(applied_lsn).0, Relaxed);
        self.shared.streamed_lsn.store(0, Relaxed);
        self.shared.source_clock_offset.store(i64::MIN, Relaxed);
        self.shared.source_heard_at.store(i64::MIN, Relaxed);
        lock(&self.shared.pending).resume(received_lsn, applied_lsn);
    }

    /// The source does or does not send to us now.
    pub fn set_connected(&self, connected: bool) {
        self.shared.connected.store(connected, Relaxed);
    }

    /// A lost connection was made again.
    pub fn reconnected(&self, side: Side) {
        self.shared.reconnects[side as usize].fetch_add(1, Relaxed);
    }

    /// Bytes came from the source.
    pub fn received_bytes(&self, bytes: u64) {
        self.shared.received_bytes.fetch_add(bytes, Relaxed);
    }

    /// A transaction was received whole. `commit_time` is the stream's: microseconds since 2000-01-01 UTC.
    pub fn received_transaction(&self, changes: u64, end_lsn: Lsn, commit_time: i64) {
        self.shared.received_transactions.fetch_add(1, Relaxed);
        self.shared.received_changes.fetch_add(changes, Relaxed);
        self.shared.source_wal_lsn.fetch_max(end_lsn.0, Relaxed);
        lock(&self.shared.pending).received(end_lsn, commit_time);
    }

    /// A keepalive said how far the source has sent its WAL, and what its clock says: microseconds since 2000-01-01 UTC.
    ///
    /// Not for the header of a data message: its position lies inside a transaction that is not received whole yet.
    pub fn heard_from_source(&self, sent_lsn: Lsn, server_time: i64) {
        self.shared.source_wal_lsn.fetch_max(sent_lsn.0, Relaxed);
        self.shared.streamed_lsn.fetch_max(sent_lsn.0, Relaxed);
        self.source_clock(server_time);
    }

    /// The header of a data message said what the source's clock says: microseconds since 2000-01-01 UTC.
    pub fn source_clock(&self, server_time: i64) {
        self.shared.source_heard_at.store(server_time, Relaxed);
        self.shared.source_clock_offset.store(server_time - self.our_clock(), Relaxed);
    }

    /// What a query on the source said: its WAL position, and how many bytes of WAL our slot keeps.
    pub fn source_position(&self, wal_lsn: Lsn, retained_wal_bytes: u64) {
        self.shared.source_wal_lsn.fetch_max(wal_lsn.0, Relaxed);
        lock(&self.shared.text).source.retained_wal_bytes = Some(retained_wal_bytes);
    }

    /// How the queue on disk is.
    pub fn set_queue(&self, queue: Queue) {
        *lock(&self.shared.queue) = queue;
    }

    /// The target has committed a batch.
    pub fn applied(&self, batch: AppliedBatch) {
        self.shared.applied_transactions.fetch_add(batch.transactions, Relaxed);
        self.shared.applied_changes.fetch_add(batch.changes, Relaxed);
        self.shared.applied_batches.fetch_add(1, Relaxed);
        lock(&self.shared.pending).applied(batch.end_lsn, batch.commit_time);
        match &self.shared.metrics {
            Some(own) => own.record_apply_batch(batch.elapsed),
            None => metrics::record_apply_batch(batch.elapsed),
        }
    }

    /// The target refused a batch, and it was replayed row by row.
    pub fn serial_replay(&self) {
        self.shared.serial_replays.fetch_add(1, Relaxed);
    }

    /// Statements of DDL were replayed.
    pub fn ddl_replayed(&self, statements: u64) {
        self.shared.ddl_replayed.fetch_add(statements, Relaxed);
    }

    /// Changes of a table did not meet the rows they should have.
    pub fn conflicts(&self, schema: &str, table: &str, kind: ConflictKind, changes: u64) {
        *lock(&self.shared.conflicts).entry((schema.to_owned(), table.to_owned(), kind)).or_insert(0) += changes;
    }

    /// The operator holds or releases the apply.
    pub fn set_apply_paused(&self, paused: bool) {
        self.shared.apply_paused.store(paused, Relaxed);
    }

    /// A comparison holds or releases the apply.
    pub fn set_apply_held(&self, held: bool) {
        self.shared.apply_held.store(held, Relaxed);
    }

    /// The operator holds or releases the copy.
    pub fn set_copy_paused(&self, paused: bool) {
        self.shared.copy_paused.store(paused, Relaxed);
    }

    /// How many parts may be copied at once, and how many bytes in a second.
    pub fn set_copy_limits(&self, jobs: usize, bytes_per_second: Option<u64>) {
        let mut limits = lock(&self.shared.copy_limits);
        (limits.jobs, limits.rate) = (jobs, bytes_per_second);
    }

    /// How many parts are copied now.
    pub fn set_copy_jobs(&self, jobs: usize) {
        self.shared.copy_jobs.store(jobs as u64, Relaxed);
    }

    /// Whom the copy waits for, if it does.
    pub fn set_copy_waits_for(&self, whom: Option<String>) {
        lock(&self.shared.copy_limits).waits_for = whom;
    }

    /// How much WAL the source may keep because of our slot, in bytes.
    pub fn set_source_wal_max(&self, bytes: Option<u64>) {
        lock(&self.shared.text).source.wal_max_bytes = bytes;
    }

    /// Shows how many connections there are.
    pub fn show_connections(&self, source: &ConnectionCount, target: &ConnectionCount) {
        *lock(&self.shared.connections) = Some([source.clone(), target.clone()]);
    }

    /// The last hour, oldest first: what the plots of the page and of the terminal begin with.
    pub fn history(&self) -> Vec<Point> {
        lock(&self.shared.history).points()
    }

    /// Samples the rates, keeps them for the plots, and brings the metrics up to date, every second until the guard is dropped. Needs a tokio runtime.
    pub fn start_ticker(&self) -> Ticker {
        let board = self.clone();
        let task = tokio::spawn(async move {
            let mut interval = tokio::time::interval(TICK);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                board.tick(Instant::now());
                let status = board.snapshot();
                lock(&board.shared.history).add(Point::of(&status));
                match &board.shared.metrics {
                    Some(own) => own.fold_observations(),
                    None => {
                        metrics::publish(&status);
                        metrics::fold_observations();
                    }
                }
            }
        });
        Ticker { task: task.abort_handle() }
    }

    /// The metrics of this one of several migrations, as they are now; nothing for the only one.
    pub fn scrape(&self) -> String {
        self.shared.metrics.as_ref().map_or_else(String::new, |own| own.render(&self.snapshot()))
    }

    /// Takes a sample for the rates.
    pub fn tick(&self, now: Instant) {
        let copied_bytes = lock(&self.shared.tables).in_order.iter().map(|table| table.copied_bytes()).sum();
        let counters = Counters {
            copied_bytes,
            received_bytes: self.shared.received_bytes.load(Relaxed),
            applied_transactions: self.shared.applied_transactions.load(Relaxed),
            applied_changes: self.shared.applied_changes.load(Relaxed),
            lag_bytes: self.lag().bytes.unwrap_or(0),
        };
        lock(&self.shared.rates).sample(now, counters);
    }
}

/// Ends the ticker when it is dropped.
#[derive(Debug)]
pub struct Ticker {
    task: AbortHandle,
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A poisoned lock holds counts that are at worst one event old: still better than no status.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod tests;
