//! Few changed rows of a table: each by a statement of its own, all of them in one go.

use super::bed::{Bed, shared_server};

const SCHEMA: &str =
    "CREATE TABLE first (id int PRIMARY KEY, a text); CREATE TABLE middle (id int PRIMARY KEY, a text);
    CREATE TABLE last (id int PRIMARY KEY, a text);
    CREATE TABLE toast (id int PRIMARY KEY, n int, big text, other text);
    ALTER TABLE toast ALTER big SET STORAGE EXTERNAL, ALTER other SET STORAGE EXTERNAL;
    CREATE TABLE uniq (id int PRIMARY KEY, u int UNIQUE);
    CREATE TABLE toastkey (k text PRIMARY KEY, n int); ALTER TABLE toastkey ALTER k SET STORAGE EXTERNAL";
const ROWS: &str = "INSERT INTO uniq VALUES (1, 1), (2, 2); INSERT INTO first SELECT g, 'a' FROM generate_series(1, 50) g; INSERT INTO middle SELECT * FROM first;
    INSERT INTO last SELECT * FROM first;
    INSERT INTO toast SELECT g, g, repeat('b' || g, 1500), repeat('o' || g, 1500) FROM generate_series(1, 9) g;
    INSERT INTO toastkey SELECT repeat('k' || g, 1200), g FROM generate_series(1, 9) g";

