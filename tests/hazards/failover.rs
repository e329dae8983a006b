//! A server that failed over: an asynchronous standby took its place and lacks the newest commits (H16), or a standby is what a
//! copy is read from (H5).

use std::os::unix::fs::{MetadataExt, chown};
use std::path::PathBuf;
use std::process::Command;

use walferry::demo::server::{StopMode, ThrowawayServer};
use walferry::source::slot::ServerIdentity;
use walferry::source::snapshot::HeldSnapshot;

use crate::support::{Gate, Pair, Walferry, until, value};

/// Keeps a copy of a server as it is now: what a standby that falls behind from here on would have.
async fn keep_a_standby(server: &mut ThrowawayServer) {
    server.stop(StopMode::Fast).await.unwrap();
    let kept = kept(server);
    let copied = Command::new("cp").arg("-a").arg(server.data_directory()).arg(&kept).status().unwrap();
    assert!(copied.success());
    server.restart().await.unwrap();
}

/// The server dies, and that standby is promoted in its place, at the same address.
async fn fail_over(server: &mut ThrowawayServer) {
    server.stop(StopMode::Immediate).await.unwrap();
    let data = server.data_directory().to_owned();
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(kept(server), &data).unwrap();
    // A recovery that has nothing more to restore ends with a new timeline, as a promotion does.
    let (signal, settings) = (data.join("recovery.signal"), data.join("postgresql.auto.conf"));
    let owner = std::fs::metadata(&settings).unwrap();
    std::fs::write(&signal, "").unwrap();
    chown(&signal, Some(owner.uid()), Some(owner.gid())).unwrap();
    std::fs::write(&settings, "restore_command = 'false'\n").unwrap();
    server.restart().await.unwrap();
    until("SELECT NOT pg_is_in_recovery()", server).await;
}

fn kept(server: &ThrowawayServer) -> PathBuf {
    server.directory().join("kept")
}

fn resync(pair: &Pair) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    command.args(["resync", "--http-addr", "off", "--source", &pair.source.url(), "--target", &pair.target.url()]);
    command.arg("--dir").arg(pair.directory());
    command
}

const ROWS: &str = "SELECT id || ' ' || v FROM t ORDER BY 1";

#[tokio::test]
async fn h16_a_target_that_failed_over_is_brought_up_to_date_from_the_kept_queue() {
    let mut pair = Pair::start().await;
    pair.on_source(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT i, i FROM generate_series(1, 50) i",
    )
    .await;
    let walferry = pair.run(pair.migrate());
    pair.following().await;
    walferry.kill();
    keep_a_standby(&mut pair.target).await;

    let walferry = pair.run(pair.migrate());
    for round in 0..20 {
        pair.on_source(&format!(
            "UPDATE t SET v = v + 1 WHERE id % 20 = {round}; INSERT INTO t VALUES (1000 + {round}, 0)"
        ))
        .await;
    }
    pair.on_source("DELETE FROM t WHERE id % 7 = 0").await;
    pair.caught_up().await;
    fail_over(&mut pair.target).await;
    assert_ne!(pair.both(ROWS).await.0, pair.both(ROWS).await.1, "the standby was to lack something");
    // The same process: it reconnects, reads the ledger, and applies again what the standby has not.
    pair.on_source("INSERT INTO t VALUES (5000, 1)").await;
    until("SELECT EXISTS (SELECT FROM t WHERE id = 5000)", &pair.target).await;
    pair.same(ROWS).await;
    walferry.kill();
}

