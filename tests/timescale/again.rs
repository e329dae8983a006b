//! Hypertables that are compared and copied again: by `repair` while it follows, by `migrate --recopy`, and by `resync` after the slot was lost.

use tokio_postgres::Client;

use crate::live::{ASLEEP, assert_equal, fill};
use crate::support::process::Running;
use crate::support::timescale::{servers, timescale_available};
use crate::support::{Migration, until, until_true};

const ARGUMENTS: [&str; 4] = ["--replica-identity-full", "--no-reverse", "--queue-max-bytes", "64MiB"];

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready", |status| status["ready_to_cutover"] == true).await;
}

async fn is_applied(source: &Client, target: &Client, mark: i32) {
    source.batch_execute(&format!("INSERT INTO devices VALUES ({mark}, 'mark')")).await.unwrap();
    until_true(target, &format!("SELECT EXISTS (SELECT FROM public.devices WHERE id = {mark})")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_that_differ_are_copied_again_by_repair_recopy_and_resync_and_the_others_are_not() {
    if !timescale_available("repair, --recopy and resync of hypertables") {
        return;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = servers.migration("again").await;
    are_copied_again(&migration, None).await;
    assert_equal(&migration).await;
    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
}

/// All of it up to the cutover, from this version of the extension.
pub(super) async fn are_copied_again(migration: &Migration, version: Option<&str>) {
    let (source, target) = (migration.source().await, migration.target().await);
    fill(&source, version).await;
    let mut running = migration.migrate(&ARGUMENTS);
    ready(migration, &mut running).await;

    // Of a compressed chunk some rows are gone and others differ; and a chunk has one that the source does not have.
    let damage = [
        "DELETE FROM public.metrics WHERE device = 2 AND time < '2025-01-03 06:00Z'",
        "UPDATE public.metrics SET value = -1 WHERE device = 1 AND time = '2025-01-03 01:00Z'",
        "INSERT INTO public.metrics VALUES ('2025-01-06 00:30Z', 3, 'nobody', 0)",
    ];
    for statement in damage {
        assert!(target.execute(statement, &[]).await.unwrap() > 0, "{statement}");
    }
    let repaired = migration.with_directory("repair", &["--json", "--tables", "public.metrics"]).await;
    assert_eq!(repaired.code, Some(0), "{}\n{}", repaired.stderr, running.log());
    let copied = repaired.json()["rows_copied"].as_i64().unwrap();
    let rows: i64 = source.query_one("SELECT count(*) FROM metrics", &[]).await.unwrap().get(0);
    assert!(copied > 0 && copied < rows, "{copied} of {rows} rows: only chunks that differ");
    // What comes behind the snapshot is applied, and what it has seen is not applied twice.
    source
        .batch_execute("UPDATE metrics SET value = value + 1 WHERE device IN (1, 2) AND time < '2025-01-03 12:00Z'")
        .await
        .unwrap();
    source.batch_execute("INSERT INTO metrics VALUES ('2025-01-02 00:45Z', 2, 'behind', 1), ('2025-01-09 00:00Z', 2, 'new chunk', 1)").await.unwrap();
    is_applied(&source, &target, 1001).await;
    let seen = "SELECT count(*)::text || sum(value)::text FROM public.metrics";
    let value = async |client: &Client| client.query_one(seen, &[]).await.unwrap().get::<_, String>(0);
    assert_eq!(value(&source).await, value(&target).await);

    // The rows of a continuous aggregate, and a hypertable without a key; the source changes its chunks while nobody follows.
    running.kill().await;
    let rows_of_hourly = "SELECT format('%s.%s', materialization_hypertable_schema, materialization_hypertable_name) \
         FROM timescaledb_information.continuous_aggregates WHERE view_name = 'hourly'";
    let inner: String = source.query_one(rows_of_hourly, &[]).await.unwrap().get(0);
    let inner_there: String = target.query_one(rows_of_hourly, &[]).await.unwrap().get(0);
    for statement in [format!("UPDATE {inner_there} SET n = 0"), "DELETE FROM public.log WHERE who = 'w1'".to_owned()] {
        assert!(target.execute(&statement, &[]).await.unwrap() > 0, "{statement}");
    }
    source.batch_execute("INSERT INTO log VALUES ('2025-01-01 00:10', 'w1', '{}'); UPDATE log SET what = '{}' WHERE at < '2025-01-01 03:00'").await.unwrap();
    let recopied = migration.migrate(&[&ARGUMENTS[..], &["--recopy", &inner, "public.log"]].concat());
    let mut running = recopied;
    ready(migration, &mut running).await;
    is_applied(&source, &target, 1002).await;
    let seen = "SELECT count(*)::text || md5(string_agg(l::text, '' ORDER BY l::text COLLATE \"C\")) FROM public.log l";
    let value = async |client: &Client| client.query_one(seen, &[]).await.unwrap().get::<_, String>(0);
    assert_eq!(value(&source).await, value(&target).await);

    // The slot is lost, and with it changes, a new chunk, one that is dropped, and one that is compressed.
    running.kill().await;
    until_true(&source, "SELECT NOT bool_or(active) FROM pg_replication_slots").await;
    let lost = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots; \
                UPDATE metrics SET room = 'lost' WHERE device = 6 AND time < '2025-01-04 00:00Z'; \
                INSERT INTO metrics VALUES ('2025-03-01 00:00Z', 1, 'lost', 1); \
                SELECT drop_chunks('ticks', older_than => 101::bigint); \
                SELECT compress_chunk(c) FROM show_chunks('metrics', newer_than => '2025-01-05 00:00Z'::timestamptz, \
                                                         older_than => '2025-01-06 00:00Z'::timestamptz) c";
    for statement in lost.split("; ") {
        source.batch_execute(statement).await.unwrap();
    }
    // And one that is made while the slot waits: published as it ought to be, and not in the stream for all that (H2).
    let open = migration.source().await;
    open.batch_execute("BEGIN; SELECT pg_catalog.txid_current()").await.unwrap();
    let mut running = migration.resync(&ARGUMENTS);
    until("the slot is being made", || async { running.log().contains("making the slot").then_some(()) }).await;
    until_true(&source, "SELECT count(*) > 0 FROM pg_replication_slots").await;
    source.batch_execute("INSERT INTO metrics VALUES ('2025-04-01 00:00Z', 1, 'meanwhile', 1)").await.unwrap();
    open.batch_execute("COMMIT").await.unwrap();
    ready(migration, &mut running).await;
    source
        .batch_execute("UPDATE metrics SET room = 'found' WHERE device = 5 AND time < '2025-01-06 00:00Z'")
        .await
        .unwrap();
    source
        .batch_execute("CALL refresh_continuous_aggregate('hourly', '2025-01-05 00:00Z', '2025-01-08 00:00Z')")
        .await
        .unwrap();
    assert!(running.log().contains("were copied again into \"public\".\"metrics\""), "{}", running.log());
    assert!(!running.log().contains("were copied again into \"public\".\"log\""), "{}", running.log());
    is_applied(&source, &target, 1003).await;
    migration.cut_over(running).await;
}
