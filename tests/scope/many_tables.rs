//! Databases of very many tables: what is done for each of them is done for all at once, or is small.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::number;
use crate::support::process::Running;
use crate::support::{Migration, Servers};

/// Resident memory of the program, and what the last status takes in the state directory.
const MEMORY_MAX_BYTES: u64 = 400 << 20;
const STATUS_MAX_BYTES: u64 = 160 << 10;

/// Each with a key, an index and a few rows; a tenth of them has a sequence of its own.
async fn fill(migration: &Migration, tables: u32) {
    let source = migration.source().await;
    source.batch_execute("SET synchronous_commit = off").await.unwrap();
    for from in (0..tables).step_by(500) {
        let until = (from + 499).min(tables - 1);
        let script = format!(
            "DO $$ BEGIN FOR i IN {from}..{until} LOOP \
               EXECUTE format('CREATE TABLE t%s (id %s PRIMARY KEY, body text)', i, CASE WHEN i % 10 = 0 THEN 'serial' ELSE 'int' END); \
               EXECUTE format('CREATE INDEX ON t%s (body)', i); \
               EXECUTE format('INSERT INTO t%s SELECT g, ''row '' || g FROM generate_series(1, 3) g', i); \
             END LOOP; END $$"
        );
        source.batch_execute(&script).await.unwrap();
    }
}

/// How many rows all tables have together, and a number that their values come to.
async fn rows(client: &Client, tables: u32) -> (i64, i64) {
    let (mut count, mut sum) = (0, 0);
    for from in (0..tables).step_by(500) {
        let one = |table| format!("SELECT count(*) AS n, sum(hashtext(t::text))::int8 AS h FROM t{table} t");
        let selects: Vec<String> = (from..(from + 500).min(tables)).map(one).collect();
        let query = format!("SELECT sum(n)::int8, sum(h)::int8 FROM ({}) x", selects.join(" UNION ALL "));
        let row = client.query_one(&query, &[]).await.unwrap();
        count += row.get::<_, i64>(0);
        sum += row.get::<_, i64>(1);
    }
    (count, sum)
}

/// Like `wait_for_status`, with the patience that so many tables take on a busy machine.
async fn wait(migration: &Migration, running: &mut Running, wished: impl Fn(&serde_json::Value) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(3600);
    while !migration.status().await.is_some_and(|status| status["process_alive"] == true && wished(&status)) {
        assert!(running.is_alive() && Instant::now() < deadline, "{}", running.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn moves(tables: u32) {
    // What `check` computes for them (H10).
    let locks = (tables / 8).max(256).to_string();
    let settings = [("max_locks_per_transaction", locks.as_str()), ("autovacuum", "off"), ("max_wal_size", "8GB")];
    let servers = Servers::with(&settings, &settings).await;
    let migration = servers.migration("many").await;
    let clock = Instant::now();
    let say = |what: &str| println!("{tables} tables: {what} at {:.1} s", clock.elapsed().as_secs_f64());
    fill(&migration, tables).await;
    say("made");
    let check = migration.with_servers("check", &["--json", "--estimate-seconds", "0"]).await;
    assert_eq!(check.code, Some(0), "{}\n{}", check.stdout, check.stderr);
    assert_eq!(check.json()["tables"], tables);
    assert!(
        check.json()["findings"].as_array().unwrap().iter().all(|found| found["code"] != "locks"),
        "{}",
        check.stdout
    );
    say("checked");

    let mut running = migration.migrate(&["--no-reverse"]);
    let memory = running.watch_memory();
    let copied = |status: &serde_json::Value| status["phase"] != "preparing" && status["phase"] != "copying";
    wait(&migration, &mut running, copied).await;
    say("copied");
    wait(&migration, &mut running, |status| status["ready_to_cutover"] == true).await;
    say("follows");
    let source = migration.source().await;
    for table in [0, 7, tables - 1] {
        source
            .batch_execute(&format!("INSERT INTO t{table} VALUES (100, 'new'); DELETE FROM t{table} WHERE id = 1"))
            .await
            .unwrap();
    }
    let written = std::fs::metadata(migration.directory().join("status.json")).unwrap().len();
    let cutover = ["--yes", "--no-reverse", "--timeout", "600s", "--max-write-stall", "500s"];
    let cutover = migration.with_directory("cutover", &cutover).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    say("cut over");
    let peak = memory.await.unwrap();
    println!("peak memory {} MiB, status {} KiB", peak >> 20, written >> 10);
    assert!(peak < MEMORY_MAX_BYTES, "walferry has used {} MiB", peak >> 20);
    assert!(written < STATUS_MAX_BYTES, "the last status takes {} KiB", written >> 10);
    // The cutover has ended our session.
    let (source, target) = (migration.source().await, migration.target().await);
    assert_eq!(rows(&source, tables).await, rows(&target, tables).await);
    assert_eq!(
        number(
            &target,
            "SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = indrelid WHERE relname ~ '^t[0-9]+$'"
        )
        .await,
        i64::from(2 * tables)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_hundred_tables_move_in_bounded_memory() {
    moves(800).await;
}

/// More than the status names; takes minutes: `cargo test --test scope -- --ignored thousand_tables`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn three_thousand_tables_move_in_bounded_memory() {
    moves(3_000).await;
}

/// Many times that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn twenty_thousand_tables_move_in_bounded_memory() {
    moves(20_000).await;
}
