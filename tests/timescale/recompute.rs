//! `--caggs recompute`: aggregates that are computed on the target, those that cannot be, and what changes after they were computed.

use serde_json::Value;
use tokio_postgres::Client;

use super::live::{ASLEEP, fill};
use super::owner::service::{TIMESCALE_CLOUD, url};
use super::owner::{SCHEMA, seen};
use crate::support::process::Running;
use crate::support::timescale::{servers, timescale_available};
use crate::support::{Migration, connect, until_true};

const RECOMPUTE: [&str; 2] = ["--caggs", "recompute"];
const ARGUMENTS: [&str; 7] = [
    "--replica-identity-full",
    "--no-reverse",
    "--queue-max-bytes",
    "64MiB",
    "--pause-source-jobs",
    "--caggs",
    "recompute",
];

/// One over what is left of the raw rows, one upon it, and one over integers.
const MORE: [&str; 6] = [
    "CREATE MATERIALIZED VIEW recent WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket('1 hour', time) AS bucket, device, sum(value) AS value, count(*) AS n FROM metrics GROUP BY 1, 2 WITH NO DATA",
    "CREATE MATERIALIZED VIEW recent_days WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket('1 day', bucket) AS bucket, sum(n) AS n FROM recent GROUP BY 1 WITH NO DATA",
    "CREATE MATERIALIZED VIEW hundreds WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket(100::bigint, n) AS bucket, sum(v) AS v FROM ticks GROUP BY 1 WITH NO DATA",
    "CALL refresh_continuous_aggregate('recent', NULL, '2025-01-06 00:00Z')",
    "CALL refresh_continuous_aggregate('recent_days', NULL, '2025-01-06 00:00Z')",
    "CALL refresh_continuous_aggregate('hundreds', NULL, 400::bigint)",
];

async fn rows(client: &Client, view: &str) -> String {
    let query = format!(
        "SELECT count(*) || ' ' || coalesce(md5(string_agg(v::text, '' ORDER BY v::text COLLATE \"C\")), '') FROM public.{view} v"
    );
    client.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    client.query_one(&query, &[]).await.unwrap().get(0)
}

/// The objects of the findings with a code.
fn objects(report: &Value, code: &str) -> String {
    let findings = report["findings"].as_array().unwrap().iter().filter(|one| one["code"] == code);
    findings.map(|one| format!("{} {}\n", one["object"], one["message"])).collect()
}

