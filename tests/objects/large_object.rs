//! Large objects are in no stream, and no lock on a table holds them back (H14).

use serde_json::Value;

use crate::support::Servers;
use crate::{on_source, same};

const SCHEMA: &str = include_str!("large_object.sql");
/// What a large object is, and its privileges in an order of their own.
const ALL: &str = "SELECT m.oid, md5(lo_get(m.oid)), length(lo_get(m.oid)), pg_get_userbyid(m.lomowner), \
     (SELECT string_agg(a::text, ' ' ORDER BY a::text) FROM unnest(m.lomacl) a), obj_description(m.oid, 'pg_largeobject') \
     FROM pg_largeobject_metadata m ORDER BY 1";

#[tokio::test]
async fn h14_large_objects_are_copied_and_what_changes_until_the_fence_is_copied_again() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("large").await;
    let (source, target) = (migration.source().await, migration.target().await);
    for side in [&source, &target] {
        side.batch_execute("CREATE ROLE lo_owner; CREATE ROLE \"Lo Reader\"").await.unwrap();
    }
    source.batch_execute(SCHEMA).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    assert_eq!(same(&migration, ALL).await.len(), 611, "the first copy");

    // Somebody writes to one on the target, removes one and makes one there: the comparison says which. A change of the source only waits.
    let verified = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verified.code, Some(0), "{}", verified.stderr);
    assert_eq!(
        verified.json()["large_objects"],
        serde_json::json!({"compared": 611, "pending": 0, "different": [], "different_total": 0})
    );
    target
        .batch_execute(
            "SELECT lo_put(108, 0, 'not the source''s'); SELECT lo_unlink(109); SELECT lo_from_bytea(130, '')",
        )
        .await
        .unwrap();
    let verified = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verified.code, Some(4), "{}", verified.stderr);
    let found = &verified.json()["large_objects"];
    assert_eq!(
        (&found["different_total"], verified.json()["equal"].as_bool()),
        (&serde_json::json!(3), Some(false)),
        "{found}"
    );
    let mut different: Vec<u64> =
        found["different"].as_array().unwrap().iter().map(|oid| oid.as_u64().unwrap()).collect();
    different.sort_unstable();
    assert_eq!(different, [108, 109, 130]);
    assert!(verified.stderr.contains("DELETE FROM walferry.large_object WHERE loid IN ("), "{}", verified.stderr);
    target.batch_execute("DELETE FROM walferry.large_object WHERE loid IN (108, 109, 130)").await.unwrap();

    // Found before the fence: of each kind of change one.
    source
        .batch_execute(
            "SELECT lo_put(100, 5, 'changed'); SELECT lo_unlink(101); SELECT lo_from_bytea(120, 'new'); \
             SELECT lo_truncate(lo_open(104, 131072), 1048576); SELECT lo_put(105, 0, ''); \
             ALTER LARGE OBJECT 103 OWNER TO lo_owner; COMMENT ON LARGE OBJECT 103 IS NULL; \
             GRANT UPDATE ON LARGE OBJECT 103 TO PUBLIC; REVOKE ALL ON LARGE OBJECT 102 FROM \"Lo Reader\"",
        )
        .await
        .unwrap();
    // Changed while writers are held: what is behind the fence's locks, and not in the stream.
    let held = "SELECT lo_put(106, 3, 'late'); SELECT lo_unlink(107); SELECT lo_from_bytea(121, 'late');";
    let on_fence = on_source(&migration, held);
    let arguments = ["--yes", "--json", "--max-write-stall", "25s", "--on-fence", &on_fence];
    let cutover = migration.with_directory("cutover", &arguments).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    let after = same(&migration, ALL).await;
    assert_eq!(after.len(), 611);
    for (oid, content) in [(106, "lo\\000late"), (120, "new"), (121, "late")] {
        let found = crate::rows(&target, &format!("SELECT encode(substr(lo_get({oid}), 1, 7), 'escape')")).await;
        assert_eq!(found, [content], "{oid}");
    }

    // The way back carries them too, and copies nothing that both have.
    let wrote = "SELECT lo_put(100, 0, 'on the new one'); SELECT lo_unlink(102); SELECT lo_from_bytea(122, 'there')";
    migration.target().await.batch_execute(wrote).await.unwrap();
    migration
        .wait_for_status(&mut running, "ready to switch back", |status: &Value| {
            status["direction"] == "back" && status["ready_to_cutover"] == true
        })
        .await;
    let back = migration.with_directory("switchback", &["--yes", "--json", "--max-write-stall", "25s"]).await;
    assert_eq!(back.code, Some(0), "{}\n{}", back.stderr, running.log());
    std::mem::swap(&mut migration.source_url, &mut migration.target_url);
    let after = same(&migration, ALL).await;
    assert!(after.iter().any(|row| row.starts_with("122|")) && !after.iter().any(|row| row.starts_with("102|")));
}
