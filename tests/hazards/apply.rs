//! The apply sessions and what they leave in the target's catalog.

use crate::support::{Pair, rows};

#[tokio::test]
async fn h25_batches_do_not_change_the_catalog_and_rules_do_not_fire_again() {
    let pair = Pair::start().await;
    pair.on_source(
        "CREATE TABLE t (id int PRIMARY KEY, v int, w text); INSERT INTO t SELECT n, 0, 'w' FROM generate_series(1, 1000) n; \
         CREATE TABLE ruled (id int PRIMARY KEY, v int); INSERT INTO ruled SELECT n, 0 FROM generate_series(1, 10) n; \
         CREATE TABLE log (id bigserial PRIMARY KEY, what text); \
         CREATE RULE log_update AS ON UPDATE TO ruled DO ALSO INSERT INTO log (what) VALUES ('update ' || NEW.id); \
         CREATE RULE log_insert AS ON INSERT TO ruled DO ALSO INSERT INTO log (what) VALUES ('insert ' || NEW.id); \
         CREATE RULE keep AS ON DELETE TO ruled WHERE OLD.id < 5 DO INSTEAD INSERT INTO log (what) VALUES ('kept ' || OLD.id)",
    )
    .await;
    let mut migrate = pair.migrate();
    // One session has all the staging tables that there will be after the first changes.
    migrate.args(["--apply-workers", "1"]);
    let _walferry = pair.run(migrate);
    pair.following().await;
    let target = pair.target.connect("postgres").await.unwrap();
    let change = async |number: i32| {
        pair.on_source(&format!(
            "UPDATE t SET v = v + 1 WHERE id % 3 = {number} % 3; DELETE FROM t WHERE id = {number}; \
             INSERT INTO t VALUES ({number} + 5000, 1, 'new'); UPDATE ruled SET v = v + 1"
        ))
        .await;
        pair.caught_up().await;
    };
    for number in 1..=3 {
        change(number).await;
    }
    let staging = "SELECT oid, relname, relfilenode, xmin FROM pg_class WHERE relname LIKE 'walferry%' ORDER BY 1";
    let files = "SELECT count(*), sum(relfilenode::bigint) FROM pg_class WHERE relpersistence = 't'";
    let (before, files_before) = (rows(&target, staging).await, rows(&target, files).await);
    assert!(!before.is_empty(), "this test looks at staging tables");
    for number in 4..=24 {
        change(number).await;
    }
    assert_eq!(rows(&target, staging).await, before, "every batch leaves dead rows in the catalog");
    assert_eq!(rows(&target, files).await, files_before);

    pair.on_source("INSERT INTO ruled VALUES (20, 0); DELETE FROM ruled").await;
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT * FROM ruled ORDER BY 1").await.len(), 4);
    pair.same("SELECT * FROM log ORDER BY 1").await;
    pair.same("SELECT * FROM t ORDER BY 1").await;
    pair.same("SELECT rulename, ev_enabled FROM pg_rewrite WHERE ev_class = 'public.ruled'::regclass ORDER BY 1").await;
}

#[tokio::test]
async fn h19_a_deferrable_constraint_that_nobody_checked_stops_the_cutover() {
    let pair = Pair::start().await;
    pair.on_source(
        "CREATE TABLE place (id int PRIMARY KEY, \"the position\" int UNIQUE DEFERRABLE INITIALLY DEFERRED); \
         CREATE TABLE stay (id int PRIMARY KEY, during int4range, cancelled bool DEFAULT false, \
             EXCLUDE USING gist (during WITH &&) WHERE (NOT cancelled) DEFERRABLE); \
         INSERT INTO stay VALUES (8, '[10,20)', true), (9, '[10,20)', true); \
         CREATE TABLE one (id int PRIMARY KEY, n int, UNIQUE NULLS NOT DISTINCT (n) DEFERRABLE); \
         INSERT INTO place SELECT i, i FROM generate_series(1, 5) i; INSERT INTO place VALUES (6, NULL), (7, NULL); \
         INSERT INTO one VALUES (1, NULL)",
    )
    .await;
    let _walferry = pair.run(pair.migrate());
    pair.following().await;
    // What is only in the middle of a transaction against them goes through.
    pair.on_source("UPDATE place SET \"the position\" = \"the position\" + 1; INSERT INTO stay VALUES (1, '[1,5)')")
        .await;
    pair.caught_up().await;
    let cases = [
        ("place", "(100, 50)", "INSERT INTO place VALUES (50, 50)", "have the same \"the position\""),
        (
            "stay",
            "(100, '[10,20)')",
            "INSERT INTO stay VALUES (2, '[15,16)')",
            "against its constraint \"stay_during_excl\"",
        ),
        ("one", "(100, 7)", "UPDATE one SET n = 7", "two rows of \"public\".\"one\" on the target"),
    ];
    for (table, strange, on_source, words) in cases {
        pair.on_target(&format!("INSERT INTO {table} VALUES {strange}")).await;
        pair.on_source(on_source).await;
        pair.caught_up().await;
        let (code, said) = pair.cutover().await;
        assert_eq!(code, 5, "{said}");
        assert!(said.contains(words) && said.contains("--recopy"), "{said}");
        pair.on_target(&format!("DELETE FROM {table} WHERE id = 100")).await;
    }
    let (code, said) = pair.cutover().await;
    assert_eq!(code, 0, "{said}");
    for table in ["place", "stay", "one"] {
        pair.same(&format!("SELECT {table}::text FROM {table} ORDER BY 1")).await;
    }
}
