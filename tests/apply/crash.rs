//! Deaths between the commits of one unit, and sessions that commit when nobody expects it any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use walferry::apply::assemble::{Assembled, Assembler};
use walferry::error::ErrorKind;
use walferry::lsn::Lsn;

use super::bed::{Bed, Fed};

const SCHEMA: &str = "CREATE TABLE plain (id int PRIMARY KEY, a text, n int);
    CREATE TABLE toast (id int PRIMARY KEY, n int, big text); ALTER TABLE toast ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE uniq (id int PRIMARY KEY, u int UNIQUE); CREATE TABLE keyless (a int, b text)";
const ROWS: &str = "INSERT INTO plain SELECT g, 'a', g FROM generate_series(1, 1000) g;
    INSERT INTO toast SELECT g, g, repeat('t', 3000) FROM generate_series(1, 300) g;
    INSERT INTO uniq SELECT g, g FROM generate_series(1, 300) g";
/// Rows that move between sessions, with TOASTed values that only the unit knows.
const CHANGES: [&str; 7] = [
    "UPDATE plain SET a = 'b', n = n + 1",
    "UPDATE plain SET id = id + 10000 WHERE id % 3 = 0",
    "UPDATE toast SET big = repeat('u' || id, 900) WHERE id <= 100",
    "UPDATE toast SET id = id + 10000, n = n + 1 WHERE id <= 100",
    "UPDATE toast SET n = n + 7 WHERE id > 50",
    "INSERT INTO keyless SELECT g, 'k' FROM generate_series(1, 200) g",
    "UPDATE uniq SET u = u + 5000 WHERE id % 2 = 0",
];

