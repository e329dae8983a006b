//! T1: a hypertable that takes at least 100,000 rows a second on the source while it is migrated, with its policies at work.
//!
//! ```text
//!   loader ── COPY, a batch each tenth of a second ──► readings ── walferry ──► readings
//!             (rows as tsbs has them, one of 100 late)    │ every 20 s: refresh of the aggregate, compression of old chunks
//!                                                         └─ their changes are in the stream too
//!   sampler ── each second: lag of the newest row, lag in bytes, processor time of each server's processes
//!   at the end, the loader still at it: cutover, and a comparison of all rows by plain SQL
//! ```
//!
//! Servers of its own, with the extension; without it the case says so and is left out.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use walferry::demo::server::{StopMode, ThrowawayServer};
use walferry::error::{Context, Error, ErrorKind, Result};

use crate::engine::{Engine, PATIENCE, USER_HZ};
use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

/// What a server of these cases has besides.
const TIMESCALE: [(&str, &str); 7] = [
    ("shared_preload_libraries", "timescaledb"),
    ("timescaledb.telemetry_level", "off"),
    ("max_worker_processes", "32"),
    ("timescaledb.max_background_workers", "16"),
    ("max_locks_per_transaction", "1024"),
    ("max_connections", "50"),
    ("wal_level", "logical"),
];
const DATABASE: &str = "plant";
/// Rows of a batch: one of each device.
const DEVICES: i32 = 10_000;
/// A batch comes so often: 100,000 rows in a second, and some more, so that a late one does not count.
const BATCH_INTERVAL: Duration = Duration::from_micros(98_000);
/// One of so many rows is late by [`LATE`]: what the aggregate has of that time already is computed anew then.
const LATE_ROWS: u64 = 100;
const LATE: i64 = 45_000_000;
/// Sessions that load.
const LOADERS: u64 = 2;
/// 2000-01-01 in microseconds since 1970.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// Rows of before, in chunks of a minute; all of them but the newest compressed.
const SCHEMA: &str = "
CREATE EXTENSION timescaledb;
CREATE TABLE readings (time timestamptz NOT NULL, device integer NOT NULL,
    usage_user float8, usage_system float8, usage_idle float8, usage_iowait float8, PRIMARY KEY (time, device));
SELECT create_hypertable('readings', 'time', chunk_time_interval => interval '1 minute', create_default_indexes => false);
ALTER TABLE readings SET (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time');
INSERT INTO readings SELECT now() - make_interval(secs => s), d, s, d, s + d, 0
    FROM generate_series(60, 600, 10) s, generate_series(0, 9999) d;
SELECT compress_chunk(c) FROM show_chunks('readings', older_than => interval '2 minutes') c;
";
const AGGREGATE: [&str; 4] = [
    "CREATE MATERIALIZED VIEW by_device WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket('10 seconds', time) AS bucket, device, avg(usage_user) AS usage, max(usage_system) AS peak, count(*) AS n \
     FROM readings GROUP BY 1, 2 WITH NO DATA",
    "CALL refresh_continuous_aggregate('by_device', NULL, NULL)",
    "SELECT add_continuous_aggregate_policy('by_device', start_offset => interval '3 minutes', end_offset => interval '10 seconds', \
     schedule_interval => interval '20 seconds')",
    "SELECT add_compression_policy('readings', compress_after => interval '2 minutes', schedule_interval => interval '20 seconds')",
];

/// What both servers must agree upon: the number of rows, and a sum over the hashes of them.
const BOOKS: &str = "SELECT count(*)::text, sum(hash_record_extended(r, 0)::numeric)::text FROM readings r";
/// The policy has gone on on the target. So what it has not computed yet is computed there, as the invalidations say that came over; then
/// these are the same.
const REFRESH: &str = "CALL refresh_continuous_aggregate('by_device', NULL, NULL)";
const OF_AGGREGATE: [&str; 2] = [
    "SELECT count(*)::text, sum(hash_record_extended(r, 0)::numeric)::text FROM (SELECT bucket, device, peak, n FROM by_device) r",
    "SELECT count(*)::text, sum(hash_record_extended(r, 0)::numeric)::text \
     FROM (SELECT time_bucket('10 seconds', time) AS bucket, device, max(usage_system) AS peak, count(*) AS n FROM readings GROUP BY 1, 2) r",
];

/// Whether the servers of the benchmark have the extension.
pub fn is_available(setting: &Setting) -> bool {
    let output = std::process::Command::new(setting.programs.bin("pg_config")).arg("--sharedir").output();
    let shared = match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => format!("/usr/share/postgresql/{}", setting.programs.major()),
    };
    PathBuf::from(shared).join("extension/timescaledb.control").exists()
}

