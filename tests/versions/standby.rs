//! A physical standby of the source does the reading: its rows, its stream, or both, while the primary is written to.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_postgres::Client;
use walferry::connection::ConnectionSpec;
use walferry::decode::{Message, decode};
use walferry::demo::server::ThrowawayServer;
use walferry::source::replication::ReplicationSession;
use walferry::source::slot::ServerIdentity;
use walferry::source::snapshot::{self, HeldSnapshot};

use crate::pair::{assert_same, filled, ready};
use crate::support::load::Application;
use crate::support::{Migration, Servers, connect, hold_pg_dump, is_blocked, until, until_true};

const FEEDBACK: [(&str, &str); 6] = [
    ("fsync", "off"),
    ("wal_level", "logical"),
    ("max_connections", "60"),
    ("max_prepared_transactions", "5"),
    ("hot_standby_feedback", "on"),
    ("primary_slot_name", "reserve"),
];

/// A source with a standby, and a target. `None` where the servers are not to be had.
async fn with_standby(
    source: u32,
    target: u32,
    settings: &[(&str, &str)],
) -> Option<(Servers, ThrowawayServer, Migration)> {
    let (servers, migration) = filled(source, target).await?;
    let slot = "SELECT pg_create_physical_replication_slot('reserve', true)";
    migration.source().await.query(slot, &[]).await.unwrap();
    let tools = migration.environment.iter().find(|(name, _)| name == "WALFERRY_PG_BIN").unwrap();
    let basebackup = PathBuf::from(&tools.1).join("pg_basebackup");
    let settings = [&FEEDBACK[..], settings].concat();
    let standby = servers.source.start_standby_by(&basebackup, "reserve", &settings).await.unwrap();
    Some((servers, standby, migration))
}

/// Waits until the standby shows all that the primary has written by now.
async fn has_replayed(primary: &Client, standby: &Client) {
    let written = primary.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await.unwrap();
    let written: String = written.get(0);
    until_true(standby, &format!("SELECT pg_last_wal_replay_lsn() >= '{written}'")).await;
}

async fn slots(server: &ThrowawayServer) -> Vec<String> {
    let client = server.connect("postgres").await.unwrap();
    let rows = client.query("SELECT slot_name::text FROM pg_replication_slots WHERE slot_type = 'logical'", &[]).await;
    rows.unwrap().iter().map(|row| row.get(0)).collect()
}

/// The findings of `check`, each as code and severity.
async fn findings(migration: &Migration, arguments: &[&str]) -> Vec<(String, String)> {
    let arguments = [&["--json", "--estimate-seconds", "0"], arguments].concat();
    let check = migration.with_servers("check", &arguments).await.json();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let findings = check["findings"].as_array().unwrap().iter();
    findings.map(|finding| (text(&finding["code"]), text(&finding["severity"]))).collect()
}

