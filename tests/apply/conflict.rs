//! Somebody else has written to the target (I6): every kind of conflict, and every decision about it.

use walferry::apply::conflict::OnConflict;
use walferry::error::ErrorKind;

use super::bed::{Bed, shared_server};

const SCHEMA: &str = "CREATE TABLE plain (id int PRIMARY KEY, a text, u int UNIQUE);
    CREATE TABLE toast (id int PRIMARY KEY, n int, big text); ALTER TABLE toast ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE fullkey (id int PRIMARY KEY, n int, big text); ALTER TABLE fullkey ALTER big SET STORAGE EXTERNAL;
    ALTER TABLE fullkey REPLICA IDENTITY FULL;
    CREATE TABLE fullrow (a int, b text); ALTER TABLE fullrow REPLICA IDENTITY FULL;
    CREATE TABLE other (id int PRIMARY KEY)";
const ROWS: &str = "INSERT INTO plain SELECT g, 'a' || g, g FROM generate_series(1, 50) g;
    INSERT INTO toast SELECT g, g, repeat('t', 3000) FROM generate_series(1, 9) g; INSERT INTO fullkey SELECT * FROM toast;
    INSERT INTO fullrow SELECT g, 'f' FROM generate_series(1, 9) g";

/// What a decision leads to: the rows of the table that the case is about, as text, those that are looked at; `None` when it stops.
type Outcome = Option<&'static str>;

struct Case {
    /// What somebody does on the target.
    breaking: &'static str,
    /// What the application does on the source.
    change: &'static str,
    /// Which rows are looked at afterwards.
    look: &'static str,
    kind: &'static str,
    source: Outcome,
    target: Outcome,
    /// What a person reads when it stops.
    said: &'static [&'static str],
}