/// Does something between two servers with the extension, which end with it however it ends.
pub async fn with_servers<T>(
    setting: &Setting,
    work: impl AsyncFnOnce(&ThrowawayServer, &ThrowawayServer) -> Result<T>,
) -> Result<T> {
    let own: Vec<(&str, &str)> =
        setting.settings.iter().map(|(name, value)| (*name, value.as_str())).chain(TIMESCALE).collect();
    let mut source = ThrowawayServer::start(&setting.programs, "hypersource", &own).await?;
    let mut target = ThrowawayServer::start(&setting.programs, "hypertarget", &own).await?;
    let outcome = work(&source, &target).await;
    source.stop(StopMode::Immediate).await?;
    target.stop(StopMode::Immediate).await?;
    outcome
}

pub async fn ingest(setting: &Setting, results: &mut Results) -> Result<()> {
    with_servers(setting, async |source, target| run(setting, results, (source, target)).await).await
}

async fn run(
    setting: &Setting,
    results: &mut Results,
    (source, target): (&ThrowawayServer, &ThrowawayServer),
) -> Result<()> {
    let seconds: u64 = setting.options.size(600, 60);
    setting.new_database(source, DATABASE).await?;
    setting.new_database(target, DATABASE).await?;
    let client = source.connect(DATABASE).await?;
    client.batch_execute(SCHEMA).await.context(|| "making the hypertable".into())?;
    for statement in AGGREGATE {
        client.batch_execute(statement).await.context(|| statement.into())?;
    }
    let load = Load::start(&source.url_for(DATABASE)).await?;
    let mut engine = Engine::new(setting, "ingest", source.url_for(DATABASE), target.url_for(DATABASE))?;
    engine.start()?;
    let copied = Instant::now();
    engine.following().await?;
    results.note(format!("T1: following {:.0} s after its start, the loader at work", copied.elapsed().as_secs_f64()));
    let target_client = target.connect(DATABASE).await?;
    // What came during the copy is caught up first.
    let deadline = Instant::now() + PATIENCE;
    while load.lag(&target_client).await? > 3.0 {
        engine.check(deadline)?;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    let (before, rows_before) = (Instant::now(), load.rows());
    let (mut of_source, mut of_target) = (Processes::of(source), Processes::of(target));
    of_source.look();
    of_target.look();
    let (source_before, target_before) = (of_source.clone(), of_target.clone());
    let window = engine.watch().await?;
    let (mut lags, mut bytes) = (Vec::new(), Vec::new());
    while before.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let lag = load.lag(&target_client).await?;
        let status = engine.status().await?;
        lags.push(lag);
        bytes.push(status.lag.bytes.unwrap_or_default() as f64 / f64::from(1 << 20));
        of_source.look();
        of_target.look();
        engine.check(deadline + Duration::from_secs(seconds))?;
        if lags.len() % 10 == 0 {
            let rate = (load.rows() - rows_before) as f64 / before.elapsed().as_secs_f64();
            eprintln!("T1: {} s, {rate:.0} rows/s, the newest row is {lag:.2} s behind", lags.len());
        }
    }
    let (elapsed, rows) = (before.elapsed().as_secs_f64(), load.rows() - rows_before);
    let spent = engine.spent(window).await?;
    report(results, seconds, (elapsed, rows), lags, bytes);
    let million = rows as f64 / 1e6;
    results.note(format!(
        "T1, processor seconds per million rows: walferry {:.2}; target: {}; source: {}",
        spent.cpu_seconds / million,
        of_target.since(&target_before, million),
        of_source.since(&source_before, million)
    ));
    setting.footprint("ingest into a hypertable", engine.peak_bytes());

    let downtime = switch(&mut engine, &load, results).await?;
    let lost = load.stop().await?;
    results.add(Row::of_value(
        "T1",
        "cutover at that load: writers wait",
        "ms",
        Sample(vec![downtime]),
        Bar::AtMost(1000.0),
    ));
    compare(source, target, lost).await?;
    results.note("T1: all rows are equal on both servers afterwards, and the aggregate is that of them".into());
    // It has ended by itself, since there is no way back.
    engine.stop().await
}

