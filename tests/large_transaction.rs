//! One transaction of very many rows goes through the whole pipeline in bounded memory (I4, I7).
//!
//! `LARGE_ROWS=10000000 cargo test --release --test main large_transaction -- --nocapture` runs the full size.

use std::time::{Duration, Instant};

use crate::support::Servers;

/// What the process may use, whatever is moved through it.
const MEMORY_MAX_BYTES: u64 = 256 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i07_a_transaction_of_very_many_rows_passes_in_bounded_memory() {
    let rows: i64 = std::env::var("LARGE_ROWS").map_or(1_000_000, |rows| rows.parse().expect("a number of rows"));
    let servers = Servers::start().await;
    let migration = servers.migration("large").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source
        .batch_execute("CREATE TABLE narrow (id int PRIMARY KEY, n int); CREATE TABLE other (id int PRIMARY KEY)")
        .await
        .unwrap();
    let mut running = migration.migrate(&[]);
    let memory = running.watch_memory();
    migration.wait_for_phase(&mut running, "following").await;

    let begun = Instant::now();
    source
        .batch_execute(&format!("INSERT INTO narrow SELECT g, g % 7 FROM generate_series(1, {rows}) g"))
        .await
        .unwrap();
    source.batch_execute("INSERT INTO other VALUES (1)").await.unwrap();
    let inserted = begun.elapsed();
    // Whoever reads sees all of it or nothing.
    let seen = "SELECT (SELECT count(*) FROM narrow), EXISTS (SELECT FROM other)";
    let mut looks = 0;
    loop {
        let row = target.query_one(seen, &[]).await.unwrap();
        let (count, over): (i64, bool) = (row.get(0), row.get(1));
        assert!(count == 0 || count == rows, "a reader saw {count} of {rows} rows");
        looks += 1;
        if over {
            break;
        }
        assert!(running.is_alive(), "{}", running.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let applied = begun.elapsed();
    let caught_up = |status: &serde_json::Value| status["lag"]["bytes"].as_u64().is_some_and(|lag| lag < 1 << 20);
    let status = migration.wait_for_status(&mut running, "no lag", caught_up).await;
    assert_eq!(status["apply"]["serial_replays"], 0, "{status:#}");
    assert_eq!(status["apply"]["changes"], rows + 1);
    assert!(looks > 1);
    // Cheaper than an ordered hash, and enough for rows that all differ: how many, and sums that depend on every value.
    let sums = "SELECT concat_ws(' ', count(*), sum(id), sum(hashint8(id::int8 * 7 + n)::int8)) FROM narrow";
    let sums_of = async |side: &tokio_postgres::Client| side.query_one(sums, &[]).await.unwrap().get::<_, String>(0);
    assert_eq!(sums_of(&source).await, sums_of(&target).await);
    running.terminate().await;
    let peak = memory.await.unwrap();
    println!(
        "{rows} rows: inserted in {inserted:.1?}, on the target after {applied:.1?}, peak memory {} MiB",
        peak >> 20
    );
    assert!(peak < MEMORY_MAX_BYTES, "walferry has used {} MiB", peak >> 20);
}
