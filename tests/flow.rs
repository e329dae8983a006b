//! A migration from the check to the comparison, with everything that writes still writing.

use std::path::Path;
use std::process::Stdio;

use crate::support::load::{self, Application};
use crate::support::{Migration, Servers, programs};

/// What the process may use, whatever is moved through it.
const MEMORY_MAX_BYTES: u64 = 256 << 20;

/// Fills a database with pgbench's tables; `None` where there is no pgbench, which is in a package of its own.
async fn initialize_pgbench(migration: &Migration, scale: &str) -> Option<()> {
    let mut command = pgbench(migration)?;
    let output = command.args(["-i", "-q", "-I", "dtGvpf", "-s", scale, &migration.source_url]).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(())
}

fn pgbench(_: &Migration) -> Option<tokio::process::Command> {
    let program = programs().bin("pgbench");
    let mut command = tokio::process::Command::new(&program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    Path::new(&program).exists().then_some(command)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_on_the_target_after_a_migration_under_load() {
    let servers = Servers::start().await;
    let migration = servers.migration("shop").await;
    load::fill(&migration.source().await, 5_000).await;
    let pgbench_is_here = initialize_pgbench(&migration, "20").await.is_some();

    let application = Application::start(&migration.source_url, 2);
    let bench = pgbench_is_here.then(|| {
        let mut command = pgbench(&migration).unwrap();
        command.args(["-n", "-c", "4", "-j", "1", "-T", "3600", "--rate", "250", &migration.source_url]);
        command.spawn().unwrap()
    });
    application.goes_on(20).await;

    let check = migration.with_servers("check", &[]).await;
    assert_eq!(check.code, Some(0), "{}\n{}", check.stdout, check.stderr);
    let check = migration.with_servers("check", &["--json"]).await;
    assert_eq!(check.code, Some(0), "{}", check.stderr);
    assert_eq!(check.json()["ready"], true, "{}", check.stdout);
    assert_eq!(check.json()["version"], 1);

    let mut running = migration.migrate(&["--split-above", "64MiB"]);
    let memory = running.watch_memory();
    migration.wait_for_status(&mut running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
    application.goes_on(50).await;
    let status =
        migration.wait_for_status(&mut running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
    println!("{:#}", status["apply"]);
    let outcome = migration.cut_over(running).await;
    println!("{outcome:#}");
    assert!(outcome["downtime_ms"].as_f64().unwrap() > 0.0);
    assert!(outcome["cutover_lsn"].as_str().unwrap().contains('/'));
    assert!(outcome["steps"].as_array().unwrap().iter().all(|step| step["name"].is_string() && step["ms"].is_f64()));
    assert_eq!(outcome["sequences_synced"], 4, "counter, big, note, event");
    assert_eq!(outcome["verified"], false);
    assert_eq!(outcome["reverse"], "none");
    let peak = memory.await.unwrap();
    assert!(peak < MEMORY_MAX_BYTES, "walferry has used {} MiB", peak >> 20);
    println!("peak memory {} MiB", peak >> 20);

    if let Some(bench) = bench {
        let output = bench.wait_with_output().await.unwrap();
        assert!(!output.status.success(), "pgbench wrote until the fence ended its sessions");
        let history = "SELECT count(*) > 500 FROM pgbench_history";
        assert!(migration.target().await.query_one(history, &[]).await.unwrap().get::<_, bool>(0), "it did write");
    }
    application.stop().await;
    migration.assert_equal().await;

    let verify = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(verify.code, Some(0), "{}\n{}", verify.stdout, verify.stderr);
    assert_eq!(verify.json()["equal"], true);

    let target = migration.target().await;
    target.batch_execute("UPDATE app.big SET amount = amount + 1 WHERE id = 4321").await.unwrap();
    let verify = migration.with_directory("verify", &["--tables", "app.big"]).await;
    assert_eq!(verify.code, Some(4), "{}\n{}", verify.stdout, verify.stderr);
    assert!(verify.stdout.contains("app") && verify.stdout.contains("big"), "{}", verify.stdout);
    assert!(verify.stdout.contains("4321"), "names the key:\n{}", verify.stdout);
    if pgbench_is_here {
        target.batch_execute("DELETE FROM pgbench_accounts WHERE aid = 1234567").await.unwrap();
        let verify = migration.with_directory("verify", &["--json", "--tables", "public.pgbench_accounts"]).await;
        assert_eq!(verify.code, Some(4), "{}\n{}", verify.stdout, verify.stderr);
        assert_eq!(verify.json()["equal"], false);
        assert!(verify.stdout.contains("1234567") && verify.stdout.contains("pgbench_accounts"), "{}", verify.stdout);
    }
}
