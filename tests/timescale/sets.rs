//! Many changed rows of chunks at once: written as sets, to the effect that a replay row by row has.

use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::Migration;
use crate::support::process::Running;
use crate::support::timescale::{servers, timescale_available};

/// With a key; without one, of which rows are equal but for what only their text shows; and an aggregate. Of each hypertable the first
/// day is compressed and the second is not; the third comes on the way.
const SCHEMA: &str = "
SET TimeZone = 'UTC';
CREATE EXTENSION timescaledb;
CREATE TABLE sentinel (id int PRIMARY KEY);
CREATE TABLE metrics (time timestamptz NOT NULL, device int NOT NULL, value float8, note text, PRIMARY KEY (time, device));
SELECT create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day');
ALTER TABLE metrics ALTER note SET STORAGE EXTERNAL;
ALTER TABLE metrics SET (timescaledb.compress, timescaledb.compress_segmentby = 'device');
INSERT INTO metrics SELECT t, d, d, repeat('n', 3000 * (d % 2)) FROM generate_series('2025-01-01'::timestamptz, '2025-01-02 23:50', '10 min') t,
    generate_series(1, 4) d;
CREATE TABLE log (at timestamp NOT NULL, who text, n numeric, f float8, j json);
SELECT create_hypertable('log', 'at', chunk_time_interval => interval '1 day');
ALTER TABLE log REPLICA IDENTITY FULL;
ALTER TABLE log SET (timescaledb.compress, timescaledb.compress_segmentby = 'who');
INSERT INTO log SELECT t, nullif('w' || n, 'w3'), CASE n WHEN 1 THEN 1.0 WHEN 2 THEN 1.00 END, CASE n WHEN 1 THEN 0 WHEN 2 THEN '-0' END, '{}'
    FROM generate_series('2025-01-01'::timestamp, '2025-01-02 23:50', '10 min') t, generate_series(1, 3) n, generate_series(1, 3);
SELECT compress_chunk(c) FROM show_chunks('metrics', older_than => '2025-01-02'::timestamptz) c;
SELECT compress_chunk(c) FROM show_chunks('log', older_than => '2025-01-02'::timestamp) c";
const AGGREGATE: [&str; 2] = [
    "CREATE MATERIALIZED VIEW halves WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket('30 min', time) AS bucket, device, avg(value) AS value, max(note) AS note FROM metrics GROUP BY 1, 2 WITH NO DATA",
    "CALL refresh_continuous_aggregate('halves', NULL, NULL)",
];
/// The third day.
const NEW: [&str; 2] = [
    "INSERT INTO metrics SELECT t, d, d, 'new' FROM generate_series('2025-01-03'::timestamptz, '2025-01-03 12:00', '10 min') t, generate_series(1, 4) d",
    "INSERT INTO log SELECT t, 'w', n, n, NULL FROM generate_series('2025-01-03'::timestamp, '2025-01-03 12:00', '10 min') t, generate_series(1, 4) n",
];
const CHANGES: [&str; 9] = [
    // What is unchanged of a TOASTed column stays; keys change.
    "UPDATE metrics SET value = value + 1",
    "UPDATE metrics SET note = NULL WHERE device = 2",
    "UPDATE metrics SET time = time + interval '1 min' WHERE device = 2 AND time >= '2025-01-02'",
    "BEGIN; DELETE FROM metrics WHERE device = 4; INSERT INTO metrics SELECT time + interval '3 min', 4, 0, 'again' FROM metrics WHERE device = 1; \
     UPDATE metrics SET time = time + interval '1 min' WHERE device = 4 AND time > '2025-01-02'; COMMIT",
    // Of three equal rows one goes, two become another, and all are one text of several.
    "DELETE FROM log l USING (SELECT min(ctid) AS ctid, tableoid FROM log WHERE at >= '2025-01-02' GROUP BY at, who, n::text, f::text, tableoid) s \
     WHERE l.ctid = s.ctid AND l.tableoid = s.tableoid",
    "UPDATE log SET who = 'other' WHERE n::text = '1.00' AND at < '2025-01-03'",
    "BEGIN; UPDATE log SET f = f + 1 WHERE at >= '2025-01-02'; UPDATE log SET f = f - 1 WHERE at >= '2025-01-02' AND f > 1; COMMIT",
    "BEGIN; INSERT INTO log SELECT * FROM log WHERE who IS NULL AND at >= '2025-01-02'; DELETE FROM log WHERE who IS NULL AND at >= '2025-01-02 12:00'; COMMIT",
    "CALL refresh_continuous_aggregate('halves', NULL, NULL)",
];

