//! The source's tables change while they are being migrated (I11): the migration stops before anything wrong is applied, says
//! what mends the target, and goes on when that was done.

use std::time::Duration;

use serde_json::Value;

use crate::support::process::{Finished, Running};
use crate::support::{Migration, Servers, hold_pg_dump, is_blocked, until_true};

const SCHEMA: &str = "CREATE TABLE orders (a text, gone text, n int, id int PRIMARY KEY);
    CREATE INDEX orders_a ON orders (a); CREATE TABLE quiet (id int PRIMARY KEY, a text);
    CREATE TABLE parts (id int, r text, PRIMARY KEY (id, r)) PARTITION BY LIST (r);
    CREATE TABLE parts_a PARTITION OF parts FOR VALUES IN ('a'); CREATE TABLE parts_b PARTITION OF parts FOR VALUES IN ('b');
    CREATE TABLE idle (id int PRIMARY KEY);
    INSERT INTO orders SELECT 'a' || g, 'x', g, g FROM generate_series(1, 2000) g;
    INSERT INTO quiet SELECT g, 'q' FROM generate_series(1, 2000) g; INSERT INTO parts VALUES (1, 'a'), (1, 'b')";

/// Rows before the change and after it, in the changed table and in another; also in one transaction with both.
///
/// A column's missing value goes when its table is written anew, so the new types come first: otherwise that column too would
/// have to be waived at the cutover, because nobody can see that nothing else has happened to it.
const STEPS: [(&str, &str, &str); 6] = [
    (
        "ALTER TABLE orders ALTER COLUMN n TYPE bigint",
        "UPDATE orders SET n = 5000000000 WHERE id < 10",
        "ALTER COLUMN \"n\" TYPE bigint",
    ),
    (
        "ALTER TABLE orders ALTER COLUMN id TYPE bigint",
        "INSERT INTO orders (id, a) VALUES (6000000000, 'big')",
        "ALTER COLUMN \"id\" TYPE bigint",
    ),
    (
        "ALTER TABLE orders ADD COLUMN extra int NOT NULL DEFAULT 5",
        "UPDATE orders SET extra = 6 WHERE id < 20; INSERT INTO orders (id, a) VALUES (10001, 'added')",
        "ADD COLUMN \"extra\" integer DEFAULT 5 NOT NULL",
    ),
    ("ALTER TABLE orders DROP COLUMN gone", "UPDATE orders SET n = n + 1 WHERE id < 300", "DROP COLUMN \"gone\""),
    (
        "ALTER TABLE orders RENAME COLUMN a TO \"The Name\"",
        "UPDATE orders SET \"The Name\" = 'renamed' WHERE id < 10",
        "RENAME COLUMN \"a\" TO \"The Name\"",
    ),
    (
        "ALTER TABLE parts ADD COLUMN extra text DEFAULT 'it''s'",
        "INSERT INTO parts VALUES (2, 'a', 'x')",
        "\"public\".\"parts\" ADD COLUMN \"extra\" text DEFAULT 'it''s'::text",
    ),
];

/// What the operator reads, as statements.
fn told(stopped: &Finished, statement: &str) -> String {
    println!("{}", stopped.stderr.lines().rev().take(3).collect::<Vec<_>>().join("\n"));
    stopped.assert_refused(1, &["changed on the source", "that commits at", statement]);
    // Lines may be wrapped on a terminal only.
    let (_, rest) = stopped.stderr.rsplit_once("Run this on the target: ").unwrap();
    rest.split_once("; Then run").unwrap().0.to_owned()
}

