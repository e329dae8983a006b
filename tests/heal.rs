//! A slot, a queue, a state directory or rows of the target are lost: what stops at once, and how it goes on without starting over.

use std::path::Path;

use tokio_postgres::Client;

use crate::support::load::{self, Application};
use crate::support::process::Running;
use crate::support::{Migration, Servers, is_blocked, until, until_true};

const ROWS: u32 = 20_000;

/// A migration that follows an application, and was then killed while the application went on.
async fn interrupted(servers: &Servers) -> (Migration, Application) {
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, ROWS).await;
    let application = Application::start(&migration.source_url, 2);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    application.goes_on(20).await;
    running.kill().await;
    application.goes_on(50).await;
    (migration, application)
}

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
}

fn resync(migration: &Migration) -> Running {
    resync_in(migration, &migration.directory())
}

fn resync_in(migration: &Migration, directory: &Path) -> Running {
    Running::start(
        &[
            "resync",
            "--source",
            &migration.source_url,
            "--target",
            &migration.target_url,
            "--http-addr",
            "off",
            "--dir",
            directory.to_str().unwrap(),
        ],
        &migration.files(),
        &migration.environment,
    )
}

/// Goes on to the cutover, and compares.
async fn finish(migration: &Migration, mut running: Running, application: Application) {
    ready(migration, &mut running).await;
    application.goes_on(30).await;
    migration.cut_over(running).await;
    application.stop().await;
    migration.assert_equal().await;
}

async fn number(client: &Client, query: &str) -> i64 {
    client.query_one(query, &[]).await.unwrap().get(0)
}

/// Nobody reads from the slot any more.
async fn slot_is_free(migration: &Migration) {
    until_true(&migration.source().await, "SELECT NOT bool_or(active) FROM pg_replication_slots").await;
}

