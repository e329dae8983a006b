//! Every metric: its name, kind, unit and meaning, and how it follows from the status.
//!
//! Names have the prefix `walferry_`, base units (bytes, seconds) last, and `_total` for counters ("Metric and label
//! naming" in the Prometheus documentation). They are as stable as the JSON of the status.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::status::{Phase, Status};
use crate::observe::wall_clock;

/// A counter never falls but at a restart; a gauge is a value now; a histogram counts observations in buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// A value at this moment.
    Gauge,
    /// Observations, counted in buckets.
    Histogram,
}

/// What there is to know about a metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// The name that is scraped.
    pub name: &'static str,
    /// How its values behave.
    pub kind: Kind,
    /// What its values are measured in; `None` for a count or a flag.
    pub unit: Option<Unit>,
    /// One sentence.
    pub description: &'static str,
}

/// Declares the constants and [`ALL`] together, so that no metric can be left undescribed.
macro_rules! declare_metrics {
    ($($constant:ident: $kind:ident, $unit:expr, $name:literal, $description:literal;)*) => {
        $(#[doc = $description] pub const $constant: &str = $name;)*
        /// All metrics.
        pub const ALL: &[Metric] =
            &[$(Metric { name: $name, kind: Kind::$kind, unit: $unit, description: $description }),*];
    };
}

declare_metrics! {
    BUILD_INFO: Gauge, None, "walferry_build_info", "Always 1; the label version says which walferry runs.";
    PHASE: Gauge, None, "walferry_phase", "1 for the phase that the migration is in, 0 for the others.";
    READY_TO_CUTOVER: Gauge, None, "walferry_ready_to_cutover", "Whether a cutover can start now.";
    BLOCKERS: Gauge, None, "walferry_blockers", "How many things stand in the way of a cutover.";
    ATTENTION: Gauge, None, "walferry_attention",
        "How many things somebody should look after though they do not stop a cutover.";
    CUTOVER_EXPECTED_WAIT_SECONDS: Gauge, Some(Unit::Seconds), "walferry_cutover_expected_wait_seconds",
        "How long writers would have to wait at a cutover, by what was measured last; NaN before that.";
    VERIFICATION_TIMESTAMP_SECONDS: Gauge, Some(Unit::Seconds), "walferry_verification_timestamp_seconds",
        "When the last comparison of both sides ended, in seconds since 1970; NaN before the first.";
    VERIFICATION_DIFFERING_ROWS: Gauge, None, "walferry_verification_differing_rows",
        "Rows that the last comparison found to differ; NaN before the first.";

    LAG_BYTES: Gauge, Some(Unit::Bytes), "walferry_lag_bytes",
        "WAL between the source's newest known position and what is applied.";
    LAG_SECONDS: Gauge, Some(Unit::Seconds), "walferry_lag_seconds",
        "Age of the oldest transaction that was received and is not applied; NaN where unknown.";
    HEARTBEAT_SECONDS: Gauge, Some(Unit::Seconds), "walferry_heartbeat_seconds",
        "Time from a marker's commit on the source until it was committed on the target, on an idle source too; NaN before the first.";
    HEARTBEAT_TIMESTAMP_SECONDS: Gauge, Some(Unit::Seconds), "walferry_heartbeat_timestamp_seconds",
        "When the last such marker had arrived, in seconds since 1970; NaN before the first.";

    SOURCE_RETAINED_WAL_BYTES: Gauge, Some(Unit::Bytes), "walferry_source_retained_wal_bytes",
        "WAL that the source keeps because of the slot; NaN where unknown.";
    SOURCE_WAL_MAX_BYTES: Gauge, Some(Unit::Bytes), "walferry_source_wal_max_bytes",
        "WAL that the source may keep because of the slot; NaN without a limit.";
    SOURCE_WAL_OVER_MAX: Gauge, None, "walferry_source_wal_over_max",
        "Whether the source keeps more WAL because of the slot than it may.";
    CONNECTIONS: Gauge, None, "walferry_connections", "Our connections to a server.";
    CONNECTIONS_PEAK: Gauge, None, "walferry_connections_peak", "The most of our connections to a server at once.";
    CONNECTIONS_MAX: Gauge, None, "walferry_connections_max",
        "The most of our connections to a server that there may be; NaN without a limit.";
    SOURCE_CONNECTED: Gauge, None, "walferry_source_connected", "Whether the source sends.";
    RECONNECTS_TOTAL: Counter, None, "walferry_reconnects_total", "Connections lost and made again.";
    RECEIVED_BYTES_TOTAL: Counter, Some(Unit::Bytes), "walferry_received_bytes_total",
        "Bytes received from the source's stream.";
    RECEIVED_TRANSACTIONS_TOTAL: Counter, None, "walferry_received_transactions_total",
        "Transactions received from the source.";
    RECEIVED_CHANGES_TOTAL: Counter, None, "walferry_received_changes_total",
        "Changes of rows received from the source.";

    QUEUE_BYTES: Gauge, Some(Unit::Bytes), "walferry_queue_bytes", "Disk that the queue takes.";
    QUEUE_LIMIT_BYTES: Gauge, Some(Unit::Bytes), "walferry_queue_limit_bytes", "Disk that the queue may take.";
    QUEUE_FULL: Gauge, None, "walferry_queue_full", "Whether the queue is full, so that the source is not read.";

    APPLIED_TRANSACTIONS_TOTAL: Counter, None, "walferry_applied_transactions_total",
        "Transactions applied on the target.";
    APPLIED_CHANGES_TOTAL: Counter, None, "walferry_applied_changes_total", "Changes of rows applied on the target.";
    APPLIED_BATCHES_TOTAL: Counter, None, "walferry_applied_batches_total", "Batches committed on the target.";
    APPLY_BATCH_SECONDS: Histogram, Some(Unit::Seconds), "walferry_apply_batch_seconds",
        "Time of a batch from its first statement to its commit.";
    APPLY_PAUSED: Gauge, None, "walferry_apply_paused", "Whether the operator holds the apply.";
    SERIAL_REPLAYS_TOTAL: Counter, None, "walferry_serial_replays_total",
        "Batches that the target refused and that were replayed row by row.";
    DDL_REPLAYED_TOTAL: Counter, None, "walferry_ddl_replayed_total", "Statements of DDL that were replayed on the target.";
    CONFLICTS_TOTAL: Counter, None, "walferry_conflicts_total", "Changes that did not meet the row they should have.";
    TABLE_CONFLICTS_TOTAL: Counter, None, "walferry_table_conflicts_total",
        "The same of each table that had any.";

    COPY_JOBS: Gauge, None, "walferry_copy_jobs", "Parts of tables that are copied now.";
    COPY_PAUSED: Gauge, None, "walferry_copy_paused", "Whether the operator holds the copy.";
    COPY_WAITS_FOR_STANDBY: Gauge, None, "walferry_copy_waits_for_standby",
        "Whether the copy waits because a standby of the source lags.";
    COPY_TABLES: Gauge, None, "walferry_copy_tables", "Tables to copy.";
    COPY_DONE_TABLES: Gauge, None, "walferry_copy_done_tables", "Tables whose rows are all on the target.";
    COPY_SIZE_BYTES: Gauge, Some(Unit::Bytes), "walferry_copy_size_bytes",
        "Bytes to copy, an estimate until all are copied.";
    COPY_DONE_BYTES: Gauge, Some(Unit::Bytes), "walferry_copy_done_bytes", "Bytes copied.";
    COPY_DONE_ROWS: Gauge, None, "walferry_copy_done_rows", "Rows copied.";
    COPY_TABLE_SIZE_BYTES: Gauge, Some(Unit::Bytes), "walferry_copy_table_size_bytes",
        "Bytes of a table to copy, an estimate until it is copied.";
    COPY_TABLE_DONE_BYTES: Gauge, Some(Unit::Bytes), "walferry_copy_table_done_bytes", "Bytes of a table copied.";
    COPY_TABLE_DONE_ROWS: Gauge, None, "walferry_copy_table_done_rows", "Rows of a table copied.";
    INDEXES: Gauge, None, "walferry_indexes", "Indexes and constraints to build after the copy.";
    INDEXES_DONE: Gauge, None, "walferry_indexes_done", "Indexes and constraints built.";
}

/// Tables that get series of their own: the first ones in the order of the copy. The sums speak of all of them.
pub const TABLES_MAX: usize = 1000;

/// Upper bounds of a batch's time: from a small batch while following to a refused large one, in seconds.
const BATCH_SECONDS_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// The recorder of this process, once it is installed, or why it could not be.
static INSTALLED: OnceLock<std::result::Result<PrometheusHandle, String>> = OnceLock::new();

/// Installs the recorder for this process and describes all metrics; again, it returns the handle that is there.
///
/// # Errors
///
/// [`ErrorKind::Other`] if something else has installed a recorder before.
pub fn install() -> Result<PrometheusHandle> {
    let installed = INSTALLED.get_or_init(|| {
        let recorder = recorder().map_err(|error| error.to_string())?;
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
        describe();
        Ok(handle)
    });
    installed
        .clone()
        .map_err(|message| Error::new(ErrorKind::Other, message))
        .context(|| "installing the metrics".into())
}

/// Folds observations into their buckets, so that they take no memory where nobody scrapes. Called by the ticker.
pub(super) fn fold_observations() {
    if let Some(Ok(handle)) = INSTALLED.get() {
        handle.run_upkeep();
    }
}

/// The metrics of one of several migrations of this process; each sample has the label `database`.
pub struct OfDatabase {
    recorder: PrometheusRecorder,
}

impl std::fmt::Debug for OfDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OfDatabase")
    }
}

