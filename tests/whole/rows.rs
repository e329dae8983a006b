//! Rows and tables of every kind.

use crate::area::Area;
use crate::support::Servers;

fn area<'a>(database: &'a str, schema: &'a str, changes: &'a str) -> Area<'a> {
    Area { database, schema, changes, options: &[], explained: &[] }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_arrives_with_its_edge_values() {
    let servers = Servers::with(&[("max_locks_per_transaction", "1000")], &[("max_locks_per_transaction", "1000")]).await;
    for (database, in_binary) in [("whole_text", false), ("whole_binary", true)] {
        let area = area(database, include_str!("types.sql"), include_str!("types_changes.sql"));
        let (migration, running, before) = area.begin(&servers).await;
        let binary = migration.ledger("SELECT binary_format FROM walferry.migration").await[0].get::<_, bool>(0);
        assert_eq!(binary, in_binary);
        area.change(&migration, 2).await;
        area.change(&migration, 3).await;
        migration.cut_over(running).await;
        area.assert_whole(&migration, &before).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_tables_arrive_as_they_are() {
    let servers = Servers::start().await;
    area("odd", include_str!("odd.sql"), include_str!("odd_changes.sql")).migrate(&servers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_of_every_kind_and_inheritance_arrive_with_rows_that_move() {
    let servers = Servers::start().await;
    area("partitions", include_str!("partitions.sql"), include_str!("partitions_changes.sql")).migrate(&servers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h26_every_replica_identity_finds_exactly_its_row() {
    let servers = Servers::start().await;
    area("identity", include_str!("identity.sql"), include_str!("identity_changes.sql")).migrate(&servers).await;
}
