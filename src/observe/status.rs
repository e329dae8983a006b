//! The status of a migration at one moment: the object that `walferry status --json` and `/status` print.
//!
//! Others script against it. Fields are added, never renamed or removed, without a new [`Status::version`].
//! Sizes are bytes, times are seconds, positions are LSNs of the server that is the source at that moment.

mod phase;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cutover::GivenUpTry;
use crate::error::{Error, ErrorKind};
use crate::lsn::Lsn;
use crate::observe::format::size;
use crate::observe::wall_clock;
use crate::verify::Verification;

pub use phase::Phase;

/// The version of the layout below.
pub const STATUS_VERSION: u32 = 1;

/// Where the migration is and how it goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of this layout, [`STATUS_VERSION`].
    pub version: u32,
    /// What the migration is doing.
    pub phase: Phase,
    /// Which way the changes go: `back` once a way back is open. `source` is where they come from, whichever it is.
    #[serde(default)]
    pub direction: Direction,
    /// Whether a cutover has a way back.
    #[serde(default)]
    pub way_back: WayBack,
    /// Whether a cutover (on the way back: a switchback) can start now: exactly when `blockers` is empty.
    pub ready_to_cutover: bool,
    /// What stands in the way of a cutover, a sentence each.
    pub blockers: Vec<String>,
    /// What somebody should look after though it does not stop a cutover, a sentence each.
    #[serde(default)]
    pub attention: Vec<String>,
    /// Whether the process of the migration runs. What reads a status from a dead one sets it to false.
    pub process_alive: bool,
    /// When this was taken: RFC 3339, UTC.
    pub updated_at: String,
    /// How far the target is behind the source.
    pub lag: Lag,
    /// The initial copy, over all tables.
    pub copy: Copy,
    /// The initial copy, each table.
    pub tables: Vec<Table>,
    /// Indexes and constraints.
    pub indexes: Indexes,
    /// The queue on disk.
    pub queue: Queue,
    /// The stream from the source into the queue.
    pub stream: Stream,
    /// The way from the queue to the target.
    pub apply: Apply,
    /// The server that is moved away from.
    pub source: Source,
    /// The server that is moved to.
    pub target: Target,
    /// Our connections to both servers.
    #[serde(default)]
    pub connections: Connections,
    /// What is known of a cutover that is to come.
    #[serde(default)]
    pub cutover: CutoverOutlook,
    /// What the last comparison of both sides came to; null where there was none.
    #[serde(default)]
    pub verification: Option<Verification>,
    /// The newest events, oldest first.
    pub events: Vec<Event>,
    /// Why the migration stopped, if it did.
    pub error: Option<Failure>,
    /// Seconds until the running copy or catch-up is done at the present pace; null where there is no telling.
    pub eta_seconds: Option<f64>,
}

impl Status {
    /// The status of a migration of which nothing is known yet but its phase, and which does not run.
    pub fn not_running(phase: Phase) -> Status {
        Status {
            version: STATUS_VERSION,
            phase,
            direction: Direction::There,
            way_back: WayBack::None,
            ready_to_cutover: false,
            blockers: vec!["the migration is not running".to_string()],
            attention: Vec::new(),
            process_alive: false,
            updated_at: wall_clock::now_rfc3339(),
            lag: Lag::default(),
            copy: Copy::default(),
            tables: Vec::new(),
            indexes: Indexes::default(),
            queue: Queue::default(),
            stream: Stream::default(),
            apply: Apply::default(),
            source: Source::default(),
            target: Target::default(),
            connections: Connections::default(),
            cutover: CutoverOutlook::default(),
            verification: None,
            events: Vec::new(),
            error: None,
            eta_seconds: None,
        }
    }
}

/// Which way the changes go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From the server that is moved away from to the one that is moved to.
    #[default]
    There,
    /// From the server that took over to the one that was left, which is kept current.
    Back,
}

/// How far the way back is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WayBack {
    /// There is none: not yet, or not any more.
    #[default]
    None,
    /// Its slot is being made.
    Preparing,
    /// A cutover arms it.
    Ready,
    /// It cannot be, as things are; `attention` says why.
    Impossible,
    /// The old primary is kept current.
    Open,
}

