//! A plain database arrives as hypertables (`--hypertables`): while applications write, with chunks compressed on the way.

use std::path::PathBuf;

use tokio_postgres::Client;

use crate::support::process::Running;
use crate::support::timescale::{TIMESCALE, timescale_available};
use crate::support::{Migration, Servers, until_true};

const SCHEMA: &str = "
    CREATE TABLE device (id int PRIMARY KEY, name text NOT NULL);
    CREATE TABLE reading (
        at timestamptz NOT NULL, device int NOT NULL REFERENCES device, value float8, note text,
        n bigint GENERATED ALWAYS AS IDENTITY, PRIMARY KEY (at, device), CHECK (value < 1e9));
    CREATE INDEX reading_device ON reading (device, at DESC);
    CREATE TABLE event (seen timestamptz NOT NULL, kind text, payload jsonb);
    ALTER TABLE event REPLICA IDENTITY FULL;
    CREATE SCHEMA \"Ticks\";
    CREATE FUNCTION \"Ticks\".now() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT 1000000::bigint';
    CREATE TABLE \"Ticks\".\"Tick\" (\"T\" bigint NOT NULL, sensor int NOT NULL, v int, PRIMARY KEY (\"T\", sensor));
    INSERT INTO device SELECT d, 'device ' || d FROM generate_series(1, 5) d;
    INSERT INTO reading SELECT t, d, extract(epoch FROM t) % 1000 / 7, 'note ' || d
        FROM generate_series(now() - interval '30 days', now(), interval '10 minutes') t, generate_series(1, 5) d;
    INSERT INTO event SELECT t, 'kind ' || n % 3, jsonb_build_object('n', n)
        FROM generate_series(now() - interval '20 days', now(), interval '1 hour') WITH ORDINALITY s(t, n), generate_series(1, 2);
    INSERT INTO \"Ticks\".\"Tick\" SELECT t, s, t FROM generate_series(900000, 999990, 30) t, generate_series(1, 2) s;
    ANALYZE";

/// The example of the README, which is about `reading`.
fn example() -> &'static str {
    let readme = include_str!("../../README.md");
    let section = readme.split("### Plain tables to TimescaleDB").nth(1).unwrap();
    section.split("```toml\n").nth(1).unwrap().split("```").next().unwrap()
}

const OTHERS: &str = r#"
[[hypertable]]
table = "public.event"
time = "seen"
chunk_interval = "2 days"

[hypertable.compression]
after = "3 days"

[[hypertable]]
table = '"Ticks"."Tick"'
time = '"T"'
chunk_interval = 10000
integer_now = '"Ticks".now'

[hypertable.compression]
segment_by = ["sensor"]
after = 20000
"#;

/// What is compared, by SQL that knows nothing of hypertables.
const ROWS: &str = "SELECT 'reading', count(*), sum(hashtextextended(r::text, 0)::numeric)::text FROM reading r \
     UNION ALL SELECT 'event', count(*), sum(hashtextextended(e::text, 0)::numeric)::text FROM event e \
     UNION ALL SELECT 'tick', count(*), sum(hashtextextended(t::text, 0)::numeric)::text FROM \"Ticks\".\"Tick\" t \
     UNION ALL SELECT 'device', count(*), sum(hashtextextended(d::text, 0)::numeric)::text FROM device d ORDER BY 1";

