//! Compressed rows that a session deletes past the stream, between the count before the fence and the fence itself.

use tokio_postgres::Client;

use crate::live::{ASLEEP, assert_equal, fill};
use crate::support::process::Running;
use crate::support::timescale::{servers, timescale_available};
use crate::support::{Migration, until};

const PATIENT: [&str; 6] = ["--yes", "--no-reverse", "--timeout", "300s", "--max-write-stall", "200s"];

/// A cutover that has counted so often, and waits for the lock of a table that this session has written to.
async fn counted(migration: &Migration, running: &mut Running, holder: &Client, times: usize) -> Running {
    migration.wait_for_status(running, "ready", |status| status["ready_to_cutover"] == true).await;
    holder.batch_execute("BEGIN; UPDATE devices SET name = name || '.' WHERE id = 1").await.unwrap();
    let cutover = migration.start("cutover", &PATIENT);
    let log = &*running;
    until("the rows are counted", || async move {
        (log.log().matches(" hypertables have as many rows on both sides").count() == times).then_some(())
    })
    .await;
    cutover
}

async fn deleted(session: &Client, device: i32) {
    let statement = format!("DELETE FROM metrics WHERE device = {device} AND time < '2025-01-04 00:00Z'");
    let rows = session.execute(&statement, &[]).await.unwrap();
    assert!(rows > 0, "{statement}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_session_deletes_past_the_stream_behind_the_count_is_streamed_by_the_guard_or_stops_the_cutover() {
    if !timescale_available("compressed rows deleted past the stream, shortly before the fence") {
        return;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = servers.migration("unseen").await;
    let (source, target) = (migration.source().await, migration.target().await);
    fill(&source, None).await;
    // Who makes a chunk does it by the hand of the hypertable's owner.
    for server in [&source, &target] {
        server.batch_execute("CREATE ROLE plain").await.unwrap();
    }
    source.batch_execute("GRANT ALL ON SCHEMA public TO plain; ALTER TABLE metrics OWNER TO plain").await.unwrap();
    let mut running = migration.migrate(&["--replica-identity-full", "--no-reverse", "--queue-max-bytes", "64MiB"]);
    let (own, holder) = (migration.source().await, migration.source().await);
    own.batch_execute("SET timescaledb.enable_compressed_direct_batch_delete = on").await.unwrap();

    // Without the guard the rows go unseen, and are counted behind the fence.
    let cutover = counted(&migration, &mut running, &holder, 1).await;
    source.batch_execute("DROP FUNCTION walferry.seen() CASCADE").await.unwrap();
    deleted(&own, 3).await;
    holder.batch_execute("COMMIT").await.unwrap();
    let refused = cutover.wait().await;
    refused.assert_refused(5, &["metrics", "rows on the source", "enable_compressed_direct_batch_delete"]);
    deleted(&target, 3).await;

    // With it they are in the stream. A chunk that is made meanwhile has the guard's triggers too.
    let (own, holder) = (migration.source().await, migration.source().await);
    own.batch_execute("SET timescaledb.enable_compressed_direct_batch_delete = on").await.unwrap();
    let cutover = counted(&migration, &mut running, &holder, 2).await;
    deleted(&own, 2).await;
    own.batch_execute("INSERT INTO metrics VALUES ('2025-05-01 00:00Z', 1, 'new chunk', 1)").await.unwrap();
    own.batch_execute("DELETE FROM metrics WHERE time = '2025-01-06 00:00Z'").await.unwrap();
    holder.batch_execute("COMMIT").await.unwrap();
    let cut_over = cutover.wait().await;
    assert_eq!(cut_over.code, Some(0), "{}\n{}", cut_over.stderr, running.log());
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_equal(&migration).await;

    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    let left = "SELECT tgname::text FROM pg_trigger WHERE tgname LIKE '%walferry%' \
                UNION ALL SELECT nspname::text FROM pg_namespace WHERE nspname = 'walferry'";
    for (side, server) in [("source", migration.source().await), ("target", migration.target().await)] {
        let left: Vec<String> = server.query(left, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
        assert!(left.is_empty(), "on the {side}: {left:?}");
    }
}
