//! H36: timeouts of the server, the database and the role end none of our sessions.

use std::time::Duration;

use crate::support::load::{Application, fill};
use crate::support::{Servers, hold_pg_dump};

/// Each ends a session that does not take it away for itself.
const TIMEOUTS: [&str; 5] = [
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "tcp_user_timeout",
];

/// Longer than any of them.
const LONGER: Duration = Duration::from_millis(1600);

#[tokio::test]
async fn h36_a_migration_outlives_the_timeouts_of_server_database_and_role() {
    let servers = Servers::start().await;
    let mut migration = servers.migration("shop").await;
    for server in [&servers.source, &servers.target] {
        let superuser = server.connect("postgres").await.unwrap();
        let newer =
            superuser.query("SELECT name FROM pg_settings WHERE name IN ('transaction_timeout')", &[]).await.unwrap();
        let names = TIMEOUTS.iter().map(|name| (*name).to_owned()).chain(newer.iter().map(|row| row.get(0)));
        for name in names {
            for place in ["SYSTEM", "DATABASE shop", "ROLE postgres", "ROLE postgres IN DATABASE shop"] {
                superuser.batch_execute(&format!("ALTER {place} SET {name} = '1s'")).await.unwrap();
            }
        }
        superuser.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    }
    let unlimited = |url: &str| format!("{url}?options=-c%20statement_timeout%3D0%20-c%20idle_session_timeout%3D0");
    let application_url = unlimited(&migration.source_url);
    fill(&crate::support::connect(&application_url).await, 5_000).await;
    let check = migration.with_servers("check", &["--estimate-seconds", "0", "--json"]).await;
    assert!(check.stdout.contains("idle_session_timeout of role"), "{}", check.stdout);

    let application = Application::start(&application_url, 1);
    let dump = hold_pg_dump(&mut migration);
    // One statement that takes longer than it may.
    let mut running = migration.migrate(&["--copy-jobs", "1", "--copy-rate", "700KiB"]);
    dump.is_reached().await;
    tokio::time::sleep(LONGER).await;
    dump.release();
    let ready = |status: &serde_json::Value| status["ready_to_cutover"] == true && status["way_back"] == "ready";
    migration.wait_for_status(&mut running, "ready", ready).await;
    application.stop().await;
    tokio::time::sleep(LONGER).await;
    let cutover = migration.with_directory("cutover", &["--yes", "--max-write-stall", "25s"]).await;
    assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
    migration.wait_for_status(&mut running, "the way back", |status| status["direction"] == "back").await;
    tokio::time::sleep(LONGER).await;
    let finished = migration.with_directory("finish", &[]).await;
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    let ended = running.wait().await;
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for word in ["trying again", "timeout", "lost", "reconnect"] {
        assert!(!ended.stderr.contains(word), "{word}:\n{}", ended.stderr);
    }
}
