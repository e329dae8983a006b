//! Sources that lack what newer ones have: logical messages and scans of page ranges (before 14), TRUNCATE in the stream (before 11).

use std::time::{Duration, Instant};

use walferry::connection::ConnectionSpec;
use walferry::source::replication::ReplicationSession;
use walferry::source::version::Version;

use crate::pair::{assert_same, filled, ready};
use crate::servers;
use crate::support::{PATIENCE, Servers, is_blocked, until_true};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_messages_a_cutover_waits_for_every_change_and_an_idle_source_is_drained() {
    let Some((_servers, migration)) = filled(13, 15).await else { return };
    // Ranges would each read the whole table (H11).
    let arguments = ["--split-above", "16KiB"];
    let mut running = migration.migrate(&arguments);
    ready(&migration, &mut running).await;
    let parts =
        migration.ledger("SELECT max(part), bool_and(first_page = 0 AND end_page IS NULL) FROM walferry.part").await;
    assert_eq!((parts[0].get::<_, Option<i32>>(0), parts[0].get::<_, Option<bool>>(1)), (Some(0), Some(true)));
    running.kill().await;
    let mut running = migration.migrate(&arguments);
    ready(&migration, &mut running).await;

    // The apply is held by a lock: what is behind it, the marker too, has been received and is not applied.
    let (source, target) = (migration.source().await, migration.target().await);
    target.batch_execute("BEGIN; LOCK TABLE app.heavy IN SHARE MODE").await.unwrap();
    source.batch_execute("UPDATE app.heavy SET n = 42 WHERE id = 1").await.unwrap();
    let cutover = migration.start("cutover", &["--yes", "--no-reverse", "--timeout", "4s", "--max-write-stall", "4s"]);
    is_blocked(&migration.target().await, "app").await;
    cutover.wait().await.assert_refused(5, &["waiting until the target has caught up", "Nothing was touched"]);
    target.batch_execute("COMMIT").await.unwrap();

    // Nobody writes any more, so nothing comes but what the cutover itself sends.
    ready(&migration, &mut running).await;
    until_true(&target, "SELECT n = 42 FROM app.heavy WHERE id = 1").await;
    migration.cut_over(running).await;
    assert_same(&migration).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncate_that_is_not_in_the_stream_stops_the_cutover_and_a_new_column_the_apply() {
    let Some((_servers, migration)) = filled(10, 18).await else { return };
    let (source, target) = (migration.source().await, migration.target().await);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let alter = "ALTER TABLE app.event ADD COLUMN extra text";
    source
        .batch_execute(&format!("{alter}; INSERT INTO app.event (at, extra) VALUES ('2024-02-03', 'new')"))
        .await
        .unwrap();
    let stopped = running.wait().await;
    stopped.assert_refused(1, &["changed on the source", "\"app\".\"event\" ADD COLUMN \"extra\" text"]);
    target.batch_execute(alter).await.unwrap();
    let mut running = migration.migrate(&[]);
    let has_it = "SELECT count(*) = 1 FROM app.event WHERE extra = 'new'";
    let deadline = Instant::now() + PATIENCE;
    while !target.query_one(has_it, &[]).await.unwrap().get::<_, bool>(0) {
        assert!(running.is_alive() && Instant::now() < deadline, "{}", running.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ready(&migration, &mut running).await;

    source.batch_execute("TRUNCATE app.kinds; INSERT INTO app.kinds (id) VALUES (-5)").await.unwrap();
    let object = "file of table app.kinds (PostgreSQL before 11 streams no TRUNCATE)";
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    refused.assert_refused(5, &[object, "has changed", "walferry repair --tables"]);
    let repaired = migration.with_directory("repair", &["--tables", "app.kinds"]).await;
    assert_eq!(repaired.code, Some(0), "{}\n{}", repaired.stderr, running.log());
    ready(&migration, &mut running).await;
    migration.cut_over(running).await;
    assert_same(&migration).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_outside_of_those_tested_and_a_way_to_an_older_server_are_refused_by_name() {
    for (source, target, code, says) in
        [(10, 12, "server-version", "PostgreSQL 13 or newer"), (18, 17, "target-older", "older than the source's 18")]
    {
        let Some((source_programs, target_programs, _)) = servers::pair(source, target) else { return };
        let servers = Servers::of((&source_programs, &[]), (&target_programs, &[])).await;
        let migration = servers.migration("shop").await;
        let identity = "CREATE TABLE parts (id int GENERATED ALWAYS AS IDENTITY, at date) PARTITION BY RANGE (at)";
        migration.source().await.batch_execute(identity).await.unwrap();
        let check = migration.with_servers("check", &["--json"]).await;
        assert_eq!(check.code, Some(3), "{}", check.stderr);
        let report = check.json();
        let findings = report["findings"].as_array().unwrap();
        // From 17 on it holds for the partitions, which the changes are written to.
        let refused =
            findings.iter().any(|finding| finding["code"] == "partition-identity" && finding["severity"] == "blocker");
        assert_eq!(refused, target >= 17, "{report:#}");
        let blocker = findings.iter().find(|finding| finding["code"] == code);
        let blocker = blocker.unwrap_or_else(|| panic!("{report:#}"));
        assert_eq!((&blocker["severity"], &blocker["side"]), (&"blocker".into(), &"target".into()), "{blocker}");
        assert!(blocker["message"].as_str().unwrap().contains(says), "{blocker}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h07_a_slot_is_made_with_the_snapshot_in_use_or_without_one_in_every_versions_grammar() {
    for (one, other) in [(10, 12), (13, 14), (15, 18)] {
        let Some((one, other, _)) = servers::pair(one, other) else { return };
        let servers = Servers::of((&one, &[]), (&other, &[])).await;
        for server in [&servers.source, &servers.target] {
            let spec = ConnectionSpec::parse(&server.url()).unwrap();
            let mut session = ReplicationSession::connect(&spec, "test").await.unwrap();
            let version = Version(session.server_version().unwrap());
            let create = |name, how| format!("CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput {how}");
            session.simple_query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.unwrap();
            session.simple_query(&create("used", version.use_snapshot())).await.unwrap();
            session.simple_query("SELECT pg_export_snapshot()").await.unwrap();
            session.simple_query("COMMIT").await.unwrap();
            session.simple_query(&create("bare", version.no_snapshot())).await.unwrap();
        }
    }
}
