//! The copy: what it holds on the source, and how it reads and writes.

use std::time::Duration;

use walferry::copy;
use walferry::source::catalog;

use crate::support::{Gate, Pair, until, value};

/// Asks for the strongest lock; fails when it has to wait for longer than the patience of an application.
async fn lock_and_write(pair: &Pair) {
    let client = pair.source.connect("postgres").await.unwrap();
    client.batch_execute("SET lock_timeout = '20s'").await.unwrap();
    client.batch_execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE; COMMIT").await.expect("DDL waits for the copy");
    client.batch_execute("INSERT INTO t (v) VALUES ('written behind the DDL')").await.expect("writers wait");
}

#[tokio::test]
async fn h09_the_copy_makes_way_for_ddl_whatever_it_waits_for_itself() {
    let pair = Pair::start().await;
    pair.on_source(
        "CREATE TABLE t (id bigserial PRIMARY KEY, v text); \
         INSERT INTO t (v) SELECT repeat(md5(n::text), 20) FROM generate_series(1, 160000) n; ANALYZE",
    )
    .await;
    // In parts, of which none empties the table first: that would wait before the source is asked for anything.
    let mut command = pair.migrate();
    command.args(["--split-above", "110MiB"]);
    let (_walferry, transaction) = pair.run_waiting(command).await;
    let planned = Gate::close(&pair, 1, "INSERT", "part", "true").await;
    let copied = Gate::close(&pair, 2, "UPDATE", "part", "NEW.copied").await;
    transaction.batch_execute("COMMIT").await.unwrap();
    planned.reached(&pair).await;

    // The target takes no rows: the source's session hangs in sending.
    let in_the_way = pair.target.connect("postgres").await.unwrap();
    in_the_way.batch_execute("BEGIN; LOCK TABLE t IN SHARE MODE").await.unwrap();
    planned.open().await;
    let sends = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'walferry/%' \
                 AND wait_event = 'ClientWrite')";
    until(sends, &pair.source).await;
    lock_and_write(&pair).await;
    in_the_way.batch_execute("COMMIT").await.unwrap();

    // The target has all rows and does not commit them: the source's session is idle in its transaction.
    copied.reached(&pair).await;
    lock_and_write(&pair).await;
    copied.open().await;
    pair.following().await;
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT count(*), sum(id) FROM t").await, ["160002|12800400003"]);
}

#[tokio::test]
async fn h09_the_copy_goes_on_while_somebody_waits_who_is_in_nobodys_way() {
    let pair = Pair::start().await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)").await;
    let (_walferry, transaction) = pair.run_waiting(pair.migrate()).await;
    let copied = Gate::close(&pair, 1, "UPDATE", "part", "NEW.copied").await;
    transaction.batch_execute("COMMIT").await.unwrap();
    copied.reached(&pair).await;

    // It waits for every older snapshot to end, ours too, and for that long hinders no writer.
    let indexing = pair.source.connect("postgres").await.unwrap();
    let indexing = tokio::spawn(async move { indexing.batch_execute("CREATE INDEX CONCURRENTLY i ON t (id)").await });
    until("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'virtualxid')", &pair.source).await;
    let source = pair.source.connect("postgres").await.unwrap();
    let ours = "SELECT string_agg(pid::text, ' ' ORDER BY pid) FROM pg_stat_activity \
                WHERE application_name LIKE 'walferry/%' AND state = 'idle in transaction'";
    let before = value(&source, ours).await;
    assert_ne!(before, "NULL", "this test is about the copy's session and the one that holds the snapshot");
    // Several looks of the watchdog.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(value(&source, ours).await, before, "a session made way for nobody");
    copied.open().await;
    pair.following().await;
    indexing.await.unwrap().unwrap();
    pair.caught_up().await;
    pair.same("SELECT count(*) FROM t").await;
}

#[tokio::test]
async fn h11_the_ranges_of_a_table_read_each_of_its_pages_once_and_only_what_was_begun_is_emptied() {
    let pair = Pair::start().await;
    pair.on_source(
        "CREATE TABLE large (id int PRIMARY KEY, v text); \
         INSERT INTO large SELECT n, repeat('x', 700) FROM generate_series(1, 5000) n; \
         CREATE TABLE small (id int PRIMARY KEY); INSERT INTO small VALUES (1); \
         CREATE TABLE root (id int) PARTITION BY RANGE (id); \
         CREATE TABLE leaf PARTITION OF root FOR VALUES FROM (0) TO (10); INSERT INTO root VALUES (1); ANALYZE",
    )
    .await;
    let source = pair.source.connect("postgres").await.unwrap();
    let tables = catalog::tables(&source).await.unwrap();
    let parts = copy::plan(&tables, 512 << 10);
    assert!(parts.len() > 30, "this test needs many ranges: {}", parts.len());

    let split = ["--split-above", "512KiB", "--copy-jobs", "1"];
    let mut migrate = pair.migrate();
    migrate.args(split);
    let (walferry, transaction) = pair.run_waiting(migrate).await;
    let copied = Gate::close(&pair, 1, "UPDATE", "part", "NEW.copied AND NEW.part = 20").await;
    let planned = Gate::close(&pair, 2, "INSERT", "part", "true").await;
    planned.let_others_pass().await;
    transaction.batch_execute("COMMIT").await.unwrap();
    copied.reached(&pair).await;
    walferry.kill();
    copied.open().await;
    planned.open().await;

    // A trigger that only TRUNCATE fires, and that fires for us too.
    let on_truncate = |table: &str| {
        format!(
            "CREATE TRIGGER truncated BEFORE TRUNCATE ON {table} EXECUTE FUNCTION hold.truncated(); \
             ALTER TABLE {table} ENABLE ALWAYS TRIGGER truncated;"
        )
    };
    pair.on_target(&format!(
        "CREATE TABLE hold.truncates (name text); CREATE FUNCTION hold.truncated() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN INSERT INTO hold.truncates VALUES (TG_TABLE_NAME); RETURN NULL; END $$; {}",
        ["public.large", "public.small", "public.leaf", "public.root"].map(on_truncate).concat()
    ))
    .await;
    source.batch_execute("SELECT pg_stat_reset()").await.unwrap();
    let mut migrate = pair.migrate();
    migrate.args(split);
    let _walferry = pair.run(migrate);
    pair.following().await;
    pair.same("SELECT id, md5(v) FROM large ORDER BY 1").await;
    let target = pair.target.connect("postgres").await.unwrap();
    assert_eq!(value(&target, "SELECT string_agg(name, ' ') FROM hold.truncates").await, "large");
    // A scan of the whole table for each range would have read it more than thirty times.
    let read = "SELECT seq_tup_read BETWEEN 5000 AND 10000 FROM pg_stat_user_tables WHERE relname = 'large'";
    until(read, &pair.source).await;
}
