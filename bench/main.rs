//! The benchmark: walferry beside what a user would pick instead, in one run, on servers of its own.
//!
//! ```text
//!   main ──► setting (two throwaway servers, a scratch directory)
//!     │
//!     ├──► cloning    B1 B2   migrate, raw COPY, pg_dump, pgcopydb
//!     ├──► draining   B3–B6   a backlog: walferry from its queue and from the slot, and a native subscription
//!     ├──► following  B7      commit-to-visible lag under load
//!     ├──► switching  cutovers and switchbacks under load
//!     ├──► far        B8      the same with the target behind a delaying proxy
//!     ├──► alone      B11 B12 the queue and the decoder without servers
//!     ├──► ingesting  T1      a hypertable under sustained load, with a cutover (where the servers have TimescaleDB)
//!     ├──► changing   T2      changed rows of hypertables beside those of plain tables
//!     ├──► chunks     T3      each step of a live migration with very many chunks
//!     │
//!     └──► results (Markdown) and plot (SVG)         B9 and B10 are read off walferry's process in all of them
//! ```
//!
//! Only ratios taken within one run count. Each case is repeated; a ratio is the median of the ratios of its rounds, and the
//! table shows the least and the greatest value of every timing. Every drain ends with a comparison of the rows on all sides:
//! what loses rows is not fast.
//!
//! Run by `make bench` and `make bench-quick`. It runs the release binary beside it as a child process.

mod alone;
mod backlog;
mod changing;
mod chunks;
mod cloning;
mod draining;
mod engine;
mod far;
mod following;
mod ingesting;
mod native;
mod plot;
mod results;
mod setting;
#[allow(dead_code)] // criterion's benchmarks use the rest
mod stream;
mod switching;

use std::path::PathBuf;
use std::process::ExitCode;

use results::Results;
use setting::{Options, Setting};
use walferry::error::{Error, ErrorKind, Result};
use walferry::migrate::stop_signal;

const USAGE: &str = "bench [--quick] [--only B1,B3] [--case tables] [--rounds N] [--out DIRECTORY] [--profile]

  --quick      smaller sizes, under five minutes; writes results-quick.*
  --only       only these bars; CUTOVER for cutovers and switchbacks
  --case       of B6, only the workloads of these names
  --rounds     how often each case is repeated
  --out        where results.md and results.svg go (default: bench)
  --profile    record walferry's process with perf in every measured window; writes profile-*.txt";

fn main() -> ExitCode {
    let outcome = options().and_then(|options| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(run(options))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}

fn options() -> Result<Options> {
    let usage = |what: &str| Error::new(ErrorKind::Usage, format!("{what}\n{USAGE}"));
    let mut options = Options {
        quick: false,
        only: Vec::new(),
        cases: Vec::new(),
        rounds: None,
        out: PathBuf::from("bench"),
        profile: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| usage(&format!("{argument} needs a value")));
        match argument.as_str() {
            "--quick" => options.quick = true,
            "--profile" => options.profile = true,
            "--only" => options.only = value()?.split(',').map(str::to_uppercase).collect(),
            "--case" => options.cases = value()?.split(',').map(str::to_owned).collect(),
            "--out" => options.out = PathBuf::from(value()?),
            "--rounds" => {
                let rounds = value()?.parse().ok().filter(|rounds| *rounds > 0);
                options.rounds = Some(rounds.ok_or_else(|| usage("--rounds needs a number"))?);
            }
            other => return Err(usage(&format!("unknown option {other}"))),
        }
    }
    Ok(options)
}

async fn run(options: Options) -> Result<()> {
    let mut results = Results::begin(&options)?;
    let mut setting = Setting::make(options).await?;
    results.servers = setting.describe().await?;
    // The servers are our children, and would go on without us.
    let outcome = tokio::select! {
        outcome = cases(&setting, &mut results) => outcome,
        error = stop_signal() => Err(error),
    };
    if let Err(error) = &outcome {
        results.note(format!("The run ended early: {error}"));
    }
    setting.stop().await?;
    // What was measured is kept, whatever happened later.
    results.write(&setting.options)?;
    outcome
}

/// The bars in order of importance.
async fn cases(setting: &Setting, results: &mut Results) -> Result<()> {
    let wanted = |bar: &str| setting.options.wants(bar);
    if wanted("B1") {
        cloning::pgbench(setting, results).await?;
    }
    if wanted("B3") || wanted("B5") {
        draining::inserts(setting, results).await?;
    }
    if wanted("B4") || wanted("B5") {
        draining::tpcb(setting, results).await?;
    }
    if wanted("B7") {
        following::lag(setting, results).await?;
    }
    if wanted("B6") {
        draining::small_cases(setting, results).await?;
    }
    if wanted(switching::ID) {
        switching::switches(setting, results).await?;
    }
    if wanted("B8") {
        far::away(setting, results).await?;
    }
    if wanted("B11") {
        alone::queue(setting, results).await?;
    }
    if wanted("B12") {
        alone::decoder(setting, results)?;
    }
    if ["T1", "T2", "T3"].into_iter().any(wanted) {
        hypertables(setting, results).await?;
    }
    // A table of 5 GB: not in a quick run, unless it is asked for.
    if wanted("B2") && (!setting.options.quick || !setting.options.only.is_empty()) {
        cloning::large_table(setting, results).await?;
    }
    results.process(setting);
    Ok(())
}

/// Where the servers have TimescaleDB.
async fn hypertables(setting: &Setting, results: &mut Results) -> Result<()> {
    if !ingesting::is_available(setting) {
        let text =
            "==== NOT MEASURED: hypertables: the extension timescaledb is not installed for this PostgreSQL ====";
        results.note(text.into());
        return Ok(());
    }
    if setting.options.wants("T1") {
        ingesting::ingest(setting, results).await?;
    }
    if setting.options.wants("T2") {
        changing::changes(setting, results).await?;
    }
    if setting.options.wants("T3") {
        chunks::steps(setting, results).await?;
    }
    Ok(())
}
