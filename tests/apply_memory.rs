//! How much memory the apply needs is measured of the whole process: this test has one of its own.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)] // Shared with the other tests of the apply, which use more of it.
#[path = "apply/bed.rs"]
mod bed;

use bed::Bed;

/// The most memory that this process ever had in use.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn i04_i07_a_transaction_larger_than_memory_is_applied_whole_in_bounded_memory() {
    let mut bed = Bed::new("CREATE TABLE big (id int PRIMARY KEY, a text)", "", 1).await;
    let rows = 400_000;
    bed.on_source(&format!("INSERT INTO big SELECT g, repeat('x', 600) FROM generate_series(1, {rows}) g")).await;
    bed.keeps_history = false;
    let seen = bed.counts_while_applying("big").await;
    assert!(seen.iter().all(|count| *count == 0 || *count == rows), "a reader saw a part: {seen:?}");
    assert!(seen.len() > 5);
    bed.assert_equal("a large transaction").await;
    let peak = peak_bytes();
    assert!(peak < 256 << 20, "{} MiB for {} MiB of rows", peak >> 20, (rows * 600) >> 20);
}
