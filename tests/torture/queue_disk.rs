//! Each fault of the queue's disk by itself, step by step; the rounds make them at any moment.

use serde_json::Value;
use tokio_postgres::Client;
use walferry::lsn::Lsn;

use super::disk::{DiskFault, FaultyDisk};
use super::support::process::Running;
use super::support::{Migration, Servers, http, until, until_true};

/// Less than the disk of any machine that runs tests has.
const QUOTA: [&str; 2] = ["--queue-max-bytes", "1GiB"];
const HTTP: [&str; 4] = ["--queue-max-bytes", "1GiB", "--http-addr", "127.0.0.1:0"];

/// A migration of one table that follows, with a disk that can be made to fail. `None` where that cannot be done.
async fn following(servers: &Servers) -> Option<(Migration, FaultyDisk, Running)> {
    let mut migration = servers.migration("shop").await;
    let disk = FaultyDisk::build(&migration.files(), &migration.directory().join("queue"))?;
    migration.environment.extend_from_slice(disk.environment());
    let table = "CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text)";
    migration.source().await.batch_execute(table).await.unwrap();
    let mut running = migration.migrate(&HTTP);
    migration.wait_for_phase(&mut running, "following").await;
    Some((migration, disk, running))
}

/// One transaction for each row; answers where the WAL is after them.
async fn insert(source: &Client, rows: u32) -> Lsn {
    for _ in 0..rows {
        source.batch_execute("INSERT INTO t (body) VALUES (repeat('row ', 100))").await.unwrap();
    }
    position(source, "SELECT pg_current_wal_insert_lsn()::text").await
}

async fn position(client: &Client, query: &str) -> Lsn {
    client.query_one(query, &[]).await.unwrap().get::<_, &str>(0).parse().unwrap()
}

async fn confirmed(source: &Client) -> Lsn {
    position(source, "SELECT confirmed_flush_lsn::text FROM pg_replication_slots").await
}

fn lsn(status: &Value, pointer: &str) -> Lsn {
    status.pointer(pointer).and_then(Value::as_str).and_then(|text| text.parse().ok()).unwrap_or(Lsn::ZERO)
}

async fn arrives(target: &Client, rows: i64) {
    until_true(target, &format!("SELECT count(*) = {rows} FROM t")).await;
}

fn metric(running: &Running, name: &str) -> f64 {
    let answer = http::get(http::port(running), "/metrics");
    let line = answer.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {answer}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_full_disk_pauses_the_receiving_and_the_apply_goes_on() {
    let servers = Servers::start().await;
    let Some((migration, disk, mut running)) = following(&servers).await else { return };
    let (source, target) = (migration.source().await, migration.target().await);

    // In the queue, and not on the target yet.
    assert_eq!(migration.with_directory("pause", &["apply"]).await.code, Some(0));
    let received = insert(&source, 50).await;
    let received_all = |status: &Value| lsn(status, "/queue/durable_lsn") >= received;
    migration.wait_for_status(&mut running, "received", received_all).await;

    disk.set(Some(DiskFault::Full));
    let beyond = insert(&source, 50).await;
    let status = migration.wait_for_status(&mut running, "full", |status| status["queue"]["full"] == true).await;
    let blockers = status["blockers"].to_string();
    assert!(blockers.contains("the queue is full"), "{blockers}");
    until("the metric says it", || async { (metric(&running, "walferry_queue_full") == 1.0).then_some(()) }).await;
    assert!(running.log().contains("the disk of the queue is full: the stream waits"), "{}", running.log());

    assert_eq!(migration.with_directory("resume", &[]).await.code, Some(0));
    arrives(&target, 50).await;
    assert!(confirmed(&source).await < beyond, "acknowledged, and on no disk");
    let status = migration.wait_for_status(&mut running, "still full", |status| status["queue"]["full"] == true).await;
    assert!(lsn(&status, "/queue/durable_lsn") < beyond);
    // SIGTERM and the next start do not need room.
    assert_eq!(running.terminate().await.code, Some(130));
    let mut running = migration.migrate(&HTTP);
    migration.wait_for_status(&mut running, "full again", |status| status["queue"]["full"] == true).await;
    arrives(&target, 50).await;

    disk.set(None);
    arrives(&target, 100).await;
    let status =
        migration.wait_for_status(&mut running, "no longer full", |status| status["queue"]["full"] == false).await;
    assert!(!status["blockers"].to_string().contains("the queue is full"), "{status:#}");
    until("the metric says it", || async { (metric(&running, "walferry_queue_full") == 0.0).then_some(()) }).await;
    // A killed one has what was acknowledged.
    running.kill().await;
    insert(&source, 1).await;
    let mut running = migration.migrate(&QUOTA);
    arrives(&target, 101).await;
    assert!(running.is_alive());
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

/// It used to end the process, and the apply with it, at the first EIO.
#[tokio::test]
async fn h17_a_failed_fsync_is_taken_back_and_received_again() {
    let servers = Servers::start().await;
    let Some((migration, disk, mut running)) = following(&servers).await else { return };
    let (source, target) = (migration.source().await, migration.target().await);
    let before = insert(&source, 10).await;
    arrives(&target, 10).await;

    let mut rows = 10;
    for fault in [DiskFault::Sync, DiskFault::Write, DiskFault::Sync] {
        disk.set(Some(fault));
        let hits = disk.hits();
        let unsafe_end = insert(&source, 20).await;
        rows += 20;
        // Twice: the new segment is refused too.
        while disk.hits() <= hits + 1 {
            assert!(running.is_alive(), "{}", running.log());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let confirmed = confirmed(&source).await;
        assert!(confirmed < unsafe_end, "{confirmed} was acknowledged, and is on no disk");
        let status = migration.status().await.unwrap();
        assert_eq!(status["process_alive"], true, "{}", running.log());
        assert!(lsn(&status, "/queue/durable_lsn") < unsafe_end, "{status:#}");
        let events = status["events"].to_string();
        assert!(events.contains("Input/output error") && events.contains("trying again"), "{events}");
        disk.set(None);
        arrives(&target, rows).await;
        assert!(running.is_alive(), "{}", running.log());
    }
    assert!(before < insert(&source, 1).await);
    // What the disk holds is what was acknowledged: a killed one goes on from it.
    running.kill().await;
    let running = migration.migrate(&QUOTA);
    arrives(&target, rows + 1).await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

#[tokio::test]
async fn a_disk_that_refuses_at_the_start_is_named_and_the_same_command_goes_on_later() {
    let servers = Servers::start().await;
    let Some((migration, disk, running)) = following(&servers).await else { return };
    let (source, target) = (migration.source().await, migration.target().await);
    running.kill().await;
    insert(&source, 5).await;
    disk.set(Some(DiskFault::Sync));
    let refused = migration.migrate(&QUOTA).wait().await;
    refused.assert_refused(1, &["queue", "Input/output error", "look at the disk that holds the state directory"]);
    assert_eq!(migration.status().await.unwrap()["error"]["kind"], "disk");
    disk.set(None);
    let running = migration.migrate(&QUOTA);
    arrives(&target, 5).await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}