const CASES: [Case; 14] = [
    Case {
        breaking: "INSERT INTO plain VALUES (77, 'theirs', 770)",
        change: "INSERT INTO plain VALUES (77, 'ours', 771)",
        look: "SELECT * FROM plain WHERE id = 77",
        kind: "insert_found_row",
        source: Some("(77,ours,771)"),
        target: Some("(77,theirs,770)"),
        said: &[
            "inserting (id)=(77) into \"public\".\"plain\"",
            "the source's row is there",
            "the target has a row with that key already",
        ],
    },
    Case {
        breaking: "DELETE FROM plain WHERE id = 7",
        change: "UPDATE plain SET a = 'ours' WHERE id = 7",
        look: "SELECT * FROM plain WHERE id = 7",
        kind: "update_found_none",
        source: Some("(7,ours,7)"),
        target: Some(""),
        said: &["updating (id)=(7) of \"public\".\"plain\"", "the source's row is there", "the target has no such row"],
    },
    Case {
        breaking: "DELETE FROM plain WHERE id = 7",
        change: "UPDATE plain SET id = 700, a = 'ours' WHERE id = 7",
        look: "SELECT * FROM plain WHERE id IN (7, 700)",
        kind: "update_found_none",
        source: Some("(700,ours,7)"),
        target: Some(""),
        said: &["updating (id)=(7) of", "the target has no such row"],
    },
    Case {
        breaking: "DELETE FROM plain WHERE id = 7",
        change: "DELETE FROM plain WHERE id = 7",
        look: "SELECT * FROM plain WHERE id = 7",
        kind: "delete_found_none",
        source: Some(""),
        target: Some(""),
        said: &["deleting (id)=(7) of \"public\".\"plain\"", "was there until now", "the target has no such row"],
    },
    Case {
        breaking: "INSERT INTO plain VALUES (700, 'theirs', 770)",
        change: "UPDATE plain SET id = 700, a = 'ours' WHERE id = 7",
        look: "SELECT * FROM plain WHERE id IN (7, 700)",
        kind: "update_found_row",
        source: Some("(700,ours,7)"),
        target: Some("(7,a7,7) (700,theirs,770)"),
        said: &["updating (id)=(7) of \"public\".\"plain\" to (id)=(700)", "another row with the new key already"],
    },
    // A large value that only the moved row on the target has.
    Case {
        breaking: "INSERT INTO toast VALUES (700, -1, 'theirs')",
        change: "UPDATE toast SET id = 700 WHERE id = 7",
        look: "SELECT id, n, length(big) FROM toast WHERE id IN (7, 700)",
        kind: "update_found_row",
        source: Some("(700,7,3000)"),
        target: Some("(7,7,3000) (700,-1,6)"),
        said: &["another row with the new key already"],
    },
    // A large value that nobody knows.
    Case {
        breaking: "DELETE FROM toast WHERE id = 7",
        change: "UPDATE toast SET n = 8 WHERE id = 7",
        look: "SELECT id, n, length(big) FROM toast WHERE id = 7",
        kind: "update_found_none",
        source: None,
        target: Some(""),
        said: &["updating (id)=(7) of \"public\".\"toast\"", "the target has no such row"],
    },
    // The same, but the old row tells it.
    Case {
        breaking: "DELETE FROM fullkey WHERE id = 7",
        change: "UPDATE fullkey SET n = 8 WHERE id = 7",
        look: "SELECT id, n, length(big) FROM fullkey WHERE id = 7",
        kind: "update_found_none",
        source: Some("(7,8,3000)"),
        target: Some(""),
        said: &["updating (id)=(7) of \"public\".\"fullkey\"", "the target has no such row"],
    },
    Case {
        breaking: "DELETE FROM fullrow WHERE a = 7",
        change: "UPDATE fullrow SET b = 'ours' WHERE a = 7",
        look: "SELECT * FROM fullrow WHERE a = 7",
        kind: "update_found_none",
        source: Some("(7,ours)"),
        target: Some(""),
        said: &["updating a row without a key of \"public\".\"fullrow\"", "the target has no such row"],
    },
    Case {
        breaking: "DELETE FROM fullrow WHERE a = 7",
        change: "DELETE FROM fullrow WHERE a = 7",
        look: "SELECT * FROM fullrow WHERE a = 7",
        kind: "delete_found_none",
        source: Some(""),
        target: Some(""),
        said: &["deleting a row without a key of \"public\".\"fullrow\"", "the target has no such row"],
    },
    // A third row has the value: nobody's decision about this row removes that one.
    Case {
        breaking: "INSERT INTO plain VALUES (800, 'theirs', 770)",
        change: "INSERT INTO plain VALUES (77, 'ours', 770)",
        look: "SELECT * FROM plain WHERE id IN (77, 800)",
        kind: "unique_value_taken",
        source: None,
        target: None,
        said: &["inserting (id)=(77) into \"public\".\"plain\"", "plain_u_key"],
    },
    Case {
        breaking: "INSERT INTO plain VALUES (800, 'theirs', 770)",
        change: "UPDATE plain SET u = 770 WHERE id = 7",
        look: "SELECT * FROM plain WHERE id IN (7, 800)",
        kind: "unique_value_taken",
        source: None,
        target: None,
        said: &["updating (id)=(7) of \"public\".\"plain\"", "plain_u_key"],
    },
    // The row with the key gives way, and the third row still does not.
    Case {
        breaking: "INSERT INTO plain VALUES (77, 'theirs', 777), (800, 'theirs', 770)",
        change: "INSERT INTO plain VALUES (77, 'ours', 770)",
        look: "SELECT * FROM plain WHERE id IN (77, 800)",
        kind: "insert_found_row",
        source: None,
        target: Some("(77,theirs,777) (800,theirs,770)"),
        said: &["inserting (id)=(77) into"],
    },
    // Both at once: the moved row is gone, and another is where it went.
    Case {
        breaking: "DELETE FROM plain WHERE id = 7; INSERT INTO plain VALUES (700, 'theirs', 770)",
        change: "UPDATE plain SET id = 700, a = 'ours' WHERE id = 7",
        look: "SELECT * FROM plain WHERE id IN (7, 700)",
        kind: "update_found_row",
        source: Some("(700,ours,7)"),
        target: Some("(700,theirs,770)"),
        said: &["another row with the new key already"],
    },
];

async fn look(bed: &Bed, query: &str) -> String {
    let query = format!("SELECT coalesce(string_agg(r::text, ' ' ORDER BY r::text), '') FROM ({query}) r");
    bed.target.query_one(&query, &[]).await.unwrap().get(0)
}

