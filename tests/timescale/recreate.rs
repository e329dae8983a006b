//! TimescaleDB to another version of it: made again on the target, live, with everything going on at once on the source, killed on the way,
//! and compared by plain SQL.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::again::are_copied_again;
use super::killed::is_killed_in_each_phase;
use super::live::{ASLEEP, Application, fill, killed_and_begun_again, nothing_runs_on_the_target_yet};
use crate::support::timescale::{servers, timescale_available, timescale_has_version};
use crate::support::{Migration, Servers, until};

pub(super) const OLD: &str = "2.26.4";

/// What another version has to be told besides: indexes, compression and policies of an aggregate, who owns and reads what, views upon
/// aggregates, keys between tables, ranges of other lengths, jobs of another owner.
const BESIDES: [&str; 16] = [
    "CREATE ROLE keeper LOGIN",
    "CREATE ROLE reader",
    "GRANT CREATE, USAGE ON SCHEMA public TO keeper",
    "CREATE INDEX hourly_n ON hourly (n, bucket)",
    "ALTER MATERIALIZED VIEW hourly SET (timescaledb.compress = true)",
    "SELECT compress_chunk(c) FROM show_chunks('hourly') c",
    "SELECT add_compression_policy('hourly', interval '101 years')",
    "SELECT add_retention_policy('daily', interval '200 years')",
    "GRANT SELECT ON hourly TO reader; COMMENT ON VIEW hourly IS 'by the hour'",
    "CREATE VIEW busy AS SELECT bucket, sum(n) AS n FROM hourly WHERE device > 1 GROUP BY 1",
    "CREATE FUNCTION of_hour(hourly) RETURNS bigint LANGUAGE sql AS 'SELECT $1.n'",
    "ALTER TABLE log OWNER TO keeper",
    "SET ROLE keeper; CREATE PROCEDURE kept(job_id int, config jsonb) LANGUAGE sql AS 'SELECT 1'; \
     SELECT add_job('kept', '2 hours', config => '{\"hypertable_id\": 1}', initial_start => '2030-01-01 00:00Z', timezone => 'Europe/Berlin'); \
     RESET ROLE",
    "CREATE TABLE spans (at timestamptz NOT NULL, device int NOT NULL REFERENCES devices, id bigint GENERATED ALWAYS AS IDENTITY, \
     place int NOT NULL, UNIQUE (at, place, id)); \
     SELECT create_hypertable('spans', 'at', chunk_time_interval => interval '1 day'); \
     SELECT add_dimension('spans', 'place', chunk_time_interval => 10); \
     INSERT INTO spans (at, device, place) SELECT '2025-01-01 00:00Z'::timestamptz + n * interval '1 hour', 1 + n % 20, n % 40 \
     FROM generate_series(0, 60) n; \
     SELECT set_chunk_time_interval('spans', interval '7 days', 'at'); \
     INSERT INTO spans (at, device, place) VALUES ('2025-01-20 00:00Z', 3, 7)",
    "CREATE TRIGGER touch_span BEFORE UPDATE ON spans FOR EACH ROW WHEN (NEW.place > 1000) EXECUTE FUNCTION touch()",
    "SELECT alter_job(1000, max_retries => 7, retry_period => '3 hours', schedule_interval => '5 hours')",
];

