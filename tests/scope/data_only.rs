//! Rows into a schema that is there already.

use crate::support::{Servers, until_true};
use crate::{assert_same_rows, number};

const SOURCE: &str = "
    CREATE TABLE parent (id int PRIMARY KEY, name text, at timestamptz DEFAULT now());
    CREATE TABLE child (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, parent int REFERENCES parent, body text, doubled int GENERATED ALWAYS AS (id * 2) STORED);
    CREATE TABLE wide (id bigserial PRIMARY KEY, body text);
    CREATE FUNCTION pass() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER only_here BEFORE INSERT ON parent FOR EACH ROW EXECUTE FUNCTION pass(); ALTER TABLE parent ENABLE ALWAYS TRIGGER only_here;
    SELECT lo_from_bytea(4711, 'data, too');
    INSERT INTO parent SELECT i, 'p' || i FROM generate_series(1, 500) i;
    INSERT INTO child (parent, body) SELECT 1 + i % 500, 'c' || i FROM generate_series(1, 2000) i;
    INSERT INTO wide (body) SELECT repeat(md5(i::text), 40) FROM generate_series(1, 10000) i;
    ANALYZE";

/// Columns in another order, more of them, a trigger that must not fire, and all keys and indexes already.
const TARGET: &str = "
    CREATE TABLE wide (added int DEFAULT 7, body text, id bigserial PRIMARY KEY);
    CREATE TABLE parent (at timestamptz DEFAULT now(), note text, name text, id int PRIMARY KEY);
    CREATE TABLE child (body text, doubled int, parent int REFERENCES parent, id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
    CREATE INDEX child_body ON child (body);
    CREATE TABLE fired (at timestamptz);
    CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO fired VALUES (now()); RETURN NEW; END';
    CREATE TRIGGER fire BEFORE INSERT OR UPDATE OR DELETE ON child FOR EACH ROW EXECUTE FUNCTION fire();";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_alone_go_into_tables_that_are_there_with_their_columns_found_by_name() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute(SOURCE).await.unwrap();
    target.batch_execute(TARGET).await.unwrap();
    let mut running = migration.migrate(&["--data-only"]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    source
        .batch_execute(
            "INSERT INTO parent VALUES (1001, 'new'); INSERT INTO child (parent, body) VALUES (1001, 'new'); \
             UPDATE child SET body = body || '!' WHERE id % 3 = 0; DELETE FROM child WHERE id % 7 = 0; \
             UPDATE wide SET body = 'short' WHERE id < 100; TRUNCATE child, parent; \
             INSERT INTO parent VALUES (1, 'again'); INSERT INTO child (parent, body) SELECT 1, 'again' FROM generate_series(1, 50)",
        )
        .await
        .unwrap();
    until_true(&target, "SELECT count(*) = 50 FROM child").await;
    let columns = "id, parent, body FROM child";
    assert_same_rows(
        &source,
        &target,
        &["(SELECT id, name, at FROM parent)", &format!("(SELECT {columns})"), "(SELECT id, body FROM wide)"],
    )
    .await;
    assert_eq!(number(&target, "SELECT count(*) FROM fired").await, 0, "no trigger fires");
    assert_eq!(number(&target, "SELECT count(*) FROM wide WHERE added <> 7").await, 0, "a default fills what is new");

    migration.cut_over(running).await;
    // Keys, identity and sequences are as they were made there, and go on where the source's were.
    assert!(target.batch_execute("INSERT INTO child (id) VALUES (-1)").await.is_err(), "GENERATED ALWAYS again");
    let next = "INSERT INTO child (parent) VALUES (1) RETURNING id::int8";
    assert_eq!(number(&target, next).await, 2051 + 1);
    assert_eq!(number(&target, "SELECT nextval('wide_id_seq')").await, 10001);
    assert_eq!(number(&target, "SELECT count(*) FROM pg_largeobject_metadata").await, 1);
    assert_eq!(number(&target, "SELECT count(*) FROM fired").await, 1, "the trigger fires again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_names_each_difference_that_would_refuse_or_lose_rows() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source
        .batch_execute(
            "CREATE TABLE a (id int PRIMARY KEY, b int, c varchar(10), d int); CREATE TABLE gone (id int PRIMARY KEY); \
             CREATE TABLE k (id int PRIMARY KEY); CREATE TABLE f (id int PRIMARY KEY, k int); CREATE SEQUENCE s",
        )
        .await
        .unwrap();
    target
        .batch_execute(
            "CREATE TABLE a (id int PRIMARY KEY, b bigint, d int NOT NULL, e int NOT NULL); CREATE TABLE k (id int UNIQUE DEFERRABLE); \
             ALTER TABLE k DROP CONSTRAINT k_id_key; CREATE TABLE q (id int PRIMARY KEY); \
             CREATE TABLE f (id int PRIMARY KEY, k int REFERENCES q); INSERT INTO f VALUES (1)",
        )
        .await
        .unwrap();
    let check = migration.with_servers("check", &["--data-only", "--json", "--estimate-seconds", "0"]).await;
    assert_eq!(check.code, Some(3), "{}", check.stderr);
    let report = check.json();
    let found = |code: &str| {
        let findings = report["findings"].as_array().unwrap();
        let found = findings.iter().find(|finding| finding["code"] == code);
        found.unwrap_or_else(|| panic!("no {code} in {report:#}"))["object"].as_str().unwrap().to_owned()
    };
    assert_eq!(found("target-table-missing"), "\"public\".\"gone\"");
    assert_eq!(found("target-column-missing"), "\"c\" of \"public\".\"a\" (character varying(10))");
    assert_eq!(found("target-column-type"), "\"b\" of \"public\".\"a\" (bigint there, integer on the source)");
    assert_eq!(found("target-column-not-null"), "\"d\" of \"public\".\"a\"");
    assert_eq!(found("target-column-extra"), "\"e\" of \"public\".\"a\"");
    assert_eq!(found("target-key-missing"), "\"public\".\"k\" (\"id\")");
    assert_eq!(found("target-foreign-key-extra"), "\"f_k_fkey\" of \"public\".\"f\"");
    assert_eq!(found("target-table-not-empty"), "\"public\".\"f\"");
    assert_eq!(found("target-sequence-missing"), "\"public\".\"s\"");
    // Where nothing keeps the target's triggers and foreign keys from acting on what comes, they are named.
    target.batch_execute("CREATE ROLE mover LOGIN IN ROLE pg_read_all_data, pg_write_all_data").await.unwrap();
    let as_superuser = migration.target_url.clone();
    migration.target_url = as_superuser.replacen("postgres@", "mover@", 1);
    assert_ne!(migration.target_url, as_superuser);
    let check = migration.with_servers("check", &["--data-only", "--json", "--estimate-seconds", "0"]).await;
    let report = check.json();
    let fires = report["findings"].as_array().unwrap().iter().find(|finding| finding["code"] == "target-fires");
    assert_eq!(fires.unwrap_or_else(|| panic!("{report:#}"))["object"], "constraint f_k_fkey on \"public\".\"f\"");
    migration.target_url = as_superuser;
    let refused = migration.migrate(&["--data-only"]).wait().await;
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert_eq!(number(&target, "SELECT count(*) FROM f").await, 1, "nothing was touched");
}

/// Identity columns of every kind on one side, and of another on the other.
const IDENTITIES: [&str; 2] = [
    "CREATE TABLE one (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, body text); \
     CREATE TABLE two (id int PRIMARY KEY, n int GENERATED BY DEFAULT AS IDENTITY, body text); \
     CREATE TABLE three (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int, body text); \
     INSERT INTO one (id, body) SELECT i, 'x' FROM generate_series(1, 100) i; INSERT INTO two (id, body) SELECT i, 'x' FROM generate_series(1, 100) i; \
     INSERT INTO three (n, body) SELECT i, 'x' FROM generate_series(1, 100) i",
    "CREATE TABLE one (id int PRIMARY KEY, n int NOT NULL DEFAULT 7, body text); \
     CREATE TABLE two (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, body text); \
     CREATE TABLE three (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, n int, body text)",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_way_back_of_rows_alone_knows_each_sides_own_identity_columns() {
    let servers = Servers::start().await;
    let migration = servers.migration("identities").await;
    let (source, target) = (migration.source().await, migration.target().await);
    source.batch_execute(IDENTITIES[0]).await.unwrap();
    target.batch_execute(IDENTITIES[1]).await.unwrap();
    let mut running = migration.migrate(&["--data-only"]);
    let tables = ["(TABLE one)", "(TABLE two)", "(TABLE three)"];
    // By set, and by a statement for a single row.
    let write = |from: i32| {
        format!(
            "UPDATE one SET body = 'new' WHERE id < 60; UPDATE two SET body = 'new' WHERE id < 60; UPDATE three SET body = 'new' WHERE id < 60; \
             INSERT INTO one (id, n) VALUES ({from}, DEFAULT); INSERT INTO two (id) VALUES ({from}); INSERT INTO three (n) VALUES ({from}); \
             DELETE FROM one WHERE id = {from} - 900; UPDATE two SET body = 'last' WHERE id = {from}"
        )
    };
    let ready = |status: &serde_json::Value| status["ready_to_cutover"] == true && status["way_back"] == "ready";
    migration.wait_for_status(&mut running, "ready with a way back", ready).await;
    source.batch_execute(&write(1001)).await.unwrap();
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    let (source, target) = (migration.source().await, migration.target().await);
    assert_same_rows(&source, &target, &tables).await;
    let kinds = "SELECT string_agg(c.relname || '.' || a.attname || a.attidentity::text, ' ' ORDER BY c.relname) FROM pg_attribute a \
         JOIN pg_class c ON c.oid = a.attrelid WHERE c.relname IN ('one', 'two', 'three') AND c.relkind = 'r' AND a.attidentity <> ''";
    let kinds = async |client: &tokio_postgres::Client| client.query_one(kinds, &[]).await.unwrap().get::<_, String>(0);
    assert_eq!(kinds(&target).await, "three.idd two.na");

    target.batch_execute(&write(1002)).await.unwrap();
    target.batch_execute("UPDATE one SET n = n + 1000 WHERE id > 90").await.unwrap();
    let ready = |status: &serde_json::Value| status["direction"] == "back" && status["ready_to_cutover"] == true;
    migration.wait_for_status(&mut running, "ready to switch back", ready).await;
    let back = migration.with_directory("switchback", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(back.code, Some(0), "{}\n{}", back.stderr, running.log());
    let (source, target) = (migration.source().await, migration.target().await);
    assert_same_rows(&source, &target, &tables).await;
    assert_eq!(
        (kinds(&source).await, kinds(&target).await),
        ("one.na three.ida two.nd".into(), "three.idd two.na".into())
    );
}