fn report(results: &mut Results, seconds: u64, (elapsed, rows): (f64, u64), lags: Vec<f64>, bytes: Vec<f64>) {
    let thirds: Vec<f64> =
        lags.chunks(lags.len().div_ceil(3)).map(|third| third.iter().sum::<f64>() / third.len() as f64).collect();
    let thirds: Vec<String> = thirds.iter().map(|mean| format!("{mean:.2}")).collect();
    results.note(format!("T1, mean lag in s of the first, second and last third: {}", thirds.join(", ")));
    let most = |values: &[f64]| Sample(vec![values.iter().copied().fold(0.0, f64::max)]);
    let (worst, worst_bytes) = (most(&lags), most(&bytes));
    let mut sorted = lags;
    sorted.sort_by(f64::total_cmp);
    let middle = Sample(vec![sorted[sorted.len() / 2]]);
    let rate = Sample(vec![rows as f64 / elapsed / 1000.0]);
    let case = format!("ingest into a hypertable, COPY of {DEVICES} rows each, for {seconds} s");
    results.add(Row::of_value("T1", &case, "k rows/s", rate, Bar::AtLeast(100.0)));
    results.add(Row::of_value("T1", "age of the newest row on the target, p50", "s", middle, Bar::Reported));
    results.add(Row::of_value("T1", "age of the newest row on the target, the worst", "s", worst, Bar::AtMost(30.0)));
    results.add(Row::of_value("T1", "lag in bytes of WAL, the worst", "MiB", worst_bytes, Bar::Reported));
}