/// What users see, but for names and numbers that another server has for itself.
async fn seen(client: &Client) -> BTreeMap<String, String> {
    client.batch_execute("SET search_path = public; SET TimeZone = 'UTC'").await.unwrap();
    let mut seen = BTreeMap::new();
    let relations = client
        .query(
            "SELECT format('%I.%I', schemaname, tablename), format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'public' \
             UNION ALL SELECT 'view ' || viewname, format('%I.%I', schemaname, viewname) FROM pg_views WHERE schemaname = 'public' \
             UNION ALL SELECT 'rows of ' || view_name, format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name) \
             FROM timescaledb_information.continuous_aggregates",
            &[],
        )
        .await
        .unwrap();
    for relation in relations {
        let query = format!(
            "SELECT count(*)::text || ' ' || coalesce(md5(string_agg(h, '' ORDER BY h)), '') \
             FROM (SELECT md5(t::text) COLLATE \"C\" FROM {} t) hashes(h)",
            relation.get::<_, &str>(1)
        );
        seen.insert(relation.get(0), client.query_one(&query, &[]).await.unwrap().get(0));
    }
    // A hypertable by its name, that of an aggregate by its view.
    const CALLED: &str = "WITH called AS (SELECT h.id, format('%I.%I', h.schema_name, h.table_name)::regclass AS relation, \
             coalesce(a.user_view_name, h.table_name)::text AS name \
         FROM _timescaledb_catalog.hypertable h LEFT JOIN _timescaledb_catalog.continuous_agg a ON a.mat_hypertable_id = h.id)";
    for (what, query) in [
        (
            "dimensions",
            "SELECT c.name, d.column_name, d.column_type, d.interval_length, d.num_slices, d.integer_now_func FROM called c \
             JOIN _timescaledb_catalog.dimension d ON d.hypertable_id = c.id",
        ),
        (
            "owners",
            "SELECT c.name, pg_get_userbyid(p.relowner) FROM called c JOIN pg_class p ON p.oid = c.relation WHERE p.relname NOT LIKE '\\_comp%'",
        ),
        (
            "compression",
            "SELECT c.name, s.segmentby, s.orderby, s.orderby_desc, s.orderby_nullsfirst FROM called c \
             JOIN _timescaledb_catalog.compression_settings s ON s.relid = c.relation",
        ),
        (
            "aggregates",
            "SELECT view_name, view_owner, materialized_only, compression_enabled, view_definition FROM timescaledb_information.continuous_aggregates",
        ),
        (
            "jobs",
            "SELECT j.id, j.application_name, j.schedule_interval, j.max_runtime, j.max_retries, j.retry_period, j.proc_schema, j.proc_name, \
                    j.owner, j.scheduled, j.fixed_schedule, j.initial_start, j.check_name, j.timezone, c.name, \
                    CASE WHEN c.id IS NULL THEN j.config ELSE j.config - 'hypertable_id' - 'mat_hypertable_id' END, \
                    c.id = coalesce(j.config->>'hypertable_id', j.config->>'mat_hypertable_id')::int \
             FROM _timescaledb_catalog.bgw_job j LEFT JOIN called c ON c.id = j.hypertable_id WHERE j.id >= 1000",
        ),
        (
            "watermarks",
            "SELECT c.name, w.watermark FROM called c JOIN _timescaledb_catalog.continuous_aggs_watermark w ON w.mat_hypertable_id = c.id",
        ),
        (
            "thresholds",
            "SELECT c.name, w.watermark FROM called c JOIN _timescaledb_catalog.continuous_aggs_invalidation_threshold w ON w.hypertable_id = c.id",
        ),
        (
            "invalid",
            "SELECT c.name, w.lowest_modified_value, w.greatest_modified_value FROM called c \
             JOIN _timescaledb_catalog.continuous_aggs_hypertable_invalidation_log w ON w.hypertable_id = c.id",
        ),
        (
            "invalid rows of aggregates",
            "SELECT c.name, w.lowest_modified_value, w.greatest_modified_value FROM called c \
             JOIN _timescaledb_catalog.continuous_aggs_materialization_invalidation_log w ON w.materialization_id = c.id",
        ),
        (
            "indexes",
            "SELECT c.name, regexp_replace(pg_get_indexdef(i.indexrelid), '_materialized_hypertable_[0-9]+', '', 'g') \
             FROM called c JOIN pg_index i ON i.indrelid = c.relation",
        ),
        (
            "triggers and keys",
            "SELECT t.tgrelid::regclass::text, t.tgname, t.tgenabled FROM pg_trigger t JOIN called c ON c.relation = t.tgrelid \
             WHERE NOT t.tgisinternal AND t.tgname !~ '^(ts_|!walferry)' \
             UNION ALL SELECT k.conrelid::regclass::text, k.conname, k.contype FROM pg_constraint k JOIN called c ON c.relation = k.conrelid",
        ),
        (
            "rights",
            "SELECT c.relname, c.relacl::text, obj_description(c.oid, 'pg_class') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = 'public' AND c.relkind IN ('r', 'v')",
        ),
    ] {
        let query =
            format!("{CALLED} SELECT coalesce(string_agg(r::text, E'\\n' ORDER BY r::text), '') FROM ({query}) r");
        let row = client.query_one(&query, &[]).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        seen.insert(what.into(), row.get(0));
    }
    seen
}

async fn assert_equal(migration: &Migration) {
    let (source, target) = (seen(&migration.source().await).await, seen(&migration.target().await).await);
    assert!(source.len() > 18, "{source:?}");
    for (what, value) in &source {
        assert_eq!(Some(&value.replace("keeper", "guardian")), target.get(what), "{what} of source and target");
    }
    assert_eq!(source.len(), target.len());
}