async fn temporary_tables(bed: &Bed) -> i64 {
    let question = "SELECT count(*) FROM pg_class WHERE relname LIKE 'walferry_%' AND relpersistence = 't'";
    bed.target.query_one(question, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn few_changes_take_no_temporary_table_and_leave_unchanged_toasted_columns_as_they_are() {
    for binary in [false, true] {
        let mut bed = Bed::with(shared_server().await, SCHEMA, ROWS, 2, binary).await;
        bed.write_singly_up_to(20);
        let mut apply = bed.apply_from(bed.progress().await).await.unwrap();
        for statement in [
            "UPDATE toast SET n = -n WHERE id <= 3",
            "UPDATE toast SET big = repeat('new', 1000) WHERE id IN (3, 4)",
            "UPDATE toast SET other = NULL, n = 7 WHERE id = 5",
            "UPDATE toastkey SET n = -n WHERE n < 4; DELETE FROM toastkey WHERE n = 5",
            "DELETE FROM toast WHERE id = 6; INSERT INTO toast VALUES (10, 10, repeat('ten', 1000), E'\\t\\\\N\\n')",
            "UPDATE first SET a = NULL WHERE id = 1; UPDATE first SET a = E'x\\ty' WHERE id = 2; DELETE FROM first WHERE id = 3",
        ] {
            bed.on_source(statement).await;
        }
        let until = bed.capture().await;
        apply.run(Some(until)).await.unwrap();
        bed.assert_equal(&format!("few changes, binary {binary}")).await;
        assert_eq!(temporary_tables(&bed).await, 0, "binary {binary}");
        assert_eq!(bed.serial_replays(), 0, "binary {binary}");
        // More rows of the same tables, by the same sessions.
        bed.on_source("UPDATE first SET a = a || 'b'; UPDATE toast SET n = n + 1").await;
        let until = bed.capture().await;
        apply.run(Some(until)).await.unwrap();
        bed.assert_equal(&format!("more changes, binary {binary}")).await;
        assert_eq!(temporary_tables(&bed).await, 1, "of the one table with many");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_refusal_that_is_told_is_the_first_and_what_came_around_it_is_taken_back() {
    let cases = [
        (
            "INSERT INTO middle VALUES (77, 'theirs')",
            "INSERT INTO middle VALUES (77, 'ours')",
            "middle_pkey",
            "DELETE FROM middle WHERE id = 77",
        ),
        (
            "DELETE FROM middle WHERE id = 7",
            "UPDATE middle SET a = 'ours' WHERE id = 7",
            "updates of 1 rows of \"public\".\"middle\" met 0 rows",
            "INSERT INTO middle VALUES (7, 'a')",
        ),
        (
            "DELETE FROM middle WHERE id = 7",
            "DELETE FROM middle WHERE id = 7",
            "deletes of 1 rows of \"public\".\"middle\" met 0 rows",
            "INSERT INTO middle VALUES (7, 'a')",
        ),
    ];
    for (breaking, change, said, mending) in cases {
        let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
        bed.on_target(breaking).await;
        bed.on_source(&format!(
            "BEGIN; UPDATE first SET a = 'b' WHERE id = 1; DELETE FROM first WHERE id = 2; {change}; \
             UPDATE last SET a = 'b' WHERE id = 1; INSERT INTO last VALUES (78, 'after'); COMMIT"
        ))
        .await;
        let until = bed.capture().await;
        bed.apply(until).await.unwrap_err();
        let events = format!("{:?}", bed.board.snapshot().events).replace("\\\"", "\"");
        assert!(events.contains("the target refused a batch") && events.contains(said), "{change}: {events}");
        assert!(events.contains("writing to \"public\".\"middle\""), "{change}: {events}");
        assert!(!events.contains("25P02"), "{change}: {events}");
        for table in ["first", "last"] {
            let question = format!("SELECT count(*) FROM {table} WHERE a = 'a'");
            let untouched: i64 = bed.target.query_one(&question, &[]).await.unwrap().get(0);
            assert_eq!(untouched, 50, "{change}: {table}");
        }
        bed.on_target(mending).await;
        bed.apply(until).await.unwrap();
        bed.assert_equal(change).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_after_a_refusal_with_what_it_had_prepared() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    bed.write_singly_up_to(20);
    let mut apply = bed.apply_from(bed.progress().await).await.unwrap();
    for round in 0..3 {
        bed.on_source(&format!("UPDATE first SET a = 'r{round}' WHERE id = 1; UPDATE toast SET n = {round}")).await;
        // Two rows swap a unique value, which their net effect cannot tell.
        bed.on_source("BEGIN; UPDATE uniq SET u = -u; UPDATE uniq SET u = 3 + u; COMMIT").await;
        bed.on_source(&format!(
            "UPDATE first SET a = 's{round}' WHERE id < 40; DELETE FROM first WHERE id = 50 - {round}"
        ))
        .await;
        let until = bed.capture().await;
        apply.run(Some(until)).await.unwrap();
        bed.assert_equal(&format!("round {round}")).await;
    }
    assert_eq!(bed.serial_replays(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_tables_than_statements_are_kept_are_written_all_the_same() {
    let schema = "DO $$ BEGIN FOR g IN 1..450 LOOP EXECUTE format('CREATE TABLE t%s (id int PRIMARY KEY, a int)', g); END LOOP; END $$";
    let rows =
        "DO $$ BEGIN FOR g IN 1..450 LOOP EXECUTE format('INSERT INTO t%s VALUES (1, 1), (2, 2)', g); END LOOP; END $$";
    let each = |statement: &str| {
        format!("DO $$ BEGIN FOR g IN 1..450 LOOP EXECUTE format('{statement}', g); END LOOP; END $$")
    };
    let mut bed = Bed::new(schema, rows, 1).await;
    let mut apply = bed.apply_from(bed.progress().await).await.unwrap();
    for round in 0..2 {
        // 1350 statements in one unit.
        bed.on_source(&each(&format!("UPDATE t%1$s SET a = a + 1 WHERE id = 1; DELETE FROM t%1$s WHERE id = {} ; INSERT INTO t%1$s VALUES ({}, 3)", round + 2, round + 3)))
            .await;
        let until = bed.capture().await;
        apply.run(Some(until)).await.unwrap();
        bed.assert_equal(&format!("round {round}")).await;
    }
    assert_eq!(bed.serial_replays(), 0);
    assert_eq!(temporary_tables(&bed).await, 0);
}