/// How far the target is behind the source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// WAL between what is applied and the newest position known of the source; null before both are known.
    pub bytes: Option<u64>,
    /// Age, by the source's clock, of the oldest transaction that was received and is not applied; 0 when all are.
    /// While the source is not connected: at least the time since it was last heard. Null where there is no telling.
    pub seconds: Option<f64>,
}

/// The initial copy, over all tables.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Copy {
    /// Tables to copy.
    pub tables_total: u64,
    /// Tables whose rows are all on the target.
    pub tables_done: u64,
    /// Bytes to copy: an estimate, replaced table by table with what it came to.
    pub bytes_total: u64,
    /// Bytes copied.
    pub bytes_done: u64,
    /// Rows copied.
    pub rows_done: u64,
    /// Bytes copied in a second, over the last ten seconds.
    pub bytes_per_second: f64,
    /// Whether the operator holds the copy.
    pub paused: bool,
    /// Parts that are copied at this moment.
    #[serde(default)]
    pub jobs: u64,
    /// Parts that may be copied at once.
    #[serde(default)]
    pub jobs_max: u64,
    /// Bytes that may be copied in a second; null for as many as it goes.
    #[serde(default)]
    pub rate_max_bytes_per_second: Option<u64>,
    /// Whom it waits for, out of care: a standby of the source that lags. Null when it does not wait.
    #[serde(default)]
    pub waits_for: Option<String>,
}

/// The initial copy of a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// Bytes to copy: an estimate from its size on disk until it is copied, then what it came to.
    pub bytes_total: u64,
    /// Bytes copied.
    pub bytes_done: u64,
    /// Rows copied.
    pub rows_done: u64,
    /// How far it is.
    pub state: TableState,
}

/// How far the initial copy of a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TableState {
    /// Not begun.
    Waiting,
    /// Its rows are being copied.
    Copying,
    /// Its rows are there; its indexes are being built, or wait to be.
    Indexing,
    /// Complete.
    Done,
}

impl TableState {
    /// The name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            TableState::Waiting => "waiting",
            TableState::Copying => "copying",
            TableState::Indexing => "indexing",
            TableState::Done => "done",
        }
    }
}

/// Indexes and constraints that are built after the copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Indexes {
    /// How many there are to build.
    pub total: u64,
    /// How many are built.
    pub done: u64,
}

/// The queue on disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Queue {
    /// Bytes of disk that it takes.
    pub bytes: u64,
    /// Bytes that it may take.
    pub limit_bytes: u64,
    /// Whether it is full, so that the source is not read.
    pub full: bool,
    /// Up to here everything is on disk (fsync), and may be acknowledged.
    pub durable_lsn: Lsn,
    /// Up to here everything is written.
    pub written_lsn: Lsn,
}

/// The stream from the source into the queue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    /// Whether the source sends.
    pub connected: bool,
    /// End LSN of the newest transaction received.
    pub received_lsn: Lsn,
    /// Connections lost and made again, to the source.
    pub reconnects: u64,
    /// Bytes received since the start of the process.
    pub bytes: u64,
    /// Transactions received since the start of the process.
    pub transactions: u64,
    /// Changes of rows received since the start of the process.
    pub changes: u64,
    /// Bytes received in a second, over the last ten seconds.
    pub bytes_per_second: f64,
}

/// The way from the queue to the target. Counts are since the start of the process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Apply {
    /// Transactions of the source applied.
    pub transactions: u64,
    /// Changes of rows applied.
    pub changes: u64,
    /// Batches committed.
    pub batches: u64,
    /// Transactions applied in a second, over the last ten seconds.
    pub transactions_per_second: f64,
    /// Changes applied in a second, over the last ten seconds.
    pub changes_per_second: f64,
    /// End LSN of the newest transaction applied.
    pub applied_lsn: Lsn,
    /// Batches that the target refused as a whole and that were replayed row by row.
    pub serial_replays: u64,
    /// Statements of DDL that were replayed on the target.
    #[serde(default)]
    pub ddl_replayed: u64,
    /// Changes that did not meet the row they should have (invariant I6).
    pub conflicts: u64,
    /// The same by [`ConflictKind::name`].
    pub conflicts_by_kind: BTreeMap<String, u64>,
    /// The same by table, those that had any.
    #[serde(default)]
    pub conflicts_by_table: Vec<TableConflicts>,
    /// Whether the operator holds the apply.
    pub paused: bool,
    /// Whether a comparison holds it, for a moment.
    #[serde(default)]
    pub held: bool,
}

