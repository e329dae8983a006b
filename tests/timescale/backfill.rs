//! Old rows by pieces, beside an application that writes to both databases.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_postgres::Client;

use crate::support::process::{Finished, Running};
use crate::support::timescale::{TIMESCALE, timescale_available, timescale_has_version};
use crate::support::{Migration, Servers, is_blocked};

const DOCUMENT: &str = include_str!("../../docs/backfill.md");

/// The moment from which on the application writes to both; it lies in the tenth chunk.
pub(crate) const UNTIL: &str = "2026-01-10T12:00:00Z";

pub(crate) const SCHEMA: [&str; 5] = [
    "CREATE TABLE device (id int PRIMARY KEY, name text)",
    "CREATE TABLE conditions (time timestamptz NOT NULL, device int NOT NULL REFERENCES device, value float8, note text, PRIMARY KEY (time, device))",
    "SELECT create_hypertable('conditions', 'time', chunk_time_interval => interval '1 day')",
    "ALTER TABLE conditions SET (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time DESC')",
    "CREATE MATERIALIZED VIEW hourly WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket('1 hour', time) AS hour, device, count(*) AS n, max(value) AS value FROM conditions GROUP BY 1, 2 WITH NO DATA",
];

/// Ten days of rows; seven chunks are compressed, and a row came late into the second of them.
pub(crate) const ROWS: [&str; 4] = [
    "INSERT INTO device SELECT i, 'device ' || i FROM generate_series(1, 20) i",
    "INSERT INTO conditions SELECT t, d, extract(epoch FROM t)::int8 % 977 / 7.0, 'note ' || d \
     FROM generate_series('2026-01-01 00:00Z'::timestamptz, '2026-01-10 11:50Z', '10 min') t, generate_series(1, 10) d",
    "SELECT compress_chunk(c) FROM show_chunks('conditions', older_than => '2026-01-08 00:00Z'::timestamptz) c",
    "INSERT INTO conditions VALUES ('2026-01-02 00:00:01Z', 17, 1, 'late')",
];

