//! `check --plan` and the record, of migrations with TimescaleDB, against what the servers themselves logged.

use serde_json::Value;

use super::live::fill;
use super::recreate::OLD;
use crate::judge::{assert_complete, assert_planned, plan, record, servers};
use crate::logged::LogDirectory;
use crate::support::timescale::{TIMESCALE, timescale_available, timescale_has_version};
use crate::support::{Migration, until_true};

const WHOLE: [&str; 3] = ["--replica-identity-full", "--no-reverse", "--pause-source-jobs"];
const COMPUTED: [&str; 5] = ["--replica-identity-full", "--no-reverse", "--pause-source-jobs", "--caggs", "recompute"];

/// One of each kind that `--hypertables` makes.
const DECLARED: &str = r#"
[[hypertable]]
table = "public.tick"
time = "n"
chunk_interval = 100
integer_now = "public.tick_now"

[[hypertable.dimension]]
column = "sensor"
partitions = 2

[hypertable.compression]
segment_by = ["sensor"]
after = 500

[hypertable.retention]
after = 100000
"#;

async fn moved(migration: &Migration, arguments: &[&str], work: impl AsyncFnOnce()) -> Vec<Value> {
    let mut running = migration.migrate(&[&["--queue-max-bytes", "64MiB"], arguments].concat());
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    work().await;
    migration.cut_over(running).await;
    let record = record(&migration.directory());
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    record
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_statement_with_timescaledb_is_in_the_plan_and_in_the_record() {
    if !timescale_available("the plan of migrations with TimescaleDB") {
        return;
    }
    let (source_log, target_log) = (LogDirectory::new(), LogDirectory::new());
    let servers = servers(&source_log, &target_log, &TIMESCALE).await;
    let whole = servers.migration("whole").await;
    fill(&whole.source().await, None).await;
    let of_whole = moved(&whole, &WHOLE, async || what_comes_and_goes(&whole).await).await;

    let plain = servers.migration("plain").await;
    plain
        .source()
        .await
        .batch_execute(
            "CREATE TABLE tick (n bigint NOT NULL, sensor int NOT NULL, v int, PRIMARY KEY (n, sensor)); \
             CREATE FUNCTION tick_now() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT 2000::bigint'; \
             INSERT INTO tick SELECT n, n % 4, n FROM generate_series(1, 1900) n",
        )
        .await
        .unwrap();
    let file = plain.files().join("hypertables.toml");
    std::fs::write(&file, DECLARED).unwrap();
    let options = ["--no-reverse", "--hypertables", file.to_str().unwrap()];
    let target = plain.target().await;
    let compressed = "SELECT count(*) > 0 FROM timescaledb_information.chunks WHERE is_compressed";
    let of_plain = moved(&plain, &options, async || until_true(&target, compressed).await).await;

    let mut planned = [plan(&whole, &WHOLE).await, plan(&plain, &options).await].concat();
    let mut record = [of_whole, of_plain].concat();
    let made_again = timescale_has_version(OLD, "the plan of a migration to another version of TimescaleDB");
    if made_again {
        let another = servers.migration("another").await;
        fill(&another.source().await, Some(OLD)).await;
        another.target().await.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
        record.extend(moved(&another, &COMPUTED, async || what_changes_where_it_is_made_again(&another).await).await);
        planned.extend(plan(&another, &COMPUTED).await);
    }
    let on_source = assert_planned(&source_log, "source", &planned, &[]);
    let on_target = assert_planned(&target_log, "target", &planned, &[]);
    let of_another = [
        "refresh_continuous_aggregate",
        "create_chunk",
        "add_job",
        "delete_job",
        "alter_job_set_hypertable_id",
        "decompress_chunk",
    ];
    for (changes, texts) in [
        (&on_target, if made_again { &of_another[..] } else { &[] }),
        (
            &on_source,
            &["ALTER DATABASE", "ALTER SYSTEM SET", "ALTER SYSTEM RESET", "pg_reload_conf", "alter_job", "ADD TABLE"][..],
        ),
        (
            &on_target,
            &[
                "CREATE EXTENSION",
                "INSERT INTO \"_timescaledb_catalog\"",
                "DELETE FROM \"_timescaledb_catalog\"",
                "drop_chunk",
                "alter_job",
                "create_hypertable",
                "add_dimension",
                "set_integer_now_func",
                "timescaledb.compress",
                "add_compression_policy",
                "compress_chunk",
            ],
        ),
    ] {
        for text in texts {
            assert!(changes.iter().any(|change| change.contains(text)), "{text} was never run: {changes:#?}");
        }
    }
    let but_clean = |changes: Vec<String>| -> Vec<String> {
        changes.into_iter().filter(|change| !change.starts_with("DROP") && !change.contains(" RESET ")).collect()
    };
    assert_complete(&record, &but_clean(on_source), "source");
    assert_complete(&record, &but_clean(on_target), "target");
    let kinds: Vec<&str> = record.iter().filter_map(|line| line["kind"].as_str()).collect();
    for kind in ["setting", "job", "extension", "hypertable", "chunk"] {
        assert!(kinds.contains(&kind), "{kind} is not in the record");
    }
}

/// A chunk that comes unpublished, others that go, and a change of compressed rows.
async fn what_comes_and_goes(migration: &Migration) {
    let (source, target) = (migration.source().await, migration.target().await);
    source
        .batch_execute(
            "SET timescaledb.enable_chunk_auto_publication = off; INSERT INTO metrics VALUES ('2025-02-01 00:00Z', 1, 'late', 1)",
        )
        .await
        .unwrap();
    until_true(&target, "SELECT count(*) = 1 FROM public.metrics WHERE time >= '2025-02-01 00:00Z'").await;
    source.batch_execute("SELECT drop_chunks('log', older_than => '2025-01-02'::timestamp)").await.unwrap();
    source.batch_execute("UPDATE metrics SET value = 3 WHERE time = '2025-01-03 05:00Z'").await.unwrap();
}

/// The same, and chunks that the target compresses and decompresses after the source, and jobs that change.
async fn what_changes_where_it_is_made_again(migration: &Migration) {
    let (source, target) = (migration.source().await, migration.target().await);
    let is_compressed = |is: &str| {
        format!(
            "SELECT count(*) > 0 FROM timescaledb_information.chunks WHERE hypertable_name = 'metrics' \
             AND is_compressed = {is} AND range_start = '2025-01-04 00:00Z'"
        )
    };
    until_true(&target, &is_compressed("true")).await;
    let decompress = "SELECT decompress_chunk(c) FROM show_chunks('metrics', newer_than => '2025-01-04 00:00Z'::timestamptz, \
                      older_than => '2025-01-05 00:00Z'::timestamptz) c";
    source.batch_execute(decompress).await.unwrap();
    what_comes_and_goes(migration).await;
    until_true(&target, &is_compressed("false")).await;
    let change = "SELECT alter_job(job_id, schedule_interval => '9 hours') FROM timescaledb_information.jobs WHERE proc_name = 'policy_retention'";
    source.batch_execute(change).await.unwrap();
}