/// Changes of a table that did not meet the row they should have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TableConflicts {
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// [`ConflictKind::name`].
    pub kind: String,
    /// How many.
    pub changes: u64,
}

/// A change that did not meet the row it should have (invariant I6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConflictKind {
    /// An insert found a row with its key.
    InsertFoundRow,
    /// An update found no row.
    UpdateFoundNone,
    /// A delete found no row.
    DeleteFoundNone,
    /// An update of the key found another row with the new one.
    UpdateFoundRow,
    /// Another row has a value that must be unique.
    UniqueValueTaken,
}

impl ConflictKind {
    /// All kinds.
    pub const ALL: [ConflictKind; 5] = [
        ConflictKind::InsertFoundRow,
        ConflictKind::UpdateFoundNone,
        ConflictKind::DeleteFoundNone,
        ConflictKind::UpdateFoundRow,
        ConflictKind::UniqueValueTaken,
    ];

    /// The name in JSON and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            ConflictKind::InsertFoundRow => "insert_found_row",
            ConflictKind::UpdateFoundNone => "update_found_none",
            ConflictKind::DeleteFoundNone => "delete_found_none",
            ConflictKind::UpdateFoundRow => "update_found_row",
            ConflictKind::UniqueValueTaken => "unique_value_taken",
        }
    }
}

/// The server that is moved away from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// Host, port, database and version, without user or password.
    pub description: String,
    /// The newest WAL position known of it.
    pub wal_lsn: Lsn,
    /// WAL that it keeps because of our slot, in bytes; null until it was asked.
    pub retained_wal_bytes: Option<u64>,
    /// WAL that it may keep because of our slot before somebody is to hear of it, in bytes; null where no limit was given.
    #[serde(default)]
    pub wal_max_bytes: Option<u64>,
}

impl Source {
    /// What is to be said when it keeps more WAL because of our slot than it may.
    pub fn too_much_wal(&self) -> Option<String> {
        let (retained, max) = (self.retained_wal_bytes?, self.wal_max_bytes?);
        (retained > max).then(|| {
            format!(
                "the source keeps {} of WAL for our slot, more than --source-wal-max {}: its disk can fill up",
                size(retained),
                size(max)
            )
        })
    }
}

/// The server that is moved to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Host, port, database and version, without user or password.
    pub description: String,
    /// Connections lost and made again.
    pub reconnects: u64,
}

/// Our connections to both servers, those of replication and of `pg_dump` too.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Connections {
    /// To the server that is moved away from.
    pub source: ConnectionNumbers,
    /// To the server that is moved to.
    pub target: ConnectionNumbers,
}

/// How many connections to one server there are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ConnectionNumbers {
    /// Now.
    pub now: u64,
    /// The most at once since the start of the process.
    pub peak: u64,
    /// The most that there may be; null where no limit was given.
    pub max: Option<u64>,
}

/// What is known of a cutover that is to come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CutoverOutlook {
    /// How long writers would have to wait, in milliseconds, from what was measured last; null before that.
    pub expected_downtime_ms: Option<f64>,
    /// How long a marker took from the source through the queue until the target had committed it, likewise.
    pub marker_ms: Option<f64>,
    /// When that was measured: RFC 3339, UTC.
    pub measured_at: Option<String>,
    /// The last try, if it was given up.
    pub last_given_up: Option<GivenUpTry>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When: RFC 3339, UTC.
    pub time: String,
    /// How bad it is.
    pub level: Level,
    /// What it was.
    pub text: String,
}

