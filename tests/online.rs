//! `verify` while writes go on, and `repair`: what is equal is never called different, what differs is named, and whatever dies
//! meanwhile, the apply goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio_postgres::Client;

use crate::support::load::{self, Application};
use crate::support::process::{Finished, Running};
use crate::support::{Migration, Servers, connect, is_blocked, until, until_true};

async fn follows(servers: &Servers, rows: u32) -> (Migration, Running) {
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, rows).await;
    let running = go_on(&migration).await;
    (migration, running)
}

async fn go_on(migration: &Migration) -> Running {
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
    running
}

/// Writers whose transactions become visible in another order than they commit: some wait in the middle, some do not wait for the disk.
struct OddWriters {
    stop: Arc<AtomicBool>,
    writers: tokio::task::JoinSet<()>,
}

impl OddWriters {
    fn start(url: &str) -> OddWriters {
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = tokio::task::JoinSet::new();
        let ways = [
            "BEGIN; SET LOCAL synchronous_commit = off; INSERT INTO app.event (at, kind) VALUES ('2024-07-01', 'odd'); COMMIT",
            "BEGIN; INSERT INTO app.event (at, kind) VALUES ('2024-07-02', 'slow'); SELECT pg_sleep(0.1); \
             UPDATE app.heavy SET n = n + 1 WHERE id = 7; COMMIT",
            "BEGIN; DELETE FROM app.event WHERE id IN (SELECT id FROM app.event WHERE kind = 'odd' LIMIT 3); COMMIT",
            "BEGIN; SET LOCAL commit_delay = 20000; SET LOCAL commit_siblings = 0; \
             INSERT INTO app.event (at, kind) VALUES ('2024-07-03', 'late'); COMMIT",
        ];
        for way in ways {
            let (url, stop) = (url.to_owned(), Arc::clone(&stop));
            writers.spawn(async move {
                let client = connect(&url).await;
                while !stop.load(Ordering::Relaxed) {
                    drop(client.batch_execute(way).await);
                    drop(client.batch_execute("ROLLBACK").await);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            });
        }
        OddWriters { stop, writers }
    }

    async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.writers.join_next().await.is_some() {}
    }
}

async fn verify(migration: &Migration, arguments: &[&str]) -> Finished {
    migration.with_directory("verify", &[&["--json"], arguments].concat()).await
}

#[track_caller]
fn is_equal_online(finished: &Finished) -> Value {
    assert_eq!(finished.code, Some(0), "{}\n{}", finished.stdout, finished.stderr);
    let report = finished.json();
    assert_eq!((&report["equal"], &report["online"]), (&Value::Bool(true), &Value::Bool(true)), "{report:#}");
    report
}

