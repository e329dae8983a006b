//! `kill -9` at the worst moments of every phase: the same command goes on, and nothing is lost or doubled.
//!
//! A phase is held by locks, so that the moment is always the same: an open transaction holds the making of the slot, a lock
//! on a table of the target holds its copy, its indexes or the apply, an uncommitted schema holds the restore.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, connect, hold_pg_dump, is_blocked, until, until_true};

/// Small ranges, few jobs: so that a large table is half copied for a while.
const SMALL_PARTS: [&str; 4] = ["--split-above", "1MiB", "--copy-jobs", "2"];

async fn write_all_the_time(servers: &Servers, rows: u32) -> (Migration, Application) {
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, rows).await;
    let application = Application::start(&migration.source_url, 3);
    application.goes_on(10).await;
    (migration, application)
}

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

/// Goes on to the cutover, and compares.
async fn finish(migration: &Migration, mut running: Running, application: Application) {
    ready(migration, &mut running).await;
    application.goes_on(30).await;
    migration.cut_over(running).await;
    application.stop().await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_it_prepares_it_prepares_anew_and_moves_everything() {
    let servers = Servers::start().await;
    let (mut migration, application) = write_all_the_time(&servers, 5_000).await;
    let dump = hold_pg_dump(&mut migration);
    let (source, target) = (migration.source().await, migration.target().await);

    // It knows who it is, and the ledger does not yet.
    target.batch_execute("BEGIN; CREATE SCHEMA walferry").await.unwrap();
    let running = migration.migrate(&[]);
    is_blocked(&migration.target().await, "CREATE SCHEMA walferry").await;
    assert!(migration.directory().join("migration.json").exists());
    running.kill().await;
    target.batch_execute("ROLLBACK").await.unwrap();

    // The slot waits for an open transaction, and its session does not notice that nobody waits any more.
    source.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let observer = migration.source().await;
    let slot_is_being_made = "SELECT active AND confirmed_flush_lsn IS NULL FROM pg_replication_slots";
    let mut first_maker = 0;
    for _ in 0..2 {
        let mut running = migration.migrate(&[]);
        migration.wait_for_phase(&mut running, "preparing").await;
        let another =
            format!("SELECT active_pid <> {first_maker} AND confirmed_flush_lsn IS NULL FROM pg_replication_slots");
        until_true(&observer, &another).await;
        until_true(&observer, slot_is_being_made).await;
        first_maker = observer.query_one("SELECT active_pid FROM pg_replication_slots", &[]).await.unwrap().get(0);
        running.kill().await;
    }
    source.batch_execute("COMMIT").await.unwrap();

    // The slot is there and keeps WAL; the ledger does not know its snapshot yet.
    let running = migration.migrate(&[]);
    dump.is_reached().await;
    let slot = "SELECT count(*), bool_and(confirmed_flush_lsn IS NOT NULL) FROM pg_replication_slots";
    let row = source.query_one(slot, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, bool>(1)), (1, true));
    let prepared = migration.ledger("SELECT consistent_point IS NOT NULL FROM walferry.migration").await;
    assert!(!prepared[0].get::<_, bool>(0));
    running.kill().await;
    dump.release();

    // Half of the schema is restored.
    target.batch_execute("BEGIN; CREATE SCHEMA app").await.unwrap();
    let running = migration.migrate(&[]);
    is_blocked(&migration.target().await, "CREATE SCHEMA app").await;
    let slot_name = "SELECT slot_name FROM pg_replication_slots";
    let slot: String = source.query_one(slot_name, &[]).await.unwrap().get(0);
    running.kill().await;
    let running = migration.migrate(&[]);
    // The session that the dead process left is ended; the new one waits in its place.
    let one_waits = "SELECT count(*) = 1 FROM pg_stat_activity \
                     WHERE wait_event_type = 'Lock' AND query LIKE '%CREATE SCHEMA app%' AND pid <> pg_backend_pid()";
    until_true(&migration.target().await, one_waits).await;
    target.batch_execute("ROLLBACK").await.unwrap();

    let mut running = running;
    ready(&migration, &mut running).await;
    let slots = source.query(slot_name, &[]).await.unwrap();
    assert_eq!(slots.len(), 1, "earlier attempts left no slot");
    assert_eq!(slots[0].get::<_, String>(0), slot, "what was prepared is used");
    let publications = source.query("SELECT pubname FROM pg_publication", &[]).await.unwrap();
    assert_eq!(publications.len(), 2, "earlier attempts left no publication");
    finish(&migration, running, application).await;
}

