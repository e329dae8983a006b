//! What materialized views show is no row of the stream: refreshed on the source, they are refreshed on the target.

use crate::support::Servers;
use crate::{on_source, same};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1); \
     CREATE MATERIALIZED VIEW plain AS SELECT sum(v) FROM t; \
     CREATE MATERIALIZED VIEW beside AS SELECT id, v FROM t; CREATE UNIQUE INDEX beside_key ON beside (id); \
     CREATE MATERIALIZED VIEW emptied AS SELECT 1 AS one; \
     CREATE MATERIALIZED VIEW filled AS SELECT count(*) FROM t WITH NO DATA; \
     CREATE MATERIALIZED VIEW at_the_fence AS SELECT max(v) FROM t";
const POPULATED: &str = "SELECT relname, relispopulated FROM pg_class WHERE relkind = 'm' ORDER BY 1";

#[tokio::test]
async fn a_materialized_view_shows_what_its_last_refresh_on_the_source_showed() {
    let servers = Servers::start().await;
    let migration = servers.migration("views").await;
    let source = migration.source().await;
    source.batch_execute(SCHEMA).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    source.batch_execute("INSERT INTO t VALUES (2, 2)").await.unwrap();
    for view in ["plain", "CONCURRENTLY beside", "filled"] {
        source.batch_execute(&format!("REFRESH MATERIALIZED VIEW {view}")).await.unwrap();
    }
    source.batch_execute("REFRESH MATERIALIZED VIEW emptied WITH NO DATA; INSERT INTO t VALUES (3, 3)").await.unwrap();
    let on_fence = on_source(&migration, "REFRESH MATERIALIZED VIEW at_the_fence");
    let arguments = ["--yes", "--no-reverse", "--json", "--max-write-stall", "25s", "--on-fence", &on_fence];
    let cutover = migration.with_directory("cutover", &arguments).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    assert_eq!(same(&migration, POPULATED).await, ["at_the_fence|t", "beside|t", "emptied|f", "filled|t", "plain|t"]);
    assert_eq!(same(&migration, "SELECT * FROM at_the_fence").await, ["3"]);
    let target = migration.target().await;
    // As the source's or newer: the third row came after them.
    for (view, before, newer) in [
        ("SELECT * FROM plain", "3", "6"),
        ("SELECT count(*) FROM beside", "2", "3"),
        ("SELECT * FROM filled", "2", "3"),
    ] {
        let shown = crate::rows(&target, view).await;
        assert!(shown == [before] || shown == [newer], "{view}: {shown:?}");
    }
}

#[tokio::test]
async fn a_materialized_view_that_cannot_be_refreshed_stands_against_a_cutover_until_it_is_waived() {
    let servers = Servers::with(&[], &[("cluster_name", "the_target")]).await;
    let migration = servers.migration("views").await;
    let source = migration.source().await;
    source
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY); \
             CREATE FUNCTION only_here() RETURNS int LANGUAGE plpgsql AS $$ BEGIN \
               IF current_setting('cluster_name') = 'the_target' THEN RAISE 'not here'; END IF; RETURN 1; END $$; \
             CREATE MATERIALIZED VIEW here AS SELECT public.only_here()",
        )
        .await
        .unwrap();
    let mut running = migration.migrate(&[]);
    let names_it =
        |status: &serde_json::Value| status["blockers"].to_string().contains("materialized view public.here");
    migration.wait_for_status(&mut running, "the blocker", names_it).await;
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    refused.assert_refused(5, &["materialized view public.here", "not here", "--waive"]);
    let waived = ["--yes", "--no-reverse", "--max-write-stall", "25s", "--waive", "materialized view public.here"];
    let cutover = migration.with_directory("cutover", &waived).await;
    assert_eq!(cutover.code, Some(0), "{}", cutover.stderr);
    assert_eq!(
        crate::rows(&migration.target().await, "SELECT relispopulated FROM pg_class WHERE relname = 'here'").await,
        ["f"]
    );
}
