//! Slot, snapshot and publication: nothing may fall between the stream and the copy.

use std::time::Duration;

use crate::support::{Gate, Pair, quoted, until, value};

/// A dead standby makes a commit hang after its record is in the WAL: it is committed for the stream, and still running for
/// every snapshot.
const DEAD_STANDBY: [(&str, &str); 2] = [("synchronous_standby_names", "dead"), ("synchronous_commit", "local")];

/// Commits on the source, and hangs there.
async fn hanging_commit(pair: &Pair, insert: &str) -> tokio::task::JoinHandle<()> {
    let client = pair.source.connect("postgres").await.unwrap();
    let statements = format!("SET synchronous_commit = on; {insert}");
    let hanging = tokio::spawn(async move { client.batch_execute(&statements).await.unwrap() });
    until("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')", &pair.source).await;
    hanging
}

const END_THE_WAIT: &str = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";

/// An open transaction that has an xid.
async fn open_transaction(pair: &Pair) -> tokio_postgres::Client {
    let client = pair.source.connect("postgres").await.unwrap();
    client.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    client
}

/// Whether the slot waits for a commit that hangs, as the minor releases of November 2026 have it, or is made, and its table copied.
async fn slot_waits_for_the_hanging_commit(pair: &Pair, copied: &Gate) -> bool {
    let source = pair.source.connect("postgres").await.unwrap();
    let waits = "SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_stat_activity h ON h.wait_event = 'SyncRep' AND h.backend_xid = l.transactionid \
                 JOIN pg_stat_activity s ON s.pid = l.pid AND s.backend_type = 'walsender' WHERE NOT l.granted)";
    loop {
        if value(&source, waits).await == "t" {
            return true;
        }
        if copied.is_reached(pair).await {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn h01_a_new_snapshot_waits_for_commits_that_the_slot_takes_for_done_and_the_server_does_not() {
    let pair = Pair::start_with(&DEAD_STANDBY).await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;

    // The slot becomes consistent when `second` ends: a commit before that is not in the stream.
    let (walferry, first) = pair.run_waiting(pair.migrate()).await;
    let copied = Gate::close(&pair, 1, "UPDATE", "part", "NEW.copied").await;
    let second = open_transaction(&pair).await;
    first.batch_execute("COMMIT").await.unwrap();
    pair.waits_for(&second).await;
    let hanging = hanging_commit(&pair, "INSERT INTO t VALUES (2)").await;
    second.batch_execute("COMMIT").await.unwrap();
    if slot_waits_for_the_hanging_commit(&pair, &copied).await {
        println!("this server's slot waits for such a commit itself: nothing can be taken for done that is not");
        pair.on_source(END_THE_WAIT).await;
        hanging.await.unwrap();
        copied.open().await;
        pair.following().await;
        assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1", "2"]);
        return;
    }

    // The slot's snapshot dies before the table is copied.
    walferry.kill();
    copied.open().await;
    let _walferry = pair.run(pair.migrate());
    let taken = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'walferry/%' \
                 AND (query LIKE '%pg_export_snapshot%' OR query LIKE '%pg_current_wal_insert_lsn%' OR query = 'ROLLBACK'))";
    until(taken, &pair.source).await;
    // Time enough for a snapshot that does not wait to be used.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    pair.on_source(END_THE_WAIT).await;
    hanging.await.unwrap();

    pair.following().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1", "2"]);
}

#[tokio::test]
async fn h01_a_table_that_is_compared_again_waits_for_commits_that_were_applied_and_are_not_visible() {
    let pair = Pair::start_with(&DEAD_STANDBY).await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let walferry = pair.run(pair.migrate());
    pair.following().await;
    // In the WAL, and so on the target; but not yet in any snapshot of the source.
    let hanging = hanging_commit(&pair, "INSERT INTO t VALUES (2)").await;
    until("SELECT EXISTS (SELECT FROM t WHERE id = 2)", &pair.target).await;
    walferry.kill();

    let mut again = pair.migrate();
    again.args(["--recopy", "public.t"]);
    let _walferry = pair.run(again);
    until("SELECT NOT copied FROM walferry.source_table", &pair.target).await;
    // Time enough for a snapshot that does not wait to be used: the row would go, and never come again.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    pair.on_source(END_THE_WAIT).await;
    hanging.await.unwrap();
    until("SELECT copied FROM walferry.source_table", &pair.target).await;
    pair.following().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1", "2"]);
}

#[tokio::test]
async fn h01_a_slot_whose_snapshot_is_not_in_the_ledger_is_made_again() {
    let pair = Pair::start().await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let (begun, hold) = (pair.files.path().join("begun"), pair.files.path().join("hold"));
    let tools = pair.tools(&format!("touch {}; while [ -e {} ]; do sleep 0.05; done", quoted(&begun), quoted(&hold)));
    std::fs::write(&hold, "").unwrap();
    let mut migrate = pair.migrate();
    migrate.env("WALFERRY_PG_BIN", &tools);
    let walferry = pair.run(migrate);
    while !begun.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let slot = "SELECT slot_name || ' ' || confirmed_flush_lsn FROM pg_replication_slots";
    let source = pair.source.connect("postgres").await.unwrap();
    let of_the_dead = value(&source, slot).await;
    walferry.kill();
    std::fs::remove_file(&hold).unwrap();
    pair.on_source("INSERT INTO t VALUES (2)").await;

    let _walferry = pair.run(pair.migrate());
    pair.following().await;
    let now = value(&source, slot).await;
    assert_ne!(now, of_the_dead);
    assert_eq!(now.split(' ').next(), of_the_dead.split(' ').next(), "it has the same name");
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1", "2"]);
}

#[tokio::test]
async fn h02_the_tables_are_published_before_the_slot_waits_for_what_is_in_flight() {
    let pair = Pair::start().await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE keyless (id int)").await;
    let in_flight = open_transaction(&pair).await;
    in_flight.batch_execute("INSERT INTO t VALUES (1); INSERT INTO keyless VALUES (1)").await.unwrap();
    let _walferry = pair.run(pair.migrate());
    pair.waits_for(&in_flight).await;

    let source = pair.source.connect("postgres").await.unwrap();
    let published = "SELECT string_agg(tablename, ' ' ORDER BY tablename) FROM pg_publication_tables";
    assert_eq!(value(&source, published).await, "keyless t");
    // Younger than the slot's start, older than its consistent point.
    let younger = open_transaction(&pair).await;
    younger.batch_execute("INSERT INTO t VALUES (2); INSERT INTO keyless VALUES (2)").await.unwrap();
    in_flight.batch_execute("INSERT INTO t VALUES (3); COMMIT").await.unwrap();
    pair.waits_for(&younger).await;
    pair.on_source("INSERT INTO t VALUES (4); INSERT INTO keyless VALUES (4)").await;
    younger.batch_execute("INSERT INTO t VALUES (5); COMMIT").await.unwrap();
    pair.on_source("INSERT INTO t VALUES (6); UPDATE t SET id = -id WHERE id < 3").await;

    pair.following().await;
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["-2", "-1", "3", "4", "5", "6"]);
    assert_eq!(pair.same("SELECT id FROM keyless ORDER BY 1").await, ["1", "2", "4"]);
}

#[tokio::test]
async fn h03_ranges_of_one_table_never_come_from_two_snapshots() {
    let pair = Pair::start().await;
    // Two rows fill a page. The first pages have room again.
    pair.on_source(
        "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t ALTER v SET STORAGE PLAIN; \
         INSERT INTO t SELECT n, repeat('x', 3900) FROM generate_series(1, 200) n",
    )
    .await;
    pair.on_source("DELETE FROM t WHERE id IN (1, 2, 3, 4)").await;
    pair.on_source("VACUUM t").await;
    let mut migrate = pair.migrate();
    // Parts of 16 pages.
    migrate.args(["--split-above", "512KiB", "--copy-jobs", "1"]);
    let (walferry, transaction) = pair.run_waiting(migrate).await;
    let copied = Gate::close(&pair, 1, "UPDATE", "part", "NEW.copied AND NEW.part = 2").await;
    transaction.batch_execute("COMMIT").await.unwrap();
    copied.reached(&pair).await;
    let target = pair.target.connect("postgres").await.unwrap();
    assert_eq!(value(&target, "SELECT count(*) FROM walferry.part WHERE copied").await, "2");
    walferry.kill();
    copied.open().await;

    // A row moves from a range that is not copied into one that is: a copy that goes on under another snapshot misses it.
    let source = pair.source.connect("postgres").await.unwrap();
    let page = "SELECT (ctid::text::point)[0]::int FROM t WHERE id = 150";
    assert_eq!(value(&source, page).await, "74");
    source.batch_execute("UPDATE t SET v = repeat('y', 3900) WHERE id = 150").await.unwrap();
    assert!(value(&source, page).await.parse::<i32>().unwrap() < 16, "the row did not move");

    let mut migrate = pair.migrate();
    migrate.args(["--split-above", "512KiB", "--copy-jobs", "1"]);
    let _walferry = pair.run(migrate);
    pair.following().await;
    pair.caught_up().await;
    let rows = pair.same("SELECT id, md5(v) FROM t ORDER BY 1").await;
    assert_eq!(rows.len(), 196);
    let snapshots =
        "SELECT count(*) FROM walferry.source_table t JOIN walferry.snapshot s ON s.id = t.snapshot WHERE s.id > 0";
    assert_eq!(value(&target, snapshots).await, "1", "the table was to be copied anew under a new snapshot");
}

#[tokio::test]
async fn h04_what_was_emptied_or_rewritten_after_the_snapshot_is_copied_under_another() {
    let pair = Pair::start().await;
    pair.on_source(
        "CREATE TABLE emptied (id int PRIMARY KEY); INSERT INTO emptied SELECT generate_series(1, 100); \
         CREATE TABLE rewritten (id int PRIMARY KEY, v int); INSERT INTO rewritten SELECT n, n FROM generate_series(1, 100) n; \
         CREATE TABLE late (id int PRIMARY KEY, v int); INSERT INTO late SELECT n, n FROM generate_series(1, 100) n",
    )
    .await;
    let (_walferry, transaction) = pair.run_waiting(pair.migrate()).await;
    let restored = Gate::close(&pair, 1, "INSERT", "part", "true").await;
    transaction.batch_execute("COMMIT").await.unwrap();
    restored.reached(&pair).await;

    // The slot's snapshot is alive, and shows no row of either table any more.
    pair.on_source("TRUNCATE emptied; INSERT INTO emptied VALUES (7)").await;
    pair.on_source("ALTER TABLE rewritten ALTER v TYPE int USING v + 1").await;
    restored.open().await;
    pair.following().await;
    pair.on_source("INSERT INTO emptied VALUES (8); UPDATE rewritten SET v = v * 2 WHERE id = 1").await;
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT id FROM emptied ORDER BY 1").await, ["7", "8"]);
    assert_eq!(pair.same("SELECT id, v FROM rewritten ORDER BY 1").await.len(), 100);

    // Rewritten after its copy, with the type it had: the stream shows nothing of it, so the cutover must.
    pair.on_source("ALTER TABLE late ALTER v TYPE int USING v + 1").await;
    let (code, said) = pair.cutover().await;
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("column v of table public.late has changed"), "{said}");
}

