//! Connections that stay open and say nothing any more, for good: the server answers everybody else.

use walferry::demo::server::ThrowawayServer;

use super::proxy::Proxy;
use super::support::process::Running;
use super::support::{Migration, Servers, connect, until_true};

/// A migration that follows, through a proxy before one of its servers.
async fn following(servers: &Servers, before: impl Fn(&Servers) -> &ThrowawayServer) -> (Migration, Proxy, Running) {
    let mut migration = servers.migration("shop").await;
    let table = "CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)";
    migration.source().await.batch_execute(table).await.unwrap();
    let port = before(servers).port();
    let proxy = Proxy::to(port).await.unwrap();
    for url in [&mut migration.source_url, &mut migration.target_url] {
        *url = url.replace(&format!(":{port}/"), &format!(":{}/", proxy.port));
    }
    let mut running = migration.migrate(&["--queue-max-bytes", "1GiB"]);
    migration.wait_for_phase(&mut running, "following").await;
    (migration, proxy, running)
}

async fn goes_on_after_a_stall(before: impl Fn(&Servers) -> &ThrowawayServer) {
    // The source does not find out by itself that nobody is there any more.
    let servers = Servers::with(&[("wal_sender_timeout", "0")], &[]).await;
    let (migration, proxy, mut running) = following(&servers, before).await;
    let source = connect(&servers.source.url_for("shop")).await;
    let target = connect(&servers.target.url_for("shop")).await;
    source.batch_execute("INSERT INTO t DEFAULT VALUES").await.unwrap();
    until_true(&target, "SELECT count(*) = 1 FROM t").await;

    assert!(proxy.freeze_present(true, || true) > 0);
    source.batch_execute("INSERT INTO t DEFAULT VALUES").await.unwrap();
    until_true(&target, "SELECT count(*) = 2 FROM t").await;
    assert!(running.is_alive(), "{}", running.log());
    println!("{}", running.log());
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

#[tokio::test]
async fn a_source_that_goes_silent_is_left_and_asked_anew() {
    goes_on_after_a_stall(|servers| &servers.source).await;
}

#[tokio::test]
async fn a_target_that_goes_silent_is_left_and_asked_anew() {
    goes_on_after_a_stall(|servers| &servers.target).await;
}

#[tokio::test]
async fn a_copy_that_hangs_on_a_silent_connection_begins_again() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    let source = connect(&servers.source.url_for("shop")).await;
    source
        .batch_execute(
            "CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text); \
             INSERT INTO t (body) SELECT repeat(md5(i::text), 30) FROM generate_series(1, 20000) i",
        )
        .await
        .unwrap();
    let proxy = Proxy::to(servers.source.port()).await.unwrap();
    let (port, before) = (proxy.port, servers.source.port());
    migration.source_url = migration.source_url.replace(&format!(":{before}/"), &format!(":{port}/"));
    // So slow that it cannot be over before it stalls.
    proxy.slow(true);
    let mut running = migration.migrate(&["--queue-max-bytes", "1GiB"]);
    until_true(&source, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'COPY%')")
        .await;
    assert!(proxy.freeze_present(true, || true) > 0);
    proxy.slow(false);
    migration.wait_for_phase(&mut running, "following").await;
    assert!(running.log().contains("a connection is dead"), "{}", running.log());
    migration.cut_over(running).await;
    migration.assert_equal().await;
}
