//! What can be in the way of a backfill's pieces: rows that are there already, what a death leaves behind, what comes late, and what others
//! do on the target meanwhile.

use crate::backfill::{ROWS, SCHEMA, UNTIL, assert_same, run_all, text};
use crate::support::process::{Finished, Running};
use crate::support::timescale::{TIMESCALE, timescale_available};
use crate::support::{Migration, Servers, is_blocked};

fn start(migration: &Migration, arguments: &[&str]) -> Running {
    let dir = migration.directory();
    let (source, target) = (migration.source_url.as_str(), migration.target_url.as_str());
    let mut all = vec!["backfill", "--source", source, "--target", target, "--dir", dir.to_str().unwrap()];
    // Both bounds lie in the middle of a compressed chunk.
    all.extend(["--from", "2026-01-02T06:00:00Z", "--until", "2026-01-07T12:00:00Z", "--http-addr", "off"]);
    all.extend([
        "--copy-jobs",
        "1",
        "--tables",
        "public.conditions,public.events",
        "--time-column",
        "public.events=at",
    ]);
    all.extend(arguments);
    Running::start(&all, &migration.files(), &migration.environment)
}

async fn backfill(migration: &Migration, arguments: &[&str]) -> Finished {
    start(migration, arguments).wait().await
}

#[tokio::test]
async fn rows_that_are_there_and_come_late_orphans_and_dropped_chunks_are_dealt_with_by_rule() {
    if !timescale_available("a backfill among rows, orphans and jobs of others") {
        return;
    }
    let servers = Servers::with(&TIMESCALE, &TIMESCALE).await;
    let migration = servers.migration("parts").await;
    let (source, target) = (migration.source().await, migration.target().await);
    for client in [&source, &target] {
        run_all(client, &["CREATE EXTENSION timescaledb"]).await;
        run_all(client, &SCHEMA).await;
        run_all(client, &["CREATE TABLE events (id bigint PRIMARY KEY, at timestamptz, what text)"]).await;
        run_all(client, &["INSERT INTO device SELECT i, 'device ' || i FROM generate_series(1, 10) i"]).await;
    }
    let of_source = [
        // Nothing of the sixth day.
        "INSERT INTO conditions SELECT t, d, extract(epoch FROM t)::int8 % 977 / 7.0, 'note ' || d \
         FROM generate_series('2026-01-01 00:00Z'::timestamptz, '2026-01-08 23:00Z', '1 hour') t, generate_series(1, 10) d \
         WHERE t < '2026-01-06 00:00Z' OR t >= '2026-01-07 00:00Z'",
        "SELECT compress_chunk(c) FROM show_chunks('conditions') c",
        "INSERT INTO events SELECT i, '2026-01-01 00:00Z'::timestamptz + i * interval '1 hour', 'event ' || i FROM generate_series(1, 200) i",
    ];
    run_all(&source, &of_source).await;
    let of_target = [
        // Others with the same keys: in chunks that are compressed, and of a plain table once in the range and once past it.
        "INSERT INTO conditions SELECT '2026-01-02 06:00Z', d, -1, 'another' FROM generate_series(1, 10) d",
        "INSERT INTO conditions SELECT '2026-01-05 00:00Z', d, -1, 'another' FROM generate_series(1, 2) d",
        "SELECT compress_chunk(c) FROM show_chunks('conditions') c",
        "INSERT INTO events VALUES (150, '2026-01-20 00:00Z', 'past it')",
        "ALTER DATABASE parts SET timescaledb.max_tuples_decompressed_per_dml_transaction = 1",
    ];
    run_all(&target, &of_target).await;

    // Nobody wins unless somebody says who; and what is past the bounds is nobody's to replace.
    backfill(&migration, &[]).await.assert_refused(1, &["\"events\"", "(\"id\")=(150)", "--on-conflict"]);
    run_all(&target, &["INSERT INTO events VALUES (30, '2026-01-04 00:00Z', 'another')"]).await;
    backfill(&migration, &["--on-conflict", "source"]).await.assert_refused(1, &["\"events\"", "(\"id\")=(150)"]);
    assert_eq!(text(&target, "SELECT what FROM events").await, "(\"past it\")\n(another)");
    run_all(&target, &["DELETE FROM events WHERE id = 150"]).await;

    // The source wins. It dies in the third day, whose chunk is made and has no row yet.
    let holder = migration.target().await;
    let hold = |day: &str| {
        format!(
            "BEGIN; SELECT FROM walferry.backfill_piece WHERE range_from = extract(epoch FROM '{day}'::timestamptz) * 1000000 FOR UPDATE"
        )
    };
    holder.batch_execute(&hold("2026-01-03 00:00Z")).await.unwrap();
    let running = start(&migration, &["--on-conflict", "source"]);
    is_blocked(&target, "UPDATE walferry.backfill_piece").await;
    let of_second = "SELECT count(*), min(value) FROM conditions WHERE time < '2026-01-03 00:00Z'";
    let wanted = text(&source, &format!("{of_second} AND time >= '2026-01-02 06:00Z'")).await;
    assert_eq!(text(&target, of_second).await, wanted, "the source's rows, from the bound on");
    running.kill().await;
    holder.batch_execute("ROLLBACK").await.unwrap();
    let third = "SELECT is_compressed FROM timescaledb_information.chunks WHERE hypertable_name = 'conditions' \
                 AND range_start = '2026-01-03 00:00Z'";
    assert_eq!(text(&target, third).await, "(t)", "an orphan");
    assert_eq!(
        text(&target, "SELECT count(*) FROM events").await,
        text(&source, "SELECT count(*) FROM events WHERE at >= '2026-01-02 06:00Z' AND at < '2026-01-07 12:00Z'").await
    );
    // Meanwhile somebody drops what was copied.
    run_all(&target, &["SELECT drop_chunks('conditions', older_than => '2026-01-03 00:00Z'::timestamptz)"]).await;

    // The target wins. Rows of a day without a chunk come late, to both, while it is in the fourth.
    holder.batch_execute(&hold("2026-01-04 00:00Z")).await.unwrap();
    let running = start(&migration, &["--on-conflict", "target", "--json"]);
    is_blocked(&target, "UPDATE walferry.backfill_piece").await;
    for client in [&source, &target] {
        let late =
            "INSERT INTO conditions VALUES ('2026-01-03 00:00:30Z', 4, 4, 'late'), ('2026-01-06 12:00Z', 4, 4, 'late')";
        run_all(client, &[late]).await;
    }
    holder.batch_execute("ROLLBACK").await.unwrap();
    let done = running.wait().await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.stderr.contains("1 pieces that were copied are gone from the target"), "{}", done.stderr);
    let done = done.json();
    assert_eq!((&done["pieces"], &done["pieces_now"]), (&7.into(), &6.into()), "{done:#}");
    let how = "SELECT how, count(*) FROM walferry.backfill_piece WHERE relation LIKE '%conditions%' GROUP BY how";
    assert_eq!(text(&target, how).await, "(as_it_is,2)\n(found,1)\n(merged,1)\n(rows,2)");

    let rows = "SELECT * FROM conditions WHERE note <> 'another' AND time >= '2026-01-02 06:00Z' AND time < '2026-01-07 12:00Z' \
                AND (time, device) NOT IN (('2026-01-05 00:00Z', 1), ('2026-01-05 00:00Z', 2))";
    assert_eq!(text(&target, rows).await, text(&source, rows).await);
    assert_eq!(
        text(&target, "SELECT count(*) FROM conditions").await,
        text(&target, &format!("SELECT count(*) + 2 FROM ({rows}) r")).await
    );
    let another = "SELECT time, device FROM conditions WHERE value = -1";
    assert_eq!(text(&target, another).await, "(\"2026-01-05 00:00:00+00\",1)\n(\"2026-01-05 00:00:00+00\",2)");
    let hours = "SELECT * FROM hourly WHERE hour <> '2026-01-05 00:00Z' AND hour >= '2026-01-02 06:00Z' AND hour < '2026-01-07 12:00Z'";
    run_all(&source, &["CALL refresh_continuous_aggregate('hourly', NULL, NULL)"]).await;
    assert_eq!(text(&target, hours).await, text(&source, hours).await);
    let compressed = "SELECT range_start::date FROM timescaledb_information.chunks WHERE hypertable_name = 'conditions' AND is_compressed";
    assert_eq!(text(&target, compressed).await, "(2026-01-03)\n(2026-01-04)\n(2026-01-05)");
    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
}