/// Sessions whose transactions each insert their own id; one in five stays open for a while over others.
async fn write_ids(url: String, session: u64, stop: Arc<AtomicBool>) {
    let client = connect(&url).await;
    let mut number = session;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        client.batch_execute("BEGIN; INSERT INTO ids VALUES (txid_current())").await.unwrap();
        if number.is_multiple_of(5) {
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
        client.batch_execute(if number.is_multiple_of(7) { "ROLLBACK" } else { "COMMIT" }).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h05_a_snapshot_of_a_standby_shows_exactly_what_committed_before_its_position_in_the_wal() {
    let Some((servers, standby, _)) = with_standby(16, 16, &[]).await else { return };
    let (primary, reader) =
        (servers.source.connect("postgres").await.unwrap(), standby.connect("postgres").await.unwrap());
    primary.batch_execute("CREATE TABLE ids (id int8); CREATE PUBLICATION ids FOR TABLE ids").await.unwrap();
    primary.batch_execute("SELECT pg_create_logical_replication_slot('ids', 'pgoutput')").await.unwrap();
    let (from, on) =
        (ConnectionSpec::parse(&servers.source.url()).unwrap(), ConnectionSpec::parse(&standby.url()).unwrap());
    let mut session = ReplicationSession::connect(&from, "test").await.unwrap();
    let identity = session.identify_system().await.unwrap();
    let server = ServerIdentity { system: identity.system_id, timeline: identity.timeline };
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> =
        (0..4).map(|number| tokio::spawn(write_ids(servers.source.url(), number, Arc::clone(&stop)))).collect();
    until_true(&reader, "SELECT count(*) > 20 FROM ids").await;
    let mut taken = Vec::new();
    for _ in 0..40 {
        let held = HeldSnapshot::take_on_standby(&from, &on, "test", &server, 0).await.unwrap();
        snapshot::import(&reader, &held.name).await.unwrap();
        let rows = reader.query("SELECT id FROM ids", &[]).await.unwrap();
        reader.batch_execute("COMMIT").await.unwrap();
        let shown: BTreeSet<i64> = rows.iter().map(|row| row.get(0)).collect();
        taken.push((held.data.clone(), shown));
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let stream = "SELECT data FROM pg_logical_slot_get_binary_changes('ids', NULL, NULL, 'proto_version', '1', 'publication_names', 'ids')";
    let mut commits = 0;
    for row in primary.query(stream, &[]).await.unwrap() {
        let Message::Begin { commit_lsn, xid, .. } = decode(row.get(0)).unwrap() else { continue };
        commits += 1;
        for (data, shown) in &taken {
            let visible = shown.contains(&i64::from(xid));
            assert_eq!(
                data.sees(xid, commit_lsn),
                visible,
                "transaction {xid} that commits at {commit_lsn} in {data:?}"
            );
        }
    }
    assert!(commits > taken.len(), "{commits}");
    let between = taken.windows(2).filter(|pair| pair[0].1 != pair[1].1).count();
    assert!(between > 5, "it was written all the while: {between}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_come_from_a_standby_while_a_transaction_of_the_primary_is_open_over_their_snapshot() {
    let Some((servers, standby, mut migration)) = with_standby(15, 15, &[]).await else { return };
    let url = standby.url_for("shop");
    let has = |findings: &[(String, String)], code: &str, severity: &str| {
        findings.contains(&(code.to_owned(), severity.to_owned()))
    };
    let found = findings(&migration, &["--copy-from", &url]).await;
    assert!(!found.iter().any(|(code, _)| code.starts_with("standby")), "{found:?}");
    let found = findings(&migration, &["--stream-from", &url]).await;
    assert!(has(&found, "standby-version", "blocker"), "{found:?}");
    let found = findings(&migration, &["--copy-from", &migration.source_url]).await;
    assert!(has(&found, "standby-promoted", "blocker"), "{found:?}");
    let (source_url, primary) = (migration.source_url.clone(), migration.source().await);
    migration.source_url.clone_from(&url);
    let found = findings(&migration, &[]).await;
    assert!(has(&found, "in-recovery", "blocker"), "{found:?}");
    migration.source_url = source_url;

    let dump = hold_pg_dump(&mut migration);
    let application = Application::start(&migration.source_url, 2);
    let mut running = migration.migrate(&["--copy-from", &url]);
    dump.is_reached().await;
    // The slot is made. This transaction has an id, and a later one has ended, when the standby's snapshot is taken.
    let open = migration.source().await;
    open.batch_execute("BEGIN; INSERT INTO app.kinds (id, f8) VALUES (4711, 1); DELETE FROM app.kinds WHERE id = 1")
        .await
        .unwrap();
    primary.batch_execute("INSERT INTO app.kinds (id, f8) VALUES (4712, 2)").await.unwrap();
    has_replayed(&primary, &standby.connect("shop").await.unwrap()).await;
    dump.release();
    // It is not waited for: what it does is behind the snapshot in the WAL, wherever that stands in the list of transactions.
    let target = migration.target().await;
    until_true(&target, "SELECT bool_and(copied) FROM walferry.source_table").await;
    let read = "SELECT seq_scan > 0 FROM pg_stat_user_tables WHERE relname = 'heavy'";
    until_true(&standby.connect("shop").await.unwrap(), read).await;
    open.batch_execute("COMMIT").await.unwrap();
    ready(&migration, &mut running).await;
    application.goes_on(20).await;
    application.stop().await;
    ready(&migration, &mut running).await;
    until_true(&target, "SELECT count(*) = 2 FROM app.kinds WHERE id IN (4711, 4712)").await;
    until_true(&target, "SELECT count(*) = 0 FROM app.kinds WHERE id = 1").await;
    running.kill().await;

    // A standby that lets nobody stand in the way of its replay: what it cancels is read again under a newer snapshot.
    let administrator = standby.connect("postgres").await.unwrap();
    for setting in ["hot_standby_feedback = off", "max_standby_streaming_delay = 0"] {
        administrator.batch_execute(&format!("ALTER SYSTEM SET {setting}")).await.unwrap();
    }
    administrator.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    until_true(&primary, "SELECT bool_and(backend_xmin IS NULL) FROM pg_stat_replication").await;
    target
        .batch_execute("UPDATE app.heavy SET n = -n - 1 WHERE id = 5; BEGIN; LOCK TABLE app.heavy IN SHARE MODE")
        .await
        .unwrap();
    let mut running = migration.migrate(&["--copy-from", &url, "--recopy", "app.heavy"]);
    is_blocked(&migration.target().await, "heavy").await;
    primary.batch_execute("UPDATE app.heavy SET n = n + 1; DELETE FROM app.heavy WHERE id = 9").await.unwrap();
    let cancelled = "SELECT confl_snapshot > 0 FROM pg_stat_database_conflicts WHERE datname = 'shop'";
    until("the standby cancels the copy", || async {
        primary.batch_execute("VACUUM app.heavy").await.unwrap();
        let row = administrator.query_one(cancelled, &[]).await.unwrap();
        row.get::<_, bool>(0).then_some(())
    })
    .await;
    target.batch_execute("COMMIT").await.unwrap();
    ready(&migration, &mut running).await;
    migration.cut_over(running).await;
    assert_same(&migration).await;
    assert_eq!(slots(&servers.source).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_and_stream_come_from_a_standby_there_and_the_way_back_from_the_new_primary() {
    let Some((servers, standby, migration)) = with_standby(16, 18, &[]).await else { return };
    let url = standby.url_for("shop");
    let application = Application::start(&migration.source_url, 2);
    let both = ["--copy-from", &url, "--stream-from", &url];
    let mut running = migration.migrate(&both);
    ready(&migration, &mut running).await;
    assert_eq!((slots(&servers.source).await.len(), slots(&standby).await.len()), (0, 1));
    application.goes_on(20).await;
    running.kill().await;
    migration.migrate(&[]).wait().await.assert_refused(3, &["has its slot on a standby", "--stream-from"]);
    let mut running = migration.migrate(&both);
    ready(&migration, &mut running).await;
    application.goes_on(20).await;
    let verified = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verified.code, Some(0), "{}\n{}", verified.stdout, verified.stderr);

    let cutover = migration.with_directory("cutover", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    application.stop().await;
    migration.wait_for_status(&mut running, "the way back", |status| status["direction"] == "back").await;
    assert_same(&migration).await;
    until("the old slot is gone from the standby", || async { slots(&standby).await.is_empty().then_some(()) }).await;
    migration.target().await.batch_execute("INSERT INTO app.kinds (id, f8) VALUES (4711, 1)").await.unwrap();
    ready(&migration, &mut running).await;
    let switchback = migration.with_directory("switchback", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(switchback.code, Some(0), "{}\n{}", switchback.stderr, running.log());
    assert_eq!(running.wait().await.code, Some(0));
    assert_same(&migration).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h16_a_standby_that_is_promoted_ends_the_stream_from_it_and_a_resync_goes_on_from_the_primary() {
    let Some((servers, standby, migration)) = with_standby(18, 18, &[]).await else { return };
    let url = standby.url_for("shop");
    let mut running = migration.migrate(&["--stream-from", &url]);
    ready(&migration, &mut running).await;
    let primary = migration.source().await;
    primary.batch_execute("UPDATE app.kinds SET f8 = 7 WHERE id = 3").await.unwrap();
    let target = migration.target().await;
    until_true(&target, "SELECT f8 = 7 FROM app.kinds WHERE id = 3").await;

    let promoted = standby.connect("shop").await.unwrap();
    until_true(&promoted, "SELECT pg_promote()").await;
    let ended = running.wait().await;
    ended.assert_refused(1, &["timeline 2", "give it as --source", "resync"]);
    migration.migrate(&["--stream-from", &url]).wait().await.assert_refused(1, &["timeline 2"]);
    // What somebody writes there is not the source's.
    promoted.batch_execute("UPDATE app.kinds SET f8 = -1 WHERE id = 4").await.unwrap();

    primary.batch_execute("UPDATE app.kinds SET f8 = 8 WHERE id = 3").await.unwrap();
    let mut running = migration.resync(&[]);
    ready(&migration, &mut running).await;
    assert_eq!(slots(&standby).await, Vec::<String>::new());
    migration.cut_over(running).await;
    assert_same(&migration).await;
    let clean = migration.with_directory("clean", &[]).await;
    assert_eq!(clean.code, Some(0), "{}", clean.stderr);
    assert_eq!(slots(&servers.source).await, Vec::<String>::new());
}
