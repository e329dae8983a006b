//! The source as managed services have it: a role that `docs/managed-services.md` makes, member of the tables' owner, without
//! superuser and without ALTER SYSTEM. So sessions that are there already publish no new chunks, and those come late.

#[path = "../managed/service.rs"]
#[allow(dead_code)]
pub(super) mod service;

use serde_json::Value;

use self::service::{AZURE, url};
use crate::support::timescale::{servers, timescale_available};
use crate::support::{connect, until_true};

/// Made by the owner, who is no superuser either.
pub(super) const SCHEMA: [&str; 14] = [
    "SET ROLE app_owner",
    "CREATE SCHEMA app",
    "SET search_path = app, public",
    "CREATE TABLE metrics (time timestamptz NOT NULL, device int NOT NULL, value int, PRIMARY KEY (device, time))",
    "SELECT create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day')",
    "ALTER TABLE metrics SET (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time')",
    "INSERT INTO metrics SELECT t, d, d FROM generate_series('2025-01-01 00:00Z'::timestamptz, '2025-01-04 23:00Z', '1 hour') t, \
     generate_series(1, 3) d",
    "SELECT compress_chunk(c) FROM show_chunks('metrics', older_than => '2025-01-03 00:00Z'::timestamptz) c",
    "CREATE MATERIALIZED VIEW daily WITH (timescaledb.continuous) AS \
     SELECT time_bucket('1 day', time) AS day, device, sum(value) AS value FROM metrics GROUP BY 1, 2 WITH NO DATA",
    "CALL refresh_continuous_aggregate('daily', NULL, '2025-01-03 00:00Z')",
    "SELECT add_compression_policy('metrics', interval '90 years')",
    "CREATE TABLE devices (id int PRIMARY KEY, name text)",
    "INSERT INTO devices SELECT n, 'd' || n FROM generate_series(1, 5) n",
    "GRANT USAGE ON SCHEMA app TO writer; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA app TO writer",
];

/// Rows of all that users see, by plain SQL.
pub(super) async fn seen(url: &str) -> Vec<String> {
    let client = connect(url).await;
    client.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    let mut seen = Vec::new();
    for relation in ["app.metrics", "app.devices", "app.daily"] {
        let query =
            format!("SELECT count(*) || ' ' || md5(string_agg(t::text, ',' ORDER BY t::text)) FROM {relation} t");
        seen.push(format!("{relation} {}", client.query_one(&query, &[]).await.unwrap().get::<_, String>(0)));
    }
    let jobs = "SELECT job_id || ' ' || proc_name || ' ' || owner || ' ' || scheduled FROM timescaledb_information.jobs \
                WHERE job_id >= 1000 ORDER BY 1";
    seen.extend(client.query(jobs, &[]).await.unwrap().iter().map(|row| row.get::<_, String>(0)));
    seen
}