/// The chunks with compressed rows, by hypertable.
async fn compressed_chunks(client: &Client) -> i64 {
    let count = "SELECT count(*) FROM timescaledb_information.chunks WHERE is_compressed";
    client.query_one(count, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_version_of_timescaledb_gets_everything_made_again_live() {
    let what = "TimescaleDB to another version of it, live";
    if !timescale_available(what) || !timescale_has_version(OLD, what) {
        return;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = servers.migration("again").await;
    let source = migration.source().await;
    fill(&source, Some(OLD)).await;
    for statement in BESIDES {
        source.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    let target = migration.target().await;
    target.batch_execute("CREATE EXTENSION timescaledb; CREATE ROLE guardian LOGIN; CREATE ROLE reader").await.unwrap();
    drop(target);
    let checked = migration.with_servers("check", &["--role-map", "keeper=guardian"]).await;
    assert!(checked.stdout.contains("Made again on the target"), "{}\n{}", checked.stdout, checked.stderr);

    let application = Application::start(&migration.source_url);
    application.goes_on(1).await;
    let arguments =
        ["--replica-identity-full", "--no-reverse", "--queue-max-bytes", "64MiB", "--role-map", "keeper=guardian"];
    // Killed when the schema may be there or not, and in the copy.
    let mut running = migration.migrate(&arguments);
    let migration_began = "SELECT pg_catalog.to_regclass('walferry.timescaledb_recreation') IS NOT NULL";
    let target = migration.target().await;
    until("the way is decided", || async {
        target.query_one(migration_began, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    running = killed_and_begun_again(&migration, running, &arguments).await;
    migration.wait_for_phase(&mut running, "copying").await;
    running = killed_and_begun_again(&migration, running, &arguments).await;
    migration.wait_for_phase(&mut running, "following").await;
    nothing_runs_on_the_target_yet(&migration).await;
    application.goes_on(2).await;
    source.batch_execute("SELECT drop_chunks('log', older_than => '2025-01-02'::timestamp)").await.unwrap();
    source.batch_execute("INSERT INTO log VALUES ('2025-01-01 00:00', 'again', '{}')").await.unwrap();
    source.batch_execute("SELECT drop_chunks('spans', older_than => '2025-01-02 00:00Z'::timestamptz)").await.unwrap();
    source.batch_execute("INSERT INTO spans (at, device, place) VALUES ('2025-02-20 00:00Z', 3, 7)").await.unwrap();
    source.batch_execute("UPDATE spans SET device = 5 WHERE at >= '2025-01-20 00:00Z'").await.unwrap();
    application.goes_on(1).await;
    application.stop().await;
    // A job that changes, one that goes and one that comes while it follows.
    source
        .batch_execute(
            "SELECT alter_job(1001, schedule_interval => '7 hours'); \
             SELECT delete_job(job_id) FROM timescaledb_information.jobs WHERE proc_name = 'kept'",
        )
        .await
        .unwrap();
    source.batch_execute("SELECT add_retention_policy('spans', interval '300 years')").await.unwrap();
    until("chunks are compressed on the target", || async { (compressed_chunks(&target).await > 2).then_some(()) })
        .await;
    let caught_up = |status: &serde_json::Value| status["lag"]["bytes"].as_f64() == Some(0.0);
    migration.wait_for_status(&mut running, "nothing is left to apply", caught_up).await;
    drop((source, target));
    migration.cut_over(running).await;
    assert_equal(&migration).await;

    // What aggregates are made of works on: a change of old rows is in them after a refresh, what has no raw rows any more stays.
    let target = migration.target().await;
    let kept = "SELECT coalesce(sum(n), 0)::int8 FROM public.hourly WHERE bucket < '2025-01-02 00:00Z'";
    let before: i64 = target.query_one(kept, &[]).await.unwrap().get(0);
    assert!(before > 0, "over raw rows that retention has dropped");
    target.batch_execute("INSERT INTO public.metrics VALUES ('2025-01-05 03:30Z', 77, 'new', 1)").await.unwrap();
    target
        .batch_execute(
            "CALL public.refresh_continuous_aggregate('public.hourly', '2025-01-03 00:00Z', '2025-01-06 00:00Z')",
        )
        .await
        .unwrap();
    let new = "SELECT count(*) FROM public.hourly WHERE device = 77";
    assert_eq!(target.query_one(new, &[]).await.unwrap().get::<_, i64>(0), 1);
    assert_eq!(target.query_one(kept, &[]).await.unwrap().get::<_, i64>(0), before);
}

/// Two databases, the target's with the newer version; nothing where this machine has only one.
async fn another_version(name: &str, what: &str) -> Option<(Servers, Migration)> {
    if !timescale_available(what) || !timescale_has_version(OLD, what) {
        return None;
    }
    let servers = servers(&[], &ASLEEP).await;
    let migration = servers.migration(name).await;
    migration.target().await.batch_execute("CREATE EXTENSION timescaledb").await.unwrap();
    Some((servers, migration))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn made_again_and_killed_in_each_phase_jobs_are_right_and_it_goes_on() {
    let what = "kill -9 in each phase of a migration to another version of TimescaleDB, --pause-source-jobs";
    let Some((_servers, migration)) = another_version("killed", what).await else { return };
    is_killed_in_each_phase(&migration, Some(OLD)).await;
    assert_equal(&migration).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn made_again_chunks_that_differ_are_copied_again_by_repair_recopy_and_resync() {
    let what = "repair, --recopy and resync of hypertables that are made again";
    let Some((_servers, migration)) = another_version("again", what).await else { return };
    are_copied_again(&migration, Some(OLD)).await;
    assert_equal(&migration).await;
}
