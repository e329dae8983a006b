//! The one place where the parts of the migration say how they are doing.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

use crate::connection::ConnectionCount;
use crate::cutover::GivenUpTry;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::observe::lag::Pending;
use crate::observe::metrics;
use crate::observe::rates::{Counters, RateWindow, Rates};
use crate::observe::status::{
    Apply, ConflictKind, ConnectionNumbers, Connections, Copy, CutoverOutlook, Direction, Event, Failure, Indexes, Lag,
    Level, Phase, Queue, STATUS_VERSION, Source, Status, Stream, Table, TableConflicts, TableState, Target, WayBack,
};
use crate::observe::table_progress::TableProgress;
use crate::observe::wall_clock;
use crate::verify::Verification;

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
            text: Mutex::new(text),
        };
        StatusBoard { shared: Arc::new(shared) }
    }

    /// Says what the migration does now, as an event.
    pub fn set_phase(&self, phase: Phase) {
        let changed = {
            let mut text = lock(&self.shared.text);
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

    /// Samples the rates and brings the metrics up to date, every second until the guard is dropped. Needs a tokio runtime.
    pub fn start_ticker(&self) -> Ticker {
        let board = self.clone();
        let task = tokio::spawn(async move {
            let mut interval = tokio::time::interval(TICK);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                board.tick(Instant::now());
                match &board.shared.metrics {
                    Some(own) => own.fold_observations(),
                    None => {
                        metrics::publish(&board.snapshot());
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

    /// Everything, as it is now.
    pub fn snapshot(&self) -> Status {
        let rates = lock(&self.shared.rates).rates();
        let tables = self.tables();
        let copy = self.copy(&rates, &tables);
        let lag = self.lag();
        let (stream, apply) = (self.stream(&rates), self.apply(&rates));
        let queue = lock(&self.shared.queue).clone();
        let text = lock(&self.shared.text);
        let blockers = blockers(&text, &stream, &apply, &queue);
        let eta_seconds = eta_seconds(text.phase, &copy, &lag, &rates);
        let wal_lsn = Lsn(self.shared.source_wal_lsn.load(Relaxed));
        let source = Source { wal_lsn, ..text.source.clone() };
        let reconnects = self.shared.reconnects[Side::Target as usize].load(Relaxed);
        Status {
            version: STATUS_VERSION,
            phase: text.shown_phase(),
            way_back: text.way_back,
            direction: if text.turned_back { Direction::Back } else { Direction::There },
            ready_to_cutover: blockers.is_empty(),
            blockers,
            attention: attention(&source, &copy, &text),
            process_alive: true,
            updated_at: wall_clock::now_rfc3339(),
            lag,
            copy,
            tables,
            indexes: Indexes {
                total: self.shared.indexes_total.load(Relaxed),
                done: self.shared.indexes_done.load(Relaxed),
            },
            queue,
            stream,
            apply,
            source,
            target: Target { reconnects, ..text.target.clone() },
            connections: self.connections(),
            cutover: text.cutover.clone(),
            verification: text.verification.clone(),
            events: text.events.iter().cloned().collect(),
            error: text.error.clone(),
            eta_seconds,
        }
    }

    fn tables(&self) -> Vec<Table> {
        lock(&self.shared.tables).in_order.iter().map(|table| table.snapshot()).collect()
    }

    fn copy(&self, rates: &Rates, tables: &[Table]) -> Copy {
        let limits = lock(&self.shared.copy_limits).clone();
        let copied = |state: TableState| matches!(state, TableState::Indexing | TableState::Done);
        Copy {
            tables_total: tables.len() as u64,
            tables_done: tables.iter().filter(|table| copied(table.state)).count() as u64,
            bytes_total: tables.iter().map(|table| table.bytes_total).sum(),
            bytes_done: tables.iter().map(|table| table.bytes_done).sum(),
            rows_done: tables.iter().map(|table| table.rows_done).sum(),
            bytes_per_second: rates.copied_bytes,
            paused: self.shared.copy_paused.load(Relaxed),
            jobs: self.shared.copy_jobs.load(Relaxed),
            jobs_max: limits.jobs as u64,
            rate_max_bytes_per_second: limits.rate,
            waits_for: limits.waits_for,
        }
    }

    fn connections(&self) -> Connections {
        let numbers = |count: &ConnectionCount| ConnectionNumbers {
            now: count.now() as u64,
            peak: count.peak() as u64,
            max: count.max().map(|max| max as u64),
        };
        let counts = lock(&self.shared.connections);
        counts.as_ref().map_or_else(Connections::default, |[source, target]| Connections {
            source: numbers(source),
            target: numbers(target),
        })
    }

    fn stream(&self, rates: &Rates) -> Stream {
        Stream {
            connected: self.shared.connected.load(Relaxed),
            received_lsn: lock(&self.shared.pending).received_lsn(),
            reconnects: self.shared.reconnects[Side::Source as usize].load(Relaxed),
            bytes: self.shared.received_bytes.load(Relaxed),
            transactions: self.shared.received_transactions.load(Relaxed),
            changes: self.shared.received_changes.load(Relaxed),
            bytes_per_second: rates.received_bytes,
        }
    }

    fn apply(&self, rates: &Rates) -> Apply {
        let mut conflicts_by_kind: BTreeMap<String, u64> =
            ConflictKind::ALL.iter().map(|kind| (kind.name().to_string(), 0)).collect();
        let mut conflicts_by_table = Vec::new();
        for ((schema, name, kind), &changes) in lock(&self.shared.conflicts).iter() {
            let (schema, name, kind) = (schema.clone(), name.clone(), kind.name().to_string());
            *conflicts_by_kind.entry(kind.clone()).or_insert(0) += changes;
            conflicts_by_table.push(TableConflicts { schema, name, kind, changes });
        }
        Apply {
            transactions: self.shared.applied_transactions.load(Relaxed),
            changes: self.shared.applied_changes.load(Relaxed),
            batches: self.shared.applied_batches.load(Relaxed),
            transactions_per_second: rates.applied_transactions,
            changes_per_second: rates.applied_changes,
            applied_lsn: lock(&self.shared.pending).applied_lsn(),
            serial_replays: self.shared.serial_replays.load(Relaxed),
            ddl_replayed: self.shared.ddl_replayed.load(Relaxed),
            conflicts: conflicts_by_kind.values().sum(),
            conflicts_by_kind,
            conflicts_by_table,
            paused: self.shared.apply_paused.load(Relaxed),
            held: self.shared.apply_held.load(Relaxed),
        }
    }

    fn lag(&self) -> Lag {
        // Read first: what is heard in between can then only make the lag larger.
        let streamed = Lsn(self.shared.streamed_lsn.load(Relaxed));
        let (applied, all_applied, oldest) = {
            let pending = lock(&self.shared.pending);
            (pending.applied_lsn(), pending.is_empty(), pending.oldest_commit_time())
        };
        let newest = Lsn(self.shared.source_wal_lsn.load(Relaxed));
        // Where all that was received is applied, the source has nothing for us up to the position it has sent.
        let applied = if all_applied { applied.max(streamed) } else { applied };
        let bytes = (newest > Lsn::ZERO && applied > Lsn::ZERO).then(|| newest.bytes_since(applied));

        let offset = self.shared.source_clock_offset.load(Relaxed);
        let heard_at = (offset != i64::MIN).then(|| self.shared.source_heard_at.load(Relaxed));
        let seconds = heard_at.and_then(|heard_at| {
            let since = |time: i64| (self.our_clock() + offset - time).max(0) as f64 / 1e6;
            match (self.shared.connected.load(Relaxed), all_applied) {
                (true, true) => Some(0.0),
                // Nobody knows what was committed since the source was last heard.
                (false, true) => Some(since(heard_at)),
                (_, false) => oldest.map(since),
            }
        });
        Lag { bytes, seconds }
    }

    /// Microseconds since the board was made.
    fn our_clock(&self) -> i64 {
        i64::try_from(self.shared.started.elapsed().as_micros()).unwrap_or(i64::MAX)
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

/// What stands in the way of a cutover. A migration is ready exactly when this is empty.
fn blockers(text: &Text, stream: &Stream, apply: &Apply, queue: &Queue) -> Vec<String> {
    let mut blockers = Vec::new();
    match text.phase {
        Phase::Following => {}
        Phase::CuttingOver => blockers.push("a cutover is running".to_string()),
        Phase::CutOver if text.turned_back => blockers.push("the migration was switched back".to_string()),
        Phase::CutOver => blockers.push("the cutover is done".to_string()),
        Phase::Reversed => blockers.push("the migration was switched back".to_string()),
        Phase::Failed => blockers.push("the migration failed".to_string()),
        phase => blockers.push(format!("the target does not follow yet: {}", phase.title())),
    }
    if text.phase == Phase::Following {
        if !stream.connected {
            blockers.push("the source is not connected".to_string());
        }
        if apply.paused {
            blockers.push("the apply is paused; walferry resume lets it go on".to_string());
        }
        if queue.full {
            blockers.push("the queue is full".to_string());
        }
    }
    blockers.extend(text.blockers.iter().cloned());
    blockers
}

/// What does not stop a cutover, but somebody should look after.
fn attention(source: &Source, copy: &Copy, text: &Text) -> Vec<String> {
    let waits = copy.waits_for.as_ref().map(|whom| format!("the copy waits for {whom}"));
    let way_back = text.way_back_lacks.as_ref().map(|why| format!("a cutover has no way back: {why}"));
    let texts = [waits, way_back, text.left_by_cutover.clone(), text.not_served.clone()];
    source.too_much_wal().into_iter().chain(texts.into_iter().flatten()).collect()
}

/// Seconds until the copy or the catch-up is done; `None` where nothing moves, or nobody knows.
fn eta_seconds(phase: Phase, copy: &Copy, lag: &Lag, rates: &Rates) -> Option<f64> {
    let (left, rate) = match phase {
        Phase::Copying => (copy.bytes_total.saturating_sub(copy.bytes_done), rates.copied_bytes),
        Phase::CatchingUp => (lag.bytes?, rates.lag_bytes_shrinking),
        _ => return None,
    };
    (rate > 0.0).then(|| left as f64 / rate)
}

/// A poisoned lock holds counts that are at worst one event old: still better than no status.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod tests;
