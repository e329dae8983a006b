//! `--roles`, `--role-map`, `--no-owner` and `--no-privileges`: who owns what on the target.

use crate::support::{Servers, connect};
use crate::{rows, same};

const EVERYTHING: &str = include_str!("everything.sql");
const ROLES: &str = "CREATE ROLE objects_owner LOGIN PASSWORD 'the-owners-password' CONNECTION LIMIT 7 VALID UNTIL '2040-01-01 00:00:00+00'; \
     CREATE ROLE objects_reader; CREATE ROLE \"Objects Writer\" CREATEDB; CREATE ROLE objects_person LOGIN NOINHERIT REPLICATION; \
     GRANT objects_reader TO objects_person WITH ADMIN OPTION; GRANT pg_monitor TO objects_person; \
     ALTER ROLE objects_owner SET search_path = app, public; ALTER ROLE objects_owner IN DATABASE owned SET work_mem = '7MB'; \
     COMMENT ON ROLE objects_reader IS 'reads'; CREATE ROLE objects_stranger";
const OF_ROLES: &str = "SELECT r.rolname, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb, r.rolcanlogin, r.rolreplication, \
     r.rolconnlimit, r.rolvaliduntil, r.rolbypassrls, a.rolpassword, \
     (SELECT string_agg(d.datname || s.setconfig::text, ' ' ORDER BY d.datname) FROM pg_db_role_setting s \
      LEFT JOIN pg_database d ON d.oid = s.setdatabase WHERE s.setrole = r.oid), \
     (SELECT s.setconfig FROM pg_db_role_setting s WHERE s.setrole = r.oid AND s.setdatabase = 0), \
     (SELECT string_agg(roleid::regrole || '/' || admin_option, ' ' ORDER BY roleid::regrole::text) FROM pg_auth_members m WHERE m.member = r.oid), \
     shobj_description(r.oid, 'pg_authid') \
     FROM pg_roles r JOIN pg_authid a ON a.oid = r.oid WHERE r.oid >= 16384 AND r.rolname <> 'objects_stranger' ORDER BY 1";

#[tokio::test]
async fn roles_come_with_passwords_settings_and_memberships_and_the_log_shows_no_password() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("owned").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute(ROLES).await.unwrap();
    source.batch_execute(EVERYTHING).await.unwrap();
    migration.with_servers("check", &[]).await.assert_refused_without_hint(3);
    let check = migration.with_servers("check", &["--roles"]).await;
    assert_eq!(check.code, Some(0), "{}", check.stdout);
    migration.environment.push(("WALFERRY_LOG".into(), "trace".into()));
    let mut running = migration.migrate(&["--roles"]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    let roles = same(&migration, OF_ROLES).await;
    assert_eq!(roles.len(), 4, "{roles:?}");
    let stranger = rows(&target, "SELECT FROM pg_roles WHERE rolname = 'objects_stranger'").await;
    assert!(stranger.is_empty(), "nothing of this database refers to it");
    let verifier = &rows(&source, "SELECT rolpassword FROM pg_authid WHERE rolname = 'objects_owner'").await[0];
    assert!(verifier.starts_with("SCRAM-SHA-256$"), "this test made what it is about");
    assert!(!running.log().contains("SCRAM-SHA-256") && !running.log().contains("the-owners-password"));
    for name in ["migration", "schema_item", "fingerprint"] {
        let held = format!("SELECT FROM walferry.{name} t WHERE t::text LIKE '%SCRAM-SHA-256%'");
        assert!(rows(&target, &held).await.is_empty(), "{name} holds a password");
    }
    // Whoever knew the password still gets in.
    let url = migration.target_url.replacen("postgres://postgres", "postgres://objects_owner", 1);
    assert!(url.contains("objects_owner"), "{url}");
    drop(connect(&url).await);
}

#[tokio::test]
async fn a_role_map_gives_everything_to_the_roles_of_another_name() {
    let servers = Servers::start().await;
    let migration = servers.migration("owned").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute(ROLES).await.unwrap();
    source.batch_execute(EVERYTHING).await.unwrap();
    source
        .batch_execute(
            "SELECT lo_from_bytea(77, 'x'); ALTER LARGE OBJECT 77 OWNER TO objects_owner; \
                          GRANT SELECT ON LARGE OBJECT 77 TO objects_reader",
        )
        .await
        .unwrap();
    target
        .batch_execute("CREATE ROLE \"Other Owner\"; CREATE ROLE other_reader; CREATE ROLE \"Objects Writer\"")
        .await
        .unwrap();
    let map = ["--role-map", "objects_owner=Other Owner", "--role-map", "objects_reader=other_reader"];
    let check = migration.with_servers("check", &map).await;
    assert_eq!(check.code, Some(0), "{}", check.stdout);
    let running = migration.migrate(&map);
    migration.cut_over(running).await;
    // The same schema as if the roles were called so on the source.
    let administrator = servers.source.connect("postgres").await.unwrap();
    administrator
        .batch_execute(
            "ALTER ROLE objects_owner RENAME TO \"Other Owner\"; ALTER ROLE objects_reader RENAME TO other_reader",
        )
        .await
        .unwrap();
    let difference = crate::dump::difference(&migration.source_url, &migration.target_url);
    let unexplained: Vec<&String> = difference.iter().filter(|item| !crate::everything::is_explained(item)).collect();
    assert_eq!(unexplained, [] as [&String; 0]);
    let large = "SELECT lomowner::regrole, lomacl FROM pg_largeobject_metadata";
    assert_eq!(
        same(&migration, large).await,
        ["\"Other Owner\"|{\"\\\"Other Owner\\\"=rw/\\\"Other Owner\\\"\",\"other_reader=r/\\\"Other Owner\\\"\"}"]
    );
}

#[tokio::test]
async fn without_owners_and_privileges_everything_belongs_to_whoever_connects() {
    let servers = Servers::start().await;
    let migration = servers.migration("owned").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute(ROLES).await.unwrap();
    let schema = "CREATE SCHEMA app AUTHORIZATION objects_owner; CREATE TABLE app.t (id int PRIMARY KEY); ALTER TABLE app.t OWNER TO objects_owner; \
         GRANT SELECT ON app.t TO objects_reader; SELECT lo_from_bytea(77, 'x'); ALTER LARGE OBJECT 77 OWNER TO objects_owner; \
         GRANT SELECT ON LARGE OBJECT 77 TO objects_reader; ALTER DEFAULT PRIVILEGES FOR ROLE objects_owner GRANT SELECT ON TABLES TO objects_reader";
    source.batch_execute(schema).await.unwrap();
    let options = ["--no-owner", "--no-privileges"];
    let check = migration.with_servers("check", &options).await;
    assert_eq!(check.code, Some(0), "{}", check.stdout);
    let running = migration.migrate(&options);
    migration.cut_over(running).await;
    for (query, expected) in [
        ("SELECT relowner::regrole, relacl FROM pg_class WHERE relname = 't'", "postgres|NULL"),
        ("SELECT nspowner::regrole, nspacl FROM pg_namespace WHERE nspname = 'app'", "postgres|NULL"),
        ("SELECT lomowner::regrole, lomacl FROM pg_largeobject_metadata", "postgres|NULL"),
        ("SELECT count(*) FROM pg_default_acl", "0"),
    ] {
        assert_eq!(rows(&target, query).await, [expected], "{query}");
    }
}
