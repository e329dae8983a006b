//! Batches that the target refuses, rows that are not as they should be, and locks.

use walferry::error::ErrorKind;
use walferry::lsn::Lsn;

use super::bed::Bed;

const SCHEMA: &str = "CREATE EXTENSION citext SCHEMA public;
    CREATE TABLE plain (id int PRIMARY KEY, a text);
    CREATE TABLE uniq (id int PRIMARY KEY, u int UNIQUE, a text);
    CREATE TABLE numerickey (k numeric PRIMARY KEY, n int);
    CREATE TABLE citextkey (k citext PRIMARY KEY, n int);
    CREATE TABLE floatkey (k float8 PRIMARY KEY, n int)";
const ROWS: &str = "INSERT INTO plain SELECT g, 'a' FROM generate_series(1, 500) g;
    INSERT INTO uniq SELECT g, g, 'a' FROM generate_series(1, 500) g;
    INSERT INTO numerickey VALUES (1.0, 1), (2, 2); INSERT INTO citextkey VALUES ('a', 1), ('b', 2);
    INSERT INTO floatkey VALUES ('-0', 1), (2, 2)";

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_batch_ends_as_serial_replay_does() {
    for (workers, singly) in [(1, usize::MAX), (3, 0)] {
        let mut bed = Bed::new(SCHEMA, ROWS, workers).await;
        bed.write_singly_up_to(singly);
        // Two rows swap a unique value over several transactions; a set meets both at once.
        let swap = "BEGIN; UPDATE uniq SET u = 1000 WHERE id = 1; UPDATE uniq SET u = 1 WHERE id = 2; UPDATE uniq SET u = 2 WHERE id = 1; COMMIT";
        bed.on_source(swap).await;
        bed.on_source("UPDATE uniq SET a = 'many' WHERE id > 100").await;
        bed.capture_and_apply().await.unwrap();
        bed.assert_equal("a swap").await;
        assert_eq!(bed.serial_replays(), 1, "the target refuses a swap as a set");
        // A circle of keys, in one transaction and over several in one batch.
        let circle = [
            "UPDATE plain SET id = 1001 WHERE id = 3",
            "UPDATE plain SET id = 3 WHERE id = 2",
            "UPDATE plain SET id = 2 WHERE id = 1",
            "UPDATE plain SET id = 1 WHERE id = 1001",
        ];
        bed.on_source(&format!("BEGIN; {}; COMMIT", circle.join(";"))).await;
        for statement in circle {
            bed.on_source(statement).await;
        }
        bed.on_source("UPDATE plain SET id = id + 10000, a = 'moved' WHERE id > 20").await;
        bed.capture_and_apply().await.unwrap();
        bed.assert_equal("a circle of keys").await;
        assert_eq!(bed.serial_replays(), 1, "a circle of keys has a net effect");
        // Refused, and in the same batch what cannot be merged at all.
        bed.on_source(swap).await;
        bed.on_source("TRUNCATE plain; INSERT INTO plain VALUES (1, 'after')").await;
        bed.on_source(swap).await;
        bed.capture_and_apply().await.unwrap();
        bed.assert_equal("swaps around a TRUNCATE").await;
    }
}