#[tokio::test]
async fn h07_a_slot_whose_snapshot_is_too_large_is_made_without_one_and_still_misses_nothing() {
    let pair = Pair::start_with(&[
        DEAD_STANDBY[0],
        DEAD_STANDBY[1],
        ("max_connections", "20"),
        ("max_wal_senders", "4"),
        ("max_worker_processes", "1"),
    ])
    .await;
    pair.on_source(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE commits (at timestamptz); \
         CREATE PROCEDURE abort_often() LANGUAGE plpgsql AS $$ BEGIN \
           FOR n IN 1..200 LOOP \
             BEGIN INSERT INTO t VALUES (0); RAISE EXCEPTION 'no'; EXCEPTION WHEN raise_exception THEN END; \
           END LOOP; \
         END $$",
    )
    .await;
    let spec = pair.source_spec();
    let mut open = open_transaction(&pair).await;
    let making = tokio::spawn(async move { walferry::source::slot::create(&spec, None, "walferry/test", "s").await });
    // While the slot waits for the second transaction of its attempt, a third begins and hundreds of subtransactions abort:
    // all of them would have to be in the snapshot.
    let mut hanging = None;
    for attempt in 0..4 {
        pair.waits_for(&open).await;
        let second = open_transaction(&pair).await;
        open.batch_execute("COMMIT").await.unwrap();
        pair.waits_for(&second).await;
        if attempt < 3 {
            open = open_transaction(&pair).await;
            pair.on_source("CALL abort_often()").await;
            pair.on_source("INSERT INTO commits VALUES (now())").await;
        } else {
            // The last attempt makes no snapshot with the slot: what the slot takes for committed still hangs.
            hanging = Some(hanging_commit(&pair, "INSERT INTO t VALUES (1)").await);
        }
        second.batch_execute("COMMIT").await.unwrap();
    }
    until("SELECT EXISTS (SELECT FROM pg_replication_slots WHERE confirmed_flush_lsn IS NOT NULL)", &pair.source).await;
    // Time enough for a snapshot that does not wait.
    tokio::time::sleep(Duration::from_millis(1000)).await;
    pair.on_source(END_THE_WAIT).await;
    hanging.unwrap().await.unwrap();

    let new = making.await.unwrap().unwrap();
    let log = std::fs::read_to_string(pair.source.log()).unwrap();
    assert_eq!(log.matches("initial slot snapshot too large").count(), 3, "this test made what it is about");
    let source = pair.source.connect("postgres").await.unwrap();
    walferry::source::snapshot::import(&source, &new.snapshot.name).await.unwrap();
    assert_eq!(
        value(&source, "SELECT count(*) FROM t").await,
        "1",
        "the hanging commit is in neither stream nor snapshot"
    );
}

