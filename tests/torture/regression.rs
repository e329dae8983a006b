//! What the torture found, small enough to be shown by itself.

use std::collections::BTreeMap;
use std::time::Duration;

use walferry::connection::ConnectionSpec;
use walferry::cutover;
use walferry::demo::server::{ServerPrograms, ThrowawayServer};
use walferry::lsn::Lsn;
use walferry::source::catalog::{ReplicaIdentity, Table};
use walferry::source::snapshot::SnapshotData;
use walferry::target::ledger::{self, Migration, Part, Phase, Prepared};
use walferry::target::role::ApplyRole;
use walferry::target::writer::Writer;

/// A target with the ledger of a migration of one table, `public.t`, whose one part is planned.
async fn prepared_target() -> ThrowawayServer {
    let programs = ServerPrograms::find(None).unwrap();
    let server = ThrowawayServer::start(&programs, "regression", &[("fsync", "off")]).await.unwrap();
    let mut client = server.connect("postgres").await.unwrap();
    client.batch_execute("CREATE TABLE public.t (a int)").await.unwrap();
    let migration = Migration {
        id: "00000001".into(),
        source_system: "1".into(),
        source_timeline: 1,
        source_database: "postgres".into(),
        slot: "s".into(),
        publication: "p".into(),
        insert_only_publication: "i".into(),
        binary: false,
        apply_workers: 2,
        phase: Phase::Preparing,
        consistent_point: None,
        pre_data_restored: false,
        post_data_restored: false,
        snapshot_floor: 0,
        queue: "queue".into(),
        way_back: None,
        apply_role: ApplyRole::Replica,
        scope: Default::default(),
    };
    ledger::create(&mut client, &migration).await.unwrap();
    let prepared = Prepared {
        consistent_point: Lsn(16),
        snapshot: &snapshot("10:10:"),
        tables: &[(table(), true)],
        items: &[],
        fingerprint: &BTreeMap::new(),
        binary: false,
    };
    ledger::record_prepared(&mut client, &migration, &prepared).await.unwrap();
    ledger::plan_copy(&mut client, None, &[part()]).await.unwrap();
    server
}

fn snapshot(text: &str) -> SnapshotData {
    SnapshotData::parse(text, Lsn(16)).unwrap()
}

fn part() -> Part {
    Part { relid: 1, part: 0, first_page: 0, end_page: None }
}

fn table() -> Table {
    Table {
        relid: 1,
        schema: "public".into(),
        name: "t".into(),
        unlogged: false,
        is_partition: false,
        identity: ReplicaIdentity::Default,
        columns: vec![],
        key: vec![],
        has_other_unique: false,
        pages: 0,
        bytes: 0,
        estimated_rows: 0.0,
        updates_and_deletes: 0,
        relfilenode: None,
        firing: Vec::new(),
        hypertable: None,
    }
}

/// Two sessions wrote the same batch, because the first had seemed lost with its commit on the way. Without a key to refuse
/// it, the rows were there twice.
#[tokio::test]
async fn a_batch_is_not_committed_again_beside_a_session_that_seemed_lost() {
    let server = prepared_target().await;
    let spec = ConnectionSpec::parse(&server.url()).unwrap();
    let mut lost = Writer::open(&spec, "lost", ApplyRole::Replica).await.unwrap();
    let mut successor = Writer::open(&spec, "successor", ApplyRole::Replica).await.unwrap();
    lost.begin().await.unwrap();
    successor.begin().await.unwrap();
    let stood = [(0, Lsn(16)), (1, Lsn(16))];
    lost.advance(&stood, Lsn(32)).await.unwrap();
    lost.commit().await.unwrap();
    let error = successor.advance(&stood, Lsn(32)).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}

/// A part's commit was on its way when the copy was planned anew: its rows stayed, and counted as the new snapshot's.
#[tokio::test]
async fn a_new_plan_waits_for_a_part_whose_commit_is_on_its_way() {
    let server = prepared_target().await;
    let lost = server.connect("postgres").await.unwrap();
    lost.batch_execute("BEGIN; INSERT INTO public.t VALUES (1)").await.unwrap();
    assert!(ledger::part_copied(&lost, &part(), 1).await.unwrap());
    let mut client = server.connect("postgres").await.unwrap();
    let planning =
        tokio::spawn(async move { ledger::plan_copy(&mut client, Some(&snapshot("20:20:")), &[part()]).await });
    let watching = server.connect("postgres").await.unwrap();
    let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)";
    while !watching.query_one(waits, &[]).await.unwrap().get::<_, bool>(0) && !planning.is_finished() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    lost.batch_execute("COMMIT").await.unwrap();
    let error = planning.await.unwrap().unwrap_err();
    assert!(error.is_transient(), "{error}");
    let tables = ledger::tables(&watching).await.unwrap();
    assert!(tables[0].copied && tables[0].snapshot == Some(0), "it is complete under the snapshot it was copied under");
}

/// The fence was lifted while the decision was on its way: two primaries.
#[tokio::test]
async fn a_fence_is_not_lifted_beside_a_decision_on_its_way() {
    let server = prepared_target().await;
    let deciding = server.connect("postgres").await.unwrap();
    deciding
        .batch_execute(
            "UPDATE walferry.migration SET fence = '{\"cutover\": \"x\"}'; ALTER DATABASE postgres SET default_transaction_read_only = on; \
             BEGIN; UPDATE walferry.migration SET phase = 'cut_over'",
        )
        .await
        .unwrap();
    let spec = ConnectionSpec::parse(&server.url()).unwrap();
    let target = spec.connect("walferry").await.unwrap();
    let lifting = tokio::spawn(async move { cutover::lift_left_over_fence(&spec, &target, &spec, "walferry").await });
    let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock')";
    let watching = server.connect("postgres").await.unwrap();
    while !watching.query_one(waits, &[]).await.unwrap().get::<_, bool>(0) && !lifting.is_finished() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    deciding.batch_execute("COMMIT").await.unwrap();
    assert!(lifting.await.unwrap().unwrap().is_none(), "the target is the primary: the source stays closed");
    let row = watching.query_one("SELECT count(*) FROM pg_db_role_setting WHERE setrole = 0", &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 1);
}
