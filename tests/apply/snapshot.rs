//! Which transactions a table's copy has seen (I3).

use std::sync::Arc;

use tokio_postgres::types::PgLsn;

use super::bed::{Bed, own_server, snapshot_of};

const SCHEMA: &str = "CREATE TABLE plain (id int PRIMARY KEY, a text); CREATE TABLE keyless (a int)";

/// Copies both tables again under the source's snapshot of this moment, and says so in the ledger.
async fn copy_again(bed: &mut Bed) {
    let snapshot = snapshot_of(&bed.source).await;
    for table in ["plain", "keyless"] {
        bed.on_target(&format!("TRUNCATE {table}")).await;
        let columns: String = if table == "plain" { "id || ',' || quote_literal(a)".into() } else { "a::text".into() };
        for row in bed.source.query(&format!("SELECT {columns} FROM {table}"), &[]).await.unwrap() {
            bed.on_target(&format!("INSERT INTO {table} VALUES ({})", row.get::<_, String>(0))).await;
        }
    }
    let running: Vec<String> = snapshot.running.iter().map(u64::to_string).collect();
    bed.on_target(&format!(
        "UPDATE walferry.snapshot SET first_running = {}, next = {}, running = '{{{}}}', insert_lsn = '{}'",
        snapshot.xmin,
        snapshot.xmax,
        running.join(","),
        snapshot.insert_lsn
    ))
    .await;
    bed.reload().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i03_a_change_is_applied_exactly_when_the_copy_has_not_seen_it() {
    // A server of its own: commits that ask for the standby hang here.
    let settings = [("synchronous_standby_names", "dead"), ("synchronous_commit", "local")];
    let server = Arc::new(own_server(&settings).await);
    let mut bed = Bed::with(Arc::clone(&server), SCHEMA, "INSERT INTO plain VALUES (1, 'copied')", 2, false).await;
    bed.on_source("INSERT INTO plain VALUES (2, 'seen'); INSERT INTO keyless VALUES (2)").await;
    // Began before the snapshot, commits after it.
    let open = server.connect(&bed.source_database).await.unwrap();
    open.batch_execute("BEGIN; INSERT INTO plain VALUES (3, 'open'); INSERT INTO keyless VALUES (3)").await.unwrap();
    // Its commit record is in the WAL, and it is not visible: it waits for a standby that is dead.
    let waiting = server.connect(&bed.source_database).await.unwrap();
    waiting.batch_execute("SET synchronous_commit = on").await.unwrap();
    let commit = tokio::spawn(async move {
        let script = "BEGIN; INSERT INTO plain VALUES (4, 'waiting'); INSERT INTO keyless VALUES (4); COMMIT";
        waiting.batch_execute(script).await.unwrap();
    });
    loop {
        let waits: i64 = bed
            .source
            .query_one("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'", &[])
            .await
            .unwrap()
            .get(0);
        if waits == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    copy_again(&mut bed).await;
    let copied: i64 = bed.target.query_one("SELECT count(*) FROM plain", &[]).await.unwrap().get(0);
    assert_eq!(copied, 2, "the copy has the rows 1 and 2, and not that of the commit that waits");
    bed.source.batch_execute("ALTER SYSTEM SET synchronous_standby_names = ''").await.unwrap();
    bed.on_source("SELECT pg_reload_conf()").await;
    commit.await.unwrap();
    open.batch_execute("COMMIT").await.unwrap();
    bed.on_source("INSERT INTO plain VALUES (5, 'after'); UPDATE plain SET a = 'twice' WHERE id IN (2, 4)").await;
    bed.capture_and_apply().await.unwrap();
    bed.assert_equal("around the snapshot").await;
    assert_eq!(bed.serial_replays(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn h06_a_commit_past_the_snapshots_position_is_applied_whatever_its_xid() {
    let mut bed = Bed::new(SCHEMA, "INSERT INTO plain VALUES (1, 'copied')", 2).await;
    bed.on_source("INSERT INTO plain VALUES (2, 'seen')").await;
    copy_again(&mut bed).await;
    // As if 2³² transactions less a thousand had passed since the snapshot: the stream's xids look older than it.
    bed.on_target("UPDATE walferry.snapshot SET first_running = first_running + 1000, next = next + 1000").await;
    bed.reload().await;
    bed.on_source("INSERT INTO plain VALUES (3, 'after'); UPDATE plain SET a = 'twice' WHERE id = 2").await;
    bed.on_source("TRUNCATE keyless; INSERT INTO keyless VALUES (1)").await;
    let insert: PgLsn = bed.target.query_one("SELECT insert_lsn FROM walferry.snapshot", &[]).await.unwrap().get(0);
    let until = bed.capture().await;
    assert!(until > insert.into());
    bed.apply(until).await.unwrap();
    bed.assert_equal("long after the snapshot").await;
}
