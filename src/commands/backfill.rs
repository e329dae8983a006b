//! `backfill`.

use std::fmt::Write;

use indicatif::MultiProgress;

use super::{both, print, print_json};
use crate::backfill::{self, Options, Outcome, plan::Plan};
use crate::care;
use crate::care::tune::COPY_JOBS;
use crate::cli;
use crate::error::Result;
use crate::observe::board::StatusBoard;
use crate::observe::format::{count, duration, printable, size};
use crate::observe::logging::LogFormat;
use crate::observe::progress::{self, ProgressMode};

pub(super) async fn backfill(given: cli::Backfill, log_format: LogFormat, bars: MultiProgress) -> Result<()> {
    let (source, target) = both(&given.servers)?;
    let options = Options {
        source,
        target,
        directory: given.directory.dir,
        until: given.until,
        from: given.from,
        tables: given.tables,
        time_columns: given.time_column,
        on_conflict: given.on_conflict,
        care: care::Options { copy_jobs: given.copy_jobs, copy_rate: given.copy_rate, ..care::Options::default() },
        http_address: given.http_addr.0,
    };
    if given.dry_run {
        let plan = backfill::plan(&options).await?;
        return if given.json { print_json(&plan) } else { print(&page_of_plan(&plan)) };
    }
    let board = StatusBoard::new();
    let mode = ProgressMode::detect(log_format, bars, options.care.copy_jobs.unwrap_or(COPY_JOBS));
    let shown = progress::start(board.clone(), mode);
    let outcome = backfill::run(options, &board).await;
    drop(shown);
    let outcome = outcome?;
    if given.json { print_json(&outcome) } else { print(&page(&outcome)) }
}

fn page_of_plan(plan: &Plan) -> String {
    let mut page = String::new();
    let bytes = |bytes: i64| size(bytes.max(0).cast_unsigned());
    for table in &plan.tables {
        let sum: i64 = table.pieces.iter().map(|piece| piece.bytes).sum();
        let _ = writeln!(page, "{}: {} pieces, {}", printable(&table.table), table.pieces.len(), bytes(sum));
        for piece in &table.pieces {
            let _ = writeln!(page, "  {}  {}  {}", printable(&piece.name), bytes(piece.bytes), piece.how);
        }
    }
    for (title, lines) in [
        ("These policies of the target rest meanwhile", &plan.policies),
        ("These continuous aggregates are refreshed at the end", &plan.aggregates),
        ("Look at this first", &plan.warnings),
    ] {
        if !lines.is_empty() {
            let _ = writeln!(page, "{title}:");
            for line in lines {
                let _ = writeln!(page, "  {}", printable(line));
            }
        }
    }
    let _ = writeln!(page, "{} in all. Nothing was changed.", bytes(plan.bytes));
    page
}

fn page(outcome: &Outcome) -> String {
    let how = |name: &str| outcome.how.get(name).copied().unwrap_or_default();
    let mut page = format!(
        "All {} pieces are there with {} rows, each compared with the source; {} of them were copied now, in {}:\n",
        outcome.pieces,
        count(outcome.rows.max(0).cast_unsigned()),
        outcome.pieces_now,
        duration(outcome.seconds)
    );
    for (name, text) in [
        ("as_it_is", "compressed as they are"),
        ("rows", "by rows"),
        ("merged", "around rows that were there"),
        ("found", "found there, to the last row"),
        ("gone", "dropped on the source meanwhile"),
    ] {
        if how(name) > 0 {
            let _ = writeln!(page, "  {:>6}  {text}", how(name));
        }
    }
    let _ = writeln!(
        page,
        "{} chunks were compressed on the target; {} continuous aggregates refreshed; {} foreign keys hold.",
        outcome.compressed,
        outcome.aggregates.len(),
        outcome.foreign_keys
    );
    page.push_str("When you need its ledger no more: walferry clean --dir with the same directory.\n");
    page
}
