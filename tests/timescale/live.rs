//! TimescaleDB to TimescaleDB, live, with everything going on at once on the source, and compared by plain SQL.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::support::process::Running;
use crate::support::timescale::{servers, timescale_available};
use crate::support::{Migration, Servers, connect, until, until_true};

/// Hypertables with a key (one of them by space too), without one, by integers, inside of which columns were dropped; continuous
/// aggregates upon each other, and over raw data that retention has dropped; an ordinary table; jobs of all kinds.
const SCHEMA: &str = "
CREATE TABLE metrics (gone int, time timestamptz NOT NULL, device int NOT NULL, room text, value float8, PRIMARY KEY (device, time));
SELECT create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day');
SELECT add_dimension('metrics', 'device', number_partitions => 2);
INSERT INTO metrics SELECT 1, t, d, 'room ' || d, d FROM generate_series('2025-01-01 00:00Z'::timestamptz, '2025-01-02 23:00Z', '1 hour') t, \
    generate_series(1, 6) d;
ALTER TABLE metrics DROP COLUMN gone;
ALTER TABLE metrics ADD COLUMN unit text DEFAULT 'C';
INSERT INTO metrics SELECT t, d, 'room ' || d, d FROM generate_series('2025-01-03 00:00Z'::timestamptz, '2025-01-06 23:00Z', '1 hour') t, \
    generate_series(1, 6) d;