async fn copied_again(migration: &Migration) -> i64 {
    number(&migration.target().await, "SELECT sum(rows_copied)::int8 FROM walferry.source_table").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_lost_slot_a_resync_copies_only_what_differs() {
    let servers = Servers::start().await;
    let (migration, application) = interrupted(&servers).await;
    slot_is_free(&migration).await;
    let source = migration.source().await;
    source.batch_execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots").await.unwrap();
    // Two that change many rows each would lock each other out.
    application.stop().await;
    // What the stream will never tell: each kind of change, to tables with a key and without, in ranges and whole.
    source
        .batch_execute(
            "DELETE FROM app.big WHERE id % 997 = 5;
             UPDATE app.big SET amount = -amount, tags = NULL WHERE id % 1009 = 7;
             UPDATE app.event SET at = at + 400 WHERE id % 300 = 1;
             UPDATE app.heavy SET n = n + 1 WHERE id % 9 = 0;
             UPDATE app.\"Weird \"\"Name\" SET \"the key\" = -\"the key\" WHERE \"the key\" % 50 = 3;
             INSERT INTO app.keyless SELECT 1, 'line 1' FROM generate_series(1, 3)",
        )
        .await
        .unwrap();
    let applied = "SELECT min(applied)::text FROM walferry.apply_progress";
    let before: String = migration.target().await.query_one(applied, &[]).await.unwrap().get(0);
    let refused = migration.migrate(&[]).wait().await;
    refused.assert_refused(1, &["is gone from the source", "walferry resync"]);
    let after: String = migration.target().await.query_one(applied, &[]).await.unwrap().get(0);
    assert_eq!(before, after, "something was applied past the gap");

    // Nor what becomes of a table meanwhile.
    source.batch_execute("ALTER TABLE app.heavy ADD COLUMN extra integer NOT NULL DEFAULT 7").await.unwrap();
    let refused = resync(&migration).wait().await;
    refused.assert_refused(1, &["column \"extra\" integer was added", "ADD COLUMN \"extra\" integer"]);
    let mended = "ALTER TABLE app.heavy ADD COLUMN extra integer NOT NULL DEFAULT 7";
    migration.target().await.batch_execute(mended).await.unwrap();

    let mut running = resync(&migration);
    ready(&migration, &mut running).await;
    let again = copied_again(&migration).await;
    assert!(again > 20, "all that differed was to be copied, not {again} rows");
    assert!(again < i64::from(ROWS) / 3, "{again} rows were copied again, of {ROWS} and more");
    let application = Application::start(&migration.source_url, 2);
    finish(&migration, running, application).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_state_directory_is_made_again_by_a_resync_but_not_while_its_process_lives() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 2000).await;
    let application = Application::start(&migration.source_url, 2);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let elsewhere = migration.files().join("elsewhere");
    resync_in(&migration, &elsewhere).wait().await.assert_refused(3, &["another walferry is at work"]);
    assert!(running.is_alive(), "the process that works was disturbed:\n{}", running.log());
    running.kill().await;
    std::fs::remove_dir_all(migration.directory()).unwrap();

    application.goes_on(30).await;
    migration.migrate(&[]).wait().await.assert_refused(3, &["whose state directory is not", "walferry resync"]);
    finish(&migration, resync(&migration), application).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_somebody_changed_on_the_target_are_healed_by_recopy() {
    let servers = Servers::start().await;
    let (migration, application) = interrupted(&servers).await;
    let target = migration.target().await;
    target
        .batch_execute(
            "SET session_replication_role = replica;
             DELETE FROM app.big WHERE id % 500 = 3;
             UPDATE app.big SET body = 'changed' WHERE id % 500 = 4;
             DELETE FROM app.keyless WHERE n % 100 = 0;
             INSERT INTO app.keyless VALUES (-1, NULL), (-1, NULL)",
        )
        .await
        .unwrap();
    migration.migrate(&["--recopy", "app.nothing"]).wait().await.assert_refused(2, &["there is no table app.nothing"]);

    let mut running = migration.migrate(&["--recopy", "app.big", "app.keyless"]);
    ready(&migration, &mut running).await;
    let untouched = number(
        &target,
        "SELECT count(*) FROM walferry.source_table WHERE snapshot = 0 AND definition->>'name' NOT IN ('big', 'keyless')",
    )
    .await;
    assert!(untouched >= 4, "only {untouched} of the other tables still have their first copy");
    assert!(copied_again(&migration).await < i64::from(ROWS), "all rows were copied again");
    finish(&migration, running, application).await;
}

/// A migration whose apply was held while the queue acknowledged more, and that was then killed.
async fn with_a_full_queue(servers: &Servers) -> (Migration, Application) {
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 2000).await;
    migration.source().await.batch_execute("CREATE TABLE app.quiet (id int PRIMARY KEY)").await.unwrap();
    let application = Application::start(&migration.source_url, 2);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    assert_eq!(migration.with_directory("pause", &["apply"]).await.code, Some(0));
    application.goes_on(100).await;
    let (source, target) = (migration.source().await, migration.target().await);
    let position: String = source.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let acknowledged = "SELECT confirmed_flush_lsn > $1::text::pg_lsn FROM pg_replication_slots";
    until("the queue has acknowledged them", || async {
        source.query_one(acknowledged, &[&position]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    let applied = "SELECT max(applied) < $1::text::pg_lsn FROM walferry.apply_progress";
    assert!(target.query_one(applied, &[&position]).await.unwrap().get::<_, bool>(0), "the apply was to be held");
    running.kill().await;
    application.goes_on(30).await;
    (migration, application)
}

/// Damages the queue's one segment.
fn damage(migration: &Migration, how: impl Fn(&mut Vec<u8>)) {
    let queue = std::fs::read_dir(migration.directory().join("queue")).unwrap();
    let segment = queue.map(|entry| entry.unwrap().path()).max().unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    how(&mut bytes);
    std::fs::write(&segment, bytes).unwrap();
}

async fn goes_on_and_finishes(migration: &Migration, mut running: Running, application: Application) {
    migration.wait_for_phase(&mut running, "following").await;
    assert_eq!(migration.with_directory("resume", &[]).await.code, Some(0));
    finish(migration, running, application).await;
}

/// The blocks of a segment: where each begins, and its bytes with header (format.rs of the queue).
fn blocks(segment: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize| u32::from_le_bytes(segment[at..at + 4].try_into().unwrap()) as usize;
    let mut blocks = Vec::new();
    let mut at = 64;
    while at + 64 <= segment.len() {
        let labels = usize::from(u16::from_le_bytes([segment[at + 6], segment[at + 7]]));
        let bytes = 64 + if labels > 0 { labels * 4 + 4 } else { 0 } + number(at + 8);
        blocks.push((at, bytes));
        at += bytes;
    }
    blocks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupt_queue_stops_with_its_place_and_the_tables_that_heal_it() {
    let servers = Servers::start().await;
    let (migration, application) = with_a_full_queue(&servers).await;
    // The last byte of a block in the last tenth: acknowledged, not applied, and not the tail.
    damage(&migration, |bytes| {
        let blocks = blocks(bytes);
        let (at, length) = blocks[blocks.len() * 9 / 10];
        bytes[at + length - 1] ^= 0x40;
    });
    let refused = migration.migrate(&[]).wait().await;
    refused.assert_refused(1, &["is corrupt at offset", "the transactions from", "`--recopy '"]);
    let names = refused.stderr.split("`--recopy '").nth(1).unwrap().split("'`").next().unwrap();
    let names: Vec<&str> = names.split("' '").collect();
    assert!(names.contains(&"app.big") && !names.contains(&"app.quiet"), "what was written to, and no more: {names:?}");

    let too_few = migration.migrate(&["--recopy", "app.big"]).wait().await;
    too_few.assert_refused(3, &["changed other tables too", "'app.big'"]);
    let running = migration.migrate(&[&["--recopy"][..], &names].concat());
    goes_on_and_finishes(&migration, running, application).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_of_which_nobody_can_say_what_is_lost_is_healed_by_a_resync() {
    let servers = Servers::start().await;
    let (migration, application) = with_a_full_queue(&servers).await;
    damage(&migration, |bytes| {
        // Cut at a block, so that nothing looks torn: what is missing shows only in what the source was told.
        let blocks = blocks(bytes);
        bytes.truncate(blocks[blocks.len() * 9 / 10].0);
    });
    migration.migrate(&[]).wait().await.assert_refused(1, &["has been moved on to", "walferry resync"]);
    migration
        .migrate(&["--recopy", "app.big"])
        .wait()
        .await
        .assert_refused(1, &["can no longer be told", "walferry resync"]);
    goes_on_and_finishes(&migration, resync(&migration), application).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resync_that_is_killed_anywhere_is_gone_on_with() {
    let servers = Servers::start().await;
    let (migration, application) = interrupted(&servers).await;
    slot_is_free(&migration).await;
    let source = migration.source().await;
    source.batch_execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots").await.unwrap();
    // The application can be in its way, and it in the application's.
    let change = "UPDATE app.big SET amount = amount + 1 WHERE id % 100 = 7";
    until("many rows are changed", || async { source.batch_execute(change).await.ok() }).await;
    let (holder, observer) = (migration.target().await, migration.target().await);

    // The slot is made, and the ledger does not know it.
    holder.batch_execute("BEGIN; LOCK TABLE walferry.apply_progress").await.unwrap();
    let running = resync(&migration);
    is_blocked(&observer, "LOCK TABLE walferry.source_table").await;
    running.kill().await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    slot_is_free(&migration).await;
    migration.migrate(&[]).wait().await.assert_refused(1, &["has been moved on to", "walferry resync"]);

    // A table is being exchanged: half of the new rows are there, and not committed.
    holder.batch_execute("BEGIN; LOCK TABLE walferry.part IN SHARE MODE; SELECT").await.unwrap();
    let running = resync(&migration);
    is_blocked(&observer, "LOCK TABLE walferry.source_table").await;
    holder.batch_execute("ROLLBACK; BEGIN; SELECT FROM app.heavy; LOCK TABLE app.big IN SHARE MODE").await.unwrap();
    is_blocked(&observer, "DELETE FROM").await;
    running.kill().await;
    holder.batch_execute("ROLLBACK").await.unwrap();

    // Recorded: it is a migration like any other, and `migrate` goes on with it.
    finish(&migration, migration.migrate(&[]), application).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resync_without_a_migration_or_of_another_one_is_refused() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    migration.source().await.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    resync(&migration).wait().await.assert_refused(3, &["no migration to resync"]);
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    running.terminate().await;
    let other = servers.migration("other").await;
    let target_url = std::mem::replace(&mut migration.target_url, "postgres://postgres@127.0.0.1:1/shop".into());
    let elsewhere = migration.files().join("elsewhere");
    resync_in(&migration, &elsewhere).wait().await.assert_refused(1, &["looking for the ledger on the target"]);
    migration.target_url = target_url;
    migration.source_url.clone_from(&other.source_url);
    resync(&migration).wait().await.assert_refused(3, &["moves the database shop, not other"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_binary_stream_becomes_one_in_text_when_a_column_comes_that_has_no_binary_form() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute("CREATE TABLE t (id int PRIMARY KEY, a text)").await.unwrap();
    source.batch_execute("INSERT INTO t SELECT g, 'a' || g FROM generate_series(1, 500) g").await.unwrap();
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    let is_binary = "SELECT binary_format::int::int8 FROM walferry.migration";
    assert_eq!(number(&target, is_binary).await, 1);
    source.batch_execute("ALTER TABLE t ADD COLUMN price money").await.unwrap();
    source.batch_execute("UPDATE t SET price = 7.5 WHERE id < 9").await.unwrap();
    let said = ["money has no binary form", "`walferry resync`"];
    running.wait().await.assert_refused(1, &said);
    target.batch_execute("ALTER TABLE t ADD COLUMN price money").await.unwrap();
    migration.migrate(&["--recopy", "public.t"]).wait().await.assert_refused(1, &said);

    let mut running = resync(&migration);
    ready(&migration, &mut running).await;
    assert_eq!(number(&target, is_binary).await, 0);
    source.batch_execute("UPDATE t SET price = 8.5, a = NULL WHERE id < 5; DELETE FROM t WHERE id = 6").await.unwrap();
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resync_sets_tables_aside_that_the_source_dropped_and_the_cutover_still_names_them() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let (source, target) = (migration.source().await, migration.target().await);
    let schema =
        "CREATE TABLE day (d int, n int) PARTITION BY LIST (d); CREATE TABLE day_1 PARTITION OF day FOR VALUES IN (1);
        CREATE TABLE day_2 PARTITION OF day FOR VALUES IN (2); CREATE TABLE t (id int PRIMARY KEY);
        INSERT INTO day SELECT 1 + g % 2, g FROM generate_series(1, 500) g; INSERT INTO t VALUES (1)";
    source.batch_execute(schema).await.unwrap();
    let mut running = migration.migrate(&[]);
    ready(&migration, &mut running).await;
    running.kill().await;
    slot_is_free(&migration).await;
    source.batch_execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots").await.unwrap();
    // Another table of the name would meet the rows of the old one.
    source.batch_execute("DROP TABLE day_1; CREATE TABLE day_1 (d int, n int)").await.unwrap();
    resync(&migration)
        .wait()
        .await
        .assert_refused(1, &["day_1\" is gone from the source", "Another table has its name"]);
    source.batch_execute("DROP TABLE day_1; INSERT INTO day VALUES (2, -1)").await.unwrap();
    migration.migrate(&["--recopy", "public.day_1"]).wait().await.assert_refused(1, &["walferry resync"]);

    let mut running = resync(&migration);
    migration.ready_but_for_the_source(&mut running).await;
    assert_eq!(number(&target, "SELECT count(*) FROM walferry.source_table").await, 2);
    assert_eq!(number(&target, "SELECT count(*) FROM day_1").await, 250, "what the target has of it stays");
    source.batch_execute("INSERT INTO day VALUES (2, -2); INSERT INTO t VALUES (2)").await.unwrap();
    target.batch_execute("DROP TABLE day_1").await.unwrap();
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    refused.assert_refused(5, &["table public.day_1 is gone"]);
    let gone = ["table public.day_1", "column d of table public.day_1", "column n of table public.day_1"];
    let waived: Vec<&str> = gone.iter().flat_map(|object| ["--waive", object]).collect();
    let done = migration.with_directory("cutover", &[&["--yes", "--no-reverse"][..], &waived].concat()).await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_mends_a_foreign_key_that_was_refused_arrives_when_it_goes_on() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let source = migration.source().await;
    source
        .batch_execute(
            "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent); \
             SET session_replication_role = replica; INSERT INTO child VALUES (1, 5); RESET session_replication_role",
        )
        .await
        .unwrap();
    let refused = migration.migrate(&[]).wait().await;
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("child_parent_fkey"), "{}", refused.stderr);
    source.batch_execute("INSERT INTO parent VALUES (5)").await.unwrap();
    let running = migration.migrate(&[]);
    migration.cut_over(running).await;
    migration.assert_equal().await;
}
