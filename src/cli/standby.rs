//! Options that name standbys of the source.

use clap::Args;

/// Standbys of the source that do the reading; all that is written is the primary's, which `--source` names.
#[derive(Debug, Args)]
#[command(next_help_heading = "A standby as the source")]
pub struct StandbyOptions {
    /// Read rows (the copy, what `resync` and --recopy compare, the estimate) on this standby of --source, which stays the primary
    #[arg(long, env = "WALFERRY_COPY_FROM", hide_env_values = true, value_name = "URL")]
    pub copy_from: Option<String>,
    /// Make the slot on this standby of --source, and receive the changes from it (PostgreSQL 16 or newer); fixed when the
    /// migration begins, `resync` can change it
    #[arg(long, env = "WALFERRY_STREAM_FROM", hide_env_values = true, value_name = "URL")]
    pub stream_from: Option<String>,
}