ALTER TABLE metrics SET (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time DESC');
CREATE TABLE log (at timestamp NOT NULL, who text, what jsonb);
SELECT create_hypertable('log', 'at', chunk_time_interval => interval '1 day');
ALTER TABLE log SET (timescaledb.compress, timescaledb.compress_segmentby = 'who');
INSERT INTO log SELECT t, 'w' || (n % 3), jsonb_build_object('n', n) FROM generate_series('2025-01-01'::timestamp, '2025-01-04', '1 hour') t, \
    generate_series(1, 3) n;
INSERT INTO log SELECT * FROM log WHERE what->>'n' = '1';
CREATE TABLE ticks (n bigint NOT NULL, v numeric, PRIMARY KEY (n));
SELECT create_hypertable('ticks', 'n', chunk_time_interval => 100);
CREATE FUNCTION ticks_now() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT coalesce(max(n), 0) FROM public.ticks';
SELECT set_integer_now_func('ticks', 'ticks_now');
INSERT INTO ticks SELECT n, n / 7.0 FROM generate_series(1, 450) n;
CREATE TABLE devices (id int PRIMARY KEY, name text);
INSERT INTO devices SELECT n, 'device ' || n FROM generate_series(1, 20) n;
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.room = NEW.room || ''!''; RETURN NEW; END';
CREATE TRIGGER touch BEFORE UPDATE ON metrics FOR EACH ROW WHEN (NEW.value > 1000) EXECUTE FUNCTION touch();
SELECT compress_chunk(c) FROM show_chunks('metrics', older_than => '2025-01-05 00:00Z'::timestamptz) c;
SELECT compress_chunk(c) FROM show_chunks('log', older_than => '2025-01-02'::timestamp) c;
INSERT INTO metrics VALUES ('2025-01-02 00:30Z', 1, 'late', 1, 'K');
SELECT add_retention_policy('metrics', interval '100 years');
SELECT add_compression_policy('metrics', interval '90 years');
SELECT add_reorder_policy('ticks', 'ticks_pkey');
CREATE PROCEDURE own(job_id int, config jsonb) LANGUAGE sql AS 'SELECT 1';
SELECT alter_job(add_job('own', '1 hour', config => '{\"a\": 1}'), scheduled => false);
SELECT add_job('own', '3 days', initial_start => '2090-01-01 00:00Z', timezone => 'Europe/Berlin');
";

const AGGREGATES: [&str; 6] = [
    "CREATE MATERIALIZED VIEW hourly WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket('1 hour', time) AS bucket, device, avg(value) AS value, count(*) AS n FROM metrics GROUP BY 1, 2 WITH NO DATA",
    "CREATE MATERIALIZED VIEW daily WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS \
     SELECT time_bucket('1 day', bucket) AS bucket, sum(n) AS n FROM hourly GROUP BY 1 WITH NO DATA",
    "CALL refresh_continuous_aggregate('hourly', NULL, '2025-01-06 00:00Z')",
    "CALL refresh_continuous_aggregate('daily', NULL, '2025-01-06 00:00Z')",
    "SELECT add_continuous_aggregate_policy('hourly', interval '100 years', interval '1 hour', interval '1 hour')",
    "SELECT drop_chunks('metrics', older_than => '2025-01-02 00:00Z'::timestamptz)",
];

/// Who writes all the time: to compressed and to other chunks, and to new ones.
const WRITES: [&str; 8] = [
    "INSERT INTO metrics SELECT '2025-01-07 00:00Z'::timestamptz + $1 * interval '17 minutes', d, 'new', $1 FROM generate_series(1, 3) d",
    "INSERT INTO metrics VALUES ('2025-01-03 00:00Z'::timestamptz + $1 * interval '1 minute', 2, 'upsert', $1) \
     ON CONFLICT (device, time) DO UPDATE SET value = EXCLUDED.value",
    "UPDATE metrics SET value = $1 WHERE device = 1 + $1 % 6 AND time = '2025-01-04 00:00Z'::timestamptz + ($1 % 48) * interval '1 hour'",
    "UPDATE metrics SET room = 'swept ' || $1 WHERE device = 1 + $1 % 6 AND time >= '2025-01-05 22:00Z' AND time < '2025-01-06 03:00Z'",
    "DELETE FROM metrics WHERE device = 4 AND time = '2025-01-02 00:00Z'::timestamptz + ($1 % 72) * interval '1 hour'",
    "INSERT INTO ticks SELECT max(n) + 1 + $1 % 3, $1 FROM ticks",
    "INSERT INTO log VALUES ('2025-01-01'::timestamp + $1 * interval '13 minutes', 'w' || $1 % 3, jsonb_build_object('w', $1))",
    "UPDATE devices SET name = 'd' || $1 WHERE id = 1 + $1 % 20",
];

/// What goes on beside it, over and over. What meets a lock of another is tried again in the next round.
const WORK: [&str; 9] = [
    "SELECT compress_chunk(c, true) FROM show_chunks('metrics', older_than => '2025-01-06 00:00Z'::timestamptz) c",
    "SELECT decompress_chunk(c, true) FROM show_chunks('metrics', newer_than => '2025-01-03 00:00Z'::timestamptz, \
     older_than => '2025-01-04 00:00Z'::timestamptz) c",
    "CALL refresh_continuous_aggregate('hourly', '2025-01-05 00:00Z', '2025-01-08 00:00Z')",
    "CALL refresh_continuous_aggregate('daily', '2025-01-05 00:00Z', '2025-01-08 00:00Z')",
    "DELETE FROM metrics WHERE device = 5 AND time < '2025-01-04 00:00Z'",
    "SELECT reorder_chunk(c, 'ticks_pkey') FROM (SELECT show_chunks('ticks') c LIMIT 1) s",
    "DO $$ DECLARE least bigint; BEGIN SELECT max(n) - 400 INTO least FROM ticks; PERFORM drop_chunks('ticks', older_than => least); END $$",
    "INSERT INTO metrics SELECT t, 5, 'again', 0 FROM generate_series('2025-01-02 06:00Z'::timestamptz, '2025-01-03 12:00Z', '1 hour') t \
     ON CONFLICT DO NOTHING",
    "SELECT compress_chunk(c, true) FROM show_chunks('log', older_than => '2025-01-03'::timestamp) c",
];

pub(super) struct Application {
    tasks: JoinSet<()>,
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    rounds: Arc<AtomicU64>,
}

impl Application {
    pub(super) fn start(url: &str) -> Application {
        let (stop, writes, rounds) = (Arc::default(), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for writer in 0..2i64 {
            let (url, stop, writes): (_, Arc<AtomicBool>, _) = (url.to_owned(), Arc::clone(&stop), Arc::clone(&writes));
            tasks.spawn(async move {
                let client = connect(&url).await;
                let mut number = writer;
                while !stop.load(Ordering::Relaxed) {
                    for statement in WRITES {
                        let statement = statement.replace("$1", &number.to_string());
                        // Locks of the work beside it, deadlocks, rows of both writers: as an application has them.
                        let _ = client.batch_execute(&statement).await;
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                    number += 2;
                    tokio::time::sleep(Duration::from_millis(120)).await;
                }
            });
        }
        let (url, halt, done): (_, Arc<AtomicBool>, _) = (url.to_owned(), Arc::clone(&stop), Arc::clone(&rounds));
        tasks.spawn(async move {
            let client = connect(&url).await;
            client.batch_execute("SET lock_timeout = '2s'").await.unwrap();
            while !halt.load(Ordering::Relaxed) {
                for statement in WORK {
                    if let Err(error) = client.batch_execute(statement).await {
                        println!("beside: {statement}: {error:?}");
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        Application { tasks, stop, writes, rounds }
    }

    /// Until so many more rounds of the work beside it have gone by.
    pub(super) async fn goes_on(&self, rounds: u64) {
        let goal = self.rounds.load(Ordering::Relaxed) + rounds;
        until("the application goes on", || async { (self.rounds.load(Ordering::Relaxed) >= goal).then_some(()) })
            .await;
    }

    pub(super) async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        assert!(self.writes.load(Ordering::Relaxed) > 0);
    }
}

/// What wakes at the cutover is compared before it has run.
pub(super) const ASLEEP: [(&str, &str); 1] = [("timescaledb.max_background_workers", "0")];

/// Everything above, with a version of the extension.
pub(crate) async fn fill(client: &Client, version: Option<&str>) {
    let version = version.map_or_else(String::new, |version| format!(" VERSION '{version}'"));
    client.batch_execute(&format!("CREATE EXTENSION timescaledb{version}")).await.unwrap();
    client.batch_execute(SCHEMA).await.unwrap();
    for statement in AGGREGATES {
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

/// How a server writes a query down, which another major version does otherwise.
const DEFINITIONS: &str = "definitions";

/// Everything that users see, by plain SQL.
async fn seen(client: &Client) -> BTreeMap<String, String> {
    client.batch_execute("SET search_path = public; SET TimeZone = 'UTC'").await.unwrap();
    let mut seen = BTreeMap::new();
    let relations = client
        .query(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'public' \
             UNION ALL SELECT format('%I.%I', view_schema, view_name) FROM timescaledb_information.continuous_aggregates \
             UNION ALL SELECT format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name) \
             FROM timescaledb_information.continuous_aggregates",
            &[],
        )
        .await
        .unwrap();
    for relation in relations {
        let relation: String = relation.get(0);
        let query = format!(
            "SELECT count(*)::text || ' ' || coalesce(md5(string_agg(h, '' ORDER BY h)), '') \
             FROM (SELECT md5(t::text) COLLATE \"C\" FROM {relation} t) hashes(h)"
        );
        seen.insert(relation, client.query_one(&query, &[]).await.unwrap().get(0));
    }
    for (what, query) in [
        ("hypertables", "SELECT to_jsonb(h) - 'num_chunks' FROM timescaledb_information.hypertables h"),
        ("dimensions", "SELECT to_jsonb(d) FROM timescaledb_information.dimensions d"),
        ("compression", "SELECT to_jsonb(c) FROM timescaledb_information.hypertable_compression_settings c"),
        ("aggregates", "SELECT to_jsonb(c) - 'view_definition' FROM timescaledb_information.continuous_aggregates c"),
        (DEFINITIONS, "SELECT view_definition FROM timescaledb_information.continuous_aggregates c"),
        ("jobs", "SELECT to_jsonb(j) - 'next_start' FROM timescaledb_information.jobs j WHERE job_id >= 1000"),
        ("time zones of jobs", "SELECT to_jsonb(j)->>'timezone' FROM _timescaledb_catalog.bgw_job j WHERE id >= 1000"),
        ("watermarks", "SELECT to_jsonb(w) FROM _timescaledb_catalog.continuous_aggs_watermark w"),
        ("invalid", "SELECT to_jsonb(w) FROM _timescaledb_catalog.continuous_aggs_hypertable_invalidation_log w"),
        ("indexes", "SELECT to_jsonb(i) FROM pg_indexes i WHERE schemaname = 'public'"),
        (
            "triggers",
            "SELECT to_jsonb(pg_get_triggerdef(oid)) FROM pg_trigger \
             WHERE tgrelid = 'metrics'::regclass AND NOT tgisinternal AND tgname NOT LIKE '!walferry%'",
        ),
    ] {
        let query = format!("SELECT coalesce(string_agg(r::text, E'\\n' ORDER BY r::text), '') FROM ({query}) q(r)");
        seen.insert(what.into(), client.query_one(&query, &[]).await.unwrap().get(0));
    }
    seen
}

pub(crate) async fn assert_equal(migration: &Migration) {
    let (source, target) = (seen(&migration.source().await).await, seen(&migration.target().await).await);
    assert!(source.len() > 12, "{source:?}");
    let version =
        async |client: Client| client.query_one("SHOW server_version_num", &[]).await.unwrap().get::<_, String>(0);
    let (from, to) = (version(migration.source().await).await, version(migration.target().await).await);
    for (what, value) in source.iter().filter(|(what, _)| *what != DEFINITIONS || from[..2] == to[..2]) {
        assert_eq!(Some(value), target.get(what), "{what} of source and target");
    }
    assert_eq!(source.len(), target.len());
    // What hangs on a hypertable hangs on each of its chunks, those that came on the way included.
    let bare = "SELECT c.oid::regclass::text FROM timescaledb_information.chunks k \
         JOIN pg_class c ON c.oid = format('%I.%I', k.chunk_schema, k.chunk_name)::regclass \
         WHERE hypertable_name = 'metrics' AND (NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = 'touch') \
            OR (SELECT count(*) FROM pg_index i WHERE i.indrelid = c.oid) <> 2)";
    let bare = migration.target().await.query(bare, &[]).await.unwrap();
    assert!(
        bare.is_empty(),
        "chunks without trigger or index: {:?}",
        bare.iter().map(|row| row.get::<_, &str>(0)).collect::<Vec<_>>()
    );
}

pub async fn nothing_runs_on_the_target_yet(migration: &Migration) {
    let target = migration.target().await;
    let awake =
        target.query("SELECT FROM _timescaledb_catalog.bgw_job WHERE id >= 1000 AND scheduled", &[]).await.unwrap();
    assert!(awake.is_empty(), "jobs sleep until the cutover");
    let restoring: String = target.query_one("SHOW timescaledb.restoring", &[]).await.unwrap().get(0);
    assert_eq!(restoring, "off", "nobody else is in restoring mode");
}

async fn begun(servers: &Servers, database: &str) -> (Migration, Application) {
    let migration = servers.migration(database).await;
    fill(&migration.source().await, None).await;
    let application = Application::start(&migration.source_url);
    application.goes_on(1).await;
    (migration, application)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_timescaledb_is_moved_live_under_compression_refresh_and_retention() {
    if !timescale_available("TimescaleDB to TimescaleDB, live") {
        return;
    }
    is_moved_live(&servers(&[], &ASLEEP).await, &[]).await;
}

/// The whole of it, between these servers; with variables that the program gets besides.
pub async fn is_moved_live(servers: &Servers, environment: &[(&str, &str)]) {
    let (mut migration, application) = begun(servers, "live").await;
    migration.environment.extend(environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let mut running = migration.migrate(&["--replica-identity-full", "--no-reverse", "--queue-max-bytes", "64MiB"]);
    migration.wait_for_phase(&mut running, "following").await;
    nothing_runs_on_the_target_yet(&migration).await;
    application.goes_on(2).await;
    // A new hypertable's chunk range comes again after it was dropped.
    let source = migration.source().await;
    source.batch_execute("SELECT drop_chunks('log', older_than => '2025-01-02'::timestamp)").await.unwrap();
    source.batch_execute("INSERT INTO log VALUES ('2025-01-01 00:00', 'again', '{}')").await.unwrap();
    application.goes_on(1).await;
    application.stop().await;
    // So that the target's policies, which run from the decision on, find nothing to refresh before both sides are compared.
    for aggregate in ["hourly", "daily"] {
        source.batch_execute(&format!("CALL refresh_continuous_aggregate('{aggregate}', NULL, NULL)")).await.unwrap();
    }
    drop(source);
    let caught_up = |status: &serde_json::Value| status["lag"]["bytes"].as_f64() == Some(0.0);
    migration.wait_for_status(&mut running, "nothing is left to apply", caught_up).await;
    migration.cut_over(running).await;
    assert_equal(&migration).await;

    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    let source = migration.source().await;
    let left = source.query("SELECT FROM pg_class WHERE relreplident = 'f'", &[]).await.unwrap();
    assert!(left.is_empty(), "replica identities are put back");
    let set = "SELECT NOT EXISTS (SELECT FROM pg_db_role_setting) AND NOT EXISTS (SELECT FROM pg_file_settings \
               WHERE name LIKE 'timescaledb.%' AND sourcefile LIKE '%auto.conf')";
    until_true(&source, set).await;
}

/// An end at once, as by `kill -9`, and the same command again.
pub(super) async fn killed_and_begun_again(migration: &Migration, running: Running, arguments: &[&str]) -> Running {
    running.kill().await;
    nothing_runs_on_the_target_yet(migration).await;
    migration.migrate(arguments)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_a_session_did_not_publish_is_copied_late_and_a_killed_process_goes_on() {
    if !timescale_available("chunks that come late, and kill -9 with TimescaleDB") {
        return;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = servers.migration("late").await;
    let source = migration.source().await;
    fill(&source, None).await;
    // A session of before the migration that says no by itself, and has a chunk's transaction open while it is looked for.
    let own = migration.source().await;
    own.batch_execute("SET timescaledb.enable_chunk_auto_publication = off").await.unwrap();
    let arguments = ["--replica-identity-full", "--no-reverse", "--queue-max-bytes", "64MiB"];
    let mut running = migration.migrate(&arguments);
    migration.wait_for_phase(&mut running, "copying").await;
    let mut running = killed_and_begun_again(&migration, running, &arguments).await;
    migration.wait_for_phase(&mut running, "following").await;
    own.batch_execute("INSERT INTO metrics VALUES ('2025-02-01 00:00Z', 1, 'unpublished', 1), ('2025-02-01 01:00Z', 1, 'unpublished', 1)")
        .await
        .unwrap();
    own.batch_execute("BEGIN; INSERT INTO metrics VALUES ('2025-02-01 02:00Z', 1, 'open', 1)").await.unwrap();
    let published = "SELECT count(*) > 0 FROM pg_publication_tables p JOIN timescaledb_information.chunks k \
         ON k.chunk_schema = p.schemaname AND k.chunk_name = p.tablename WHERE k.range_start >= '2025-02-01 00:00Z'";
    until_true(&source, published).await;
    own.batch_execute("UPDATE metrics SET value = 2 WHERE time = '2025-02-01 01:00Z'; COMMIT").await.unwrap();
    own.batch_execute("UPDATE metrics SET value = 3 WHERE time >= '2025-02-01 01:00Z'").await.unwrap();
    let copied = "SELECT count(*) = 3 FROM public.metrics WHERE time >= '2025-02-01 00:00Z'";
    let target = migration.target().await;
    while !target.query_one(copied, &[]).await.unwrap().get::<_, bool>(0) {
        assert!(running.is_alive(), "{}", running.log());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    migration.wait_for_phase(&mut running, "following").await;
    let mut running = killed_and_begun_again(&migration, running, &arguments).await;
    // A whole segment, by a session that nobody could reach.
    own.batch_execute("SET timescaledb.enable_compressed_direct_batch_delete = on").await.unwrap();
    let rows = own.execute("DELETE FROM metrics WHERE device = 3 AND time < '2025-01-04 00:00Z'", &[]).await.unwrap();
    assert!(rows > 0);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    refused.assert_refused(5, &["metrics", "rows on the source", "enable_compressed_direct_batch_delete"]);
    nothing_runs_on_the_target_yet(&migration).await;
    // What was lost is made up for by hand on the target, and nothing else is missing.
    let target = migration.target().await;
    target.batch_execute("DELETE FROM public.metrics WHERE device = 3 AND time < '2025-01-04 00:00Z'").await.unwrap();
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    // A chunk that comes and is taken up when the cutover has read the ledger's tables, and before it reads them again.
    let holder = migration.target().await;
    holder.batch_execute("BEGIN; LOCK TABLE walferry.fingerprint IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let cutover =
        migration.start("cutover", &["--yes", "--no-reverse", "--timeout", "110s", "--max-write-stall", "25s"]);
    migration.wait_for_phase(&mut running, "cutting_over").await;
    // The refused cutover had ended all sessions.
    let source = migration.source().await;
    source.batch_execute("INSERT INTO metrics VALUES ('2025-03-01 00:00Z', 1, 'in between', 1)").await.unwrap();
    until_true(&target, "SELECT count(*) = 1 FROM public.metrics WHERE room = 'in between'").await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    let switched = cutover.wait().await;
    assert_eq!(switched.code, Some(0), "{}\n{}", switched.stderr, running.log());
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_equal(&migration).await;
    // What was invalid on the source when it was left is what the new primary's policies compute now: of the whole segment, nothing is left.
    let target = migration.target().await;
    let raw = "SELECT time_bucket('1 hour', time), device, count(*) FROM metrics GROUP BY 1, 2";
    let aggregate = "SELECT bucket, device, n FROM hourly WHERE bucket >= '2025-01-02 00:00Z'";
    let differ = format!("SELECT count(*) FROM (({raw} EXCEPT {aggregate}) UNION ALL ({aggregate} EXCEPT {raw})) rows");
    let differ = async || target.query_one(&differ, &[]).await.unwrap().get::<_, i64>(0);
    assert!(differ().await > 40, "hours of which all rows are deleted");
    target.batch_execute("CALL refresh_continuous_aggregate('hourly', NULL, NULL)").await.unwrap();
    assert_eq!(differ().await, 0);
}