#[tokio::test]
async fn h08_ddl_after_the_snapshot_is_not_in_the_schema_and_stops_the_cutover() {
    let pair = Pair::start().await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    // Right before pg_dump looks: the slot and its snapshot are there.
    let psql = walferry::demo::server::ServerPrograms::find(None).unwrap().bin("psql");
    let ddl = "ALTER TABLE public.t ADD late int DEFAULT 5; CREATE TABLE public.later (id int PRIMARY KEY)";
    let tools = pair.tools(&format!("{} -q -d '{}' -c '{ddl}' >&2", psql.display(), pair.source.url()));
    let mut migrate = pair.migrate();
    migrate.env("WALFERRY_PG_BIN", &tools);
    let (_walferry, transaction) = pair.run_waiting(migrate).await;
    // And a table that comes before the snapshot, but after the publication: it is migrated as any other.
    pair.on_source("CREATE TABLE early (id int PRIMARY KEY); INSERT INTO early VALUES (1)").await;
    transaction.batch_execute("COMMIT").await.unwrap();

    pair.following().await;
    pair.on_source("INSERT INTO early VALUES (2)").await;
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT id FROM early ORDER BY 1").await, ["1", "2"]);
    let target = pair.target.connect("postgres").await.unwrap();
    assert_eq!(value(&target, "SELECT to_regclass('public.later')").await, "NULL");
    assert_eq!(value(&target, "SELECT count(*) FROM pg_attribute WHERE attname = 'late'").await, "0");
    let (code, said) = pair.cutover().await;
    assert_eq!(code, 5, "{said}");
    for named in ["column late of table public.t is new", "table public.later is new"] {
        assert!(said.contains(named), "{said}");
    }
}