async fn rows(client: &Client) -> Vec<(String, i64, String)> {
    client.query(ROWS, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
}

fn declared(migration: &Migration, text: &str) -> PathBuf {
    let path = migration.files().join("hypertables.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// What applications do to a hypertable: new rows, late ones, changed ones, rows that get another time, and rows that go; the old
/// ones are in compressed chunks.
async fn write(source: &Client, round: i32) {
    let late = round % 17 + 4;
    source
        .batch_execute(&format!(
            "INSERT INTO reading VALUES (clock_timestamp(), 1 + {round} % 5, {round}, 'new');
             INSERT INTO reading VALUES (clock_timestamp() - interval '{late} days', 1 + {round} % 5, {round}, 'late');
             UPDATE reading SET value = -{round} WHERE at = (SELECT at FROM reading WHERE at < now() - interval '{late} days'
                 ORDER BY at DESC LIMIT 1);
             UPDATE reading SET at = at - interval '36 hours 1 microsecond', note = 'moved' WHERE (at, device) = (SELECT at, device
                 FROM reading WHERE at < now() - interval '{late} days' ORDER BY at DESC, device LIMIT 1);
             DELETE FROM reading WHERE (at, device) = (SELECT at, device FROM reading WHERE at < now() - interval '{late} days 1 hour'
                 ORDER BY at DESC, device LIMIT 1);
             INSERT INTO event SELECT clock_timestamp() - interval '{late} days', 'late', '{{\"round\": {round}}}' FROM generate_series(1, 3);
             UPDATE event SET kind = NULL WHERE ctid = (SELECT ctid FROM event WHERE seen < now() - interval '{late} days'
                 ORDER BY seen DESC, ctid LIMIT 1);
             DELETE FROM event WHERE ctid = (SELECT ctid FROM event WHERE seen < now() - interval '{late} days 2 hours'
                 ORDER BY seen DESC, ctid LIMIT 1);
             UPDATE event SET seen = seen - interval '3 days' WHERE ctid = (SELECT ctid FROM event
                 WHERE seen < now() - interval '{late} days 5 hours' ORDER BY seen DESC, ctid LIMIT 1);
             INSERT INTO \"Ticks\".\"Tick\" VALUES (1000000 + {round}, 1, {round}), (900001 + 30 * {round}, 1, {round});
             UPDATE \"Ticks\".\"Tick\" SET v = {round} WHERE \"T\" = 900000 + 30 * {round};
             DELETE FROM \"Ticks\".\"Tick\" WHERE \"T\" = 930000 + 30 * {round} AND sensor = 2"
        ))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_database_becomes_compressed_hypertables_while_it_is_written_to() {
    if !timescale_available("a plain database becomes hypertables") {
        return;
    }
    let servers = Servers::with(&[], &TIMESCALE).await;
    let migration = servers.migration("plain").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute(SCHEMA).await.unwrap();
    let file = declared(&migration, &format!("{}{OTHERS}", example()));
    let file = file.to_str().unwrap();

    let refused = migration.with_servers("migrate", &["--dir", "/nowhere", "--hypertables", file]).await;
    assert_eq!(refused.code, Some(2), "there would be no way back: {}", refused.stderr);

    let options = [
        "--hypertables",
        file,
        "--no-reverse",
        "--split-above",
        "256KiB",
        "--copy-jobs",
        "2",
        "--queue-max-bytes",
        "256MiB",
    ];
    let mut running = migration.migrate(&options);
    for round in 0..20 {
        write(&source, round).await;
    }
    migration.wait_for_phase(&mut running, "following").await;
    let compressed = "SELECT count(*) > 20 AND count(DISTINCT hypertable_name) = 3 FROM timescaledb_information.chunks WHERE is_compressed";
    until_true(&target, compressed).await;
    let asleep =
        "SELECT count(*) = 4 AND NOT bool_or(scheduled) FROM timescaledb_information.jobs WHERE job_id >= 1000";
    until_true(&target, asleep).await;
    for round in 20..60 {
        write(&source, round).await;
        if round == 40 {
            source.batch_execute("TRUNCATE \"Ticks\".\"Tick\"").await.unwrap();
        }
    }
    let verified = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verified.code, Some(0), "{}\n{}\n{}", verified.stderr, verified.json(), running.log());
    // What the late rows have left uncompressed beside compressed rows is compressed again.
    until_true(&target, "SELECT count(*) = 0 FROM _timescaledb_catalog.chunk WHERE status & 8 <> 0").await;
    for round in 60..70 {
        write(&source, round).await;
    }
    migration.cut_over(running).await;

    // The cutover has ended all sessions there.
    let source = migration.source().await;
    assert_eq!(rows(&source).await, rows(&target).await, "rows of source and target (count, hash)");
    let state = target
        .query_one(
            "SELECT (SELECT array_agg(hypertable_name || ' ' || num_dimensions || ' ' || compression_enabled ORDER BY hypertable_name)::text
                     FROM timescaledb_information.hypertables),
                    (SELECT count(*) FROM timescaledb_information.jobs WHERE job_id >= 1000 AND scheduled),
                    (SELECT array_agg(indexname ORDER BY indexname)::text FROM pg_indexes WHERE schemaname IN ('public', 'Ticks')),
                    (SELECT count(*) FROM pg_constraint WHERE conrelid = 'reading'::regclass AND contype = 'f')",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(state.get::<_, &str>(0), "{\"Tick 1 true\",\"event 1 true\",\"reading 2 true\"}");
    assert_eq!(state.get::<_, i64>(1), 4, "the policies are awake");
    let indexes: &str = state.get(2);
    assert_eq!(indexes, "{Tick_pkey,device_pkey,event_seen_idx,reading_device,reading_pkey}", "and no other by time");
    assert_eq!(state.get::<_, i64>(3), 1, "the foreign key to a plain table");
}

const SERIES: &str = "
    CREATE TABLE sensor (at timestamptz NOT NULL, sensor_id int NOT NULL, value float8, PRIMARY KEY (sensor_id, at));
    CREATE TABLE events (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, happened timestamptz NOT NULL, kind text);
    CREATE TABLE account (id int PRIMARY KEY, at timestamptz NOT NULL, balance numeric);
    CREATE TABLE referring (sensor_id int, at timestamptz, FOREIGN KEY (sensor_id, at) REFERENCES sensor (sensor_id, at));
    CREATE TABLE parted (at timestamptz) PARTITION BY RANGE (at);
    CREATE TABLE nullable (at timestamptz, EXCLUDE USING btree (at WITH =));
    INSERT INTO sensor SELECT t, s, s / 7.0
        FROM generate_series(now() - interval '100 days', now(), interval '1 hour') t, generate_series(1, 20) s ORDER BY t, s;
    INSERT INTO events (happened, kind) SELECT now() - n * interval '1 minute', 'kind ' || n % 7 FROM generate_series(1, 30000) n;
    INSERT INTO account SELECT n, now(), 5 FROM generate_series(1, 100) n;
    ANALYZE";

const UNFIT: &str = r#"
[[hypertable]]
table = "public.account"
time = "at"
chunk_interval = 5

[[hypertable]]
table = "public.parted"
time = "at"
chunk_interval = "1 day"

[[hypertable]]
table = "public.nullable"
time = "at"
chunk_interval = "a while 5"

[[hypertable.dimension]]
column = "nowhere"
partitions = 2
"#;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_suggested_is_accepted_unchanged_and_survives_being_killed() {
    if !timescale_available("suggested hypertables") {
        return;
    }
    let servers = Servers::with(&[], &TIMESCALE).await;
    let migration = servers.migration("series").await;
    let source = migration.source().await;
    source.batch_execute(SERIES).await.unwrap();

    let unfit = declared(&migration, UNFIT);
    let arguments = ["--hypertables", unfit.to_str().unwrap(), "--estimate-seconds", "0", "--json"];
    let check = migration.with_servers("check", &arguments).await;
    assert_eq!(check.code, Some(3), "{}", check.stderr);
    let report = check.json();
    let found: Vec<(&str, &str)> = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["severity"] == "blocker")
        .map(|finding| (finding["code"].as_str().unwrap(), finding["object"].as_str().unwrap()))
        .collect();
    let expected = [
        ("hypertable-key", "\"public\".\"account\": account_pkey"),
        ("hypertable-time", "\"public\".\"account\" (at)"),
        ("hypertable-table", "\"public\".\"parted\""),
        ("hypertable-time", "\"public\".\"nullable\" (at)"),
        ("hypertable-column", "\"public\".\"nullable\" (nowhere)"),
        ("hypertable-key", "\"public\".\"nullable\": nullable_at_excl"),
        ("hypertable-interval", "\"public\".\"nullable\""),
    ];
    for each in expected {
        assert!(found.contains(&each), "{each:?} is not among {found:?}");
    }
    assert_eq!(found.len(), expected.len(), "{found:?}");

    source.batch_execute("DROP TABLE referring, parted").await.unwrap();
    let suggested = Running::start(
        &["suggest-hypertables", "--source", &migration.source_url, "--memory", "8MiB"],
        &migration.files(),
        &[],
    );
    let suggested = suggested.wait().await;
    assert_eq!(suggested.code, Some(0), "{}", suggested.stderr);
    for text in [
        "table = \"public.sensor\"\n",
        "\nsegment_by = [\"sensor_id\"]\n",
        "\ntable = \"public.events\"\n",
        "\n# about 100 rows: too few to be worth chunks, or never analysed.\n# [[hypertable]]\n# table = \"public.account\"\n",
    ] {
        assert!(suggested.stdout.contains(text), "{text:?} is not in:\n{}", suggested.stdout);
    }
    let file = declared(&migration, &suggested.stdout);
    let file = file.to_str().unwrap();
    let check = migration.with_servers("check", &["--hypertables", file, "--estimate-seconds", "0"]).await;
    assert_eq!(check.code, Some(0), "{}\n{}", check.stdout, check.stderr);

    let options = [
        "--hypertables",
        file,
        "--no-reverse",
        "--split-above",
        "256KiB",
        "--queue-max-bytes",
        "256MiB",
        "--copy-rate",
    ];
    let mut running = migration.migrate(&[&options[..], &["256KiB"]].concat());
    migration.wait_for_phase(&mut running, "copying").await;
    running.kill().await;
    source.batch_execute("UPDATE sensor SET value = -1 WHERE at < now() - interval '99 days'").await.unwrap();

    let mut running = migration.migrate(&[&options[..], &["off"]].concat());
    migration.wait_for_phase(&mut running, "following").await;
    let target = migration.target().await;
    until_true(&target, "SELECT count(*) > 0 FROM timescaledb_information.chunks WHERE is_compressed").await;
    running.kill().await;
    source
        .batch_execute(
            "DELETE FROM sensor WHERE at < now() - interval '98 days' AND sensor_id < 10;
             UPDATE sensor SET value = -2 WHERE at < now() - interval '97 days';
             UPDATE sensor SET at = at - interval '50 days 1 minute' WHERE sensor_id = 11 AND at > now() - interval '1 day';
             INSERT INTO events (happened, kind) SELECT now(), 'new' FROM generate_series(1, 50);
             UPDATE events SET kind = 'old' WHERE id < 100",
        )
        .await
        .unwrap();
    let running = migration.migrate(&[&options[..], &["off"]].concat());
    migration.cut_over(running).await;

    let source = migration.source().await;
    let same = "SELECT 'sensor', count(*), sum(hashtextextended(s::text, 0)::numeric)::text FROM sensor s \
                UNION ALL SELECT 'events', count(*), sum(hashtextextended(e::text, 0)::numeric)::text FROM events e";
    let read = |client: Client| async move {
        let rows = client.query(same, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect::<Vec<(String, i64, String)>>()
    };
    assert_eq!(read(source).await, read(migration.target().await).await);
    let made = "SELECT array_agg(hypertable_name ORDER BY hypertable_name)::text, (SELECT count(*) FROM timescaledb_information.jobs \
                WHERE job_id >= 1000 AND scheduled) FROM timescaledb_information.hypertables WHERE compression_enabled";
    let made = migration.target().await.query_one(made, &[]).await.unwrap();
    assert_eq!((made.get::<_, &str>(0), made.get::<_, i64>(1)), ("{events,sensor}", 1));
    let identity = "SELECT attidentity = 'a' FROM pg_attribute WHERE attrelid = 'events'::regclass AND attname = 'id'";
    until_true(&migration.target().await, identity).await;
}
