//! Options that are about TimescaleDB on the source.

use clap::Args;

/// TimescaleDB on the source.
#[derive(Debug, Args)]
#[command(next_help_heading = "TimescaleDB")]
pub struct TimescaleOptions {
    /// Pause the source's TimescaleDB jobs (policies and the users' own) from before the slot on; without this they run on. Those
    /// that ran run again after `walferry clean`, or when the migration goes on without this; on the target, from the cutover on
    #[arg(long)]
    pub pause_source_jobs: bool,
}
