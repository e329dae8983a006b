//! What a migration that goes on must find as it left it: the slot, the server, the state directory, the ledger.

use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio_postgres::Client;
use walferry::demo::server::{ServerPrograms, ThrowawayServer};
use walferry::source::catalog;

use crate::support::{Gate, Pair, Walferry, until, value};

/// A migration of one row that followed and then was killed, with a second row on the source that it has not seen.
async fn interrupted() -> Pair {
    let pair = Pair::start().await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let walferry = pair.run(pair.migrate());
    pair.following().await;
    walferry.kill();
    until("SELECT NOT bool_or(active) FROM pg_replication_slots", &pair.source).await;
    pair.on_source("INSERT INTO t VALUES (2)").await;
    pair
}

async fn target(pair: &Pair) -> Client {
    pair.target.connect("postgres").await.unwrap()
}

/// It refuses with this code and these words, and has applied nothing.
async fn refuses(pair: &Pair, walferry: Walferry, code: i32, words: &str) {
    let (exited, said) = walferry.exit().await;
    assert_eq!(exited, code, "{said}");
    assert!(said.contains(words), "{said}");
    assert!(said.contains(" next: "), "it has to say what to do next: {said}");
    assert_eq!(value(&target(pair).await, "SELECT string_agg(id::text, ' ') FROM t").await, "1", "{said}");
}

#[tokio::test]
async fn h15_a_slot_that_was_moved_on_by_somebody_else_stops_the_migration() {
    let pair = interrupted().await;
    pair.on_source("SELECT pg_replication_slot_advance(slot_name, pg_current_wal_lsn()) FROM pg_replication_slots")
        .await;
    pair.on_source("INSERT INTO t VALUES (3)").await;
    refuses(&pair, pair.run(pair.migrate()), 1, "has been moved on to").await;
}

#[tokio::test]
async fn h15_a_lost_queue_stops_the_migration_when_the_slot_has_moved() {
    let pair = interrupted().await;
    pair.on_source("SELECT pg_replication_slot_advance(slot_name, pg_current_wal_lsn()) FROM pg_replication_slots")
        .await;
    std::fs::remove_dir_all(pair.directory().join("queue")).unwrap();
    refuses(&pair, pair.run(pair.migrate()), 1, "has been moved on to").await;
}

#[tokio::test]
async fn h15_a_lost_or_foreign_state_directory_is_refused() {
    let pair = interrupted().await;
    let kept = pair.files.path().join("kept");
    std::fs::rename(pair.directory(), &kept).unwrap();
    refuses(&pair, pair.run(pair.migrate()), 3, "whose state directory is not").await;

    // Another migration's: between the same databases, with another id.
    let identity = std::fs::read_to_string(kept.join("migration.json")).unwrap();
    let id = value(&target(&pair).await, "SELECT id FROM walferry.migration").await;
    std::fs::write(pair.directory().join("migration.json"), identity.replace(&id, "0badcafe")).unwrap();
    refuses(&pair, pair.run(pair.migrate()), 3, "whose state directory is not").await;

    // And with its own it goes on.
    std::fs::remove_dir_all(pair.directory()).unwrap();
    std::fs::rename(&kept, pair.directory()).unwrap();
    let _walferry = pair.run(pair.migrate());
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1", "2"]);
}

#[tokio::test]
async fn h15_a_slot_that_is_gone_stops_the_migration() {
    let pair = interrupted().await;
    pair.on_source("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots").await;
    refuses(&pair, pair.run(pair.migrate()), 1, "is gone from the source").await;
}

#[tokio::test]
async fn h15_a_ledger_that_is_behind_the_queue_stops_the_migration() {
    let pair = interrupted().await;
    // A target that was restored from an old backup, where the queue no longer keeps what it had applied.
    pair.on_target("UPDATE walferry.apply_progress SET applied = '0/1'").await;
    refuses(&pair, pair.run(pair.migrate()), 1, "what lies between is no longer there").await;
}

