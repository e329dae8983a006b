//! One schema file with one of everything, migrated live, and the dumps of both sides beside each other.

use crate::dump;
use crate::same;
use crate::support::Servers;

const ROLES: &str = include_str!("roles.sql");
const EVERYTHING: &str = include_str!("everything.sql");

/// Of the server's own replication, and said by `check`; the publications of the migration itself go with `clean`. And the label
/// whose provider is missing.
pub fn is_explained(item: &str) -> bool {
    let kinds =
        ["; Type: PUBLICATION;", "; Type: PUBLICATION TABLE;", "; Type: SUBSCRIPTION;", "; Type: SECURITY LABEL;"];
    item.starts_with("source: ") && kinds.iter().any(|kind| item.lines().next().unwrap_or_default().contains(kind))
}

#[tokio::test]
async fn everything_besides_rows_arrives_and_what_does_not_is_named() {
    let servers = Servers::start().await;
    let migration = servers.migration("everything").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute(ROLES).await.unwrap();
    target.batch_execute(ROLES).await.unwrap();
    source.batch_execute(EVERYTHING).await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    let log = running.log();
    assert!(log.contains("left out") && log.contains("SECURITY LABEL TABLE item"), "{log}");
    // On the way, and refreshed on the target too.
    source
        .batch_execute("INSERT INTO app.item (name) VALUES ('late'); REFRESH MATERIALIZED VIEW app.by_mood")
        .await
        .unwrap();
    migration.cut_over(running).await;
    assert!(!same(&migration, "SELECT * FROM app.by_mood ORDER BY 1").await.is_empty());
    assert!(!same(&migration, "SELECT * FROM app.ddl_log ORDER BY 1").await.is_empty());
    assert!(
        same(&migration, "SELECT relpersistence, relispopulated FROM pg_class WHERE relname = 'never'").await
            == ["p|f"]
    );
    let difference = dump::difference(&migration.source_url, &migration.target_url);
    let (explained, unexplained): (Vec<_>, Vec<_>) = difference.iter().partition(|item| is_explained(item));
    assert_eq!(unexplained, [] as [&String; 0]);
    assert!(!explained.is_empty(), "this test made what is not moved");
    assert_eq!(
        same(&migration, "SELECT extname, extversion FROM pg_extension ORDER BY 1").await.len(),
        5,
        "plpgsql, and four of the schema's"
    );
}