impl OfDatabase {
    /// Those of a database, described.
    ///
    /// # Errors
    /// `Other` when the buckets cannot be set.
    pub fn new(database: &str) -> Result<OfDatabase> {
        let recorder = builder()?.add_global_label("database", database).build_recorder();
        metrics::with_local_recorder(&recorder, describe);
        Ok(OfDatabase { recorder })
    }

    /// All of them, as they follow from a status now, in the text exposition format.
    pub fn render(&self, status: &Status) -> String {
        metrics::with_local_recorder(&self.recorder, || publish(status));
        self.recorder.handle().render()
    }

    /// Observes the time of a batch.
    pub(super) fn record_apply_batch(&self, elapsed: Duration) {
        metrics::with_local_recorder(&self.recorder, || record_apply_batch(elapsed));
    }

    /// As [`fold_observations`].
    pub(super) fn fold_observations(&self) {
        self.recorder.handle().run_upkeep();
    }
}

/// Several scrapes as one: each metric once, with the samples of all.
pub fn merge(scrapes: &[String]) -> String {
    let mut metrics: Vec<(&str, Vec<&str>, Vec<&str>)> = Vec::new();
    for scrape in scrapes {
        let (mut described, mut at) = (Vec::new(), None);
        for line in scrape.lines().filter(|line| !line.is_empty()) {
            if line.starts_with("# HELP ") {
                described.push(line);
            } else if let Some(name) = line.strip_prefix("# TYPE ") {
                described.push(line);
                let described = std::mem::take(&mut described);
                at = metrics.iter().position(|(known, ..)| *known == name).or_else(|| {
                    metrics.push((name, described, Vec::new()));
                    Some(metrics.len() - 1)
                });
            } else if let Some((_, _, samples)) = at.and_then(|at: usize| metrics.get_mut(at)) {
                samples.push(line);
            }
        }
    }
    let mut text = String::new();
    for (_, described, samples) in &metrics {
        for line in described.iter().chain(samples) {
            text.push_str(line);
            text.push('\n');
        }
        text.push('\n');
    }
    text
}