/// `kind table key columns`, sorted.
fn differences(report: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for table in report["tables"].as_array().unwrap() {
        for difference in table["differences"].as_array().unwrap() {
            let columns: Vec<&str> =
                difference["columns"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let (kind, table, key) = (text(&difference["kind"]), text(&table["table"]), text(&difference["key"]));
            found.push(format!("{kind} {table} {key} {}", columns.join(",")).trim_end().to_owned());
        }
    }
    found.sort();
    found
}

/// A table of values that another comparison could take for each other.
const PLANTED: &str = "CREATE TABLE app.planted (id int PRIMARY KEY, t text, f float8, n numeric, z timestamptz, b bytea, j jsonb); \
    INSERT INTO app.planted SELECT i, '', 0, 1.0, '2024-01-01 00:00+00', '\\x00', '{\"a\": 1}' FROM generate_series(1, 1000) i; \
    CREATE TABLE app.by_text (k text, i int, v int, PRIMARY KEY (k, i)); \
    INSERT INTO app.by_text SELECT k, i, 0 FROM unnest(ARRAY['a', 'B', 'ä', '_x', 'Z', '-']) k, generate_series(1, 50) i";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_constant_load_what_is_equal_is_equal_and_what_is_planted_is_found_and_repaired() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    load::fill(&source, 60_000).await;
    source.batch_execute(PLANTED).await.unwrap();
    // A value looks different there, and is the same.
    let target = migration.target().await;
    target
        .batch_execute(
            "ALTER DATABASE shop SET timezone = 'Asia/Tokyo'; ALTER DATABASE shop SET extra_float_digits = 0",
        )
        .await
        .unwrap();
    let running = go_on(&migration).await;
    let (application, odd) = (Application::start(&migration.source_url, 4), OddWriters::start(&migration.source_url));
    application.goes_on(20).await;

    let mut positions = Vec::new();
    for _ in 0..6 {
        let report = is_equal_online(&verify(&migration, &[]).await);
        positions.push(report["source_lsn"].as_str().unwrap().to_owned());
        let rested = report["apply_rested_ms"].as_f64().unwrap();
        println!("at {}, the apply rested {rested:.0} ms, {} s", positions[positions.len() - 1], report["seconds"]);
    }
    positions.dedup();
    assert_eq!(positions.len(), 6, "the apply went on between them: {positions:?}");
    // Many points, quickly one after the other, at tables that change all the time.
    for _ in 0..12 {
        is_equal_online(&verify(&migration, &["--tables", "app.heavy,app.event_2024,app.note"]).await);
    }
    is_equal_online(&verify(&migration, &["--sample", "10%"]).await);
    is_equal_online(&verify(&migration, &["--jobs", "1", "--tables", "app.big,app.heavy"]).await);
    let status = migration.status().await.unwrap();
    assert_eq!(status["verification"]["equal"], true, "{}", status["verification"]);
    // The last of them was of some tables; the last of all rows before it vouches for both sides.
    walferry::verify::require(&target, Duration::from_secs(600)).await.unwrap();
    let error = walferry::verify::require(&target, Duration::ZERO).await.unwrap_err();
    assert!(error.to_string().contains("it has to be within"), "{error}");
    let refused = migration.with_directory("repair", &[]).await;
    assert!(refused.stdout.contains("nothing to repair"), "{}", refused.stdout);

    let plant = "SET session_replication_role = replica; \
        UPDATE app.planted SET t = NULL WHERE id BETWEEN 1 AND 8; \
        UPDATE app.planted SET f = 'NaN' WHERE id BETWEEN 11 AND 14; \
        UPDATE app.planted SET f = '-0' WHERE id BETWEEN 15 AND 18; \
        UPDATE app.planted SET n = 1.00 WHERE id BETWEEN 21 AND 28; \
        UPDATE app.planted SET z = '2024-01-01 00:00+01' WHERE id BETWEEN 31 AND 34; \
        UPDATE app.planted SET b = '' WHERE id BETWEEN 41 AND 42; \
        UPDATE app.planted SET j = '{\"a\": 1.0}' WHERE id BETWEEN 43 AND 44; \
        DELETE FROM app.planted WHERE id BETWEEN 991 AND 996; \
        INSERT INTO app.planted (id) SELECT generate_series(-6, -1); \
        UPDATE app.by_text SET v = 1 WHERE i = 17; \
        UPDATE app.by_text SET k = 'b' WHERE k = 'B' AND i = 3";
    target.batch_execute(plant).await.unwrap();
    let mut expected = Vec::new();
    let different = |ids: std::ops::RangeInclusive<i32>, column: &str| {
        ids.map(|id| format!("different \"app\".\"planted\" (id)=({id}) {column}")).collect::<Vec<_>>()
    };
    for (ids, column) in [(1..=8, "t"), (11..=18, "f"), (21..=28, "n"), (31..=34, "z"), (41..=42, "b"), (43..=44, "j")]
    {
        expected.extend(different(ids, column));
    }
    expected.extend((991..=996).map(|id| format!("missing_on_target \"app\".\"planted\" (id)=({id})")));
    expected.extend((-6..=-1).map(|id| format!("extra_on_target \"app\".\"planted\" (id)=({id})")));
    expected
        .extend(["a", "B", "ä", "_x", "Z", "-"].map(|k| format!("different \"app\".\"by_text\" (k, i)=({k}, 17) v")));
    expected.push("missing_on_target \"app\".\"by_text\" (k, i)=(B, 3)".to_owned());
    expected.push("extra_on_target \"app\".\"by_text\" (k, i)=(b, 3)".to_owned());
    expected.sort();
    assert_eq!(expected.len(), 52);
    let found = verify(&migration, &["--max-keys", "1000"]).await;
    assert_eq!(found.code, Some(4), "{}", found.stderr);
    assert_eq!(differences(&found.json()), expected);
    assert!(!found.stdout.contains("Infinity") && !found.stdout.contains("NaN"), "values are shown only on request");
    let error = walferry::verify::require(&target, Duration::from_secs(600)).await.unwrap_err();
    assert!(error.to_string().contains("the two sides differ"), "{error}");
    let shown = migration.with_directory("verify", &["--tables", "app.planted", "--show-values"]).await;
    assert!(shown.stdout.contains("NaN") && shown.stdout.contains("NULL"), "{}", shown.stdout);
    until("the status names it", || async {
        let status = migration.status().await?;
        (status["verification"]["differing_tables"] == serde_json::json!(["\"app\".\"planted\""])).then_some(())
    })
    .await;

    // The last comparison was of one table; the other is named.
    let tables = "app.planted,app.by_text";
    let repaired = migration.with_directory("repair", &["--json", "--tables", tables]).await;
    assert_eq!(repaired.code, Some(0), "{}\n{}", repaired.stderr, running.log());
    let copied = repaired.json()["rows_copied"].as_i64().unwrap();
    assert!((46..700).contains(&copied), "{copied} rows were copied again");
    is_equal_online(&verify(&migration, &["--tables", tables]).await);
    // A part that is equal takes nothing back.
    walferry::verify::require(&target, Duration::from_secs(600)).await.unwrap_err();
    is_equal_online(&verify(&migration, &[]).await);
    walferry::verify::require(&target, Duration::from_secs(600)).await.unwrap();

    application.goes_on(20).await;
    odd.stop().await;
    migration.cut_over(running).await;
    application.stop().await;
    migration.assert_equal().await;
}

