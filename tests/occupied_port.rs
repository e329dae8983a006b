//! The port for metrics belongs to somebody else: the migration goes on without, says so everywhere, and takes it when it is free.

use std::net::TcpListener;

use crate::support::{Servers, http, load};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_occupied_metrics_port_is_said_and_does_not_stop_a_migration() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 100).await;
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = occupied.local_addr().unwrap();
    let mut running = migration.migrate(&["--http-addr", &address.to_string()]);
    let ready = |status: &serde_json::Value| status["ready_to_cutover"] == true;
    let status = migration.wait_for_status(&mut running, "ready without metrics", ready).await;
    let said = format!("no metrics and no page: {address} is in use by another program");
    let attention = status["attention"].as_array().unwrap();
    assert!(attention.iter().any(|text| text.as_str().unwrap().starts_with(&said)), "{status:#}");
    assert!(running.log().contains(&said), "{}", running.log());
    let terminal = migration.with_directory("status", &[]).await;
    assert!(terminal.stdout.contains(&said), "{}", terminal.stdout);

    drop(occupied);
    // Not by connecting: a connection to a free port can meet itself.
    let content = |status: &serde_json::Value| status["attention"].as_array().unwrap().is_empty();
    migration.wait_for_status(&mut running, "nothing to look after", content).await;
    assert!(http::get(address.port(), "/metrics").contains("walferry_phase{phase=\"following\"} 1"));
    migration.cut_over(running).await;
    migration.assert_equal().await;
}
