//! What cannot work is refused before anything is touched: a clear error, what to do next, the documented exit code.

use std::net::TcpListener;

use walferry::demo::server::ThrowawayServer;

use crate::support::compare::touched;
use crate::support::process::{Finished, Running};
use crate::support::{Migration, Servers, http, programs};

const TABLES: &str =
    "CREATE TABLE item (id int PRIMARY KEY, name text); INSERT INTO item VALUES (1, 'one'), (2, 'two')";

/// What both servers have.
async fn both(migration: &Migration) -> (Vec<String>, Vec<String>) {
    (touched(&migration.source().await).await, touched(&migration.target().await).await)
}

/// A migration of a small table that nothing stands against.
async fn plain(servers: &Servers, database: &str) -> Migration {
    let migration = servers.migration(database).await;
    migration.source().await.batch_execute(TABLES).await.unwrap();
    migration
}

/// `walferry migrate` with these servers is refused, and so it is by `walferry check` where it is a matter of the servers.
async fn migrate_between(migration: &Migration, source: &str, target: &str) -> Finished {
    let directory = migration.directory();
    let arguments =
        ["migrate", "--source", source, "--target", target, "--dir", directory.to_str().unwrap(), "--http-addr", "off"];
    Running::start(&arguments, &migration.files(), &migration.environment).wait().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_cannot_be_reached_or_refuses_the_password_is_named() {
    let servers = Servers::start().await;
    let migration = plain(&servers, "shop").await;
    for server in [&servers.source, &servers.target] {
        let hba = server.data_directory().join("pg_hba.conf");
        let text = std::fs::read_to_string(&hba).unwrap();
        std::fs::write(&hba, format!("host all careful 127.0.0.1/32 scram-sha-256\n{text}")).unwrap();
        let administrator = server.connect("postgres").await.unwrap();
        administrator.batch_execute("CREATE ROLE careful LOGIN SUPERUSER PASSWORD 'the right one'").await.unwrap();
        administrator.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    }
    let before = both(&migration).await;
    let (source, target) = (&migration.source_url, &migration.target_url);
    let as_careful = |url: &str| url.replace("postgres@", "careful:not-the-right-one@");
    let elsewhere = |url: &str| url.replace("127.0.0.1", "no-such-host.invalid");
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let closed = |url: &str, port: u16| url.replace(&format!(":{port}/"), &format!(":{free}/"));

    let cases = [
        (as_careful(source), target.clone(), "password"),
        (source.clone(), as_careful(target), "password"),
        (elsewhere(source), target.clone(), "no-such-host.invalid"),
        (source.clone(), elsewhere(target), "no-such-host.invalid"),
        (closed(source, servers.source.port()), target.clone(), "refused"),
        (source.clone(), closed(target, servers.target.port()), "refused"),
    ];
    for (source, target, text) in cases {
        let refused = migrate_between(&migration, &source, &target).await;
        println!("{}", refused.stderr);
        refused.assert_refused(3, &[text]);
        assert!(!refused.stderr.contains("not-the-right-one"), "a password is no text for people: {}", refused.stderr);
        let side = if source == migration.source_url { "target" } else { "source" };
        assert!(refused.stderr.contains(side), "it says which server: {}", refused.stderr);
        let check = Running::start(
            &["check", "--json", "--source", &source, "--target", &target],
            &migration.files(),
            &migration.environment,
        );
        let check = check.wait().await;
        assert_eq!(check.code, Some(3), "{}", check.stderr);
        assert_eq!(check.json()["ready"], false);
        assert!(!check.stdout.contains("not-the-right-one"), "{}", check.stdout);
    }
    assert_eq!(both(&migration).await, before);
    // Nothing of a refusal stands in the way: the same directory serves the next try.
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_or_a_target_that_cannot_serve_is_refused_and_stays_as_it_was() {
    let programs = programs();
    let (servers, replica) = tokio::join!(
        Servers::start(),
        ThrowawayServer::start(&programs, "replica", &[("wal_level", "replica"), ("fsync", "off")])
    );
    let replica = replica.unwrap();

    let migration = plain(&servers, "level").await;
    let client = replica.connect("postgres").await.unwrap();
    client.batch_execute(TABLES).await.unwrap();
    let before = (touched(&client).await, both(&migration).await);
    let refused = migrate_between(&migration, &replica.url(), &migration.target_url).await;
    refused.assert_refused(3, &["wal_level", "ALTER SYSTEM SET wal_level", "Nothing was changed"]);
    assert_eq!((touched(&client).await, both(&migration).await), before);

    let migration = plain(&servers, "taken").await;
    let target = migration.target().await;
    target.batch_execute("CREATE TABLE precious (id int PRIMARY KEY); INSERT INTO precious VALUES (7)").await.unwrap();
    let before = both(&migration).await;
    let refused = migration.migrate(&[]).wait().await;
    refused.assert_refused(3, &["precious", "empty", "Nothing was changed"]);
    assert_eq!(both(&migration).await, before);
    let check = migration.with_servers("check", &["--json"]).await;
    assert_eq!((check.code, check.json()["ready"].as_bool()), (Some(3), Some(false)));
    assert!(check.stdout.contains("precious"), "{}", check.stdout);
    let rows: i64 = target.query_one("SELECT count(*) FROM precious", &[]).await.unwrap().get(0);
    assert_eq!(rows, 1);

    // Published, its application's updates would fail from then on.
    let migration = plain(&servers, "keyless").await;
    let source = migration.source().await;
    source
        .batch_execute("CREATE TABLE reading (sensor int, value float8); INSERT INTO reading VALUES (1, 2)")
        .await
        .unwrap();
    source.batch_execute("UPDATE reading SET value = 3; SELECT pg_stat_force_next_flush()").await.unwrap();
    crate::support::until_true(&source, "SELECT n_tup_upd > 0 FROM pg_stat_user_tables WHERE relname = 'reading'")
        .await;
    let before = both(&migration).await;
    let refused = migration.migrate(&[]).wait().await;
    refused.assert_refused(3, &["reading", "REPLICA IDENTITY", "ALTER TABLE", "Nothing was changed"]);
    assert_eq!(both(&migration).await, before);
    source.batch_execute("UPDATE reading SET value = 4").await.unwrap();
    // What the check says to run mends it.
    source.batch_execute("ALTER TABLE reading REPLICA IDENTITY FULL").await.unwrap();
    let mut running = migration.migrate(&[]);
    migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    source.batch_execute("UPDATE reading SET value = 5").await.unwrap();
    migration.cut_over(running).await;
    migration.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_directory_that_cannot_serve_is_refused() {
    let servers = Servers::start().await;
    let migration = plain(&servers, "shop").await;
    let before = both(&migration).await;

    // Not even root can make a directory below a file, or in /proc.
    let file = migration.files().join("a file");
    std::fs::write(&file, "").unwrap();
    for path in [file.join("state"), file.clone(), "/proc/walferry".into()] {
        let path = path.to_str().unwrap();
        let arguments = [
            "migrate",
            "--source",
            &migration.source_url,
            "--target",
            &migration.target_url,
            "--dir",
            path,
            "--http-addr",
            "off",
        ];
        let refused = Running::start(&arguments, &migration.files(), &[]).wait().await;
        refused.assert_refused(1, &[path, "--dir"]);
        assert_eq!(both(&migration).await, before, "{path}");
    }

    // A way back would be made ready meanwhile.
    let mut running = migration.migrate(&["--no-reverse"]);
    migration.wait_for_phase(&mut running, "following").await;
    let now = both(&migration).await;
    let second = migration.migrate(&[]).wait().await;
    second.assert_refused(3, &["another walferry is running", "walferry status", "a directory of its own"]);
    assert_eq!(both(&migration).await, now);
    assert!(running.is_alive());
    assert_eq!(migration.status().await.unwrap()["phase"], "following", "the first one does not mind");

    // The target belongs to that migration, whatever directory another one has.
    let other = migration.files().join("other");
    let arguments = [
        "migrate",
        "--source",
        &migration.source_url,
        "--target",
        &migration.target_url,
        "--dir",
        other.to_str().unwrap(),
        "--http-addr",
        "off",
    ];
    let refused = Running::start(&arguments, &migration.files(), &[]).wait().await;
    refused.assert_refused(3, &["holds the ledger of migration", "walferry clean"]);
    assert_eq!(both(&migration).await, now);
    running.terminate().await;

    // And the directory belongs to it, whatever servers are given.
    let stranger = plain(&servers, "stranger").await;
    let before = both(&stranger).await;
    let refused = migrate_between(&migration, &stranger.source_url, &stranger.target_url).await;
    refused.assert_refused(3, &["belongs to a migration with another source", "another --dir"]);
    let refused = migrate_between(&migration, &migration.source_url, &stranger.target_url).await;
    refused.assert_refused(3, &["belongs to a migration with another target", "another --dir"]);
    assert_eq!(both(&stranger).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_usage_exits_with_2_and_a_missing_migration_with_1() {
    let files = tempfile::tempdir().unwrap();
    let run = |arguments: &'static [&'static str]| Running::start(arguments, files.path(), &[]).wait();
    for arguments in [
        &[][..],
        &["migrte"],
        &["migrate", "--source", "postgres://a/b", "--target", "postgres://a/c"],
        &["migrate", "--copy-jobs", "0", "--dir", "d"],
        &["migrate", "--http-addr", "9617", "--dir", "d"],
        &["cutover", "--dir", "d", "--timeout", "soon"],
        &["status"],
        &["check", "--source", "postgres://a/b"],
        &["check", "--source", "postgres://a/b?no_such_parameter=1", "--target", "postgres://a/c"],
    ] {
        let wrong = run(arguments).await;
        assert_eq!(wrong.code, Some(2), "{arguments:?}: {}", wrong.stderr);
        assert!(!wrong.stderr.is_empty() && wrong.stdout.is_empty(), "{arguments:?}: {}", wrong.stdout);
    }
    let missing = run(&["check", "--target", "postgres://a/c"]).await;
    missing.assert_refused(2, &["--source is missing", "WALFERRY_SOURCE"]);

    let nothing = files.path().join("nothing");
    for command in ["status", "cutover", "verify", "clean"] {
        let arguments = [command, "--dir", nothing.to_str().unwrap()];
        let refused = Running::start(&arguments, files.path(), &[]).wait().await;
        println!("{command}: {}", refused.stderr);
        refused.assert_refused(1, &[nothing.to_str().unwrap()]);
        assert!(!nothing.exists(), "{command} made the directory");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_was_stopped_is_shown_and_takes_no_cutover() {
    let servers = Servers::start().await;
    let migration = plain(&servers, "shop").await;
    let mut running = migration.migrate(&["--http-addr", "127.0.0.1:0"]);
    let status = migration.wait_for_status(&mut running, "ready", |status| status["ready_to_cutover"] == true).await;
    has_every_documented_field(&status);
    let copy = &status["copy"];
    assert_eq!((&copy["tables_done"], &copy["tables_total"], &copy["rows_done"]), (&1.into(), &1.into(), &2.into()));
    assert_eq!(migration.with_directory("status", &["--exit-code"]).await.code, Some(0));
    answers_over_http(&running);

    running.kill().await;
    let status = migration.status().await.unwrap();
    has_every_documented_field(&status);
    assert_eq!(status["process_alive"], false);
    assert_eq!(status["ready_to_cutover"], false);
    assert!(!status["blockers"].as_array().unwrap().is_empty());
    assert_eq!(migration.with_directory("status", &["--exit-code"]).await.code, Some(1));
    let shown = migration.with_directory("status", &[]).await;
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    // A check that knows whose the ledger and the slot are finds nothing in the way of going on.
    let directory = migration.directory();
    let check = migration.with_servers("check", &["--dir", directory.to_str().unwrap()]).await;
    assert_eq!(check.code, Some(0), "{}", check.stdout);
    assert_eq!(migration.with_servers("check", &[]).await.code, Some(3));
    let before = both(&migration).await;
    let refused = migration.with_directory("cutover", &["--yes", "--no-reverse"]).await;
    println!("{}", refused.stderr);
    refused.assert_refused(1, &["walferry migrate"]);
    assert_eq!(both(&migration).await, before);
}

/// What scripts rely on.
fn has_every_documented_field(status: &serde_json::Value) {
    for pointer in [
        "/version",
        "/phase",
        "/ready_to_cutover",
        "/blockers",
        "/process_alive",
        "/updated_at",
        "/lag/bytes",
        "/lag/seconds",
        "/copy/tables_total",
        "/copy/tables_done",
        "/copy/bytes_total",
        "/copy/bytes_done",
        "/copy/rows_done",
        "/queue/bytes",
        "/apply/transactions",
        "/apply/changes",
        "/apply/changes_per_second",
        "/error",
    ] {
        assert!(status.pointer(pointer).is_some(), "{pointer} is not in {status:#}");
    }
    assert_eq!(status["error"], serde_json::Value::Null);
}

fn answers_over_http(running: &Running) {
    let port = http::port(running);
    http::get(port, "/healthz");
    let metrics = http::get(port, "/metrics");
    for name in ["walferry_lag_bytes", "walferry_queue_bytes"] {
        assert!(metrics.contains(&format!("\n{name}")), "{metrics}");
    }
}