pub(crate) async fn run_all(client: &Client, statements: &[&str]) {
    client.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    for statement in statements {
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

/// Rows of a query as one text.
pub(crate) async fn text(client: &Client, query: &str) -> String {
    let query =
        format!("SELECT coalesce(string_agg(x::text, E'\\n' ORDER BY x::text COLLATE \"C\"), '') FROM ({query}) x");
    client.query_one(&query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

/// The same on both sides, and something.
pub(crate) async fn assert_same(migration: &Migration, query: &str) {
    let (source, target) = (migration.source().await, migration.target().await);
    for client in [&source, &target] {
        client.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    }
    let (here, there) = (text(&source, query).await, text(&target, query).await);
    assert!(!here.is_empty(), "{query}");
    assert!(here == there, "{query}: {} and {} characters", here.len(), there.len());
}

async fn backfill(migration: &Migration, arguments: &[&str]) -> Finished {
    start(migration, arguments).wait().await
}

fn start(migration: &Migration, arguments: &[&str]) -> Running {
    let dir = migration.directory();
    let (source, target) = (migration.source_url.as_str(), migration.target_url.as_str());
    let mut all = vec!["backfill", "--source", source, "--target", target, "--dir", dir.to_str().unwrap()];
    all.extend(["--until", UNTIL, "--http-addr", "off", "--copy-jobs", "1"]);
    all.extend(arguments);
    Running::start(&all, &migration.files(), &migration.environment)
}

/// An application that writes the same new rows to both databases, until it is stopped.
struct WritesToBoth {
    stop: Arc<AtomicBool>,
    writer: tokio::task::JoinHandle<i64>,
}

impl WritesToBoth {
    async fn start(migration: &Migration) -> WritesToBoth {
        let (source, target) = (migration.source().await, migration.target().await);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let writer = tokio::spawn(async move {
            let mut written = 0;
            while !stopped.load(Ordering::Relaxed) {
                let row = format!(
                    "INSERT INTO public.conditions VALUES ('2026-01-10 12:00Z'::timestamptz + {written} * interval '1 min', 3, {written}, 'new')"
                );
                source.batch_execute(&row).await.unwrap();
                target.batch_execute(&row).await.unwrap();
                written += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            written
        });
        WritesToBoth { stop, writer }
    }

    async fn stop(self) -> i64 {
        self.stop.store(true, Ordering::Relaxed);
        self.writer.await.unwrap()
    }
}

#[tokio::test]
async fn ten_chunks_with_a_failure_in_the_sixth_and_a_kill_come_over_as_they_are_beside_an_application() {
    if !timescale_available("a backfill of ten chunks") {
        return;
    }
    let servers = Servers::with(&TIMESCALE, &TIMESCALE).await;
    let migration = servers.migration("fill").await;
    let (source, target) = (migration.source().await, migration.target().await);
    for client in [&source, &target] {
        run_all(client, &["CREATE EXTENSION timescaledb"]).await;
        run_all(client, &SCHEMA).await;
    }
    run_all(&source, &ROWS).await;
    run_all(&source, &["CALL refresh_continuous_aggregate('hourly', NULL, NULL)"]).await;
    let policies = [
        "SELECT add_retention_policy('conditions', interval '100 years')",
        "SELECT add_compression_policy('conditions', interval '90 years')",
        // What the application wrote to both, of the third day.
        "INSERT INTO device SELECT i, 'device ' || i FROM generate_series(1, 20) i",
        "INSERT INTO conditions VALUES ('2026-01-03 00:00Z', 1, extract(epoch FROM '2026-01-03 00:00Z'::timestamptz)::int8 % 977 / 7.0, 'note 1')",
        // And what somebody wrote to the target only, of the sixth.
        "INSERT INTO conditions VALUES ('2026-01-06 00:00Z', 2, -1, 'another')",
    ];
    run_all(&target, &policies).await;
    let application = WritesToBoth::start(&migration).await;

    let plan = backfill(&migration, &["--dry-run", "--json"]).await.json();
    let pieces = |table: usize| plan["tables"][table]["pieces"].as_array().unwrap();
    assert_eq!((pieces(0).len(), pieces(1).len()), (1, 10), "{plan:#}");
    assert_eq!(pieces(1).iter().filter(|piece| piece["how"] == "compressed as it is").count(), 7);
    assert_eq!(plan["policies"].as_array().unwrap().len(), 2);
    assert!(
        text(&target, "SELECT to_regclass('walferry.backfill') AS t").await.contains("()"),
        "a plan changes nothing"
    );

    // The sixth has a row that is another.
    let failed = backfill(&migration, &[]).await;
    failed.assert_refused(1, &["_chunk", "(\"time\", \"device\")=(\"2026-01-06 00:00:00+00\",2)", "--on-conflict"]);
    let copied = "SELECT count(*) FROM walferry.backfill_piece WHERE copied AND relation LIKE '%conditions%'";
    assert_eq!(text(&target, copied).await, "(5)");
    let scheduled =
        "SELECT proc_name, scheduled FROM timescaledb_information.jobs WHERE hypertable_name = 'conditions'";
    assert_eq!(text(&target, scheduled).await, "(policy_compression,t)\n(policy_retention,t)");

    // Mended; then it dies in the sixth, with its rows written and not committed.
    run_all(&target, &["DELETE FROM conditions WHERE note = 'another'"]).await;
    let holder = migration.target().await;
    holder.batch_execute("BEGIN; SELECT FROM walferry.backfill_piece WHERE NOT copied FOR UPDATE").await.unwrap();
    let running = start(&migration, &[]);
    is_blocked(&target, "UPDATE walferry.backfill_piece").await;
    running.kill().await;
    assert_eq!(text(&target, scheduled).await, "(policy_compression,f)\n(policy_retention,f)", "they rest");
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(text(&target, copied).await, "(5)");
    let sixth = "SELECT count(*) FROM conditions WHERE time >= '2026-01-06 00:00Z' AND time < '2026-01-07 00:00Z'";
    assert_eq!(text(&target, sixth).await, "(0)", "a piece is there or not");

    let other_options = backfill(&migration, &["--from", "2026-01-02"]).await;
    other_options.assert_refused(3, &["was begun with other options"]);
    let done = backfill(&migration, &["--json"]).await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let done = done.json();
    assert_eq!((&done["pieces"], &done["pieces_now"]), (&11.into(), &5.into()), "{done:#}");
    assert!(application.stop().await > 0);

    assert_same(&migration, "SELECT * FROM conditions").await;
    assert_same(&migration, "SELECT * FROM device").await;
    assert_same(&migration, "SELECT * FROM hourly WHERE hour < '2026-01-10 12:00Z'").await;
    let how = "SELECT how, count(*) FROM walferry.backfill_piece WHERE relation LIKE '%conditions%' GROUP BY how";
    assert_eq!(text(&target, how).await, "(as_it_is,6)\n(merged,1)\n(rows,3)", "the third met rows that were there");
    assert_eq!(text(&target, scheduled).await, "(policy_compression,t)\n(policy_retention,t)");
    // The first chunk's batches are the source's, to the byte; the third was compressed again.
    let batches = "SELECT format('%I.%I', i.schema_name, i.table_name) FROM _timescaledb_catalog.chunk c \
                   JOIN _timescaledb_catalog.chunk i ON i.id = c.compressed_chunk_id \
                   JOIN timescaledb_information.chunks n ON n.chunk_name = c.table_name WHERE n.range_start = '2026-01-01 00:00Z'";
    let mut of = Vec::new();
    for client in [&source, &target] {
        let name: String = client.query_one(batches, &[]).await.unwrap().get(0);
        of.push(text(client, &format!("SELECT * FROM {name}")).await);
    }
    assert!(of[0].len() > 1000 && of[0] == of[1], "compressed rows as they are");
    let compressed =
        "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'conditions' AND is_compressed";
    assert_eq!((text(&source, compressed).await, text(&target, compressed).await), ("(7)".into(), "(7)".into()));
    // A chunk that came as it is takes part in what comes next: its keys are known.
    let again = target.batch_execute("INSERT INTO conditions VALUES ('2026-01-01 00:00Z', 1, 0, 'twice')").await;
    assert_eq!(again.unwrap_err().code().unwrap().code(), "23505");

    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    let mut left = migration.left_over().await;
    left.retain(|what| !what.starts_with("event trigger timescaledb_"));
    assert_eq!(left, Vec::<String>::new());
}

/// The commands of the document's blocks for a shell.
fn commands() -> Vec<Vec<String>> {
    let blocks = DOCUMENT.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks
        .flat_map(str::lines)
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .filter(|words: &Vec<_>| !words.is_empty())
        .collect()
}

#[tokio::test]
async fn the_documents_commands_fill_a_newer_version_whose_chunks_are_other_ones() {
    if !timescale_available("a backfill between versions")
        || !timescale_has_version("2.26.4", "a backfill between versions")
    {
        return;
    }
    let servers = Servers::with(&TIMESCALE, &TIMESCALE).await;
    let migration = servers.migration("document").await;
    let (source, target) = (migration.source().await, migration.target().await);
    run_all(&source, &["CREATE EXTENSION timescaledb VERSION '2.26.4'"]).await;
    run_all(&target, &["CREATE EXTENSION timescaledb VERSION '2.28.3'"]).await;
    let more = [
        "CREATE TABLE events (id bigint PRIMARY KEY, at timestamptz, what jsonb)",
        "CREATE TABLE ticks (n bigint NOT NULL, d text, v int)",
    ];
    for client in [&source, &target] {
        run_all(client, &SCHEMA).await;
        run_all(client, &more).await;
    }
    run_all(&source, &ROWS).await;
    let rows = [
        "INSERT INTO events SELECT i, '2026-01-01 00:00Z'::timestamptz + i * interval '1 hour', jsonb_build_object('i', i) FROM generate_series(1, 300) i",
        // Divided by a hash, too; the target has a plain table.
        "SELECT create_hypertable('ticks', 'n', chunk_time_interval => 1000, partitioning_column => 'd', number_partitions => 3)",
        "INSERT INTO ticks SELECT i, CASE WHEN i % 7 > 0 THEN 'd' || i % 11 END, i FROM generate_series(1, 3000) i",
    ];
    run_all(&source, &rows).await;
    // Chunks of three days where the source has one each.
    run_all(&target, &["SELECT set_chunk_time_interval('conditions', interval '3 days')"]).await;
    let environment = [("WALFERRY_SOURCE", &migration.source_url), ("WALFERRY_TARGET", &migration.target_url)];
    let environment: Vec<(String, String)> = environment.map(|(name, value)| (name.to_owned(), value.clone())).to_vec();
    let files = migration.files().to_str().unwrap().to_owned();
    let run = async |words: &[&str]| {
        let mut words: Vec<String> = words.iter().map(|word| word.replace("./", &format!("{files}/"))).collect();
        if words[0] == "backfill" {
            words.extend(["--http-addr".to_owned(), "off".to_owned()]);
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let ended = Running::start(&words, &migration.files(), &environment).wait().await;
        assert_eq!(ended.code, Some(0), "{words:?}: {}", ended.stderr);
        ended
    };
    let commands = commands();
    assert_eq!(commands.len(), 6, "{commands:?}");
    for words in &commands {
        assert_eq!(words[0], "walferry");
        run(&words[1..].iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
    let hash = ["backfill", "--dir", "./ticks", "--tables", "public.ticks", "--until", "2500"];
    run(&hash).await;

    assert_same(&migration, "SELECT * FROM conditions").await;
    assert_same(&migration, "SELECT * FROM device").await;
    assert_same(&migration, "SELECT * FROM events WHERE at >= '2026-01-02 00:00Z' AND at < '2026-01-10 12:00Z'").await;
    assert_same(&migration, "SELECT * FROM ticks WHERE n < 2500").await;
    assert_eq!(text(&target, "SELECT max(n) FROM ticks").await, "(2499)");
    assert_eq!(text(&target, "SELECT count(*) FROM events").await, "(204)", "nothing before --from");
    let chunks = "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'conditions'";
    assert!(text(&target, chunks).await.len() < "(10)".len() + 1, "{}", text(&target, chunks).await);
    let compressed = format!("{chunks} AND is_compressed AND range_end <= '2026-01-08 00:00Z'");
    assert_ne!(text(&target, &compressed).await, "(0)");
    // SQL of the document.
    let sql = DOCUMENT.split("```sql\n").nth(1).unwrap().split("```").next().unwrap();
    target.batch_execute(sql).await.unwrap();
    assert!(text(&target, "SELECT how FROM walferry.backfill_piece").await.contains("rows"));
}
