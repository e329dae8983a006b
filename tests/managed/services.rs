//! Whole migrations as the roles that services give.

use crate::service::{AZURE, CLOUD_SQL, RDS, Service, TIMESCALE_CLOUD, superuser, url};
use crate::shop::{self, Application};
use crate::support::{Servers, compare, until_true};

async fn migrates(service: Service, settings: &[(&str, &str)]) {
    let servers = Servers::with(settings, settings).await;
    let migration = service.migration(&servers).await;
    let (source, target) = (superuser(&servers.source).await, superuser(&servers.target).await);
    shop::fill(&source).await;
    let check = migration.with_servers("check", &["--estimate-seconds", "0", "--json"]).await;
    assert_eq!(check.code, Some(0), "{}", check.stdout);
    assert!(check.stdout.contains("\"replica-role\""), "{}", check.stdout);

    let application = Application::start(&url(&servers.source, "app", "app"), 2);
    let mut running = migration.migrate(&["--no-reverse"]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    shop::goes_on(&source, 50).await;
    assert_eq!(shop::what_fires(&target).await, [""; 0]);
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    refused.assert_refused(5, &["superuser postgres"]);
    drop(source);
    let beside = servers.source.connect("postgres").await.unwrap();
    until_true(
        &beside,
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = 'app' AND usename = 'postgres')",
    )
    .await;
    migration.cut_over(running).await;
    application.has_ended().await;

    shop::is_the_same_on_both_sides(&migration).await;
    assert_eq!(shop::not_valid(&target).await, ["of_customer"]);
    let verified = migration.with_servers("verify", &[]).await;
    assert_eq!(verified.code, Some(0), "{}{}", verified.stdout, verified.stderr);
    let audited = "SELECT count(*) FROM shop.audit";
    let before: i64 = target.query_one(audited, &[]).await.unwrap().get(0);
    target.batch_execute("SELECT shop.work(9, 1)").await.unwrap();
    assert!(target.query_one(audited, &[]).await.unwrap().get::<_, i64>(0) > before, "triggers fire again");
    let orphan = target.batch_execute("INSERT INTO shop.item (owner, place) VALUES (-1, 1)").await.unwrap_err();
    assert_eq!(orphan.code().map(|code| code.code()), Some("23503"));

    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
    for (client, side) in [(&superuser(&servers.source).await, "source"), (&target, "target")] {
        let mut left = compare::left_over(client, side).await;
        left.retain(|what| !what.starts_with("role "));
        assert_eq!(left, [""; 0]);
    }
}

#[tokio::test]
async fn the_role_that_the_document_makes_on_amazon_rds_migrates_a_whole_database() {
    migrates(RDS, &[("rds.logical_replication", "1")]).await;
}

#[tokio::test]
async fn the_role_that_the_document_makes_on_cloud_sql_migrates_a_whole_database() {
    migrates(CLOUD_SQL, &[]).await;
}

#[tokio::test]
async fn the_role_that_the_document_makes_on_azure_migrates_a_whole_database() {
    migrates(AZURE, &[]).await;
}

#[tokio::test]
async fn the_role_that_the_document_makes_on_timescale_cloud_migrates_a_whole_database() {
    migrates(TIMESCALE_CLOUD, &[]).await;
}
