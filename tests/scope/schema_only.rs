//! The schema without rows.

use crate::support::{Servers, compare, load};
use crate::{number, relations};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_schema_alone_comes_whole_or_in_part_and_leaves_nothing_behind() {
    let servers = Servers::start().await;
    let migration = servers.migration("whole").await;
    load::fill(&migration.source().await, 100).await;
    let done = migration.migrate(&["--schema-only", "--json"]).wait().await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(done.json()["schema_only"], true);
    let (source, target) = (migration.source().await, migration.target().await);
    assert_eq!(compare::definitions(&source).await, compare::definitions(&target).await);
    assert_eq!(number(&target, "SELECT count(*) FROM app.big").await, 0);
    assert_eq!(migration.left_over().await, Vec::<String>::new());
    let again = migration.migrate(&["--schema-only"]).wait().await;
    assert_eq!(again.code, Some(3), "the target is not empty any more:\n{}", again.stderr);

    let part = servers.migration("part").await;
    load::fill(&part.source().await, 100).await;
    let done = part.migrate(&["--schema-only", "--include-table", "app.big"]).wait().await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let there = relations(&part.target().await).await;
    assert_eq!(there, ["app.big", "app.big_id_seq"].iter().map(ToString::to_string).collect());

    let owned = servers.migration("owned").await;
    let schema = "CREATE ROLE scope_owner LOGIN CONNECTION LIMIT 7; CREATE TABLE owned (id int); ALTER TABLE owned OWNER TO scope_owner";
    owned.source().await.batch_execute(schema).await.unwrap();
    let done = owned.migrate(&["--schema-only", "--roles"]).wait().await;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let owner = "SELECT rolconnlimit::int8 FROM pg_class c JOIN pg_roles r ON r.oid = relowner WHERE relname = 'owned' AND rolname = 'scope_owner'";
    assert_eq!(number(&owned.target().await, owner).await, 7);
    assert_eq!(owned.left_over().await, Vec::<String>::new());
}
