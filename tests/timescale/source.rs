//! What is read of a server.

use walferry::demo::server::ThrowawayServer;
use walferry::timescale::source::{extension, read};

use crate::support::programs;
use crate::support::timescale::{TIMESCALE, timescale_available, timescale_has_version};

const SCHEMA: &str = "
CREATE TABLE conditions (time timestamptz NOT NULL, device int NOT NULL, room text, value float8, PRIMARY KEY (device, time));
SELECT create_hypertable('conditions', 'time', chunk_time_interval => interval '1 day');
SELECT add_dimension('conditions', 'device', number_partitions => 2);
ALTER TABLE conditions SET (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time DESC');
INSERT INTO conditions SELECT t, d, 'r', d FROM generate_series('2025-01-01 00:00Z'::timestamptz, '2025-01-02 23:00Z', '1 hour') t, \
    generate_series(1, 4) d;
CREATE TABLE ticks (n bigint NOT NULL, v int);
SELECT create_hypertable('ticks', 'n', chunk_time_interval => 1000);
CREATE FUNCTION ticks_now() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT coalesce(max(n), 0) FROM public.ticks';
SELECT set_integer_now_func('ticks', 'ticks_now');
SELECT compress_chunk(c) FROM show_chunks('conditions', older_than => '2025-01-02 00:00Z'::timestamptz) c;
INSERT INTO conditions VALUES ('2025-01-01 00:30Z', 1, 'late', 1);
SELECT add_retention_policy('conditions', interval '100 years');
";

const AGGREGATES: [&str; 4] = [
    "CREATE MATERIALIZED VIEW hourly WITH (timescaledb.continuous, timescaledb.materialized_only = true) AS \
     SELECT time_bucket('1 hour', time) AS bucket, device, avg(value) AS value FROM conditions GROUP BY 1, 2 WITH NO DATA",
    "CREATE MATERIALIZED VIEW daily WITH (timescaledb.continuous) AS \
     SELECT time_bucket('1 day', bucket) AS bucket, device, avg(value) AS value FROM hourly GROUP BY 1, 2 WITH NO DATA",
    "CALL refresh_continuous_aggregate('hourly', NULL, NULL)",
    "SELECT alter_job(add_continuous_aggregate_policy('daily', interval '3 days', interval '1 hour', interval '1 hour'), scheduled => false)",
];

#[tokio::test]
async fn all_that_a_server_has_of_timescaledb_is_read() {
    if !timescale_available("what is read of TimescaleDB") {
        return;
    }
    let server = ThrowawayServer::start(&programs(), "timescale", &TIMESCALE).await.unwrap();
    let plain = server.connect("postgres").await.unwrap();
    assert_eq!(extension(&plain).await.unwrap(), None);
    assert_eq!(read(&plain).await.unwrap(), None);
    for version in ["2.26.4", "2.28.3"] {
        if !timescale_has_version(version, "what is read of this version of TimescaleDB") {
            continue;
        }
        let database = format!("v{}", version.replace('.', "_"));
        plain.batch_execute(&format!("CREATE DATABASE {database}")).await.unwrap();
        let client = server.connect(&database).await.unwrap();
        let create = format!("CREATE SCHEMA ts; CREATE EXTENSION timescaledb WITH SCHEMA ts VERSION '{version}'");
        client.batch_execute(&create).await.unwrap();
        client.batch_execute(&format!("SET search_path = public, ts; {SCHEMA}")).await.unwrap();
        for statement in AGGREGATES {
            client.batch_execute(statement).await.unwrap();
        }
        let found = read(&client).await.unwrap().unwrap();
        let extension = &found.extension;
        assert_eq!(
            (extension.version.as_str(), extension.schema.as_str(), extension.license.as_str(), extension.loaded),
            (version, "ts", "timescale", true)
        );
        let names: Vec<(&str, Option<&str>)> =
            found.hypertables.iter().map(|h| (h.name.as_str(), h.materializes.as_deref())).collect();
        assert_eq!(names.len(), 4, "{names:?}");
        assert_eq!((names[0], names[1]), (("conditions", None), ("ticks", None)));
        let materializes: Vec<&str> = names.iter().filter_map(|(_, of)| *of).collect();
        assert_eq!(materializes, ["public.hourly", "public.daily"]);
        let (conditions, ticks) = (&found.hypertables[0], &found.hypertables[1]);
        assert_eq!((conditions.compression, ticks.compression), (true, false));
        assert_eq!(conditions.segment_by, ["device"]);
        assert_eq!(conditions.order_by, [r#""time" DESC NULLS FIRST"#]);
        let [time, device] = &conditions.dimensions[..] else { panic!("{conditions:?}") };
        assert_eq!((time.column_type.as_str(), time.interval), ("timestamp with time zone", Some(86_400_000_000)));
        assert_eq!((device.column.as_str(), device.partitions, device.interval), ("device", Some(2), None));
        assert_eq!((ticks.dimensions[0].interval, ticks.dimensions[0].column_type.as_str()), (Some(1000), "bigint"));
        assert_eq!(ticks.dimensions[0].integer_now.as_deref(), Some("public.ticks_now"));

        let chunks: Vec<_> = found.chunks.iter().filter(|chunk| chunk.hypertable == conditions.id).collect();
        assert_eq!(chunks.len(), 4, "two days in two partitions: {chunks:?}");
        assert!(chunks.iter().all(|chunk| chunk.slices.len() == 2 && chunk.slices[0].dimension == time.id));
        let compressed: Vec<_> = chunks.iter().filter(|chunk| chunk.is_compressed()).collect();
        assert_eq!(compressed.len(), 2);
        assert!(compressed.iter().all(|chunk| chunk.compressed.is_some()));
        assert_eq!(compressed.iter().filter(|chunk| chunk.is_partial()).count(), 1);
        assert_eq!(compressed[0].slices[0].end - compressed[0].slices[0].start, 86_400_000_000);
        assert!(chunks.iter().all(|chunk| !chunk.is_compressed() || chunk.slices[0].start == 1_735_689_600_000_000));

        let [hourly, daily] = &found.aggregates[..] else { panic!("{:?}", found.aggregates) };
        assert_eq!((hourly.raw, hourly.parent, daily.raw), (conditions.id, None, hourly.materialization));
        assert_eq!(daily.parent, Some(hourly.materialization));
        assert!(hourly.definition.contains("avg(") && hourly.materialized_only);
        assert_eq!(hourly.watermark, Some(1_735_862_400_000_000));
        assert!(daily.watermark < Some(0), "never refreshed: {daily:?}");

        let [retention, refresh] = &found.jobs[..] else { panic!("{:?}", found.jobs) };
        assert_eq!((retention.proc_name.as_str(), retention.hypertable), ("policy_retention", Some(conditions.id)));
        assert_eq!((retention.scheduled, refresh.scheduled, retention.owner.as_str()), (true, false, "postgres"));
        assert!(retention.config.as_deref().is_some_and(|config| config.contains("drop_after")));
        assert_eq!(refresh.proc_name, "policy_refresh_continuous_aggregate");
        assert_eq!((found.distributed().count(), found.tiered().count()), (0, 0));
    }
}
