//! Options that are about TimescaleDB on the source.

use clap::Args;

use crate::timescale::Caggs;

/// TimescaleDB on the source.
#[derive(Debug, Args)]
#[command(next_help_heading = "TimescaleDB")]
pub struct TimescaleOptions {
    /// Pause the source's TimescaleDB jobs (policies and the users' own) from before the slot on; without this they run on. Those
    /// that ran run again after `walferry clean`, or when the migration goes on without this; on the target, from the cutover on
    #[arg(long)]
    pub pause_source_jobs: bool,
    /// What becomes of the rows of continuous aggregates: `copy` copies and follows them, `recompute` computes them anew on the target, where
    /// TimescaleDB is made again then. Those whose raw rows are gone, or may be dropped by retention meanwhile, are copied all the same
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Caggs::Copy)]
    pub caggs: Caggs,
}