/// Writes the unit up to `until` as the apply does, and commits the shares of some sessions only; then all die.
async fn commit_shares_of(bed: &Bed, until: Lsn, sessions: &[usize]) -> usize {
    let mut writers = bed.writers().await.unwrap();
    let reader = bed.queue.reader(bed.start).unwrap();
    let mut assembled = Assembler::start(Arc::clone(&bed.layout), reader, bed.start, Some(until), false).unwrap();
    let mut chunks = 0;
    loop {
        let Some(Ok(Assembled::Chunk(mut chunk))) = assembled.recv().await else { panic!("no chunk") };
        assert!(!chunk.small);
        chunks += 1;
        for (writer, writes) in writers.iter_mut().zip(&mut chunk.writes) {
            writer.write(&*bed.layout, writes).await.unwrap();
        }
        let Some(end) = chunk.end else { continue };
        assert_eq!(end.end_lsn, until);
        for &session in sessions {
            writers[session].advance(&[(session as i32, bed.start)], until).await.unwrap();
            writers[session].commit().await.unwrap();
        }
        drop(writers);
        return chunks;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_a_death_between_the_commits_of_a_unit_loses_and_doubles_nothing() {
    for (workers, committed) in [(2, vec![0]), (2, vec![1]), (4, vec![1, 2]), (4, vec![0, 1, 3])] {
        let mut bed = Bed::new(SCHEMA, ROWS, workers).await;
        // What goes singly here goes as a set there.
        bed.write_singly_up_to(if committed.len() == 1 { 0 } else { 40 });
        for change in CHANGES {
            bed.on_source(change).await;
        }
        let until = bed.capture().await;
        bed.on_source("UPDATE plain SET n = n + 1; DELETE FROM toast WHERE id % 4 = 0").await;
        let after = bed.capture().await;
        commit_shares_of(&bed, until, &committed).await;
        bed.apply(after).await.unwrap();
        bed.assert_equal(&format!("{committed:?} of {workers} had committed")).await;
        assert_eq!(bed.serial_replays(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_a_unit_of_several_chunks_is_made_again_as_it_was() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    bed.on_source(&format!(
        "BEGIN; INSERT INTO plain SELECT g * 20011, repeat('x', 900), g FROM generate_series(20001, 100000) g; {}; \
         UPDATE plain SET n = 0, id = id + 1000000 WHERE id % 10 = 0; COMMIT",
        CHANGES.join(";")
    ))
    .await;
    let until = bed.capture().await;
    let chunks = commit_shares_of(&bed, until, &[1]).await;
    assert!(chunks > 2, "{chunks}");
    // The queue's disk is lost too; the source sends it again, and announces every table anew.
    let history = std::mem::take(&mut bed.history);
    bed.lose_queue();
    let mut announced = Vec::new();
    for fed in history {
        if let Fed::Message(bytes) = &fed
            && bytes[0] == b'R'
        {
            announced.push(fed.clone());
        }
        bed.feed(fed).await;
        for _ in 0..3 {
            for again in announced.clone() {
                if matches!(bed.history.last(), Some(Fed::Message(bytes)) if bytes[0] == b'R') {
                    bed.feed(again).await;
                }
            }
        }
    }
    bed.flush();
    bed.apply(until).await.unwrap();
    bed.assert_equal("several chunks").await;
    assert_eq!(bed.serial_replays(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_a_unit_that_ended_with_a_position_ends_there_without_it() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    for change in CHANGES {
        bed.on_source(change).await;
    }
    let end = bed.capture().await;
    // The source is idle and moves on; its position ends the unit, and goes with the queue's newest block.
    bed.on_source("CREATE TABLE unrelated (); DROP TABLE unrelated").await;
    let position: tokio_postgres::types::PgLsn =
        bed.source.query_one("SELECT pg_current_wal_insert_lsn()", &[]).await.unwrap().get(0);
    let position = Lsn::from(position);
    assert!(position > end);
    bed.feed(Fed::Position(position)).await;
    commit_shares_of(&bed, position, &[1]).await;
    let history: Vec<Fed> =
        std::mem::take(&mut bed.history).into_iter().filter(|fed| matches!(fed, Fed::Message(_))).collect();
    bed.lose_queue();
    for fed in history {
        bed.feed(fed).await;
    }
    bed.on_source("UPDATE plain SET n = n + 1; INSERT INTO keyless SELECT g, 'l' FROM generate_series(1, 300) g").await;
    let after = bed.capture().await;
    bed.apply(after).await.unwrap();
    bed.assert_equal("without the position").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_a_commit_that_went_through_unseen_is_not_applied_again() {
    for rows in [50, 500] {
        let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
        bed.on_source(&format!("INSERT INTO keyless SELECT g, 'k' FROM generate_series(1, {rows}) g; UPDATE plain SET n = n + 1 WHERE id < {rows}")).await;
        let until = bed.capture().await;
        let stale = bed.progress().await;
        bed.apply(until).await.unwrap();
        // It read the ledger before that commit.
        let error = bed.apply_from(stale).await.unwrap().run(Some(until)).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Transient || error.kind() == ErrorKind::Divergence, "{error:?}");
        bed.assert_equal("the second apply committed nothing").await;
        // Of a table without a key nothing but the ledger tells.
        bed.on_source(&format!("INSERT INTO keyless SELECT g, 'l' FROM generate_series(1, {rows}) g")).await;
        let until = bed.capture().await;
        let stale = bed.progress().await;
        bed.apply(until).await.unwrap();
        let error = bed.apply_from(stale).await.unwrap().run(Some(until)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Transient, "{error:?}");
        bed.assert_equal("the rows of a table without a key came once").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_sessions_may_be_killed_at_any_moment() {
    let mut bed = Bed::new(SCHEMA, ROWS, 3).await;
    for round in 0..60 {
        bed.on_source(&format!(
            "BEGIN; UPDATE plain SET n = n + {round}; INSERT INTO keyless SELECT g, 'r{round}' FROM generate_series(1, 150) g; COMMIT"
        ))
        .await;
        bed.on_source("UPDATE toast SET id = -id, big = repeat(n::text || 'v', 1000) WHERE id % 10 = 1").await;
        bed.on_source("UPDATE toast SET n = n + 1").await;
    }
    let until = bed.capture().await;
    let done = AtomicBool::new(false);
    let killer = async {
        let session = bed.server.connect("postgres").await.unwrap();
        let mut killed = 0;
        while !done.load(Ordering::Relaxed) && killed < 25 {
            let hit = session
                .query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'walferry/apply' \
                     AND datname = $1 AND state <> 'idle' ORDER BY random() LIMIT 1",
                    &[&bed.target_database],
                )
                .await
                .unwrap();
            killed += hit.len();
            tokio::time::sleep(Duration::from_millis(if hit.is_empty() { 3 } else { 40 })).await;
        }
        killed
    };
    let applying = async {
        while let Err(error) = bed.apply(until).await {
            assert!(error.is_transient(), "{error:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        done.store(true, Ordering::Relaxed);
    };
    let (killed, ()) = tokio::join!(killer, applying);
    assert!(killed > 3, "only {killed} sessions were killed");
    bed.assert_equal(&format!("{killed} sessions killed")).await;
}
