//! What a target may refuse without a loss is left out and said; everything else stops the migration.

use crate::rows;
use crate::support::Servers;

#[tokio::test]
async fn the_comment_of_an_extension_that_belongs_to_another_role_is_left_out_and_said() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("harmless").await;
    let (source, target) = (migration.source().await, migration.target().await);
    let extension =
        "CREATE EXTENSION citext; COMMENT ON EXTENSION citext IS 'our own words'; CREATE TABLE t (id int PRIMARY KEY)";
    source.batch_execute(extension).await.unwrap();
    // The service's administrator has installed it; ours may do what a migration needs, and is no superuser.
    target
        .batch_execute(
            "CREATE EXTENSION citext; CREATE ROLE mover LOGIN; GRANT SET ON PARAMETER session_replication_role TO mover; \
             GRANT ALL ON DATABASE harmless TO mover; GRANT ALL ON SCHEMA public TO mover",
        )
        .await
        .unwrap();
    migration.target_url = migration.target_url.replacen("postgres@", "mover@", 1);
    let mut running = migration.migrate(&["--no-owner", "--no-privileges", "--no-reverse"]);
    migration.wait_for_phase(&mut running, "following").await;
    let log = running.log();
    assert!(log.contains("left out, because the extension belongs to another role") && log.contains("citext"), "{log}");
    assert_eq!(
        rows(&target, "SELECT relowner::regrole FROM pg_class WHERE oid = 'public.t'::regclass").await,
        ["mover"]
    );
}

#[tokio::test]
async fn any_other_refusal_stops_the_migration() {
    let servers = Servers::start().await;
    let migration = servers.migration("harmful").await;
    let source = migration.source().await;
    // Only the target's server refuses it.
    let schema = "CREATE TABLE t (id int PRIMARY KEY); CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN 1; END'; \
         UPDATE pg_proc SET proconfig = ARRAY['no_such_setting_here=1'] WHERE proname = 'f'";
    source.batch_execute(schema).await.unwrap();
    let ended = migration.migrate(&[]).wait().await;
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("restoring FUNCTION f()"), "{}", ended.stderr);
}
