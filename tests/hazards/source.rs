//! The source's own life goes on: its application can write as before, and what cannot be followed is not lost in silence.

use tokio_postgres::Client;

use crate::support::{Pair, until, value};

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

/// Brings a slot in the making to where PostgreSQL loses track of a table: it waits for `first`, and a table is emptied while an
/// older transaction, for which the slot waits next, is open. Answers with a transaction that then writes to the table.
async fn empty_beside(pair: &Pair, first: &Client, table: &str) -> Client {
    let open = async || {
        let client = pair.source.connect("postgres").await.unwrap();
        client.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
        client
    };
    let second = open().await;
    pair.on_source(&format!("TRUNCATE {table}")).await;
    first.batch_execute("COMMIT").await.unwrap();
    pair.waits_for(&second).await;
    let third = open().await;
    third.batch_execute(&format!("INSERT INTO {table} VALUES (2)")).await.unwrap();
    second.batch_execute("COMMIT").await.unwrap();
    third
}

#[tokio::test]
async fn h37_a_slot_beside_which_a_table_was_emptied_is_made_anew() {
    let pair = Pair::start().await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let (walferry, first) = pair.run_waiting(pair.migrate()).await;
    let third = empty_beside(&pair, &first, "t").await;
    // What the first slot cannot decode is in flight when the second is begun.
    pair.waits_for(&third).await;
    third.batch_execute("COMMIT").await.unwrap();
    pair.on_source("INSERT INTO t VALUES (3)").await;
    pair.following().await;
    pair.caught_up().await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["2", "3"]);
    let said = walferry.said();
    assert!(said.contains("while the slot was made: public.t; "), "{said}");
}

#[tokio::test]
async fn h37_where_tables_are_emptied_all_the_time_a_resync_goes_on_from_a_slot_that_cannot_be_decoded() {
    let pair = Pair::start().await;
    let tables: Vec<String> = (1..=5).map(|number| format!("t{number}")).collect();
    for table in &tables {
        pair.on_source(&format!("CREATE TABLE {table} (id int PRIMARY KEY); INSERT INTO {table} VALUES (1)")).await;
    }
    // The last of the slots is taken as it is.
    let (walferry, mut first) = pair.run_waiting(pair.migrate()).await;
    for table in &tables {
        pair.waits_for(&first).await;
        first = empty_beside(&pair, &first, table).await;
    }
    until("SELECT consistent_point IS NOT NULL FROM walferry.migration", &pair.target).await;
    first.batch_execute("COMMIT").await.unwrap();
    let (code, said) = walferry.exit().await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("a table was emptied or rewritten while the slot was made"), "{said}");
    assert!(said.contains("could not map file"), "{said}");

    // It is so for good.
    let (code, said) = pair.run(pair.migrate()).exit().await;
    assert_eq!(code, 1, "{said}");
    let _walferry = pair.run(pair.resync());
    pair.following().await;
    pair.on_source("INSERT INTO t5 VALUES (3)").await;
    pair.caught_up().await;
    for table in &tables {
        assert_eq!(pair.same(&format!("SELECT id FROM {table} WHERE id < 3")).await, ["2"]);
    }
    assert_eq!(pair.same("SELECT id FROM t5 ORDER BY 1").await, ["2", "3"]);
}

#[tokio::test]
async fn h37_the_slot_of_the_way_back_is_made_anew_where_a_truncate_was_applied_beside_it() {
    let pair = Pair::start().await;
    pair.on_source("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let open = async || {
        let client = pair.target.connect("postgres").await.unwrap();
        client.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
        client
    };
    let waits_for = async |transaction: &Client| {
        let xid = value(transaction, "SELECT pg_current_xact_id()").await;
        let waits = format!("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND transactionid::text = '{xid}')");
        until(&waits, &pair.target).await;
    };
    let first = open().await;
    let _walferry = pair.run(pair.migrate());
    pair.following().await;
    waits_for(&first).await;
    let second = open().await;
    pair.on_source("TRUNCATE t; INSERT INTO t VALUES (2)").await;
    pair.caught_up().await;
    first.batch_execute("COMMIT").await.unwrap();
    waits_for(&second).await;
    // Written under a snapshot of the target's catalogs in which the table has the old file; what is written later keeps that.
    pair.on_source("INSERT INTO t VALUES (3)").await;
    pair.caught_up().await;
    let third = open().await;
    second.batch_execute("COMMIT").await.unwrap();
    // The next slot in the making.
    waits_for(&third).await;
    third.batch_execute("COMMIT").await.unwrap();
    let (code, said) = pair.cutover_with(&[]).await;
    assert_eq!(code, 0, "{said}");
    pair.on_target("INSERT INTO t VALUES (4)").await;
    until("SELECT count(*) = 3 FROM t", &pair.source).await;
    assert_eq!(pair.same("SELECT id FROM t ORDER BY 1").await, ["2", "3", "4"]);
}