/// Of every table in the ledger: its snapshot, and its rows if it is complete.
async fn copied(migration: &Migration) -> BTreeMap<String, (Option<i32>, Option<i64>)> {
    let query =
        "SELECT definition->>'name', snapshot, CASE WHEN copied THEN rows_copied END FROM walferry.source_table";
    migration.ledger(query).await.into_iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_it_copies_indexes_and_catches_up_it_goes_on_and_copies_no_finished_table_again() {
    let servers = Servers::start().await;
    let (migration, application) = write_all_the_time(&servers, 40_000).await;
    let (holder, note, target) = (migration.target().await, migration.target().await, migration.target().await);

    // Some ranges of a split table are there, others are not.
    let mut running = migration.migrate(&SMALL_PARTS);
    until_true(&target, "SELECT count(*) >= 3 FROM walferry.part WHERE copied").await;
    holder.batch_execute("BEGIN; LOCK TABLE app.big IN SHARE MODE").await.unwrap();
    note.batch_execute("BEGIN; LOCK TABLE app.note IN SHARE MODE").await.unwrap();
    is_blocked(&target, "COPY \"app\".\"big\"").await;
    migration.wait_for_phase(&mut running, "copying").await;
    let parts = "SELECT count(*) FILTER (WHERE p.copied), count(*) FILTER (WHERE NOT p.copied) FROM walferry.part p \
                 JOIN walferry.source_table USING (relid) WHERE definition->>'name' = 'big'";
    let row = &migration.ledger(parts).await[0];
    let (done, open): (i64, i64) = (row.get(0), row.get(1));
    assert!(done >= 3 && open >= 3, "{done} ranges are copied, {open} are not");
    running.kill().await;
    holder.batch_execute("ROLLBACK").await.unwrap();

    // Everything but one table is there.
    let running = migration.migrate(&SMALL_PARTS);
    until_true(
        &target,
        "SELECT count(*) = 1 AND min(definition->>'name') = 'note' FROM walferry.source_table WHERE NOT copied",
    )
    .await;
    let before = copied(&migration).await;
    assert_eq!(before["big"].0, Some(1), "a half-copied table starts over under one new snapshot");
    assert!(before["big"].1.unwrap() >= 40_000);
    running.kill().await;

    // Its copy is complete, its indexes are not.
    let mut running = migration.migrate(&SMALL_PARTS);
    is_blocked(&target, "COPY \"app\".\"note\"").await;
    let indexes = tokio::spawn(async move {
        holder.batch_execute("BEGIN; LOCK TABLE app.note IN ROW EXCLUSIVE MODE").await.unwrap();
        holder
    });
    is_blocked(&target, "LOCK TABLE app.note IN ROW EXCLUSIVE").await;
    note.batch_execute("ROLLBACK").await.unwrap();
    let holder = indexes.await.unwrap();
    migration.wait_for_phase(&mut running, "indexing").await;
    is_blocked(&target, "note_pkey").await;
    let after = copied(&migration).await;
    for (table, entry) in &before {
        if table != "note" {
            assert_eq!(after[table], *entry, "{table} was complete and was copied again");
        }
    }
    assert!(after["note"].0 > before["big"].0 && after["note"].0 > before["note"].0, "{before:?} {after:?}");
    running.kill().await;

    // All is copied; the apply waits for a row.
    let mut running = migration.migrate(&SMALL_PARTS);
    is_blocked(&target, "note_pkey").await;
    until_true(
        &target,
        "SELECT count(*) > 0 AND bool_and(done) FROM walferry.schema_item WHERE name LIKE '%heavy_pkey%'",
    )
    .await;
    note.batch_execute("BEGIN; LOCK TABLE app.heavy IN SHARE MODE").await.unwrap();
    holder.batch_execute("ROLLBACK").await.unwrap();
    migration.wait_for_phase(&mut running, "catching_up").await;
    application.goes_on(50).await;
    let status = migration.wait_for_phase(&mut running, "catching_up").await;
    assert_eq!(status["ready_to_cutover"], false);
    running.kill().await;
    note.batch_execute("ROLLBACK").await.unwrap();

    let running = migration.migrate(&SMALL_PARTS);
    finish(&migration, running, application).await;
    assert_eq!(copied(&migration).await, after, "nothing was copied again");
}

/// A cutover on its way, given enough time to be held.
fn begin_cutover(migration: &Migration) -> Running {
    migration.start("cutover", &["--yes", "--no-reverse", "--timeout", "60s", "--max-write-stall", "60s"])
}

/// Waits until a cutover waits in this statement.
async fn comes_to(cutover: &mut Running, target: &Client, statement: &str) {
    let query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND strpos(query, $1) > 0";
    while target.query(query, &[&statement]).await.unwrap().is_empty() {
        assert!(cutover.is_alive(), "the cutover ended before {statement}:\n{}", cutover.log());
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// Kills the migration in the middle of a cutover, and starts it again.
async fn kill_and_start_again(migration: &Migration, running: Running, cutover: Running) -> Running {
    running.kill().await;
    let cutover = cutover.wait().await;
    assert_eq!(cutover.code, Some(1), "who asked for it is told:\n{}", cutover.stderr);
    assert!(cutover.stderr.contains("error: "), "{}", cutover.stderr);
    migration.migrate(&[])
}

/// Asked in another database: who is connected to this one behind a fence is ended with it.
async fn is_open_to_writers(migration: &Migration) -> bool {
    let beside = connect(&migration.source_url.replace("/shop", "/postgres")).await;
    beside.query("SELECT FROM pg_db_role_setting", &[]).await.unwrap().is_empty()
}

/// After a start: no fence, the application writes, the migration follows.
async fn follows_again(migration: &Migration, running: &mut Running, application: &Application) {
    until("the source is open to writers", || async { is_open_to_writers(migration).await.then_some(()) }).await;
    ready(migration, running).await;
    application.goes_on(30).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_it_follows_or_cuts_over_it_leaves_no_fence_and_follows_again() {
    let servers = Servers::start().await;
    let (migration, application) = write_all_the_time(&servers, 5_000).await;
    let holder = migration.target().await;
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    application.goes_on(50).await;
    running.kill().await;
    let mut running = migration.migrate(&[]);
    follows_again(&migration, &mut running, &application).await;

    // It waits for the locks.
    let writer = migration.source().await;
    writer.batch_execute("BEGIN; UPDATE app.heavy SET n = n + 1 WHERE id = 1").await.unwrap();
    let cutover = begin_cutover(&migration);
    is_blocked(&migration.source().await, "LOCK TABLE ONLY").await;
    migration.wait_for_phase(&mut running, "cutting_over").await;
    let mut running = kill_and_start_again(&migration, running, cutover).await;
    writer.batch_execute("COMMIT").await.unwrap();
    follows_again(&migration, &mut running, &application).await;

    // It has the locks, and waits for the apply: what it waits for is written while it tries to lock, and held up.
    writer.batch_execute("BEGIN; UPDATE app.heavy SET n = n + 1 WHERE id = 2").await.unwrap();
    let cutover = begin_cutover(&migration);
    is_blocked(&migration.source().await, "LOCK TABLE ONLY").await;
    holder.batch_execute("BEGIN; LOCK TABLE app.heavy IN SHARE MODE").await.unwrap();
    writer.batch_execute("COMMIT").await.unwrap();
    until_true(
        &migration.source().await,
        "SELECT count(*) = 7 FROM pg_locks WHERE mode = 'ShareRowExclusiveLock' AND granted AND locktype = 'relation'",
    )
    .await;
    let mut running = kill_and_start_again(&migration, running, cutover).await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    follows_again(&migration, &mut running, &application).await;

    // The database is closed, all sessions are ended, and it sets the sequences.
    holder.batch_execute("BEGIN; ALTER SEQUENCE app.counter CACHE 1").await.unwrap();
    let mut cutover = begin_cutover(&migration);
    comes_to(&mut cutover, &migration.target().await, "setval").await;
    assert!(!is_open_to_writers(&migration).await);
    assert!(migration.ledger("SELECT fence IS NOT NULL FROM walferry.migration").await[0].get::<_, bool>(0));
    let mut running = kill_and_start_again(&migration, running, cutover).await;
    follows_again(&migration, &mut running, &application).await;
    holder.batch_execute("ROLLBACK").await.unwrap();

    // It decides, and the session that it leaves could still commit the decision.
    holder.batch_execute("BEGIN; LOCK TABLE app.big IN ACCESS SHARE MODE").await.unwrap();
    let mut cutover = begin_cutover(&migration);
    comes_to(&mut cutover, &migration.target().await, "cut_over").await;
    let mut running = kill_and_start_again(&migration, running, cutover).await;
    follows_again(&migration, &mut running, &application).await;
    holder.batch_execute("ROLLBACK").await.unwrap();

    // The same, but it does commit: then that was the cutover.
    holder.batch_execute("BEGIN; LOCK TABLE app.big IN ACCESS SHARE MODE").await.unwrap();
    let mut cutover = begin_cutover(&migration);
    comes_to(&mut cutover, &migration.target().await, "cut_over").await;
    running.kill().await;
    cutover.wait().await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    until_true(&holder, "SELECT phase = 'cut_over' FROM walferry.migration").await;
    let ended = migration.migrate(&[]).wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("has been cut over already"), "{}", ended.stderr);
    assert!(!is_open_to_writers(&migration).await, "the decision stands: no second primary");
    application.stop().await;
    migration.assert_equal().await;
    assert_eq!(migration.status().await.unwrap()["phase"], "cut_over");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_it_within_seconds_in_every_phase() {
    /// What the documentation of SIGTERM promises.
    const WITHIN: Duration = Duration::from_secs(5);
    async fn terminate(running: Running, phase: &str) {
        let sent = Instant::now();
        let ended = running.terminate().await;
        assert!(sent.elapsed() < WITHIN, "{phase}: it took {:?}", sent.elapsed());
        ended.assert_refused(130, &["Run the same command again"]);
    }
    let servers = Servers::start().await;
    let (migration, application) = write_all_the_time(&servers, 20_000).await;
    let (source, target, holder) = (migration.source().await, migration.target().await, migration.target().await);

    source.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let mut running = migration.migrate(&SMALL_PARTS);
    migration.wait_for_phase(&mut running, "preparing").await;
    until_true(&migration.source().await, "SELECT active FROM pg_replication_slots").await;
    terminate(running, "preparing").await;
    source.batch_execute("COMMIT").await.unwrap();

    let running = migration.migrate(&SMALL_PARTS);
    until_true(&target, "SELECT count(*) >= 1 FROM walferry.part WHERE copied").await;
    holder.batch_execute("BEGIN; LOCK TABLE app.big IN SHARE MODE").await.unwrap();
    is_blocked(&target, "COPY \"app\".\"big\"").await;
    terminate(running, "copying").await;

    // The session that waits for the lock is left; the next start ends it.
    let mut running = migration.migrate(&SMALL_PARTS);
    migration.wait_for_phase(&mut running, "copying").await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    ready(&migration, &mut running).await;
    terminate(running, "following").await;

    let mut running = migration.migrate(&SMALL_PARTS);
    ready(&migration, &mut running).await;
    holder.batch_execute("BEGIN; ALTER SEQUENCE app.counter CACHE 1").await.unwrap();
    let mut cutover = begin_cutover(&migration);
    comes_to(&mut cutover, &target, "setval").await;
    terminate(running, "cutting over").await;
    assert_ne!(cutover.wait().await.code, Some(0));
    assert!(is_open_to_writers(&migration).await, "the fence is lifted before it ends");
    holder.batch_execute("ROLLBACK").await.unwrap();

    // It has decided, but for a lock: then that stands, and the fence with it.
    let mut running = migration.migrate(&SMALL_PARTS);
    ready(&migration, &mut running).await;
    holder.batch_execute("BEGIN; LOCK TABLE app.big IN ACCESS SHARE MODE").await.unwrap();
    let mut cutover = begin_cutover(&migration);
    comes_to(&mut cutover, &target, "cut_over").await;
    let ended = tokio::spawn(running.terminate());
    is_blocked(&target, "walferry.migration FOR UPDATE").await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(ended.await.unwrap().code, Some(130));
    cutover.wait().await;
    let decided: bool = migration.ledger("SELECT phase = 'cut_over' FROM walferry.migration").await[0].get(0);
    assert_eq!(is_open_to_writers(&migration).await, !decided, "never two primaries, never none");
    let mut running = migration.migrate(&SMALL_PARTS);
    if decided {
        assert_eq!(running.wait().await.code, Some(0));
    } else {
        ready(&migration, &mut running).await;
        migration.cut_over(running).await;
    }
    application.stop().await;
    migration.assert_equal().await;
}
