//! Transactions that are larger than what is in memory at once; `apply_memory.rs` measures them.

use super::bed::Bed;

const SCHEMA: &str =
    "CREATE TABLE big (id int PRIMARY KEY, a text); CREATE TABLE uniq (id int PRIMARY KEY, u int UNIQUE)";
const ROWS: &str = "INSERT INTO uniq VALUES (1, 1), (2, 2)";
const SWAP: &str =
    "UPDATE uniq SET u = 9 WHERE id = 1; UPDATE uniq SET u = 1 WHERE id = 2; UPDATE uniq SET u = 2 WHERE id = 1";

#[tokio::test(flavor = "multi_thread")]
async fn i05_a_large_transaction_that_is_refused_at_its_end_is_replayed_whole() {
    let mut bed = Bed::new(SCHEMA, ROWS, 2).await;
    let rows = 20_000;
    // Small ones before and after it in the same unit.
    bed.on_source("INSERT INTO uniq VALUES (3, 3)").await;
    bed.on_source(&format!(
        "BEGIN; INSERT INTO big SELECT g, repeat('x', 600) FROM generate_series(1, {rows}) g; {SWAP}; COMMIT"
    ))
    .await;
    bed.on_source("DELETE FROM big WHERE id % 100 = 0").await;
    let seen = bed.counts_while_applying("big").await;
    let possible = [0, rows, rows - rows / 100];
    assert!(seen.iter().all(|count| possible.contains(count)), "a reader saw a part: {seen:?}");
    assert_eq!(bed.serial_replays(), 1);
    bed.assert_equal("refused at its end").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_in_the_middle_of_a_large_transaction_empties_what_came_before_it() {
    let mut bed =
        Bed::new(SCHEMA, "INSERT INTO big VALUES (-1, 'old'); INSERT INTO uniq VALUES (1, 1), (2, 2)", 2).await;
    bed.on_source("INSERT INTO uniq VALUES (3, 3)").await;
    bed.on_source(
        "BEGIN; INSERT INTO big SELECT g, repeat('x', 600) FROM generate_series(1, 15000) g; TRUNCATE big; \
         INSERT INTO big SELECT g, 'kept' FROM generate_series(10, 20) g; COMMIT",
    )
    .await;
    bed.on_source("UPDATE big SET a = 'later' WHERE id = 11").await;
    bed.capture_and_apply().await.unwrap();
    bed.assert_equal("a TRUNCATE in the middle").await;
}