#[tokio::test]
async fn h16_a_source_that_failed_over_stops_the_migration_and_a_resync_heals_it() {
    let mut pair = Pair::start().await;
    pair.on_source(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT i, i FROM generate_series(1, 2000) i; \
         CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (1)",
    )
    .await;
    let walferry = pair.run(pair.migrate());
    pair.following().await;
    walferry.kill();
    keep_a_standby(&mut pair.source).await;

    // The target has commits that the promoted standby never had.
    let walferry = pair.run(pair.migrate());
    pair.on_source("INSERT INTO t VALUES (9001, 1); UPDATE t SET v = -v WHERE id <= 5; DELETE FROM t WHERE id = 77")
        .await;
    pair.caught_up().await;
    fail_over(&mut pair.source).await;
    pair.on_source("INSERT INTO t VALUES (9002, 2); UPDATE t SET v = 0 WHERE id = 1999").await;
    let (code, said) = walferry.exit().await;
    assert_eq!(code, 1, "{said}");
    for words in ["the source is on timeline 2 and was on 1", "walferry resync"] {
        assert!(said.contains(words), "{said}");
    }
    let target = pair.target.connect("postgres").await.unwrap();
    assert_eq!(value(&target, "SELECT count(*) FROM t WHERE id = 9002").await, "0", "applied past the gap");
    // And the same when it is asked again.
    let (code, said) = pair.run(pair.migrate()).exit().await;
    assert_eq!(code, 1, "{said}");

    let _walferry = pair.run(resync(&pair));
    until("SELECT EXISTS (SELECT FROM t WHERE id = 9002)", &pair.target).await;
    pair.on_source("INSERT INTO t VALUES (9003, 3)").await;
    until("SELECT EXISTS (SELECT FROM t WHERE id = 9003)", &pair.target).await;
    pair.same(ROWS).await;
    let copied = value(&target, "SELECT sum(rows_copied) FROM walferry.source_table").await;
    assert!(
        copied.parse::<u32>().unwrap() < 200,
        "{copied} rows were copied again, of 2000 that were the same but for 10"
    );
    assert_eq!(value(&target, "SELECT source_timeline FROM walferry.migration").await, "2");
    let (code, said) = pair.cutover().await;
    assert_eq!(code, 0, "{said}");
}

#[tokio::test]
async fn h05_no_snapshot_is_taken_of_a_standby() {
    let mut pair = Pair::start().await;
    pair.on_source(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT i, i FROM generate_series(1, 50) i",
    )
    .await;
    // Stopped while it copies, so that it needs another snapshot when it goes on.
    let holder = pair.target.connect("postgres").await.unwrap();
    let (walferry, transaction) = pair.run_waiting(pair.migrate()).await;
    let copying = Gate::close(&pair, 1, "UPDATE", "part", "NEW.copied").await;
    transaction.batch_execute("COMMIT").await.unwrap();
    copying.reached(&pair).await;
    walferry.kill();
    copying.open().await;
    let copied = "SELECT count(*) FROM walferry.source_table WHERE copied";
    assert_eq!(value(&holder, copied).await, "0", "the copy was to be interrupted");

    // The address leads to a standby for a while, as in the middle of a failover.
    become_a_standby(&mut pair.source, true).await;
    let server = ServerIdentity { system: "irrelevant".into(), timeline: 1 };
    let taken = HeldSnapshot::take(&pair.source_spec(), "test", &server, 0).await;
    let refused = taken.err().expect("a standby's snapshot was taken");
    assert!(refused.is_transient() && refused.to_string().contains("is a standby"), "{refused}");
    let walferry = pair.run(pair.migrate());
    until_said(&walferry, "the source is a standby").await;
    assert_eq!(value(&holder, copied).await, "0");

    become_a_standby(&mut pair.source, false).await;
    pair.on_source("UPDATE t SET v = -v WHERE id % 2 = 0").await;
    pair.following().await;
    pair.caught_up().await;
    pair.same(ROWS).await;
    walferry.kill();
}

async fn become_a_standby(server: &mut ThrowawayServer, standby: bool) {
    server.stop(StopMode::Fast).await.unwrap();
    let signal = server.data_directory().join("standby.signal");
    if standby {
        let owner = std::fs::metadata(server.data_directory()).unwrap();
        std::fs::write(&signal, "").unwrap();
        chown(&signal, Some(owner.uid()), Some(owner.gid())).unwrap();
    } else {
        std::fs::remove_file(&signal).unwrap();
    }
    server.restart().await.unwrap();
}

async fn until_said(walferry: &Walferry, words: &str) {
    for _ in 0..600 {
        if walferry.said().contains(words) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("walferry never said {words:?}:\n{}", walferry.said());
}