fn recorder() -> Result<PrometheusRecorder> {
    Ok(builder()?.build_recorder())
}

fn builder() -> Result<PrometheusBuilder> {
    // Buckets only for what is listed here would leave any other distribution a summary, which cannot be aggregated.
    PrometheusBuilder::new()
        .set_buckets(&BATCH_SECONDS_BUCKETS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Full(APPLY_BATCH_SECONDS.to_string()), &BATCH_SECONDS_BUCKETS)
        })
        .map_err(|error| Error::new(ErrorKind::Other, error.to_string()))
}

fn describe() {
    for metric in ALL {
        let unit = metric.unit.unwrap_or(Unit::Count);
        match metric.kind {
            Kind::Counter => describe_counter!(metric.name, unit, metric.description),
            Kind::Gauge => describe_gauge!(metric.name, unit, metric.description),
            Kind::Histogram => describe_histogram!(metric.name, unit, metric.description),
        }
    }
}

/// Observes the time of a batch.
pub(super) fn record_apply_batch(elapsed: Duration) {
    histogram!(APPLY_BATCH_SECONDS).record(elapsed.as_secs_f64());
}

/// Sets all metrics but the histograms from a status.
pub fn publish(status: &Status) {
    let flag = |value: bool| if value { 1.0 } else { 0.0 };
    gauge!(BUILD_INFO, "version" => env!("WALFERRY_VERSION")).set(1.0);
    for phase in Phase::ALL {
        gauge!(PHASE, "phase" => phase.name()).set(flag(phase == status.phase));
    }
    gauge!(READY_TO_CUTOVER).set(flag(status.ready_to_cutover));
    gauge!(BLOCKERS).set(status.blockers.len() as f64);
    gauge!(ATTENTION).set(status.attention.len() as f64);
    let since_1970 =
        |time: &str| wall_clock::parse_rfc3339(time).map_or(f64::NAN, |milliseconds| milliseconds as f64 / 1000.0);
    let outlook = &status.cutover;
    gauge!(HEARTBEAT_SECONDS).set(outlook.marker_ms.map_or(f64::NAN, |milliseconds| milliseconds / 1000.0));
    gauge!(HEARTBEAT_TIMESTAMP_SECONDS).set(outlook.measured_at.as_deref().map_or(f64::NAN, since_1970));
    gauge!(CUTOVER_EXPECTED_WAIT_SECONDS)
        .set(outlook.expected_downtime_ms.map_or(f64::NAN, |milliseconds| milliseconds / 1000.0));
    let verification = status.verification.as_ref();
    gauge!(VERIFICATION_TIMESTAMP_SECONDS).set(verification.map_or(f64::NAN, |last| since_1970(&last.at)));
    gauge!(VERIFICATION_DIFFERING_ROWS).set(verification.map_or(f64::NAN, |last| last.differing_rows as f64));
    gauge!(LAG_BYTES).set(status.lag.bytes.map_or(f64::NAN, |bytes| bytes as f64));
    gauge!(LAG_SECONDS).set(status.lag.seconds.unwrap_or(f64::NAN));

    gauge!(SOURCE_RETAINED_WAL_BYTES).set(status.source.retained_wal_bytes.map_or(f64::NAN, |bytes| bytes as f64));
    gauge!(SOURCE_WAL_MAX_BYTES).set(status.source.wal_max_bytes.map_or(f64::NAN, |bytes| bytes as f64));
    gauge!(SOURCE_WAL_OVER_MAX).set(flag(status.source.too_much_wal().is_some()));
    for (side, numbers) in [("source", &status.connections.source), ("target", &status.connections.target)] {
        gauge!(CONNECTIONS, "side" => side).set(numbers.now as f64);
        gauge!(CONNECTIONS_PEAK, "side" => side).set(numbers.peak as f64);
        gauge!(CONNECTIONS_MAX, "side" => side).set(numbers.max.map_or(f64::NAN, |max| max as f64));
    }
    gauge!(SOURCE_CONNECTED).set(flag(status.stream.connected));
    counter!(RECONNECTS_TOTAL, "side" => "source").absolute(status.stream.reconnects);
    counter!(RECONNECTS_TOTAL, "side" => "target").absolute(status.target.reconnects);
    counter!(RECEIVED_BYTES_TOTAL).absolute(status.stream.bytes);
    counter!(RECEIVED_TRANSACTIONS_TOTAL).absolute(status.stream.transactions);
    counter!(RECEIVED_CHANGES_TOTAL).absolute(status.stream.changes);

    gauge!(QUEUE_BYTES).set(status.queue.bytes as f64);
    gauge!(QUEUE_LIMIT_BYTES).set(status.queue.limit_bytes as f64);
    gauge!(QUEUE_FULL).set(flag(status.queue.full));

    counter!(APPLIED_TRANSACTIONS_TOTAL).absolute(status.apply.transactions);
    counter!(APPLIED_CHANGES_TOTAL).absolute(status.apply.changes);
    counter!(APPLIED_BATCHES_TOTAL).absolute(status.apply.batches);
    // There from the first scrape on, with no observations: a rate over a series that appears late misses its start.
    let _ = histogram!(APPLY_BATCH_SECONDS);
    gauge!(APPLY_PAUSED).set(flag(status.apply.paused));
    counter!(SERIAL_REPLAYS_TOTAL).absolute(status.apply.serial_replays);
    counter!(DDL_REPLAYED_TOTAL).absolute(status.apply.ddl_replayed);
    for (kind, conflicts) in &status.apply.conflicts_by_kind {
        counter!(CONFLICTS_TOTAL, "kind" => kind.clone()).absolute(*conflicts);
    }
    for table in status.apply.conflicts_by_table.iter().take(TABLES_MAX) {
        let labels = [("schema", table.schema.clone()), ("table", table.name.clone()), ("kind", table.kind.clone())];
        counter!(TABLE_CONFLICTS_TOTAL, &labels).absolute(table.changes);
    }
    publish_copy(status);
}

