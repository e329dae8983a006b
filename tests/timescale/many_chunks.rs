//! Very many chunks: no step may cost more for a chunk because there are others.

use std::time::Instant;

use tokio_postgres::Client;
use walferry::timescale::chunks::{TimeType, chunks, hypertables};

use crate::support::process::Running;
use crate::support::timescale::{TIMESCALE, timescale_available};
use crate::support::{Migration, Servers};

const TABLE: &str = "SET TimeZone = 'UTC'; CREATE EXTENSION timescaledb;
    CREATE TABLE readings (time timestamptz NOT NULL, device int NOT NULL, value float8, PRIMARY KEY (time, device));
    SELECT create_hypertable('readings', 'time', chunk_time_interval => interval '1 hour');
    ALTER TABLE readings SET (timescaledb.compress, timescaledb.compress_segmentby = 'device');";

async fn fill(client: &Client, chunks: i32) {
    let rows = format!(
        "INSERT INTO readings SELECT '2025-01-01 00:00Z'::timestamptz + i * interval '1 hour' + j * interval '1 min', j, i \
         FROM generate_series(0, {chunks} - 1) i, generate_series(1, 20) j;
         SELECT compress_chunk(c) FROM show_chunks('readings', older_than => '2025-01-01 00:00Z'::timestamptz + {chunks} / 10 * interval '1 hour') c"
    );
    client.batch_execute(TABLE).await.unwrap();
    client.batch_execute(&rows).await.unwrap();
}

#[tokio::test]
async fn a_range_of_time_opens_its_own_chunks_only_however_many_there_are() {
    if !timescale_available("which chunks a range opens") {
        return;
    }
    let servers = Servers::with(&TIMESCALE, &TIMESCALE).await;
    let migration = servers.migration("ranges").await;
    let source = migration.source().await;
    fill(&source, 40).await;
    let hypertable = hypertables(&source).await.unwrap().remove(0);
    let all = chunks(&source, &hypertable, None).await.unwrap();
    assert_eq!(all.len(), 40);
    for (from, to) in [all[0].range(&hypertable), all[39].range(&hypertable)] {
        let time = TimeType::TimestampTz;
        let query = format!(
            "EXPLAIN (COSTS OFF) SELECT count(*) FROM ONLY public.readings t WHERE t.time >= {} AND t.time < {}",
            time.literal(from),
            time.literal(to)
        )
        .replace("ONLY ", "");
        let plan = source.query(&query, &[]).await.unwrap();
        let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
        // As it is planned, not only as it is run: planning itself takes time for each chunk that it opens.
        let opened = plan.iter().filter(|line| line.contains("_chunk") && line.contains(" on ")).count();
        assert!((1..=2).contains(&opened) && !plan.join("\n").contains("excluded"), "{plan:#?}");
    }
}

/// Seconds of each step.
async fn steps(servers: &Servers, database: &str, chunks: i32) -> Vec<(&'static str, f64)> {
    let migration = servers.migration(database).await;
    fill(&migration.source().await, chunks).await;
    migration.target().await.batch_execute(TABLE).await.unwrap();
    let mut steps = Vec::new();
    for (name, arguments) in [
        ("plan", vec!["backfill", "--until", "2030-01-01", "--http-addr", "off", "--dry-run"]),
        ("fill", vec!["backfill", "--until", "2030-01-01", "--http-addr", "off"]),
        ("verify", vec!["verify"]),
    ] {
        let began = Instant::now();
        run(&migration, arguments).await;
        steps.push((name, began.elapsed().as_secs_f64()));
    }
    steps
}

async fn run(migration: &Migration, mut arguments: Vec<&str>) {
    arguments.extend(["--source", &migration.source_url, "--target", &migration.target_url]);
    let dir = migration.directory().to_str().unwrap().to_owned();
    if arguments[0] == "backfill" {
        arguments.extend(["--dir", &dir]);
    }
    let mut running = Running::start(&arguments, &migration.files(), &[]);
    while running.is_alive() {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

#[tokio::test]
#[ignore = "takes some minutes, and wants a machine to itself"]
async fn ten_times_the_chunks_take_no_more_than_about_ten_times_as_long() {
    if !timescale_available("5,000 chunks") {
        return;
    }
    let locks = [&TIMESCALE[..], &[("max_locks_per_transaction", "1024")]].concat();
    let servers = Servers::with(&locks, &locks).await;
    let (few, many) = (steps(&servers, "few", 500).await, steps(&servers, "many", 5000).await);
    for ((step, short), (_, long)) in few.iter().zip(&many) {
        eprintln!("{step}: 500 chunks {short:.1} s, 5,000 chunks {long:.1} s");
        assert!(long / short < 25.0, "{step} is worse than linear: {short:.1} s and {long:.1} s");
    }
}