/// Applies, and expects it to stop at the transaction that commits last; says what a person reads.
async fn stops(bed: &Bed, until: Lsn, before: &[Lsn]) -> String {
    let error = bed.apply(until).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Divergence, "{error:?}");
    assert!(error.next_step().is_some(), "{error:?}");
    let progress = bed.progress().await;
    assert!(progress.iter().all(|position| *position < until && *position >= before[0]), "{progress:?}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_a_row_that_is_not_as_it_should_be_stops_the_apply_until_it_is_mended() {
    let breaks = [
        (
            "DELETE FROM plain WHERE id = 7",
            "UPDATE plain SET a = 'b' WHERE id = 7",
            "INSERT INTO plain VALUES (7, 'a')",
        ),
        ("DELETE FROM plain WHERE id = 7", "DELETE FROM plain WHERE id = 7", "INSERT INTO plain VALUES (7, 'a')"),
        (
            "INSERT INTO plain VALUES (777, 'x')",
            "INSERT INTO plain VALUES (777, 'y')",
            "DELETE FROM plain WHERE id = 777",
        ),
    ];
    for (number, (breaking, change, mending)) in breaks.into_iter().enumerate() {
        // Few rows, and so many that every session has some.
        for many in [false, true] {
            let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
            bed.on_target(breaking).await;
            if many {
                bed.write_singly_up_to(0);
                bed.on_source("UPDATE plain SET a = 'before' WHERE id > 100").await;
            }
            bed.on_source("UPDATE uniq SET a = 'before' WHERE id = 1").await;
            let before = bed.capture().await;
            let xid: i64 = {
                bed.on_source(&format!("BEGIN; {change}")).await;
                let xid = bed.source.query_one("SELECT txid_current() % 4294967296", &[]).await.unwrap().get(0);
                bed.on_source("COMMIT").await;
                xid
            };
            let end = bed.capture().await;
            bed.on_source("INSERT INTO plain VALUES (9999, 'after')").await;
            let until = bed.capture().await;
            let text = stops(&bed, until, &[before]).await;
            let commit = commit_lsn(&bed, xid as u32);
            for part in
                [format!("transaction {xid} "), format!("commits at {commit}"), "\"plain\"".into(), "(id)=(7".into()]
            {
                assert!(text.contains(&part), "{part:?} is not in {text:?}");
            }
            let after: i64 =
                bed.target.query_one("SELECT count(*) FROM plain WHERE id = 9999", &[]).await.unwrap().get(0);
            assert_eq!(after, 0, "nothing after it is applied");
            let status = bed.board.snapshot().apply;
            assert_eq!(status.conflicts, 1, "case {number}");
            assert_eq!(status.conflicts_by_kind.values().sum::<u64>(), 1);
            assert!(end < until);
            bed.on_target(mending).await;
            bed.apply(until).await.unwrap();
            bed.assert_equal("after the operator mended the row").await;
        }
    }
}