/// Cuts over while the loader writes; answers how long writers waited, in milliseconds. The policies of the source may come between:
/// then it is given up, and tried again, as an operator would.
async fn switch(engine: &mut Engine, load: &Load, results: &mut Results) -> Result<f64> {
    let deadline = Instant::now() + PATIENCE;
    for attempt in 1.. {
        while !engine.status().await.is_ok_and(|status| status.ready_to_cutover) {
            engine.check(deadline)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        load.is_loading()?;
        let said = engine.command(&["cutover", "--yes", "--json", "--timeout", "60s", "--dir"]).await?;
        if let Some(wait) = said.get("downtime_ms").and_then(serde_json::Value::as_f64) {
            results.note(format!("T1: cut over at attempt {attempt}: {said}"));
            return Ok(wait);
        }
        results.note(format!("T1: the cutover was given up: {said}"));
        if attempt == 5 {
            break;
        }
    }
    Err(Error::new(ErrorKind::Aborted, "five cutovers were given up"))
}

/// Both servers have the same rows, and none that the loader was told to be committed is missing.
async fn compare(source: &ThrowawayServer, target: &ThrowawayServer, acknowledged: u64) -> Result<()> {
    let (source, target) = (source.connect(DATABASE).await?, target.connect(DATABASE).await?);
    let (here, there) = (books(&source, BOOKS).await?, books(&target, BOOKS).await?);
    let rows: u64 = there.0.parse().unwrap_or_default();
    if here != there || rows < acknowledged {
        let text = format!("{acknowledged} rows were loaded; the books are {here:?} and {there:?}");
        return Err(Error::new(ErrorKind::Different, text));
    }
    target.batch_execute(REFRESH).await.context(|| REFRESH.into())?;
    let (aggregate, computed) = (books(&target, OF_AGGREGATE[0]).await?, books(&target, OF_AGGREGATE[1]).await?);
    if aggregate != computed {
        let text = format!("the aggregate is {aggregate:?} and should be {computed:?}");
        return Err(Error::new(ErrorKind::Different, text));
    }
    Ok(())
}

async fn books(client: &Client, query: &str) -> Result<(String, Option<String>)> {
    let row = client.query_one(query, &[]).await.context(|| query.to_owned())?;
    Ok((row.get(0), row.get(1)))
}

/// The application.
struct Load {
    stop: Arc<AtomicBool>,
    rows: Arc<AtomicU64>,
    /// The time of the newest batch of each session that is committed, microseconds since 1970.
    newest: Arc<[AtomicI64]>,
    sessions: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    async fn start(url: &str) -> Result<Load> {
        let (stop, rows) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let newest: Arc<[AtomicI64]> = (0..LOADERS).map(|_| AtomicI64::new(0)).collect();
        let begun = (Instant::now(), now());
        let mut sessions = Vec::new();
        for session in 0..LOADERS {
            let client = connect(url).await?;
            let (stop, rows, newest) = (Arc::clone(&stop), Arc::clone(&rows), Arc::clone(&newest));
            sessions.push(tokio::spawn(async move {
                for batch in (session..).step_by(LOADERS as usize) {
                    let due = BATCH_INTERVAL * u32::try_from(batch).unwrap_or(u32::MAX);
                    tokio::time::sleep_until((begun.0 + due).into()).await;
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let time = begun.1 + i64::try_from(due.as_micros()).unwrap_or_default();
                    let sink = client
                        .copy_in::<_, Bytes>("COPY readings FROM STDIN (FORMAT binary)")
                        .await
                        .context(|| "beginning a batch".into())?;
                    let mut sink = std::pin::pin!(sink);
                    sink.send(rows_of(time, batch)).await?;
                    let copied = sink.finish().await.context(|| "loading a batch".into())?;
                    rows.fetch_add(copied, Ordering::Relaxed);
                    newest[session as usize].store(time, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        Ok(Load { stop, rows, newest, sessions })
    }

    fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// How old the newest row of the target is, in seconds, beside the newest that is committed on the source.
    async fn lag(&self, target: &Client) -> Result<f64> {
        self.is_loading()?;
        let committed = self.newest.iter().map(|newest| newest.load(Ordering::Relaxed)).max().unwrap_or_default();
        let newest = "SELECT coalesce((extract(epoch FROM max(time)) * 1000000)::int8, 0) FROM readings";
        let there: i64 = target.query_one(newest, &[]).await?.get(0);
        Ok((committed - there).max(0) as f64 / 1e6)
    }

    /// Fails when a session has ended.
    fn is_loading(&self) -> Result<()> {
        if self.sessions.iter().any(JoinHandle::is_finished) {
            return Err(Error::new(ErrorKind::Other, "a session of the loader has ended"));
        }
        Ok(())
    }

    /// After the switch, which has ended its sessions; answers the rows that were acknowledged.
    async fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for session in self.sessions {
            if let Ok(Err(error)) = session.await {
                eprintln!("T1: the loader was closed out: {error}");
            }
        }
        Ok(self.rows.load(Ordering::Relaxed))
    }
}

async fn connect(url: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    // What it says is said to the client too.
    tokio::spawn(connection);
    Ok(client)
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or_default()
}

/// A batch as binary COPY has it: a row of each device, a few of them late.
fn rows_of(time: i64, batch: u64) -> Bytes {
    let mut bytes = BytesMut::with_capacity(DEVICES as usize * 72);
    bytes.put_slice(b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0");
    for device in 0..DEVICES {
        bytes.put_i16(6);
        bytes.put_i32(8);
        let late = (device as u64 + batch).is_multiple_of(LATE_ROWS);
        // A millisecond beside the rows of that time.
        bytes.put_i64(time - POSTGRES_EPOCH - if late { LATE - 1000 } else { 0 });
        bytes.put_i32(4);
        bytes.put_i32(device);
        let scattered = (batch << 20 | device as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for column in 0..4 {
            bytes.put_i32(8);
            bytes.put_f64((scattered >> (column * 12) & 0xfff) as f64 / 40.96);
        }
    }
    bytes.put_i16(-1);
    bytes.freeze()
}

/// The processor time of a server's processes, by what their titles say they are. Those that have ended count with what was seen last.
#[derive(Clone)]
pub struct Processes {
    postmaster: i32,
    seen: BTreeMap<u32, (String, f64)>,
}

impl Processes {
    pub fn of(server: &ThrowawayServer) -> Processes {
        Processes { postmaster: server.pid(), seen: BTreeMap::new() }
    }

    pub fn look(&mut self) {
        let path = format!("/proc/{0}/task/{0}/children", self.postmaster);
        let children = std::fs::read_to_string(path).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()) {
            let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
            let seconds = (ticks(11) + ticks(12)) / USER_HZ;
            let title = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            self.seen.insert(pid, (kind_of(&title), seconds));
        }
    }

    pub fn since(&self, before: &Processes, million: f64) -> String {
        let mut kinds: BTreeMap<&str, f64> = BTreeMap::new();
        for (pid, (kind, seconds)) in &self.seen {
            let earlier = before.seen.get(pid).map_or(0.0, |(_, seconds)| *seconds);
            *kinds.entry(kind).or_default() += (seconds - earlier) / million;
        }
        let total: f64 = kinds.values().sum();
        let mut parts: Vec<(&str, f64)> = kinds.into_iter().filter(|(_, seconds)| *seconds >= 0.01).collect();
        parts.sort_by(|one, other| other.1.total_cmp(&one.1));
        let parts: Vec<String> = parts.iter().map(|(kind, seconds)| format!("{kind} {seconds:.2}")).collect();
        format!("{total:.2} ({})", parts.join(", "))
    }
}

/// Of a title such as `postgres: name: postgres plant 127.0.0.1(4711) COPY`.
fn kind_of(title: &str) -> String {
    let kinds = [
        ("walsender", "walsender"),
        ("walwriter", "WAL writer"),
        ("checkpointer", "checkpointer"),
        ("background writer", "background writer"),
        ("Refresh Continuous Aggregate", "refresh policy"),
        ("Columnstore Policy", "compression policy"),
        ("Compression Policy", "compression policy"),
        ("autovacuum", "autovacuum"),
        ("127.0.0.1(", "sessions"),
    ];
    kinds.iter().find(|(pattern, _)| title.contains(pattern)).map_or("others", |(_, kind)| kind).to_owned()
}