/// Whoever connects gets to whichever server it leads to at the time.
async fn proxy(leads_to: Arc<Mutex<u16>>) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let port = *leads_to.lock().unwrap();
            tokio::spawn(async move {
                if let Ok(mut to) = TcpStream::connect(("127.0.0.1", port)).await {
                    drop(tokio::io::copy_bidirectional(&mut from, &mut to).await);
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn h15_another_server_behind_the_same_name_is_neither_followed_nor_copied_from() {
    let pair = Pair::start().await;
    let tables = "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)";
    pair.on_source(tables).await;
    let settings = [("wal_level", "logical"), ("fsync", "off")];
    let other = ThrowawayServer::start(&ServerPrograms::find(None).unwrap(), "other", &settings).await.unwrap();
    let client = other.connect("postgres").await.unwrap();
    // Far ahead of the right one, so that no transaction there looks unfinished.
    client.batch_execute(&format!("{tables}; UPDATE t SET id = 666")).await.unwrap();
    client
        .batch_execute("DO $$ BEGIN FOR n IN 1..200 LOOP PERFORM txid_current(); COMMIT; END LOOP; END $$")
        .await
        .unwrap();

    let leads_to = Arc::new(Mutex::new(pair.source.port()));
    let port = proxy(Arc::clone(&leads_to)).await;
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    let (walferry, transaction) = pair.run_waiting(pair.migrate_from(&url)).await;
    let planned = Gate::close(&pair, 1, "INSERT", "part", "true").await;
    transaction.batch_execute("COMMIT").await.unwrap();
    planned.reached(&pair).await;
    walferry.kill();
    planned.open().await;

    // Its table has to be copied yet.
    *leads_to.lock().unwrap() = other.port();
    let (code, said) = pair.run(pair.migrate_from(&url)).exit().await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("this is another server: its system identifier is"), "{said}");
    assert_eq!(value(&target(&pair).await, "SELECT count(*) FROM t").await, "0");

    *leads_to.lock().unwrap() = pair.source.port();
    let _walferry = pair.run(pair.migrate_from(&url));
    pair.following().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1"]);
}

#[tokio::test]
async fn h18_sessions_that_a_dead_walferry_left_are_ended_before_another_goes_on() {
    let pair = Pair::start().await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let (walferry, transaction) = pair.run_waiting(pair.migrate()).await;
    let copied = Gate::close(&pair, 1, "UPDATE", "part", "NEW.copied").await;
    transaction.batch_execute("COMMIT").await.unwrap();
    copied.reached(&pair).await;
    let target = target(&pair).await;
    let waiting =
        "SELECT coalesce(string_agg(pid::text, ' '), 'none') FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    let left = value(&target, waiting).await;
    walferry.kill();
    assert_eq!(value(&target, waiting).await, left, "the server does not notice by itself");

    // It never passes the gate: whoever goes on has to end it, or wait for its locks for ever.
    copied.let_others_pass().await;
    let _walferry = pair.run(pair.migrate());
    pair.following().await;
    assert_eq!(value(&target, waiting).await, "none");
    assert_eq!(pair.same("SELECT id FROM t").await, ["1"]);
}

#[tokio::test]
async fn h18_a_migration_that_an_older_walferry_began_goes_on() {
    let pair = interrupted().await;
    let floor = "SELECT snapshot_floor FROM walferry.migration";
    let floor_before = value(&target(&pair).await, floor).await;
    pair.on_target(
        "UPDATE walferry.migration SET format = 1; \
         ALTER TABLE walferry.migration DROP snapshot_floor, DROP queue, DROP way_back, DROP apply_role, DROP scope; \
         ALTER TABLE walferry.source_table DROP compared",
    )
    .await;
    // It recorded less of each object. One has changed since.
    let source = pair.source.connect("postgres").await.unwrap();
    source.batch_execute("SET search_path = pg_catalog").await.unwrap();
    let mut recorded = catalog::fingerprint_of_format_3(&source).await.unwrap();
    recorded.insert("table public.t".into(), "as it was".into());
    let (objects, hashes): (Vec<&str>, Vec<&str>) = recorded.iter().map(|(a, b)| (a.as_str(), b.as_str())).unzip();
    let on_target = target(&pair).await;
    on_target.batch_execute("TRUNCATE walferry.fingerprint").await.unwrap();
    let record = "INSERT INTO walferry.fingerprint SELECT * FROM unnest($1::text[], $2::text[])";
    on_target.execute(record, &[&objects, &hashes]).await.unwrap();
    let walferry = pair.run(pair.migrate());
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1", "2"]);
    assert_eq!(value(&target(&pair).await, floor).await, floor_before);
    let renewed = walferry::target::ledger::fingerprint(&on_target).await.unwrap();
    let now = catalog::fingerprint(&source).await.unwrap();
    assert_eq!(catalog::changed_objects(&renewed, &now).collect::<Vec<_>>(), ["table public.t"]);
    walferry.kill();
    until("SELECT NOT bool_or(active) FROM pg_replication_slots", &pair.source).await;

    // The one before this keeps what it has written down of roles.
    pair.on_source("INSERT INTO t VALUES (3)").await;
    pair.on_target(
        "UPDATE walferry.migration SET format = 4, apply_role = 'origin'; ALTER TABLE walferry.migration DROP scope",
    )
    .await;
    let _walferry = pair.run(pair.migrate());
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1", "2", "3"]);
    let kept = "SELECT format || apply_role || coalesce(scope, ' and all') FROM walferry.migration";
    assert_eq!(value(&target(&pair).await, kept).await, "5origin and all");
}

#[tokio::test]
async fn h18_a_newer_ledger_or_state_directory_is_refused() {
    let pair = interrupted().await;
    pair.on_target("UPDATE walferry.migration SET format = format + 1").await;
    refuses(&pair, pair.run(pair.migrate()), 3, "the target's ledger has format ").await;
    pair.on_target("UPDATE walferry.migration SET format = format - 1").await;

    let file = pair.directory().join("migration.json");
    let identity = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, identity.replace("\"format\": 1", "\"format\": 2")).unwrap();
    refuses(&pair, pair.run(pair.migrate()), 3, "was written by a newer walferry").await;
    std::fs::write(&file, identity).unwrap();
    let _walferry = pair.run(pair.migrate());
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["1", "2"]);
}
