//! Chunks that the source merges or splits: their rows move to other relations, and no stream shows that.

use tokio_postgres::Client;

use crate::live::ASLEEP;
use crate::support::Migration;
use crate::support::timescale::{servers, timescale_available};

/// Three chunks with a key, and three without; nothing is compressed.
const TABLES: &str = "
    CREATE EXTENSION timescaledb;
    CREATE TABLE keyed (time timestamptz NOT NULL, device int, value int, PRIMARY KEY (time, device));
    CREATE TABLE keyless (time timestamptz NOT NULL, device int, value int);
    ALTER TABLE keyless REPLICA IDENTITY FULL;
    SELECT create_hypertable(t, 'time', chunk_time_interval => interval '1 day') FROM unnest('{keyed,keyless}'::regclass[]) t;
    INSERT INTO keyed SELECT '2025-01-01 00:00Z'::timestamptz + i * interval '1 hour', i % 3, i FROM generate_series(0, 71) i;
    INSERT INTO keyless SELECT * FROM keyed;
    CREATE TABLE rolled (LIKE keyed INCLUDING ALL);
    SELECT create_hypertable('rolled', 'time', chunk_time_interval => interval '1 day');
    ALTER TABLE rolled SET (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time',
        timescaledb.compress_chunk_time_interval = '2 days');
    INSERT INTO rolled SELECT * FROM keyed";
/// Still to be applied when the chunks are merged.
const BEFORE: &str = "
    UPDATE rolled SET value = -value WHERE time >= '2025-01-02 00:00Z' AND device = 1;
    DELETE FROM rolled WHERE time >= '2025-01-02 00:00Z' AND device = 2;
    UPDATE keyed SET value = -value WHERE time >= '2025-01-02 00:00Z' AND device = 1;
    UPDATE keyless SET value = -value WHERE time >= '2025-01-02 00:00Z' AND device = 1;
    DELETE FROM keyed WHERE time >= '2025-01-02 00:00Z' AND device = 2;
    INSERT INTO keyless SELECT time + interval '1 minute', device, value FROM keyless WHERE time >= '2025-01-02 00:00Z'";
const AFTER: &str = "
    UPDATE rolled SET value = value + 1 WHERE device = 1;
    INSERT INTO rolled VALUES ('2025-01-02 00:30Z', 5, 5);
    UPDATE keyed SET value = value + 1;
    UPDATE keyless SET value = value + 1 WHERE device = 1;
    DELETE FROM keyless WHERE time = '2025-01-02 00:00Z';
    INSERT INTO keyed SELECT '2025-01-02 00:30Z'::timestamptz + i * interval '1 hour', 5, i FROM generate_series(0, 23) i";

async fn rows(client: &Client, table: &str) -> Vec<String> {
    let rows = client.query(&format!("SELECT t::text FROM {table} t ORDER BY 1"), &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn merge(source: &Client) {
    source
        .batch_execute("SELECT compress_chunk(c) FROM show_chunks('rolled', older_than => '2025-01-03 00:00Z'::timestamptz) c ORDER BY c")
        .await
        .unwrap();
    let rolled = "SELECT count(*) FROM show_chunks('rolled', older_than => '2025-01-03 00:00Z'::timestamptz)";
    assert_eq!(source.query_one(rolled, &[]).await.unwrap().get::<_, i64>(0), 1, "compression has merged two");
    for table in ["keyed", "keyless"] {
        let chunks = format!(
            "SELECT array_agg(c::regclass ORDER BY c::text) FROM show_chunks('{table}', older_than => '2025-01-03 00:00Z'::timestamptz) c"
        );
        source
            .batch_execute(&format!(
                "DO $$ DECLARE chunks regclass[] := ({chunks}); BEGIN CALL merge_chunks(chunks); END $$"
            ))
            .await
            .unwrap();
    }
}

async fn assert_equal(migration: &Migration) {
    let (source, target) = (migration.source().await, migration.target().await);
    for table in ["keyed", "keyless", "rolled"] {
        let (here, there) = (rows(&source, table).await, rows(&target, table).await);
        assert!(here.len() > 50);
        assert_eq!(here, there, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_a_chunk_that_was_merged_into_another_or_split_are_applied_all_the_same() {
    if !timescale_available("chunks that are merged and split while the apply is behind") {
        return;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = servers.migration("merged").await;
    let source = migration.source().await;
    source.batch_execute(TABLES).await.unwrap();
    let mut running = migration.migrate(&["--no-reverse"]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;

    assert_eq!(migration.with_directory("pause", &["apply"]).await.code, Some(0));
    // There the apply looks at the source's chunks, as they are by then, and has all that follows still before it.
    for table in ["keyed", "keyless"] {
        source.batch_execute(&format!("INSERT INTO {table} VALUES ('2025-02-01 00:00Z', 1, 1)")).await.unwrap();
    }
    source.batch_execute(BEFORE).await.unwrap();
    merge(&source).await;
    for table in ["keyed", "keyless"] {
        let chunk = format!(
            "SELECT c FROM show_chunks('{table}', newer_than => '2025-01-03 00:00Z'::timestamptz, older_than => '2025-01-04 00:00Z'::timestamptz) c"
        );
        let split = format!("DO $$ DECLARE chunk regclass := ({chunk}); BEGIN CALL split_chunk(chunk); END $$");
        source.batch_execute(&split).await.unwrap();
    }
    source.batch_execute(AFTER).await.unwrap();
    assert_eq!(migration.with_directory("resume", &["apply"]).await.code, Some(0));
    migration.wait_for_status(&mut running, "ready again", |status| status["ready_to_cutover"] == true).await;
    running.terminate().await;
    let mut running = migration.migrate(&["--no-reverse", "--recopy", "public.keyed"]);
    migration.wait_for_status(&mut running, "ready after recopy", |status| status["ready_to_cutover"] == true).await;
    running.terminate().await;
    // They have other ranges than those that the ledger took up.
    migration.cut_over(migration.resync(&["--no-reverse"])).await;
    assert_equal(&migration).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_that_are_merged_before_they_are_copied_stop_the_copy() {
    if !timescale_available("chunks that are merged before they are copied") {
        return;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = servers.migration("merged").await;
    let source = migration.source().await;
    source.batch_execute(TABLES).await.unwrap();
    let mut running = migration.migrate(&["--no-reverse", "--copy-rate", "1KiB", "--copy-jobs", "1"]);
    migration.wait_for_phase(&mut running, "copying").await;
    running.kill().await;
    merge(&source).await;
    let missing = "SELECT count(*) FROM walferry.source_table WHERE NOT copied AND definition->'chunk' <> 'null'";
    assert!(migration.target().await.query_one(missing, &[]).await.unwrap().get::<_, i64>(0) > 0);
    let refused = migration.migrate(&["--no-reverse", "--copy-rate", "off"]).wait().await;
    refused.assert_refused(1, &["was merged with another chunk, or split, before it was copied", "`walferry clean`"]);
}