fn commit_lsn(bed: &Bed, wanted: u32) -> Lsn {
    use walferry::decode::{Message, decode};
    let begin = bed.history.iter().find_map(|fed| match fed {
        super::bed::Fed::Message(bytes) => match decode(bytes).unwrap() {
            Message::Begin { commit_lsn, xid, .. } if xid == wanted => Some(commit_lsn),
            _ => None,
        },
        super::bed::Fed::Position(_) => None,
    });
    begin.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn h20_keys_that_are_equal_in_other_bytes_stay_with_one_session() {
    for workers in [1, 2, 4] {
        let mut bed = Bed::new(SCHEMA, ROWS, workers).await;
        for many in [false, true] {
            for statement in [
                "UPDATE numerickey SET k = 1.00 WHERE k = 1",
                "UPDATE citextkey SET k = 'A' WHERE k = 'a'",
                "UPDATE floatkey SET k = '0' WHERE k = 0",
                "UPDATE floatkey SET k = '-0', n = 3 WHERE k = 0",
                "BEGIN; DELETE FROM citextkey WHERE k = 'B'; INSERT INTO citextkey VALUES ('B', 5); COMMIT",
                "UPDATE numerickey SET k = 1.000, n = n + 1 WHERE k = 1",
            ] {
                bed.on_source(statement).await;
            }
            bed.write_singly_up_to(if many { 0 } else { usize::MAX });
            if many {
                bed.on_source("UPDATE plain SET a = a || 'x'").await;
            }
            bed.capture_and_apply().await.unwrap();
            bed.assert_equal(&format!("{workers} workers")).await;
            assert_eq!(bed.serial_replays(), 0, "nobody waited for a sibling");
            bed.on_source("UPDATE citextkey SET k = lower(k::text); UPDATE numerickey SET k = trim_scale(k)").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn h20_a_lock_that_is_held_too_long_is_a_refusal() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    bed.on_source("UPDATE plain SET a = 'b'").await;
    let until = bed.capture().await;
    let mut somebody = bed.server.connect(&bed.target_database).await.unwrap();
    let lock = somebody.transaction().await.unwrap();
    lock.batch_execute("SELECT FROM plain WHERE id = 7 FOR UPDATE").await.unwrap();
    let release = async {
        // Until the apply has given up the batch, and waits again row by row.
        while bed.serial_replays() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        lock.rollback().await.unwrap();
    };
    let (applied, ()) = tokio::join!(bed.apply(until), release);
    applied.unwrap();
    bed.assert_equal("after the lock").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn h21_the_route_is_what_the_ledger_says() {
    let mut bed = Bed::new(SCHEMA, ROWS, 4).await;
    bed.on_source("UPDATE plain SET a = 'b'").await;
    let until = bed.capture().await;
    for (routing, sessions) in [("by_key", 4), ("whole", 1)] {
        bed.on_target(&format!(
            "UPDATE walferry.source_table SET routing = '{routing}' WHERE definition->>'name' = 'plain'"
        ))
        .await;
        bed.reload().await;
        let reader = bed.queue.reader(bed.start).unwrap();
        let mut assembled = walferry::apply::assemble::Assembler::start(
            std::sync::Arc::clone(&bed.layout),
            reader,
            bed.start,
            Some(until),
            false,
        )
        .unwrap();
        let Some(Ok(walferry::apply::assemble::Assembled::Chunk(chunk))) = assembled.recv().await else {
            panic!("no chunk")
        };
        assert_eq!(chunk.writes.iter().filter(|writes| !writes.is_empty()).count(), sessions, "{routing}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn h25_small_batches_leave_the_targets_catalog_as_it_is() {
    let mut bed = Bed::new(SCHEMA, ROWS, 4).await;
    bed.write_singly_up_to(0);
    let mut apply = bed.apply_from(bed.progress().await).await.unwrap();
    let files = "SELECT string_agg(relname || relfilenode, ' ' ORDER BY relname) FROM pg_class WHERE relname LIKE 'walferry_rows_%'";
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..5 {
        bed.on_source("UPDATE plain SET a = a || 'x' WHERE id <= 40").await;
        let until = bed.capture().await;
        apply.run(Some(until)).await.unwrap();
        seen.insert(bed.target.query_one(files, &[]).await.unwrap().get::<_, String>(0));
    }
    assert_eq!(seen.len(), 1, "{seen:?}");
    bed.assert_equal("small batches").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn h10_a_source_of_many_tables_leaves_few_temporary_tables_open() {
    let schema = "DO $$ BEGIN FOR g IN 1..200 LOOP EXECUTE format('CREATE TABLE t%s (id int PRIMARY KEY, a int)', g); END LOOP; END $$";
    let rows = "DO $$ BEGIN FOR g IN 1..200 LOOP EXECUTE format('INSERT INTO t%s VALUES (1, 1)', g); END LOOP; END $$";
    let mut bed = Bed::new(schema, rows, 2).await;
    bed.write_singly_up_to(0);
    let mut apply = bed.apply_from(bed.progress().await).await.unwrap();
    for table in 1..=200 {
        bed.on_source(&format!("UPDATE t{table} SET a = 2")).await;
        if table % 10 == 0 {
            let until = bed.capture().await;
            apply.run(Some(until)).await.unwrap();
        }
    }
    let open: i64 = bed
        .target
        .query_one("SELECT count(*) FROM pg_class WHERE relname LIKE 'walferry_rows_%'", &[])
        .await
        .unwrap()
        .get(0);
    assert!(open < 100, "{open}");
    bed.assert_equal("many tables").await;
}