#[tokio::test]
async fn the_schema_alone_brings_hypertables_without_a_chunk_and_migrate_with_a_range_fills_them() {
    if !timescale_available("--schema-only of hypertables") {
        return;
    }
    let servers = Servers::with(&TIMESCALE, &TIMESCALE).await;
    let migration = servers.migration("bare").await;
    let (source, target) = (migration.source().await, migration.target().await);
    run_all(&source, &["CREATE EXTENSION timescaledb"]).await;
    run_all(&source, &SCHEMA).await;
    let more = [
        "SELECT add_dimension('conditions', 'device', number_partitions => 2)",
        "CREATE TABLE ticks (n int PRIMARY KEY, v numeric)",
        "SELECT create_hypertable('ticks', 'n', chunk_time_interval => 100)",
        "CREATE FUNCTION ticks_now() RETURNS int LANGUAGE sql STABLE AS 'SELECT coalesce(max(n), 0) FROM public.ticks'",
        "SELECT set_integer_now_func('ticks', 'ticks_now')",
        "CREATE MATERIALIZED VIEW tens WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS \
         SELECT time_bucket(10, n) AS ten, sum(v) AS v FROM ticks GROUP BY 1 WITH NO DATA",
        "CREATE MATERIALIZED VIEW daily WITH (timescaledb.continuous) AS \
         SELECT time_bucket('1 day', hour) AS day, sum(n) AS n FROM hourly GROUP BY 1 WITH NO DATA",
        "CREATE INDEX ON conditions (note)",
        "INSERT INTO ticks SELECT n, n / 7.0 FROM generate_series(1, 450) n",
        "SELECT add_retention_policy('conditions', interval '100 years')",
        "SELECT add_compression_policy('conditions', interval '90 years')",
        "SELECT alter_job(add_reorder_policy('ticks', 'ticks_pkey'), scheduled => false)",
        "CREATE PROCEDURE own(job_id int, config jsonb) LANGUAGE sql AS 'SELECT 1'",
        "SELECT add_job('own', '1 hour')",
    ];
    run_all(&source, &more).await;
    run_all(&source, &ROWS).await;
    run_all(
        &source,
        &[
            "CALL refresh_continuous_aggregate('hourly', NULL, NULL)",
            "CALL refresh_continuous_aggregate('daily', NULL, NULL)",
        ],
    )
    .await;
    run_all(&source, &["CALL refresh_continuous_aggregate('tens', NULL, 400)"]).await;

    let dir = migration.directory();
    let dir = dir.to_str().unwrap();
    let brought = migration.with_servers("migrate", &["--schema-only", "--dir", dir]).await;
    assert_eq!(brought.code, Some(0), "{}", brought.stderr);
    assert!(brought.stderr.contains("\"own\") sleeps on the target"), "{}", brought.stderr);
    for same in [
        "SELECT to_jsonb(h) - 'num_chunks' FROM timescaledb_information.hypertables h",
        "SELECT to_jsonb(d) FROM timescaledb_information.dimensions d",
        "SELECT to_jsonb(c) FROM timescaledb_information.hypertable_compression_settings c",
        "SELECT to_jsonb(c) FROM timescaledb_information.continuous_aggregates c",
        "SELECT to_jsonb(j) - 'next_start' FROM timescaledb_information.jobs j WHERE job_id >= 1000 AND proc_name <> 'own'",
        "SELECT to_jsonb(i) FROM pg_indexes i WHERE schemaname = 'public'",
    ] {
        assert_same(&migration, same).await;
    }
    let own = "SELECT scheduled FROM timescaledb_information.jobs WHERE proc_name = 'own'";
    assert_eq!((text(&source, own).await, text(&target, own).await), ("(t)".into(), "(f)".into()));
    let none = "SELECT (SELECT count(*) FROM _timescaledb_catalog.chunk), (SELECT count(*) FROM pg_class WHERE relname ~ '_chunk$' AND relkind = 'r')";
    assert_eq!(text(&target, none).await, "(0,0)");
    let restoring: String = target.query_one("SHOW timescaledb.restoring", &[]).await.unwrap().get(0);
    assert_eq!(restoring, "off");

    let range =
        ["--dir", dir, "--tables", "public.conditions,public.device", "--until", UNTIL, "--http-addr", "off", "--json"];
    let filled = migration.with_servers("migrate", &range).await;
    assert_eq!(filled.code, Some(0), "{}", filled.stderr);
    assert!(filled.json()["how"]["as_it_is"].as_i64().unwrap() >= 12, "{}", filled.stdout);
    let ticks = migration.files().join("ticks");
    let range = [
        "--dir",
        ticks.to_str().unwrap(),
        "--tables",
        "public.ticks",
        "--from=1",
        "--until=1000",
        "--http-addr",
        "off",
    ];
    let filled = migration.with_servers("migrate", &range).await;
    assert_eq!(filled.code, Some(0), "{}", filled.stderr);
    for same in [
        "SELECT * FROM conditions",
        "SELECT * FROM hourly",
        "SELECT * FROM daily",
        "SELECT * FROM ticks",
        "SELECT * FROM tens",
    ] {
        assert_same(&migration, same).await;
    }
    // What a backfill does not have says so under that name.
    let wrong = migration.with_servers("migrate", &["--dir", dir, "--until", UNTIL, "--cutover", "auto"]).await;
    assert_eq!(wrong.code, Some(2), "{}", wrong.stderr);
    assert!(wrong.stderr.contains("'--cutover'") && wrong.stderr.contains("walferry backfill"), "{}", wrong.stderr);
}