/// How bad an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Info,
    /// Somebody should know.
    Warn,
    /// Something failed.
    Error,
}

/// Why the migration stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The error's kind, such as `divergence`.
    pub kind: String,
    /// What was being done to what, and what the server said.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        Failure {
            kind: kind_name(error.kind()).to_string(),
            message: error.to_string(),
            hint: error.next_step().map(str::to_string),
        }
    }
}

/// The name of an error's kind in JSON.
pub fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Usage => "usage",
        ErrorKind::Blocked => "blocked",
        ErrorKind::Transient => "transient",
        ErrorKind::Server => "server",
        ErrorKind::Divergence => "divergence",
        ErrorKind::SchemaChanged => "schema_changed",
        ErrorKind::Gap => "gap",
        ErrorKind::Queue => "queue",
        ErrorKind::Disk => "disk",
        ErrorKind::Different => "different",
        ErrorKind::Aborted => "aborted",
        ErrorKind::Interrupted => "interrupted",
        ErrorKind::Other => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_phase_is_its_name_in_json() {
        for phase in Phase::ALL {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.name());
        }
        for state in [TableState::Waiting, TableState::Copying, TableState::Indexing, TableState::Done] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }

    #[test]
    fn the_json_has_every_documented_field() {
        let mut status = Status::not_running(Phase::Following);
        status.tables.push(Table {
            schema: "public".into(),
            name: "orders".into(),
            bytes_total: 1,
            bytes_done: 1,
            rows_done: 1,
            state: TableState::Done,
        });
        status.events.push(Event { time: wall_clock::rfc3339(0), level: Level::Warn, text: "text".into() });
        status.error = Some(Failure::from(&Error::new(ErrorKind::Gap, "lost").hint("start again")));
        let json = serde_json::to_value(&status).unwrap();
        let keys = |pointer: &str| {
            let object = json.pointer(pointer).and_then(serde_json::Value::as_object);
            let mut keys: Vec<_> = object.unwrap_or_else(|| panic!("{pointer} is an object")).keys().cloned().collect();
            keys.sort();
            keys.join(" ")
        };
        assert_eq!(
            keys(""),
            "apply attention blockers connections copy cutover direction error eta_seconds events indexes lag phase process_alive queue \
             ready_to_cutover source stream tables target updated_at verification version way_back"
        );
        assert_eq!(keys("/lag"), "bytes seconds");
        assert_eq!(
            keys("/copy"),
            "bytes_done bytes_per_second bytes_total jobs jobs_max paused rate_max_bytes_per_second rows_done tables_done \
             tables_total waits_for"
        );
        assert_eq!(keys("/cutover"), "expected_downtime_ms last_given_up marker_ms measured_at");
        assert_eq!(keys("/connections"), "source target");
        assert_eq!(keys("/connections/source"), "max now peak");
        assert_eq!(keys("/tables/0"), "bytes_done bytes_total name rows_done schema state");
        assert_eq!(keys("/indexes"), "done total");
        assert_eq!(keys("/queue"), "bytes durable_lsn full limit_bytes written_lsn");
        assert_eq!(keys("/stream"), "bytes bytes_per_second changes connected received_lsn reconnects transactions");
        assert_eq!(
            keys("/apply"),
            "applied_lsn batches changes changes_per_second conflicts conflicts_by_kind conflicts_by_table ddl_replayed held paused \
             serial_replays transactions transactions_per_second"
        );
        assert_eq!(keys("/source"), "description retained_wal_bytes wal_lsn wal_max_bytes");
        assert_eq!(keys("/target"), "description reconnects");
        assert_eq!(keys("/events/0"), "level text time");
        assert_eq!(keys("/error"), "hint kind message");
        assert_eq!(json["version"], 1);
        assert_eq!(json["phase"], "following");
        assert_eq!(json["events"][0]["level"], "warn");
        assert_eq!(json["error"]["kind"], "gap");
        assert_eq!(json["queue"]["durable_lsn"], "0/0");
        assert_eq!(serde_json::from_value::<Status>(json).unwrap(), status);
    }
}