fn publish_copy(status: &Status) {
    gauge!(COPY_JOBS).set(status.copy.jobs as f64);
    gauge!(COPY_PAUSED).set(if status.copy.paused { 1.0 } else { 0.0 });
    gauge!(COPY_WAITS_FOR_STANDBY).set(if status.copy.waits_for.is_some() { 1.0 } else { 0.0 });
    gauge!(COPY_TABLES).set(status.copy.tables_total as f64);
    gauge!(COPY_DONE_TABLES).set(status.copy.tables_done as f64);
    gauge!(COPY_SIZE_BYTES).set(status.copy.bytes_total as f64);
    gauge!(COPY_DONE_BYTES).set(status.copy.bytes_done as f64);
    gauge!(COPY_DONE_ROWS).set(status.copy.rows_done as f64);
    for table in status.tables.iter().take(TABLES_MAX) {
        let labels = [("schema", table.schema.clone()), ("table", table.name.clone())];
        gauge!(COPY_TABLE_SIZE_BYTES, &labels).set(table.bytes_total as f64);
        gauge!(COPY_TABLE_DONE_BYTES, &labels).set(table.bytes_done as f64);
        gauge!(COPY_TABLE_DONE_ROWS, &labels).set(table.rows_done as f64);
    }
    gauge!(INDEXES).set(status.indexes.total as f64);
    gauge!(INDEXES_DONE).set(status.indexes.done as f64);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::observe::board::{Side, StatusBoard, tests::batch};
    use crate::observe::status::ConflictKind;
    use std::collections::{BTreeMap, BTreeSet};

    /// A sample by its name and labels, as the exposition format has them: `walferry_phase{phase="copying"}`.
    pub struct Scrape {
        samples: BTreeMap<String, f64>,
        types: BTreeMap<String, String>,
        described: BTreeSet<String>,
    }

    /// Reads the text exposition format 0.0.4, and fails on what it does not allow.
    pub fn parse(text: &str) -> Scrape {
        let mut scrape = Scrape { samples: BTreeMap::new(), types: BTreeMap::new(), described: BTreeSet::new() };
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, description) = help.split_once(' ').unwrap_or_else(|| panic!("{line}"));
                assert!(!description.is_empty() && scrape.described.insert(name.to_string()), "{line}");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap_or_else(|| panic!("{line}"));
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(scrape.types.insert(name.to_string(), kind.to_string()), None, "{line}");
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
                assert_labels(series);
                let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
                assert_eq!(scrape.samples.insert(series.to_string(), value), None, "{line}");
            }
        }
        scrape
    }

    /// A name, then nothing or labels in braces with quoted values in which quote, backslash and newline are escaped.
    fn assert_labels(series: &str) {
        let name_length = series.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(series.len());
        let mut rest = &series[name_length..];
        if rest.is_empty() {
            return;
        }
        rest = rest.strip_prefix('{').unwrap_or_else(|| panic!("{series}"));
        loop {
            let (label, value) = rest.split_once("=\"").unwrap_or_else(|| panic!("{series}"));
            assert!(label.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{series}");
            let mut escaped = false;
            let end = value.find(|c: char| {
                let closes = c == '"' && !escaped;
                assert!(!escaped || ['"', '\\', 'n'].contains(&c), "{series}");
                escaped = c == '\\' && !escaped;
                closes
            });
            rest = &value[end.unwrap_or_else(|| panic!("{series}")) + 1..];
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => return assert_eq!(rest, "}", "{series}"),
            }
        }
    }

    pub fn assert_every_metric_is_in(scrape: &Scrape) {
        for metric in ALL {
            let kind = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            assert_eq!(scrape.types.get(metric.name).map(String::as_str), Some(kind), "{}", metric.name);
            assert!(scrape.described.contains(metric.name), "{} is described", metric.name);
            let sampled = |series: &String| {
                let rest = series.strip_prefix(metric.name);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('{') || rest.starts_with("_bucket{"))
            };
            assert!(scrape.samples.keys().any(sampled), "{} has a sample", metric.name);
        }
        assert_eq!(scrape.types.len(), ALL.len(), "nothing but what is declared: {:?}", scrape.types.keys());
    }

    /// What a scrape would read after `status` was published and `observe` was run.
    fn scrape_of(status: &Status, observe: impl FnOnce()) -> Scrape {
        let recorder = recorder().unwrap();
        metrics::with_local_recorder(&recorder, || {
            describe();
            publish(status);
            observe();
        });
        parse(&recorder.handle().render())
    }

    #[test]
    fn names_follow_the_conventions() {
        let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len(), "no name twice");
        for Metric { name, kind, unit, description } in ALL {
            assert!(name.starts_with("walferry_"), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
            let base = name.strip_suffix("_total").unwrap_or(name);
            match unit {
                Some(Unit::Bytes) => assert!(base.ends_with("_bytes"), "{name}"),
                Some(Unit::Seconds) => assert!(base.ends_with("_seconds"), "{name}"),
                Some(other) => panic!("{name}: {other:?} is no base unit"),
                None => assert!(!base.ends_with("_bytes") && !base.ends_with("_seconds"), "{name}"),
            }
            assert!(description.ends_with('.') && description.len() > 10, "{name}: {description:?}");
        }
    }

    #[test]
    fn what_is_published_is_what_the_status_says() {
        let board = StatusBoard::new();
        board.set_phase(Phase::Copying);
        board.add_table(1, "public", "orders", 1000).begin_part().add(10, 1);
        board.table(1).unwrap().add_recorded(250, 5);
        board.reconnected(Side::Target);
        board.conflicts("public", "orders", ConflictKind::DeleteFoundNone, 3);
        board.received_bytes(4096);
        board.applied(batch(2, 7, 500));
        board.set_expected_downtime(120.0, 25.0, "1970-01-01T00:01:40Z".into());
        let scrape = scrape_of(&board.snapshot(), || record_apply_batch(Duration::from_millis(30)));
        assert_every_metric_is_in(&scrape);
        let value = |series: &str| *scrape.samples.get(series).unwrap_or_else(|| panic!("{series}"));
        assert_eq!(value("walferry_phase{phase=\"copying\"}"), 1.0);
        let phases = scrape.samples.iter().filter(|(series, _)| series.starts_with("walferry_phase{"));
        assert_eq!(phases.map(|(_, value)| value).sum::<f64>(), 1.0, "exactly one phase is 1");
        assert_eq!(value("walferry_copy_table_done_bytes{schema=\"public\",table=\"orders\"}"), 250.0);
        assert_eq!(value("walferry_copy_table_size_bytes{schema=\"public\",table=\"orders\"}"), 1000.0);
        assert_eq!(value("walferry_reconnects_total{side=\"target\"}"), 1.0);
        assert_eq!(value("walferry_reconnects_total{side=\"source\"}"), 0.0);
        assert_eq!(value("walferry_conflicts_total{kind=\"delete_found_none\"}"), 3.0);
        let of_the_table =
            "walferry_table_conflicts_total{schema=\"public\",table=\"orders\",kind=\"delete_found_none\"}";
        assert_eq!(value(of_the_table), 3.0);
        assert_eq!(value("walferry_received_bytes_total"), 4096.0);
        assert_eq!(value("walferry_heartbeat_seconds"), 0.025);
        assert_eq!(value("walferry_heartbeat_timestamp_seconds"), 100.0);
        assert_eq!(value("walferry_cutover_expected_wait_seconds"), 0.12);
        assert!(value("walferry_verification_differing_rows").is_nan(), "nothing was compared yet");
        assert_eq!(value("walferry_applied_changes_total"), 7.0);
        assert!(value("walferry_lag_seconds").is_nan(), "nobody knows the source's clock yet");
        assert_eq!(value("walferry_apply_batch_seconds_bucket{le=\"0.025\"}"), 0.0);
        assert_eq!(value("walferry_apply_batch_seconds_bucket{le=\"0.05\"}"), 1.0);
        assert_eq!(value("walferry_apply_batch_seconds_count"), 1.0);
    }

    #[test]
    fn the_number_of_series_is_bounded() {
        let board = StatusBoard::new();
        for relid in 0..TABLES_MAX as u32 + 10 {
            board.add_table(relid, "public", &format!("table_{relid}"), 1);
        }
        let scrape = scrape_of(&board.snapshot(), || {});
        let tables = scrape.samples.keys().filter(|series| series.starts_with("walferry_copy_table_size_bytes{"));
        assert_eq!(tables.count(), TABLES_MAX);
        assert_eq!(scrape.samples["walferry_copy_tables"], TABLES_MAX as f64 + 10.0);
    }
}
