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
