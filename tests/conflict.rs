//! Somebody else writes to the target, and rows are rewritten on the source without being streamed: the migration stops, says what
//! can be done, and goes on when it was.

use serde_json::Value;

use crate::support::process::Running;
use crate::support::{Migration, Servers, until_true};

const SCHEMA: &str = "CREATE TABLE orders (id int PRIMARY KEY, a text); CREATE TABLE quiet (id int PRIMARY KEY);
    INSERT INTO orders SELECT g, 'a' || g FROM generate_series(1, 3000) g";

async fn stops(running: Running, said: &[&str]) {
    let stopped = running.wait().await;
    println!("{}", stopped.stderr.lines().rev().take(2).collect::<Vec<_>>().join("\n"));
    stopped.assert_refused(1, said);
}

async fn all_is_applied(migration: &Migration, running: &mut Running) {
    let source = migration.source().await;
    source.batch_execute("INSERT INTO quiet SELECT coalesce(max(id), 0) + 1 FROM quiet").await.unwrap();
    let last: i32 = source.query_one("SELECT max(id) FROM quiet", &[]).await.unwrap().get(0);
    until_true(&migration.target().await, &format!("SELECT true FROM quiet WHERE id = {last}")).await;
    assert!(running.is_alive(), "{}", running.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i06_what_the_operator_decides_or_has_compared_again_lets_the_migration_go_on() {
    let servers = Servers::start().await;
    let migration = servers.migration("conflicts").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute(SCHEMA).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;

    // Somebody inserts a row, and removes another.
    target.batch_execute("INSERT INTO orders VALUES (10000, 'theirs'); DELETE FROM orders WHERE id = 7").await.unwrap();
    source.batch_execute("INSERT INTO orders VALUES (10000, 'ours')").await.unwrap();
    source
        .batch_execute("BEGIN; UPDATE orders SET a = 'ours' WHERE id = 7; DELETE FROM orders WHERE id = 8; COMMIT")
        .await
        .unwrap();
    let next = ["--on-conflict source", "--recopy public.orders", "walferry verify"];
    stops(running, &[&["that commits at", "inserting (id)=(10000) into \"public\".\"orders\""], &next[..]].concat())
        .await;
    // The same again, and nothing was applied.
    stops(migration.migrate(&["--on-conflict", "stop"]), &["inserting (id)=(10000)"]).await;
    let theirs: String = target.query_one("SELECT a FROM orders WHERE id = 10000", &[]).await.unwrap().get(0);
    assert_eq!(theirs, "theirs");

    let mut running = migration.migrate(&["--on-conflict", "source"]);
    all_is_applied(&migration, &mut running).await;
    let decided = |status: &Value| status["apply"]["conflicts"] == 2;
    let status = migration.wait_for_status(&mut running, "two conflicts", decided).await;
    assert_eq!(status["apply"]["conflicts_by_kind"]["insert_found_row"], 1);
    assert_eq!(status["apply"]["conflicts_by_kind"]["update_found_none"], 1);
    assert_eq!(status["apply"]["conflicts_by_table"][0]["name"], "orders");
    assert!(running.log().contains("insert_found_row") && running.log().contains("(id)=(10000)"), "{}", running.log());
    let rows = "SELECT string_agg(a, ' ' ORDER BY id) FROM orders WHERE id IN (7, 8, 10000)";
    let rows: String = target.query_one(rows, &[]).await.unwrap().get(0);
    assert_eq!(rows, "ours ours");
    running.terminate().await;

    // The target's rows stay; comparing the table again brings them in line.
    target.batch_execute("INSERT INTO orders VALUES (10001, 'theirs')").await.unwrap();
    source.batch_execute("INSERT INTO orders VALUES (10001, 'ours')").await.unwrap();
    let mut running = migration.migrate(&["--on-conflict", "target"]);
    all_is_applied(&migration, &mut running).await;
    let theirs: String = target.query_one("SELECT a FROM orders WHERE id = 10001", &[]).await.unwrap().get(0);
    assert_eq!(theirs, "theirs");

    // Every row gets a value that the stream does not show.
    source.batch_execute("ALTER TABLE orders ADD COLUMN extra float DEFAULT random()").await.unwrap();
    source.batch_execute("UPDATE orders SET a = 'after' WHERE id < 100").await.unwrap();
    stops(running, &["column \"extra\" double precision was added", "a value of its own", "--recopy public.orders"])
        .await;
    // Another before it is compared again: the stream has rows of a shape that neither the ledger nor the source has any more.
    source.batch_execute("ALTER TABLE orders ADD COLUMN more float DEFAULT random()").await.unwrap();
    source.batch_execute("UPDATE orders SET a = 'later' WHERE id < 50").await.unwrap();
    let mended = migration.migrate(&["--recopy", "public.orders"]).wait().await;
    mended.assert_refused(
        1,
        &["ALTER TABLE \"public\".\"orders\" ADD COLUMN \"extra\" double precision", "SET DEFAULT random()"],
    );
    let (_, statements) = mended.stderr.rsplit_once("Run this on the target: ").unwrap();
    target.batch_execute(statements.split_once("; Then run").unwrap().0).await.unwrap();
    let mut running = migration.migrate(&["--recopy", "public.orders"]);
    all_is_applied(&migration, &mut running).await;
    source.batch_execute("INSERT INTO orders (id) SELECT generate_series(20000, 20100); UPDATE orders SET extra = 0 WHERE id % 3 = 0").await.unwrap();
    all_is_applied(&migration, &mut running).await;
    let migrated = migration.cut_over(running).await;
    assert!(migrated["cutover_lsn"].is_string());
    migration.assert_equal().await;
}
