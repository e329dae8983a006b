//! B7: how long a commit takes to be visible on the target while pgbench writes as fast as the source commits.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_postgres::Client;
use walferry::error::{Context, Error, ErrorKind, Result};

use crate::backlog;
use crate::engine::Engine;
use crate::native::Native;
use crate::results::{Bar, Results, Row, Sample};
use crate::setting::Setting;

/// How often a row is written whose way is measured.
const PROBE_INTERVAL: Duration = Duration::from_millis(20);
/// How often it is looked for: the figures are that coarse, and no better than the truth.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// A probe that has not come by then ends the run.
const LOST: Duration = Duration::from_secs(120);
const DATABASE: &str = "lag";

/// Milliseconds from commit to visible, sorted.
struct Lags(Vec<f64>);

impl Lags {
    fn quantile(&self, quantile: f64) -> Sample {
        let place = (self.0.len().saturating_sub(1) as f64 * quantile).round() as usize;
        Sample(self.0.get(place).copied().into_iter().collect())
    }
}

pub async fn lag(setting: &Setting, results: &mut Results) -> Result<()> {
    let workload = backlog::tpcb(setting.options.size(50, 10), 0);
    let seconds = setting.options.size(600, 20);
    workload.prepare(setting, DATABASE).await?;
    let source = setting.source.connect(DATABASE).await?;
    source.batch_execute("CREATE TABLE probe (id bigint PRIMARY KEY, at timestamptz NOT NULL)").await?;

    setting.new_database(&setting.target, "ours_lag").await?;
    let mut engine =
        Engine::new(setting, DATABASE, setting.source.url_for(DATABASE), setting.target.url_for("ours_lag"))?;
    engine.start()?;
    engine.following().await?;
    setting.settle().await?;
    let window = engine.watch().await?;
    let ours = run(setting, "ours_lag", seconds, None, 0).await?;
    let spent = engine.spent(window).await?;
    let half = run(setting, "ours_lag", (seconds / 2).min(60), Some(ours.1 / 2.0), 1_000_000).await?;
    setting.footprint("following TPC-B", engine.peak_bytes());
    engine.clean().await?;

    // Native by itself, for the same load: both at once would take the processor from each other.
    let native = Native::begin(setting, DATABASE, "native_lag").await?;
    setting.settle().await?;
    let theirs = run(setting, "native_lag", seconds.min(120), None, 2_000_000).await?;
    native.end().await?;

    let case = |rate: f64| format!("TPC-B, 4 clients, {rate:.0} transactions/s for {seconds} s");
    for (quantile, name, bar) in [(0.5, "p50", 50.0), (0.99, "p99", 250.0)] {
        let (lags, peer) = (ours.0.quantile(quantile), theirs.0.quantile(quantile));
        results.add(Row {
            id: "B7",
            case: format!("lag {name}, {}", case(ours.1)),
            unit: "ms",
            speed: Some(peer.over(&lags)),
            walferry: lags,
            peer: Some((format!("native subscription at {:.0}/s", theirs.1), peer)),
            bar: Bar::AtMost(bar),
        });
        let at_half = format!("lag {name}, at half that rate");
        results.add(Row::of_value("B7", &at_half, "ms", half.0.quantile(quantile), Bar::AtMost(bar)));
    }
    let changes = (ours.1 * seconds as f64) as u64 * 4;
    results.cpu.push(("following TPC-B".into(), spent.cpu_seconds, changes));
    setting.drop_database(&setting.target, "ours_lag").await?;
    setting.drop_database(&setting.target, "native_lag").await?;
    setting.drop_database(&setting.source, DATABASE).await
}

/// pgbench and the prober for some seconds; answers the lags, and the transactions a second.
async fn run(setting: &Setting, target: &str, seconds: u64, rate: Option<f64>, first: i64) -> Result<(Lags, f64)> {
    let log = setting.scratch().join("pgbench.log");
    let rate = rate.map(|rate| format!(" -R {rate:.0}")).unwrap_or_default();
    let url = setting.source.url_for(DATABASE);
    let script = format!("pgbench -n -M prepared -c 4 -T {seconds}{rate} -d {url} > {} 2>&1", log.display());
    let (source, target) = (setting.source.connect(DATABASE).await?, setting.target.connect(target).await?);
    let load = setting.shell(&script);
    let until = Instant::now() + Duration::from_secs(seconds);
    let (sender, committed) = mpsc::unbounded_channel();
    let (_, (), lags) = tokio::try_join!(load, probe(&source, until, first, sender), see(&target, committed))?;
    let said = std::fs::read_to_string(&log)?;
    let rate = said.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    let rate = rate.ok_or_else(|| Error::new(ErrorKind::Other, format!("pgbench did not say its rate: {said}")))?;
    Ok((lags, rate))
}

/// Commits a row at every tick, and says when.
async fn probe(
    source: &Client,
    until: Instant,
    first: i64,
    committed: mpsc::UnboundedSender<(i64, Instant)>,
) -> Result<()> {
    let insert = source.prepare("INSERT INTO probe VALUES ($1, clock_timestamp())").await?;
    let mut tick = tokio::time::interval(PROBE_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut id = first;
    while Instant::now() < until {
        tick.tick().await;
        id += 1;
        source.execute(&insert, &[&id]).await.context(|| "writing a probe".into())?;
        // Whoever takes them ends after us.
        let _ = committed.send((id, Instant::now()));
    }
    Ok(())
}

/// Looks for them on the target. They come in order of their commits, so the greatest says it of all before.
async fn see(target: &Client, mut committed: mpsc::UnboundedReceiver<(i64, Instant)>) -> Result<Lags> {
    let newest = target.prepare("SELECT coalesce(max(id), 0) FROM probe").await?;
    let (mut waiting, mut lags) = (VecDeque::<(i64, Instant)>::new(), Vec::new());
    loop {
        let seen: i64 = target.query_one(&newest, &[]).await?.get(0);
        let now = Instant::now();
        let over = loop {
            match committed.try_recv() {
                Ok(probe) => waiting.push_back(probe),
                Err(error) => break error == mpsc::error::TryRecvError::Disconnected,
            }
        };
        while let Some((_, at)) = waiting.front().copied().filter(|(id, _)| *id <= seen) {
            waiting.pop_front();
            // One that is visible before its commit was answered took no time.
            lags.push(now.saturating_duration_since(at).as_secs_f64() * 1e3);
        }
        if over && waiting.is_empty() {
            break;
        }
        if waiting.front().is_some_and(|(_, at)| at.elapsed() > LOST) {
            return Err(Error::new(ErrorKind::Other, format!("a probe did not arrive within {LOST:?}")));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    lags.sort_by(f64::total_cmp);
    Ok(Lags(lags))
}