/// Sessions of `verify`'s on a server.
async fn sessions_of_verify(client: &Client) -> Vec<i32> {
    let query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'walferry verify'";
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Server processes that do nothing until this is dropped.
struct Stopped(Vec<i32>);

impl Stopped {
    fn new(pids: Vec<i32>) -> Stopped {
        assert!(!pids.is_empty());
        let stopped = Stopped(pids);
        stopped.signal(Signal::STOP);
        stopped
    }

    fn signal(&self, signal: Signal) {
        for pid in &self.0 {
            let _ = kill_process(Pid::from_raw(*pid).unwrap(), signal);
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
    }
}

/// A comparison that holds the apply and gets no further: the session for the target's snapshot does not answer.
async fn held_apply(migration: &Migration, running: &mut Running) -> (Running, Stopped) {
    let (source, target) = (migration.source().await, migration.target().await);
    target.batch_execute("BEGIN; LOCK TABLE app.heavy IN SHARE MODE").await.unwrap();
    source.batch_execute("UPDATE app.heavy SET n = n + 1 WHERE id = 1").await.unwrap();
    let observer = migration.target().await;
    until("an earlier comparison is gone", || async { sessions_of_verify(&observer).await.is_empty().then_some(()) })
        .await;
    let verify = migration.start("verify", &[]);
    until("the comparison waits for the target", || async {
        verify.log().contains("waiting until the target has caught up").then_some(())
    })
    .await;
    // The program's own, and the one that is to take the snapshot once the target has caught up.
    let sessions = sessions_of_verify(&observer).await;
    assert!(sessions.len() >= 2, "{sessions:?}");
    let stopped = Stopped::new(sessions);
    target.batch_execute("COMMIT").await.unwrap();
    migration.wait_for_status(running, "a held apply", |status| status["apply"]["held"] == true).await;
    (verify, stopped)
}

async fn applies(migration: &Migration) {
    let (source, target) = (migration.source().await, migration.target().await);
    let row = source.query_one("UPDATE app.heavy SET n = n + 1 WHERE id = 2 RETURNING n", &[]).await.unwrap();
    until_true(&target, &format!("SELECT n >= {} FROM app.heavy WHERE id = 2", row.get::<_, i32>(0))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_dies_while_the_apply_is_held_the_apply_goes_on() {
    let servers = Servers::start().await;
    let (migration, mut running) = follows(&servers, 2_000).await;

    let (verify_process, stopped) = held_apply(&migration, &mut running).await;
    verify_process.kill().await;
    applies(&migration).await;
    // Nobody asks any more, so nobody is held again.
    let source = migration.source().await;
    until("its sessions are gone", || async { sessions_of_verify(&source).await.is_empty().then_some(()) }).await;
    assert_eq!(migration.status().await.unwrap()["apply"]["held"], false);
    drop(stopped);
    is_equal_online(&verify(&migration, &[]).await);

    // Nobody dies: the apply rests no longer than it may all the same.
    let (verify_process, stopped) = held_apply(&migration, &mut running).await;
    applies(&migration).await;
    drop(stopped);
    let finished = verify_process.wait().await;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);

    let (verify_process, stopped) = held_apply(&migration, &mut running).await;
    running.kill().await;
    drop(stopped);
    verify_process.wait().await.assert_refused(1, &["the migration ended"]);
    let running = go_on(&migration).await;
    applies(&migration).await;
    is_equal_online(&verify(&migration, &[]).await);

    assert_eq!(migration.with_directory("pause", &["apply"]).await.code, Some(0));
    verify(&migration, &[]).await.assert_refused(3, &["the apply is paused", "walferry resume"]);
    assert_eq!(migration.with_directory("resume", &[]).await.code, Some(0));
    is_equal_online(&verify(&migration, &[]).await);
    running.kill().await;

    // Without a migration that runs, a repair says how it goes then, and both sides are compared as they are.
    let refused = migration.with_directory("repair", &["--tables", "app.heavy"]).await;
    refused.assert_refused(1, &["no migration is running", "--recopy 'app.heavy'"]);
    let finished = verify(&migration, &[]).await;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(finished.json()["online"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h35_a_commit_that_others_do_not_see_yet_is_no_difference() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 2_000).await;
    // The way back writes to the source, and its commit would hang too.
    let mut running = migration.migrate(&["--no-reverse"]);
    migration.wait_for_status(&mut running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
    let (source, target) = (migration.source().await, migration.target().await);
    let administrator = servers.source.connect("postgres").await.unwrap();
    let standbys = async |names: &str| {
        administrator.batch_execute(&format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'")).await.unwrap();
        administrator.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        until_true(&source, &format!("SELECT current_setting('synchronous_standby_names') = '{names}'")).await;
    };
    // Others do not wait for it.
    source.batch_execute("SET synchronous_commit = local").await.unwrap();
    standbys("nobody").await;
    // One that hangs since before the comparison.
    let (pid, first) = hanging_commit(&migration, 5).await;
    let finished = verify(&migration, &[]).await;
    println!("{}", finished.stderr);
    finished.assert_refused(3, &["synchronous standby", "SyncRep", "the apply goes on"]);
    applies_locally(&source, &target).await;

    // One that comes to hang while the comparison is at work, and only then that one hangs no longer.
    let comparing = migration.start("verify", &[]);
    until("the comparison tries again", || async { comparing.log().contains("more snapshots").then_some(()) }).await;
    let (_, second) = hanging_commit(&migration, 8).await;
    source.query("SELECT pg_cancel_backend($1)", &[&pid]).await.unwrap();
    first.await.unwrap().unwrap();
    let finished = comparing.wait().await;
    println!("{}", finished.stderr);
    finished.assert_refused(3, &["SyncRep", "the apply goes on"]);

    standbys("").await;
    second.await.unwrap().unwrap();
    is_equal_online(&verify(&migration, &[]).await);
    drop(running);
}

/// A commit whose record is in the stream, so that the target has it, and on the source nobody sees it.
async fn hanging_commit(
    migration: &Migration,
    row: i32,
) -> (i32, tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>) {
    let (source, target, hanging) = (migration.source().await, migration.target().await, migration.source().await);
    let pid: i32 = hanging.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let statement = format!("UPDATE app.heavy SET n = -1 WHERE id = {row}");
    let commit = tokio::spawn(async move { hanging.batch_execute(&statement).await });
    until_true(&source, &format!("SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = {pid}")).await;
    let query = format!("SELECT n = -1 FROM app.heavy WHERE id = {row}");
    until_true(&target, &query).await;
    assert!(!source.query_one(&query, &[]).await.unwrap().get::<_, bool>(0), "it is visible already");
    (pid, commit)
}

async fn applies_locally(source: &Client, target: &Client) {
    let row = source.query_one("UPDATE app.heavy SET n = n + 1 WHERE id = 2 RETURNING n", &[]).await.unwrap();
    until_true(target, &format!("SELECT n = {} FROM app.heavy WHERE id = 2", row.get::<_, i32>(0))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_truncated_under_the_snapshots_is_compared_at_another_point() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let (source, target) = (migration.source().await, migration.target().await);
    let table = |name: &str, rows: u32| {
        format!("CREATE TABLE {name} (id int PRIMARY KEY); INSERT INTO {name} SELECT generate_series(1, {rows});")
    };
    source.batch_execute(&(table("first", 5000) + &table("second", 50))).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    target.batch_execute("BEGIN; LOCK TABLE first").await.unwrap();
    let verify = migration.start("verify", &["--json", "--jobs", "1"]);
    let observer = migration.target().await;
    is_blocked(&observer, "LOCK TABLE ONLY").await;
    source.batch_execute("TRUNCATE second; INSERT INTO second VALUES (7), (8)").await.unwrap();
    until_true(&observer, "SELECT count(*) = 2 FROM second").await;
    target.batch_execute("COMMIT").await.unwrap();
    let report = is_equal_online(&verify.wait().await);
    let rows: Vec<i64> =
        report["tables"].as_array().unwrap().iter().map(|t| t["rows_source"].as_i64().unwrap()).collect();
    assert_eq!(rows, [5000, 2], "{report:#}");
    drop(running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_the_way_back_both_sides_are_compared_and_repaired_likewise() {
    let servers = Servers::start().await;
    let (migration, mut running) = follows(&servers, 2_000).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    let ready = |status: &Value| status["direction"] == "back" && status["ready_to_cutover"] == true;
    migration.wait_for_status(&mut running, "the way back", ready).await;
    let application = Application::start(&migration.target_url, 3);
    application.goes_on(20).await;
    for _ in 0..6 {
        is_equal_online(&verify(&migration, &[]).await);
    }

    let old_primary = migration.source().await;
    // Of the notes that the application has written, which it never deletes.
    let written =
        "SELECT array_agg(id ORDER BY id) FROM (SELECT id FROM app.note WHERE id > 2000 ORDER BY id LIMIT 3) n";
    let ids: Vec<i64> = old_primary.query_one(written, &[]).await.unwrap().get(0);
    let plant = format!(
        "BEGIN READ WRITE; SET LOCAL session_replication_role = replica; \
         UPDATE app.note SET document = '{{}}' WHERE id BETWEEN {} AND {}; COMMIT",
        ids[0], ids[2]
    );
    old_primary.batch_execute(&plant).await.unwrap();
    let found = verify(&migration, &[]).await;
    assert_eq!(found.code, Some(4), "{}", found.stderr);
    let expected: Vec<String> =
        ids.iter().map(|id| format!("different \"app\".\"note\" (id)=({id}) document")).collect();
    assert_eq!(differences(&found.json()), expected);
    let repaired = migration.with_directory("repair", &[]).await;
    assert_eq!(repaired.code, Some(0), "{}\n{}", repaired.stderr, running.log());
    application.goes_on(20).await;
    is_equal_online(&verify(&migration, &[]).await);
    application.stop().await;
    assert!(running.is_alive(), "{}", running.log());
    drop(running);
}
