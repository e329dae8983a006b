//! I11: whatever changes on the source after its schema was dumped is named, whatever kind of object it is.

use walferry::source::catalog::{changed_objects, fingerprint};

use crate::support::Servers;

#[tokio::test]
async fn i11_every_kind_of_change_is_named() {
    let servers = Servers::start().await;
    let migration = servers.migration("changing").await;
    let source = migration.source().await;
    source.batch_execute(include_str!("roles.sql")).await.unwrap();
    source.batch_execute(include_str!("everything.sql")).await.unwrap();
    let mut before = fingerprint(&source).await.unwrap();
    for (change, named) in [
        ("GRANT SELECT ON app.heaped TO objects_reader", "table app.heaped"),
        ("GRANT UPDATE (id) ON app.heaped TO objects_reader", "column id of table app.heaped"),
        ("ALTER VIEW app.cheap OWNER TO objects_owner", "view app.cheap"),
        ("REVOKE EXECUTE ON FUNCTION app.standard FROM PUBLIC", "function app.standard(n integer)"),
        ("CREATE SCHEMA late", "schema late"),
        ("GRANT CREATE ON SCHEMA app TO objects_reader", "schema app"),
        ("ALTER DOMAIN app.positive VALIDATE CONSTRAINT is_small", "constraint is_small on type app.positive"),
        ("ALTER DOMAIN app.positive SET NOT NULL", "type app.positive"),
        ("CREATE TYPE app.late AS ENUM ()", "type app.late"),
        ("ALTER POLICY mine ON app.item USING (false)", "policy mine on table app.item"),
        ("CREATE RULE late AS ON UPDATE TO app.heaped DO ALSO NOTIFY x", "rule late on table app.heaped"),
        ("DROP CAST (integer AS app.cents)", "cast from integer to app.cents"),
        (
            "ALTER OPERATOR app.< (app.cents, app.cents) SET (RESTRICT = scalarltsel)",
            "operator app.<(app.cents,app.cents)",
        ),
        (
            "ALTER OPERATOR FAMILY app.cents_family USING hash RENAME TO other_family",
            "operator family app.other_family for access method hash",
        ),
        ("ALTER TEXT SEARCH CONFIGURATION app.search DROP MAPPING FOR word", "text search configuration app.search"),
        ("ALTER TEXT SEARCH DICTIONARY app.plain (STOPWORDS = german)", "text search dictionary app.plain"),
        ("ALTER STATISTICS app.item_statistics SET STATISTICS 50", "statistics object app.item_statistics"),
        ("ALTER COLLATION app.german OWNER TO objects_owner", "collation app.german"),
        ("ALTER SERVER elsewhere OPTIONS (SET host 'other.invalid')", "server elsewhere"),
        ("DROP USER MAPPING FOR PUBLIC SERVER elsewhere", "user mapping for public on server elsewhere"),
        ("ALTER EVENT TRIGGER watch_tables DISABLE", "event trigger watch_tables"),
        (
            "ALTER DEFAULT PRIVILEGES IN SCHEMA app GRANT SELECT ON TABLES TO PUBLIC",
            "default privileges on new relations belonging to role postgres in schema app",
        ),
        ("COMMENT ON TABLE app.heaped IS 'late'", "comment on table app.heaped"),
        ("COMMENT ON COLUMN app.item.secret IS NULL", "comment on column secret of table app.item"),
    ] {
        source.batch_execute(change).await.unwrap_or_else(|error| panic!("{change}: {error:?}"));
        let now = fingerprint(&source).await.unwrap();
        let changed: Vec<&str> = changed_objects(&before, &now).collect();
        assert!(changed.contains(&named), "{change}: {changed:?}");
        before = now;
    }
    // Nothing that a migration or an application does all day is a change.
    let daily = "CREATE TEMP TABLE t (id int); CREATE TEMP VIEW v AS SELECT 1 AS one; INSERT INTO app.heaped VALUES (1); \
         REFRESH MATERIALIZED VIEW app.by_mood; CREATE SCHEMA walferry; COMMENT ON SCHEMA walferry IS 'ours'; ANALYZE; \
         SELECT lo_create(7); COMMENT ON LARGE OBJECT 7 IS 'compared by content'";
    source.batch_execute(daily).await.unwrap();
    let now = fingerprint(&source).await.unwrap();
    assert_eq!(changed_objects(&before, &now).collect::<Vec<_>>(), [] as [&str; 0]);
}