async fn decided(case: &Case, policy: OnConflict, expected: Outcome, many: bool) {
    let name = format!("{policy:?}, many {many}: {} / {}", case.breaking, case.change);
    let mut bed = Bed::with(shared_server().await, SCHEMA, ROWS, 2, many).await;
    bed.on_conflict = policy;
    bed.on_target(case.breaking).await;
    let before = look(&bed, case.look).await;
    if many {
        bed.write_singly_up_to(0);
        // So many that every session has some, in one unit with the conflict.
        bed.on_source("INSERT INTO other SELECT generate_series(100, 800)").await;
    }
    bed.on_source(&format!(
        "BEGIN; INSERT INTO other VALUES (1); {}; INSERT INTO other VALUES (2); COMMIT",
        case.change
    ))
    .await;
    bed.on_source("INSERT INTO other VALUES (3)").await;
    let until = bed.capture().await;
    let outcome = bed.apply(until).await;
    let others = look(&bed, "SELECT id FROM other WHERE id < 10").await;
    match expected {
        Some(rows) => {
            outcome.unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert_eq!(look(&bed, case.look).await, rows, "{name}");
            assert_eq!(others, "(1) (2) (3)", "{name}: the rest of the transaction, and what came after it");
            // The rest of the table is as it was.
            let untouched: i64 = bed
                .target
                .query_one("SELECT count(*) FROM plain p WHERE id <= 50 AND id <> 7 AND (a, u) = ('a' || id, id)", &[])
                .await
                .unwrap()
                .get(0);
            assert_eq!(untouched, 49, "{name}");
        }
        None => {
            let error = outcome.unwrap_err();
            println!("{name}: {error:?}");
            assert_eq!(error.kind(), ErrorKind::Divergence, "{name}: {error:?}");
            let (text, next) = (error.to_string(), error.next_step().unwrap_or_default());
            assert!(text.contains("applying transaction") && text.contains("that commits at"), "{name}: {text}");
            assert!(next.contains("walferry migrate --recopy 'public.") && next.contains("walferry verify"), "{next}");
            assert!(next.contains("--on-conflict"), "{next}");
            if policy == OnConflict::Stop {
                assert!(case.said.iter().all(|said| text.contains(said)), "{name}: {text}");
            }
            assert_eq!(look(&bed, case.look).await, before, "{name}: nothing of the transaction is applied");
            assert_eq!(others, "", "{name}");
        }
    }
    let status = bed.board.snapshot().apply;
    assert!(status.conflicts_by_kind[case.kind] == 1, "{name}: {:?}", status.conflicts_by_kind);
    let table = case.change.split(' ').find(|word| ["plain", "toast", "fullkey", "fullrow"].contains(word)).unwrap();
    let of_table = status.conflicts_by_table.iter().find(|of_table| of_table.kind == case.kind).unwrap();
    assert_eq!((of_table.schema.as_str(), of_table.name.as_str(), of_table.changes), ("public", table, 1), "{name}");
    assert_eq!(status.conflicts, status.conflicts_by_kind.values().sum::<u64>());
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_by_default_every_conflict_stops_and_says_what_is_where() {
    for (number, case) in CASES.iter().enumerate() {
        decided(case, OnConflict::Stop, None, number % 3 == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_the_sources_row_wins_where_it_is_known_and_nobody_elses_row_is_touched() {
    for (number, case) in CASES.iter().enumerate() {
        decided(case, OnConflict::Source, case.source, number % 2 == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_the_targets_row_stays_and_the_rest_of_the_transaction_is_applied() {
    for (number, case) in CASES.iter().enumerate() {
        decided(case, OnConflict::Target, case.target, number % 2 == 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_a_key_that_becomes_equal_in_other_bytes_is_no_conflict_with_itself() {
    for policy in [OnConflict::Stop, OnConflict::Source, OnConflict::Target] {
        let schema = "CREATE TABLE plain (k numeric PRIMARY KEY, n int); CREATE TABLE empty ()";
        let mut bed = Bed::new(schema, "INSERT INTO plain VALUES (1.0, 1), (2, 2)", 2).await;
        bed.on_conflict = policy;
        // A TRUNCATE goes the serial way, where a key is compared with the table.
        bed.on_source("BEGIN; TRUNCATE empty; UPDATE plain SET n = 9, k = 1.00 WHERE k = 1; COMMIT").await;
        bed.capture_and_apply().await.unwrap();
        bed.assert_equal("a key in other bytes").await;
        assert_eq!(bed.board.snapshot().apply.conflicts, 0);
        assert_eq!(bed.serial_replays(), 1);
    }
}
