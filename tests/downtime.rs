//! How long writers wait: many cutovers under TPC-B, one after the other. Not a test of every run; it measures, and the numbers mean
//! something on an optimized build and a quiet machine only:
//!
//! ```sh
//! ROUNDS=20 cargo test --release --test main -- --ignored --exact downtime::many_cutovers_under_tpc_b --nocapture
//! ```

use std::process::Stdio;

use tokio::process::Command;

use crate::support::{Servers, programs, until_true};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures for minutes"]
async fn many_cutovers_under_tpc_b() {
    let rounds: usize = std::env::var("ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(20);
    let servers = Servers::with(&[("fsync", "on")], &[("fsync", "on")]).await;
    let mut downtimes = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let migration = servers.migration(&format!("round_{round}")).await;
        let pgbench = programs().bin("pgbench");
        let filled =
            Command::new(&pgbench).args(["-i", "-q", "-s", "5", &migration.source_url]).output().await.unwrap();
        assert!(filled.status.success(), "{}", String::from_utf8_lossy(&filled.stderr));
        let mut running = migration.migrate(&[]);
        migration.wait_for_status(&mut running, "a way back", |status| status["way_back"] == "ready").await;
        let mut load = Command::new(&pgbench);
        load.args(["-n", "-c", "4", "-j", "2", "-T", "600", &migration.source_url]);
        let mut load =
            load.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
        let source = migration.source().await;
        until_true(&source, "SELECT count(*) > 1000 FROM pgbench_history").await;
        migration.wait_for_status(&mut running, "ready_to_cutover", |status| status["ready_to_cutover"] == true).await;
        let cutover = migration.with_directory("cutover", &["--yes", "--json", "--fence", "lock"]).await;
        assert_eq!(cutover.code, Some(0), "{}\n{}", cutover.stderr, running.log());
        load.wait().await.unwrap();
        let outcome = cutover.json();
        println!("{round}: {:.1} ms {}", outcome["downtime_ms"].as_f64().unwrap(), outcome["steps"]);
        downtimes.push(outcome["downtime_ms"].as_f64().unwrap());
        assert_eq!(migration.with_directory("finish", &[]).await.code, Some(0));
        assert_eq!(running.wait().await.code, Some(0));
        let count = "SELECT count(*), sum(delta)::int8 FROM pgbench_history";
        let [on_source, on_target] = [migration.source().await, migration.target().await]
            .map(|client| async move { client.query_one(count, &[]).await.unwrap() });
        let (on_source, on_target) = tokio::join!(on_source, on_target);
        let numbers = |row: &tokio_postgres::Row| (row.get::<_, i64>(0), row.get::<_, Option<i64>>(1));
        assert_eq!(numbers(&on_source), numbers(&on_target));
        assert_eq!(migration.with_directory("clean", &[]).await.code, Some(0));
    }
    downtimes.sort_by(f64::total_cmp);
    println!(
        "{rounds} cutovers: median {:.1} ms, worst {:.1} ms; all: {downtimes:.1?}",
        downtimes[downtimes.len() / 2],
        downtimes[downtimes.len() - 1]
    );
}
