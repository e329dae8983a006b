//! The source's own life goes on: its application can write as before, and what cannot be followed is not lost in silence.

use crate::support::{Pair, value};

#[tokio::test]
async fn h27_tables_without_a_usable_identity_take_the_applications_updates_and_stop_the_cutover() {
    let pair = Pair::start().await;
    let tables = ["deferred", "nullable", "keyless", "nothing", "leaf", "untouched"];
    pair.on_source(
        "CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE, v int); \
         CREATE TABLE nullable (id int UNIQUE, v int); \
         CREATE TABLE keyless (id int, v int); \
         CREATE TABLE nothing (id int PRIMARY KEY, v int); ALTER TABLE nothing REPLICA IDENTITY NOTHING; \
         CREATE TABLE root (id int, v int) PARTITION BY RANGE (id); \
         CREATE TABLE leaf PARTITION OF root FOR VALUES FROM (0) TO (100); \
         CREATE TABLE leaf_with_key PARTITION OF root FOR VALUES FROM (100) TO (200); \
         ALTER TABLE leaf_with_key ADD PRIMARY KEY (id); \
         CREATE TABLE untouched (id int, v int); \
         INSERT INTO root VALUES (150, 0), (151, 0)",
    )
    .await;
    for table in tables {
        pair.on_source(&format!("INSERT INTO {table} SELECT n, 0 FROM generate_series(1, 5) n")).await;
    }
    let _walferry = pair.run(pair.migrate());
    pair.following().await;
    for table in tables {
        pair.on_source(&format!("INSERT INTO {table} VALUES (10, 0)")).await;
    }
    // What can be followed is; a TRUNCATE of the others too.
    pair.on_source("UPDATE root SET v = 1 WHERE id = 150; DELETE FROM root WHERE id = 151").await;
    pair.on_source("TRUNCATE untouched; INSERT INTO untouched VALUES (1, 1), (1, 1)").await;
    pair.caught_up().await;
    for table in tables {
        pair.same(&format!("SELECT * FROM {table} ORDER BY 1")).await;
    }
    assert_eq!(pair.same("SELECT * FROM leaf_with_key").await, ["150|1"]);

    let application = pair.source.connect("postgres").await.unwrap();
    for table in tables.iter().filter(|table| **table != "untouched") {
        for change in [format!("UPDATE {table} SET v = 2 WHERE id = 1"), format!("DELETE FROM {table} WHERE id = 2")] {
            application.batch_execute(&change).await.unwrap_or_else(|error| panic!("{change}: {error:?}"));
        }
    }
    let (code, said) = pair.cutover().await;
    assert_eq!(code, 5, "{said}");
    for table in tables {
        let named = said.contains(&format!("public.{table}")) || said.contains(&format!("\"{table}\""));
        assert_eq!(named, table != "untouched", "{table}: {said}");
    }
    // It is given up as if nothing had been.
    let application = pair.source.connect("postgres").await.unwrap();
    application.batch_execute("INSERT INTO keyless VALUES (11, 0)").await.unwrap();
    assert_eq!(value(&application, "SHOW default_transaction_read_only").await, "off");
}