fn codes(report: &Value) -> Vec<(String, String)> {
    let findings = report["findings"].as_array().unwrap().iter();
    findings.map(|one| (one["code"].to_string(), one.to_string())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_without_superuser_moves_hypertables_whose_chunks_other_sessions_left_unpublished() {
    if !timescale_available("an owner without superuser on a source with TimescaleDB") {
        return;
    }
    let servers = servers(&[], &[]).await;
    // The document's target is made beside: the extension's catalog is written by a superuser of the target.
    let mut migration = AZURE.migration(&servers).await;
    migration.target_url = servers.target.url_for("app");
    let superuser = servers.source.connect("app").await.unwrap();
    superuser
        .batch_execute(
            "CREATE EXTENSION timescaledb; CREATE ROLE writer LOGIN; CREATE ROLE other LOGIN; GRANT CREATE ON DATABASE app TO other; \
             GRANT pg_monitor TO other; ALTER ROLE app_owner LOGIN",
        )
        .await
        .unwrap();
    let target = servers.target.connect("app").await.unwrap();
    target.batch_execute("CREATE ROLE writer; CREATE ROLE other").await.unwrap();
    let owner = connect(&url(&servers.source, "app", "app")).await;
    for statement in SCHEMA {
        owner.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    // A job of a role that we are no member of.
    let other = connect(&url(&servers.source, "other", "app")).await;
    other
        .batch_execute(
            "CREATE SCHEMA other; CREATE PROCEDURE other.own(job_id int, config jsonb) LANGUAGE sql AS 'SELECT 1'; \
             SELECT public.add_job('other.own', '1 hour')",
        )
        .await
        .unwrap();
    let arguments = ["--no-reverse", "--pause-source-jobs", "--queue-max-bytes", "64MiB"];
    let options = ["--estimate-seconds", "0", "--json", "--pause-source-jobs", "--no-reverse"];
    let check = migration.with_servers("check", &options).await;
    let login = codes(&check.json()).into_iter().find(|(code, _)| code.contains("timescaledb-job-login"));
    assert!(login.is_some_and(|(_, text)| text.contains("app_owner") && text.contains("other")), "{}", check.stdout);
    target.batch_execute("ALTER ROLE app_owner LOGIN; DROP ROLE other").await.unwrap();
    let check = migration.with_servers("check", &options).await;
    check.assert_refused_without_hint(3);
    let missing = codes(&check.json()).into_iter().find(|(code, _)| code.contains("timescaledb-job-owner"));
    assert!(missing.is_some_and(|(_, text)| text.contains("CREATE ROLE \\\"other\\\" LOGIN")), "{}", check.stdout);
    target.batch_execute("CREATE ROLE other LOGIN").await.unwrap();
    let check = migration.with_servers("check", &options).await;
    let found = codes(&check.json());
    let of = |code: &str| found.iter().find(|(found, _)| found.trim_matches('"') == code).map(|(_, text)| text.clone());
    assert!(of("timescaledb-jobs").is_some_and(|text| text.contains("policy_compression")), "{found:#?}");
    let not_ours = of("timescaledb-jobs-of-others").unwrap();
    assert!(not_ours.contains("own") && not_ours.contains("GRANT") && !not_ours.contains("policy_"), "{not_ours}");
    assert_eq!(check.code, Some(0), "{}", check.stdout);

    // Sessions of before the migration: what is set for the database reaches them never.
    let writer = connect(&url(&servers.source, "writer", "app")).await;
    let second = connect(&url(&servers.source, "writer", "app")).await;
    writer.batch_execute("SELECT count(*) FROM app.metrics").await.unwrap();
    second.batch_execute("SELECT count(*) FROM app.metrics").await.unwrap();
    drop(superuser);
    let mut running = migration.migrate(&arguments);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let as_owner = connect(&url(&servers.source, "app", "app")).await;
    let running_jobs =
        "SELECT string_agg(proc_name, ' ') FROM timescaledb_information.jobs WHERE job_id >= 1000 AND scheduled";
    let jobs: String = as_owner.query_one(running_jobs, &[]).await.unwrap().get(0);
    assert_eq!(jobs, "own", "only what is ours rests");
    let set = "SELECT string_agg(option, ' ') FROM pg_db_role_setting, unnest(setconfig) option WHERE option LIKE 'timescaledb.%'";
    let set: String = as_owner.query_one(set, &[]).await.unwrap().get(0);
    assert!(set.contains("auto_publication=on") && set.contains("batch_delete=off"), "{set}");

    // A chunk of each of them, one transaction open while the chunk is looked for, one closed before; and a second one in its time.
    writer
        .batch_execute("INSERT INTO app.metrics VALUES ('2025-02-01 00:00Z', 1, 1), ('2025-02-01 01:00Z', 1, 1)")
        .await
        .unwrap();
    second
        .batch_execute("BEGIN; INSERT INTO app.metrics VALUES ('2025-02-01 02:00Z', 2, 2), ('2025-02-02 00:00Z', 2, 2)")
        .await
        .unwrap();
    let published = "SELECT count(*) > 0 FROM pg_publication_tables p JOIN timescaledb_information.chunks k \
         ON k.chunk_schema = p.schemaname AND k.chunk_name = p.tablename WHERE k.range_start >= '2025-02-01 00:00Z'";
    until_true(&as_owner, published).await;
    writer.batch_execute("UPDATE app.metrics SET value = 5 WHERE time = '2025-02-01 01:00Z'").await.unwrap();
    let here =
        target.query_one("SELECT count(*) FROM app.metrics WHERE time >= '2025-02-01 00:00Z'", &[]).await.unwrap();
    assert_eq!(here.get::<_, i64>(0), 0, "what is older is waited out first");
    second.batch_execute("DELETE FROM app.metrics WHERE time = '2025-02-01 00:00Z'; COMMIT").await.unwrap();
    let deadline = std::time::Instant::now() + crate::support::PATIENCE;
    let copied = "SELECT count(*) = 3 FROM app.metrics WHERE time >= '2025-02-01 00:00Z'";
    while !target.query_one(copied, &[]).await.unwrap().get::<_, bool>(0) {
        assert!(running.is_alive() && std::time::Instant::now() < deadline, "{}", running.log());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    // Followed from then on, compressed rows too; and what a new session makes is published by itself.
    writer.batch_execute("UPDATE app.metrics SET value = 7 WHERE time = '2025-02-02 00:00Z'").await.unwrap();
    let fresh = connect(&url(&servers.source, "writer", "app")).await;
    fresh
        .batch_execute(
            "INSERT INTO app.metrics VALUES ('2025-03-01 00:00Z', 3, 3); UPDATE app.metrics SET value = 9 WHERE time = '2025-01-01 05:00Z'; \
             DELETE FROM app.metrics WHERE device = 3 AND time < '2025-01-02 00:00Z'; \
             INSERT INTO app.metrics VALUES ('2025-01-02 01:00Z', 1, 4) ON CONFLICT (device, time) DO UPDATE SET value = EXCLUDED.value",
        )
        .await
        .unwrap();
    drop((writer, second, fresh, owner, as_owner, other));
    // A chunk that is made known just then would have the cutover given up.
    let newest = "SELECT count(*) = 1 FROM app.metrics WHERE time >= '2025-03-01 00:00Z'";
    until_true(&target, newest).await;
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    migration.cut_over(running).await;
    let guards = "SELECT count(DISTINCT tgrelid) FROM pg_trigger WHERE tgname ~ '^!walferry_seen' AND tgrelid = 'app.metrics'::regclass";
    let guards: i64 = servers.source.connect("app").await.unwrap().query_one(guards, &[]).await.unwrap().get(0);
    assert_eq!(guards, 1, "the hypertable was counted before the fence, and guarded from then on");
    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    let (of_source, of_target) =
        (seen(&servers.source.url_for("app")).await, seen(&servers.target.url_for("app")).await);
    assert_eq!(of_source, of_target);
    assert!(
        of_source.iter().any(|job| job.ends_with("app_owner true")),
        "jobs run again, as their owner: {of_source:?}"
    );
}
