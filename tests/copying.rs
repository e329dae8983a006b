//! How the rows of the initial copy arrive, and what is built on them.

use crate::support::process::Running;
use crate::support::{Migration, Servers, hold_pg_dump, until_true};

/// Tables of this size are copied as a whole, and frozen.
const ROWS: &str = "SELECT n, n % 7, 'row ' || n, repeat('x', 100) FROM generate_series(1, 100000) n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_table_arrives_frozen_and_with_everything_that_hangs_on_its_indexes() {
    let servers = Servers::start().await;
    let migration = servers.migration("frozen").await;
    // Without autovacuum, nobody but the copy can have frozen the rows.
    let setup = format!(
        "CREATE TABLE item (id int NOT NULL, kind int NOT NULL, name text NOT NULL, filler text) WITH (autovacuum_enabled = false);
         INSERT INTO item {ROWS};
         ALTER TABLE item ADD PRIMARY KEY (id);
         CREATE UNIQUE INDEX item_name ON item (name); CREATE INDEX item_kind ON item (kind);
         CREATE INDEX \"item ALTER kind\" ON item (kind, id) WHERE kind > 3;
         ALTER TABLE item CLUSTER ON item_kind; ALTER TABLE item REPLICA IDENTITY USING INDEX item_name;
         ALTER INDEX \"item ALTER kind\" SET (fillfactor = 70);
         CREATE TABLE small (id int PRIMARY KEY); INSERT INTO small SELECT generate_series(1, 100)"
    );
    migration.source().await.batch_execute(&setup).await.unwrap();
    let mut running = migration.migrate(&["--index-jobs", "3", "--index-memory", "96MiB"]);
    migration.wait_for_phase(&mut running, "following").await;
    let frozen = "SELECT relallvisible = relpages AND relpages > 1000 FROM pg_class WHERE relname = 'item'";
    let target = migration.target().await;
    assert!(target.query_one(frozen, &[]).await.unwrap().get::<_, bool>(0), "every page is marked all visible");
    let analyzed = "SELECT reltuples = 100 FROM pg_class WHERE relname = 'small'";
    assert!(target.query_one(analyzed, &[]).await.unwrap().get::<_, bool>(0));
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

/// A migration of one table that rests before its copy, with the table on the target.
async fn resting_before_the_copy(servers: &Servers, name: &str) -> (Migration, Running) {
    let mut migration = servers.migration(name).await;
    let setup = format!(
        "CREATE TABLE item (id int, kind int, name text, filler text); INSERT INTO item {ROWS}; ALTER TABLE item ADD PRIMARY KEY (id)"
    );
    migration.source().await.batch_execute(&setup).await.unwrap();
    let held = hold_pg_dump(&mut migration);
    let running = migration.migrate(&[]);
    held.is_reached().await;
    let paused = migration.with_directory("pause", &["copy"]).await;
    assert_eq!(paused.code, Some(0), "{}", paused.stderr);
    held.release();
    until_true(&migration.target().await, "SELECT to_regclass('public.item') IS NOT NULL").await;
    (migration, running)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_copy_waits_for_nobody_who_reads_on_the_target() {
    let servers = Servers::start().await;
    let (migration, mut running) = resting_before_the_copy(&servers, "read").await;
    let reader = migration.target().await;
    reader.batch_execute("BEGIN; LOCK TABLE item IN ACCESS SHARE MODE").await.unwrap();
    assert_eq!(migration.with_directory("resume", &[]).await.code, Some(0));
    let target = migration.target().await;
    until_true(&target, "SELECT bool_and(copied) FROM walferry.source_table").await;
    // Its key needs the table for itself.
    reader.batch_execute("COMMIT").await.unwrap();
    migration.wait_for_phase(&mut running, "following").await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_a_stranger_has_written_to_the_target_are_not_emptied_away() {
    let servers = Servers::start().await;
    let (migration, running) = resting_before_the_copy(&servers, "stranger").await;
    let target = migration.target().await;
    target.batch_execute("INSERT INTO item VALUES (0, 0, 'theirs', '')").await.unwrap();
    assert_eq!(migration.with_directory("resume", &[]).await.code, Some(0));

    let ended = running.wait().await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("holds rows that are not ours"), "{}", ended.stderr);
    let theirs = "SELECT count(*) FROM item WHERE name = 'theirs'";
    assert_eq!(target.query_one(theirs, &[]).await.unwrap().get::<_, i64>(0), 1);

    // What the hint says.
    target.batch_execute("DELETE FROM item").await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    migration.cut_over(running).await;
    migration.assert_equal().await;
}
