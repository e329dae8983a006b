//! Extensions: their versions, and what users keep in their configuration tables.

use crate::same;
use crate::support::Servers;

/// As the script of an extension would do it, whose files a test cannot put onto the server.
const CONFIGURATION: &str = "CREATE EXTENSION hstore VERSION '1.4'; \
     CREATE TABLE known (name text PRIMARY KEY, own boolean, twice int GENERATED ALWAYS AS (length(name) * 2) STORED); \
     CREATE TABLE detail (id int PRIMARY KEY, name text REFERENCES known); CREATE SEQUENCE number; \
     ALTER EXTENSION hstore ADD TABLE known; ALTER EXTENSION hstore ADD TABLE detail; ALTER EXTENSION hstore ADD SEQUENCE number; \
     UPDATE pg_extension SET extconfig = ARRAY['known'::regclass::oid, 'detail'::regclass, 'number'::regclass], \
         extcondition = ARRAY['WHERE own', '', ''] WHERE extname = 'hstore'; \
     INSERT INTO known VALUES ('shipped', false)";

#[tokio::test]
async fn rows_of_an_extensions_configuration_tables_are_copied_until_the_fence() {
    let servers = Servers::start().await;
    let migration = servers.migration("configured").await;
    let (source, target) = (migration.source().await, migration.target().await);
    for side in [&source, &target] {
        side.batch_execute(CONFIGURATION).await.unwrap();
    }
    source
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO known VALUES ('ours', true), ('it''s', true); \
             INSERT INTO detail VALUES (1, 'ours'), (2, NULL); SELECT setval('number', 42)",
        )
        .await
        .unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let all = "SELECT known.*, detail.*, number.last_value FROM number, known FULL JOIN detail USING (name) ORDER BY 1";
    assert_eq!(same(&migration, all).await.len(), 4);
    source
        .batch_execute(
            "DELETE FROM detail WHERE id = 1; DELETE FROM known WHERE name = 'ours'; INSERT INTO known VALUES ('new', true); \
             INSERT INTO detail VALUES (3, 'new'); SELECT nextval('number')",
        )
        .await
        .unwrap();
    migration.cut_over(running).await;
    assert_eq!(same(&migration, all).await.len(), 4);
    assert_eq!(same(&migration, "SELECT count(*) FROM known WHERE name = 'shipped'").await, ["1"]);
}

#[tokio::test]
async fn an_extension_gets_the_version_that_the_source_has() {
    let servers = Servers::start().await;
    let migration = servers.migration("versions").await;
    let source = migration.source().await;
    let older = "CREATE TABLE t (id int PRIMARY KEY); CREATE EXTENSION hstore VERSION '1.4'; CREATE EXTENSION pg_trgm";
    source.batch_execute(older).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    let versions = same(&migration, "SELECT extname, extversion FROM pg_extension ORDER BY 1").await;
    assert!(versions.contains(&"hstore|1.4".to_owned()), "{versions:?}");
}

const PLACES: &str = "CREATE EXTENSION postgis; \
     INSERT INTO spatial_ref_sys (srid, auth_name, auth_srid, proj4text) VALUES (990001, 'ours', 1, '+proj=longlat +datum=WGS84 +no_defs'); \
     CREATE TABLE place (id int PRIMARY KEY, at geometry(Point, 4326) NOT NULL, area geography(Polygon), any_shape geometry, box box2d, \
                         CHECK (ST_X(at) < 180)); \
     CREATE INDEX place_at ON place USING gist (at); CREATE INDEX place_area ON place USING gist (area); \
     CREATE TABLE by_shape (shape geometry PRIMARY KEY, n int); \
     CREATE TABLE keyless (shape geometry); ALTER TABLE keyless REPLICA IDENTITY FULL; \
     CREATE VIEW lengths AS SELECT id, ST_Length(any_shape) FROM place; \
     INSERT INTO place SELECT g, ST_SetSRID(ST_MakePoint(g / 10.0, -g / 7.0), 4326), ST_Buffer(ST_MakePoint(g / 10.0, 1)::geography, 100), \
         (ARRAY['POINT EMPTY', 'LINESTRING Z (0 0 1, 1 1 2)', 'SRID=990001;POINT(1 2)', 'CIRCULARSTRING(0 0, 1 1, 2 0)', \
                'GEOMETRYCOLLECTION(POINT M (1 2 3), POINT M EMPTY)'])[1 + g % 5]::geometry, ST_MakeBox2D(ST_Point(0, 0), ST_Point(g, g)) \
         FROM generate_series(1, 200) g; \
     INSERT INTO by_shape SELECT ST_MakePoint(g, g), g FROM generate_series(1, 50) g; \
     INSERT INTO keyless SELECT ST_MakePoint(g % 3, 0) FROM generate_series(1, 9) g";

#[tokio::test]
async fn shapes_of_postgis_arrive_as_values_and_keys_with_the_users_reference_systems() {
    let servers = Servers::start().await;
    let migration = servers.migration("places").await;
    let (source, target) = (migration.source().await, migration.target().await);
    let available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'postgis'";
    if source.query_one(available, &[]).await.unwrap().get::<_, i64>(0) == 0 {
        eprintln!(
            "!!! SKIPPED: PostGIS is not installed beside the servers: `make setup-tests` does it on Debian and Ubuntu"
        );
        return;
    }
    source.batch_execute(PLACES).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    source
        .batch_execute(
            "UPDATE by_shape SET shape = ST_Translate(shape, 1000, 0) WHERE n > 40; DELETE FROM by_shape WHERE shape = ST_MakePoint(3, 3); \
             UPDATE place SET any_shape = ST_GeomFromText('POLYGON((0 0, 0 1, 1 1, 0 0))', 990001), area = NULL WHERE id % 3 = 0; \
             DELETE FROM keyless WHERE ctid IN (SELECT ctid FROM keyless WHERE ST_X(shape) = 1 LIMIT 2); \
             INSERT INTO keyless VALUES (NULL); \
             INSERT INTO spatial_ref_sys (srid, auth_name, auth_srid, proj4text) VALUES (990002, 'ours', 2, '+proj=longlat')",
        )
        .await
        .unwrap();
    migration.cut_over(running).await;
    let rows = "SELECT id::text, ST_AsEWKT(at), ST_AsText(area), ST_AsEWKB(any_shape)::text, box::text FROM place \
                UNION ALL SELECT n::text, shape::text, '', '', '' FROM by_shape UNION ALL SELECT '', shape::text, '', '', '' FROM keyless ORDER BY 1, 2";
    assert_eq!(same(&migration, rows).await.len(), 200 + 49 + 8);
    assert_eq!(
        same(&migration, "SELECT srid, proj4text FROM spatial_ref_sys WHERE auth_name = 'ours' ORDER BY 1").await.len(),
        2
    );
    let near = "SET enable_seqscan = off; EXPLAIN SELECT FROM place WHERE at && ST_MakeEnvelope(0, -1, 1, 0, 4326)";
    let plan = target.simple_query(near).await.unwrap();
    assert!(format!("{plan:?}").contains("place_at"), "the index serves: {plan:?}");
}