async fn all_is_applied(migration: &Migration, running: &mut Running) {
    let source = migration.source().await;
    source.batch_execute("INSERT INTO quiet SELECT max(id) + 1, 'last' FROM quiet").await.unwrap();
    let last: i32 = source.query_one("SELECT max(id) FROM quiet", &[]).await.unwrap().get(0);
    until_true(&migration.target().await, &format!("SELECT true FROM quiet WHERE id = {last}")).await;
    assert!(running.is_alive(), "{}", running.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i11_a_changed_table_is_mended_as_told_and_the_migration_goes_on_to_its_cutover() {
    let servers = Servers::start().await;
    let migration = servers.migration("changing").await;
    let source = migration.source().await;
    source.batch_execute(SCHEMA).await.unwrap();
    let mut running = migration.migrate(&["--apply-workers", "3", "--queue-max-bytes", "4GiB"]);
    migration.wait_for_phase(&mut running, "following").await;

    // The stream does not show this one: it stays in the way of the cutover, whatever else is dealt with.
    source.batch_execute("ALTER TABLE idle ADD COLUMN unseen int").await.unwrap();
    for (number, (change, after, statement)) in STEPS.into_iter().enumerate() {
        let before = format!(
            "INSERT INTO quiet SELECT g, 'before' FROM generate_series({0}, {0} + 500) g",
            (number + 1) * 10_000
        );
        source.batch_execute(&before).await.unwrap();
        source.batch_execute("UPDATE orders SET n = n + 1 WHERE id % 2 = 0").await.unwrap();
        let delete = format!("DELETE FROM quiet WHERE id = {}", number + 1);
        source.batch_execute(&format!("BEGIN; {delete}; {change}; {after}; COMMIT")).await.unwrap();
        source.batch_execute("UPDATE quiet SET a = a || 'x'").await.unwrap();
        let stopped = running.wait().await;
        let statements = told(&stopped, statement);
        let target = migration.target().await;
        let query = "SELECT (SELECT count(*) FROM quiet WHERE id >= $1), (SELECT count(*) FROM quiet WHERE id = $2)";
        let (first, row) = (((number + 1) * 10_000) as i32, number as i32 + 1);
        let counts = target.query_one(query, &[&first, &row]).await.unwrap();
        assert_eq!((counts.get::<_, i64>(0), counts.get::<_, i64>(1)), (501, 1), "all before it, and nothing of it");

        // Not mended, it says the same again; also after a death while it looks.
        if number % 2 == 0 {
            let killed = migration.migrate(&[]);
            tokio::time::sleep(Duration::from_millis(150 * number as u64)).await;
            killed.kill_if_alive().await;
            assert_eq!(told(&migration.migrate(&[]).wait().await, statement), statements);
        }
        target.batch_execute(&statements).await.unwrap();
        source
            .batch_execute("UPDATE orders SET n = n + 2 WHERE id % 3 = 0; UPDATE quiet SET a = a || 'y' WHERE id < 900")
            .await
            .unwrap();
        // It dies around the commit that carries the change.
        for death in 0..if number < 3 { 3 } else { 0 } {
            let mut dying = migration.migrate(&[]);
            let looked = |status: &Value| death == 0 || status["apply"]["serial_replays"].as_u64() >= Some(death);
            migration.wait_for_status(&mut dying, "a replay", looked).await;
            drop(dying.kill().await);
        }
        running = migration.migrate(&[]);
        all_is_applied(&migration, &mut running).await;
        let (ours, theirs) = (migration.source().await, migration.target().await);
        let (ours, theirs) = (crate::support::compare::rows(&ours).await, crate::support::compare::rows(&theirs).await);
        assert_eq!(ours, theirs, "{change}");
    }
    // Those that were dealt with are not named.
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    refused.assert_refused(5, &["1 objects of the source changed", "column unseen of table public.idle is new"]);
    source.batch_execute("ALTER TABLE idle DROP COLUMN unseen").await.unwrap();
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i11_a_table_that_changed_before_it_was_copied_is_not_copied_by_its_old_columns() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("early").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute("CREATE TABLE orders (id int PRIMARY KEY, a text)").await.unwrap();
    source.batch_execute("INSERT INTO orders SELECT g, 'a' FROM generate_series(1, 50000) g").await.unwrap();
    let dump = hold_pg_dump(&mut migration);
    let running = migration.migrate(&[]);
    dump.is_reached().await;
    target.batch_execute("BEGIN; LOCK TABLE walferry.part IN SHARE MODE").await.unwrap();
    dump.release();
    is_blocked(&migration.target().await, "LOCK TABLE walferry.source_table, walferry.part").await;
    running.kill().await;
    target.batch_execute("ROLLBACK").await.unwrap();
    // A row that the next snapshot shows has a value in a column that the first did not have.
    source.batch_execute("ALTER TABLE orders ADD COLUMN extra int").await.unwrap();
    source.batch_execute("UPDATE orders SET extra = 7 WHERE id = 1").await.unwrap();
    let stopped = migration.migrate(&[]).wait().await;
    stopped
        .assert_refused(1, &["the columns of \"public\".\"orders\" have changed on the source before it was copied"]);
    // What it says next is true.
    stopped.assert_refused(1, &["`--recopy 'public.orders'`"]);
    let refused = migration.migrate(&["--recopy", "public.orders"]).wait().await;
    refused.assert_refused(1, &["ALTER TABLE \"public\".\"orders\" ADD COLUMN \"extra\" integer"]);
    target.batch_execute("ALTER TABLE orders ADD COLUMN extra int").await.unwrap();
    let mut running = migration.migrate(&["--recopy", "public.orders"]);
    migration.wait_for_phase(&mut running, "following").await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}
