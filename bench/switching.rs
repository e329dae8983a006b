//! How long writers wait at a cutover and at the switchback after it, under pgbench TPC-B with four clients, the fence being locks.
//!
//! Servers of their own: the way back reads the target's WAL, which has to be at the level logical.

use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use walferry::demo::server::{StopMode, ThrowawayServer};
use walferry::error::{Context, Error, ErrorKind, Result};

use crate::engine::{Engine, PATIENCE};
use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

/// The name by which it is asked for.
pub const ID: &str = "CUTOVER";
const DATABASE: &str = "bank";
/// How long pgbench writes before each switch.
const WRITING: Duration = Duration::from_secs(2);

pub async fn switches(setting: &Setting, results: &mut Results) -> Result<()> {
    let own: Vec<(&str, &str)> = setting
        .settings
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .chain([("wal_level", "logical")])
        .collect();
    let mut source = ThrowawayServer::start(&setting.programs, "switchsource", &own).await?;
    let mut target = ThrowawayServer::start(&setting.programs, "switchtarget", &own).await?;
    let outcome = rounds(setting, results, (&source, &target)).await;
    source.stop(StopMode::Immediate).await?;
    target.stop(StopMode::Immediate).await?;
    outcome
}

async fn rounds(
    setting: &Setting,
    results: &mut Results,
    (source, target): (&ThrowawayServer, &ThrowawayServer),
) -> Result<()> {
    setting.new_database(source, DATABASE).await?;
    let (source_url, target_url) = (source.url_for(DATABASE), target.url_for(DATABASE));
    setting.shell(&format!("pgbench -i -q -s {} -d {source_url}", setting.options.size(20, 5))).await?;
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for _ in 0..setting.options.size(20, 4) {
        setting.new_database(target, DATABASE).await?;
        let mut engine = Engine::new(setting, "switching", source_url.clone(), target_url.clone())?.with_way_back();
        engine.start()?;
        engine.following().await?;
        there.push(switch(setting, &mut engine, "cutover", &source_url).await?);
        back.push(switch(setting, &mut engine, "switchback", &target_url).await?);
        nothing_is_lost(source, target).await?;
        setting.footprint("cutover and way back", engine.peak_bytes());
        engine.clean().await?;
    }
    for (what, waits) in [("cutover", there), ("switchback", back)] {
        let worst = waits.iter().copied().fold(0.0, f64::max);
        let case = format!("{what}: writers wait, TPC-B, 4 clients, {} times", waits.len());
        let list: Vec<String> = waits.iter().map(|wait| format!("{wait:.0}")).collect();
        results.note(format!("{what}, ms that writers waited: {}", list.join(" ")));
        results.add(Row::of_value("cutover", &case, "ms", Sample(waits), Bar::AtMost(300.0)));
        let worst = Sample(vec![worst]);
        results.add(Row::of_value("cutover", &format!("{what}: the worst"), "ms", worst, Bar::AtMost(1000.0)));
    }
    Ok(())
}

/// Switches while pgbench writes to the server that is left; answers how long writers waited, in milliseconds.
async fn switch(setting: &Setting, engine: &mut Engine, command: &str, from: &str) -> Result<f64> {
    let _load = pgbench(setting, from)?;
    tokio::time::sleep(WRITING).await;
    let deadline = Instant::now() + PATIENCE;
    while !engine.status().await.is_ok_and(|status| status.ready_to_cutover) {
        engine.check(deadline)?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let said = engine.command(&[command, "--yes", "--json", "--dir"]).await?;
    let wait = said.get("downtime_ms").and_then(serde_json::Value::as_f64);
    wait.ok_or_else(|| Error::new(ErrorKind::Other, format!("walferry {command} --json said {said}")))
}

/// Four clients, until they are dropped or their sessions are ended.
fn pgbench(setting: &Setting, url: &str) -> Result<Child> {
    Command::new(setting.programs.bin("pgbench"))
        .args(["-n", "-M", "prepared", "-c", "4", "-T", "3600", "-d", url])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context(|| "starting pgbench".into())
}

/// TPC-B keeps its own books: each transaction changes three balances alike and notes it. Both servers have the same ones.
async fn nothing_is_lost(source: &ThrowawayServer, target: &ThrowawayServer) -> Result<()> {
    let books = "SELECT (SELECT sum(abalance) FROM pgbench_accounts)::text, (SELECT sum(tbalance) FROM pgbench_tellers)::text, \
                        (SELECT sum(bbalance) FROM pgbench_branches)::text, (SELECT sum(delta) FROM pgbench_history)::text, \
                        (SELECT count(*) FROM pgbench_history)::text";
    let mut both = Vec::new();
    for server in [source, target] {
        let row = server.connect(DATABASE).await?.query_one(books, &[]).await?;
        both.push((0..5).map(|column| row.get(column)).collect::<Vec<String>>());
    }
    let balanced = both.iter().all(|sums| sums[..4].iter().all(|sum| *sum == sums[0]));
    if balanced && both[0] == both[1] {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Different, format!("the books are not right: {:?} and {:?}", both[0], both[1])))
}