/// What can only be replayed row by row, because of an unchanged TOASTed value behind a changed key: in a compressed chunk of the target too.
const SERIALLY: [&str; 2] = [
    "SELECT decompress_chunk(c) FROM show_chunks('metrics', older_than => '2025-01-02'::timestamptz) c",
    "BEGIN; UPDATE metrics SET value = value + 1 WHERE time < '2025-01-02' AND device <= 2; UPDATE metrics SET time = time + interval '2 min' WHERE device = 3; COMMIT",
];

async fn seen(client: &Client) -> Vec<(String, i64, String)> {
    client.batch_execute("SET search_path = public; SET TimeZone = 'UTC'").await.unwrap();
    let mut seen = Vec::new();
    for relation in ["metrics", "log", "halves"] {
        let query = format!(
            "SELECT count(*), coalesce(md5(string_agg(h, '' ORDER BY h)), '') FROM (SELECT md5(t::text) COLLATE \"C\" FROM {relation} t) hashes(h)"
        );
        let row = client.query_one(&query, &[]).await.unwrap();
        seen.push((relation.to_owned(), row.get(0), row.get(1)));
    }
    seen
}

/// Waits until everything that the source has committed is on the target.
async fn is_applied(source: &Client, target: &Client, running: &mut Running) {
    let id: i32 = source
        .query_one("INSERT INTO public.sentinel SELECT count(*) FROM public.sentinel RETURNING id", &[])
        .await
        .unwrap()
        .get(0);
    let is_there = "SELECT FROM public.sentinel WHERE id = $1";
    while target.query(is_there, &[&id]).await.unwrap().is_empty() {
        assert!(running.is_alive(), "{}", running.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How often the apply has gone row by row.
async fn replays(migration: &Migration) -> Value {
    migration.status().await.unwrap()["apply"]["serial_replays"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_changed_rows_of_chunks_are_written_as_sets_and_end_as_on_the_source() {
    if !timescale_available("many changes of hypertables at once") {
        return;
    }
    let servers = servers(&[], &[("log_statement", "all")]).await;
    for binary in [true, false] {
        let migration = servers.migration(if binary { "binary" } else { "texts" }).await;
        let source = migration.source().await;
        source.batch_execute(SCHEMA).await.unwrap();
        if !binary {
            source.batch_execute("CREATE TABLE prices (id int PRIMARY KEY, price money)").await.unwrap();
        }
        for statement in AGGREGATE {
            source.batch_execute(statement).await.unwrap();
        }
        let mut running = migration.migrate(&["--no-reverse", "--queue-max-bytes", "64MiB"]);
        migration.wait_for_phase(&mut running, "following").await;
        for statement in NEW {
            source.batch_execute(statement).await.unwrap();
        }
        let target = migration.target().await;
        is_applied(&source, &target, &mut running).await;
        let before = replays(&migration).await;
        assert_eq!(before, 0, "what comes with a new chunk is not replayed row by row");
        for statement in SERIALLY {
            source.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        }
        is_applied(&source, &target, &mut running).await;
        assert_eq!(seen(&source).await, seen(&target).await, "row by row, binary: {binary}");
        assert_ne!(replays(&migration).await, before);
        let before = replays(&migration).await;
        for statement in CHANGES {
            source.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        }
        is_applied(&source, &target, &mut running).await;
        let (here, there) = (seen(&source).await, seen(&target).await);
        assert!(here.iter().all(|(_, rows, _)| *rows > 400), "{here:?}");
        assert_eq!(here, there, "binary: {binary}");
        assert_eq!(replays(&migration).await, before, "replayed row by row, binary: {binary}: {}", running.log());

        let log = std::fs::read_to_string(servers.target.log()).unwrap();
        for way in ["walferry_equal_", "walferry_rows_", "walferry_keys_"] {
            let of_chunks = |line: &&str| line.contains(" \"_timescaledb_internal\".\"_hyper_");
            let statements: Vec<&str> =
                log.lines().filter(|line| line.contains(way) && line.contains(" t.\"")).collect();
            assert!(!statements.is_empty(), "{way}: as sets, not one by one");
            // By the hypertable, every chunk would be opened for each statement.
            assert!(statements.iter().all(of_chunks), "{way}: of a chunk by its name: {statements:#?}");
        }

        // One of many that go is not there (I6): it is found, and named.
        if binary {
            target.batch_execute("DELETE FROM log WHERE at = '2025-01-02 05:00'").await.unwrap();
            source.batch_execute("DELETE FROM log WHERE at >= '2025-01-02' AND at < '2025-01-03'").await.unwrap();
            let ended = running.wait().await;
            assert_ne!(ended.code, Some(0));
            assert!(ended.stderr.contains("a row without a key"), "{}", ended.stderr);
        } else {
            running.kill().await;
        }
    }
}