async fn ready(migration: &Migration, running: &mut Running) {
    migration.wait_for_status(running, "ready", |status| status["ready_to_cutover"] == true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aggregates_are_computed_on_the_target_but_for_those_that_would_lose_rows() {
    if !timescale_available("--caggs recompute") {
        return;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = servers.migration("computed").await;
    let (source, target) = (migration.source().await, migration.target().await);
    fill(&source, None).await;
    for statement in MORE {
        source.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    // Of the first one, raw rows are gone; retention could drop those of others while it runs.
    let check = async |options: &[&str]| {
        let all = [&["--json", "--estimate-seconds", "0", "--replica-identity-full", "--no-reverse"], options].concat();
        let check = migration.with_servers("check", &all).await;
        assert_eq!(check.code, Some(0), "{}", check.stdout);
        check.json()
    };
    let report = check(&RECOMPUTE).await;
    let kept = objects(&report, "timescaledb-not-recomputed");
    assert!(kept.contains("hourly") && kept.contains("2025-01-02") && kept.contains("recent"), "{kept}");
    assert!(!kept.contains("hundreds") && !kept.contains("recent_days"), "{kept}");
    assert!(objects(&report, "timescaledb-mode").contains("--caggs recompute"), "{report:#}");
    let report = check(&["--caggs", "recompute", "--pause-source-jobs"]).await;
    let kept = objects(&report, "timescaledb-not-recomputed");
    assert!(kept.contains("hourly") && !kept.contains("recent"), "{kept}");
    let computed = objects(&report, "timescaledb-recompute");
    assert!(["recent", "recent_days", "hundreds", "daily"].iter().all(|view| computed.contains(view)), "{computed}");

    let mut running = migration.migrate(&ARGUMENTS);
    ready(&migration, &mut running).await;
    for view in ["recent", "recent_days", "hundreds", "daily", "hourly"] {
        assert_eq!(rows(&source, view).await, rows(&target, view).await, "{view}");
    }
    let moved = migration.ledger("SELECT definition->>'name' FROM walferry.source_table").await;
    let inner = "SELECT materialization_hypertable_name::text, view_name::text FROM timescaledb_information.continuous_aggregates";
    for row in source.query(inner, &[]).await.unwrap() {
        let is_moved = moved.iter().any(|moved| moved.get::<_, String>(0) == row.get::<_, String>(0));
        assert_eq!(is_moved, row.get::<_, &str>(1) == "hourly", "{}", row.get::<_, &str>(1));
    }

    // What changes now is computed on the source, and is logged on the target: in a chunk that is compressed, in one that is not, as a
    // set, and in one that is new. A chunk that the source drops takes nothing of an aggregate with it.
    let dropped = "SELECT count(*) FROM public.recent WHERE bucket < '2025-01-03 00:00Z'";
    let before: i64 = target.query_one(dropped, &[]).await.unwrap().get(0);
    assert!(before > 0);
    for statement in [
        "UPDATE metrics SET value = value + 100 WHERE device = 1 AND time >= '2025-01-03 05:00Z' AND time < '2025-01-03 09:00Z'",
        "UPDATE metrics SET value = value + 7 WHERE time >= '2025-01-05 00:00Z' AND time < '2025-01-06 00:00Z'",
        "DELETE FROM metrics WHERE device = 3 AND time = '2025-01-04 04:00Z'",
        "INSERT INTO metrics VALUES ('2025-01-05 03:30Z', 9, 'new', 5), ('2024-06-01 00:00Z', 9, 'old', 5)",
        "DELETE FROM ticks WHERE n BETWEEN 150 AND 160",
        "CALL refresh_continuous_aggregate('recent', NULL, '2025-01-06 00:00Z')",
        "CALL refresh_continuous_aggregate('recent_days', NULL, '2025-01-06 00:00Z')",
        "CALL refresh_continuous_aggregate('hundreds', NULL, 400::bigint)",
    ] {
        source.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    let expected = [rows(&source, "recent").await, rows(&source, "recent_days").await, rows(&source, "hundreds").await];
    let dropping = "SELECT drop_chunks('metrics', older_than => '2025-01-03 00:00Z'::timestamptz, newer_than => '2025-01-01 00:00Z'::timestamptz)";
    source.batch_execute(dropping).await.unwrap();
    until_true(&target, "SELECT NOT EXISTS (SELECT FROM public.ticks WHERE n BETWEEN 150 AND 160)").await;

    // What could not be computed any more would be missed at the cutover.
    let rows_of = "SELECT format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name) \
                   FROM timescaledb_information.continuous_aggregates WHERE view_name = 'recent'";
    let rows_of: String = target.query_one(rows_of, &[]).await.unwrap().get(0);
    target.batch_execute("SET timescaledb.skip_cagg_invalidation = on").await.unwrap();
    target.batch_execute(&format!("CREATE TABLE aside AS SELECT * FROM {rows_of} WHERE bucket < '2025-01-03 00:00Z' AND bucket > '2025-01-01 00:00Z'")).await.unwrap();
    target.batch_execute(&format!("DELETE FROM {rows_of} WHERE bucket IN (SELECT bucket FROM aside)")).await.unwrap();
    ready(&migration, &mut running).await;
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse", "--max-write-stall", "25s"]).await;
    assert_eq!(refused.code, Some(5), "{}", refused.stderr);
    assert!(refused.stderr.contains("recent") && refused.stderr.contains("--caggs copy"), "{}", refused.stderr);
    target
        .batch_execute(&format!(
            "INSERT INTO {rows_of} SELECT * FROM aside; DROP TABLE aside; RESET timescaledb.skip_cagg_invalidation"
        ))
        .await
        .unwrap();
    drop(source);
    migration.cut_over(running).await;

    // A refresh computes only what is logged as changed.
    for statement in [
        "CALL public.refresh_continuous_aggregate('public.recent', NULL, '2025-01-06 00:00Z')",
        "CALL public.refresh_continuous_aggregate('public.recent_days', NULL, '2025-01-06 00:00Z')",
        "CALL public.refresh_continuous_aggregate('public.hundreds', NULL, 400::bigint)",
    ] {
        target.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    for (view, expected) in ["recent", "recent_days", "hundreds"].into_iter().zip(expected) {
        assert_eq!(rows(&target, view).await, expected, "{view}");
    }
    assert!(target.query_one(dropped, &[]).await.unwrap().get::<_, i64>(0) >= before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_without_superuser_gets_hypertables_made_again_and_aggregates_computed() {
    if !timescale_available("TimescaleDB to a target without superuser") {
        return;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = TIMESCALE_CLOUD.migration(&servers).await;
    for server in [&servers.source, &servers.target] {
        let superuser = server.connect("app").await.unwrap();
        superuser
            .batch_execute("CREATE EXTENSION timescaledb; ALTER ROLE app_owner LOGIN; CREATE ROLE writer")
            .await
            .unwrap();
    }
    let owner = connect(&url(&servers.source, "app", "app")).await;
    for statement in SCHEMA {
        owner.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    drop(owner);
    // A job of somebody whose role we have not: who makes it there has to be a member.
    let superuser = servers.source.connect("app").await.unwrap();
    for server in [&servers.source, &servers.target] {
        server.connect("app").await.unwrap().batch_execute("CREATE ROLE other LOGIN").await.unwrap();
    }
    let job = "CREATE PROCEDURE app.own(job_id int, config jsonb) LANGUAGE sql AS 'SELECT 1'; GRANT USAGE ON SCHEMA app TO other; \
               SET ROLE other; SELECT add_job('app.own', '1 hour'); RESET ROLE";
    superuser.batch_execute(job).await.unwrap();
    let check = migration
        .with_servers("check", &["--json", "--estimate-seconds", "0", "--no-reverse", "--caggs", "recompute"])
        .await;
    assert!(objects(&check.json(), "timescaledb-job-membership").contains("other"), "{}", check.stdout);
    let no_job = "SELECT delete_job(job_id) FROM timescaledb_information.jobs WHERE proc_name = 'own'; DROP PROCEDURE app.own; \
                  REVOKE USAGE ON SCHEMA app FROM other";
    superuser.batch_execute(no_job).await.unwrap();
    drop(superuser);
    let options = ["--json", "--estimate-seconds", "0", "--no-reverse"];
    let check = migration.with_servers("check", &options).await;
    assert_eq!(check.code, Some(3), "{}", check.stdout);
    assert!(objects(&check.json(), "timescaledb-superuser").contains("daily"), "{}", check.stdout);
    let check = migration.with_servers("check", &[&options[..], &RECOMPUTE].concat()).await;
    assert_eq!(check.code, Some(0), "{}", check.stdout);
    assert!(objects(&check.json(), "timescaledb-mode").contains("no superuser"), "{}", check.stdout);

    let arguments = ["--no-reverse", "--queue-max-bytes", "64MiB", "--caggs", "recompute"];
    let mut running = migration.migrate(&arguments);
    ready(&migration, &mut running).await;
    let source = connect(&url(&servers.source, "app", "app")).await;
    for statement in [
        "UPDATE app.metrics SET value = 9 WHERE time = '2025-01-01 05:00Z'",
        "DELETE FROM app.metrics WHERE device = 3 AND time < '2025-01-01 12:00Z'",
        "INSERT INTO app.metrics VALUES ('2025-01-02 00:30Z', 7, 7), ('2025-03-01 00:00Z', 3, 3)",
        "UPDATE app.devices SET name = 'new' WHERE id = 2",
        "CALL refresh_continuous_aggregate('app.daily', NULL, '2025-01-03 00:00Z')",
    ] {
        source.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    drop(source);
    let target = servers.target.connect("app").await.unwrap();
    until_true(&target, "SELECT count(*) = 1 FROM app.devices WHERE name = 'new'").await;
    ready(&migration, &mut running).await;
    migration.cut_over(running).await;
    let refresh = "CALL refresh_continuous_aggregate('app.daily', NULL, '2025-01-03 00:00Z')";
    connect(&url(&servers.target, "app_owner", "app")).await.batch_execute(refresh).await.unwrap();
    let (of_source, of_target) =
        (seen(&servers.source.url_for("app")).await, seen(&servers.target.url_for("app")).await);
    assert_eq!(of_source, of_target);
}
