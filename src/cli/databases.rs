//! The options of several databases of one server.

use clap::Args;

/// Which databases of the server.
#[derive(Debug, Args)]
#[command(next_help_heading = "Several databases")]
pub struct AllDatabases {
    /// Every database of the source's server that can be connected to and is no template, each as a migration of its own; --source and
    /// --target name any database of each server. What is missing on the target is created there. --copy-jobs, --copy-rate,
    /// --index-jobs, --apply-workers, --queue-max-bytes and the most connections are for all together
    #[arg(long, conflicts_with_all = ["include_table", "exclude_table", "include_schema", "exclude_schema", "map_schema", "data_only"])]
    pub all_databases: bool,
    /// Only databases that this pattern names; may be given again
    #[arg(long, value_name = "PATTERN", requires = "all_databases")]
    pub include_database: Vec<String>,
    /// No database that this pattern names, whatever includes it
    #[arg(long, value_name = "PATTERN", requires = "all_databases")]
    pub exclude_database: Vec<String>,
}

/// The same for `walferry migrate`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Several databases")]
pub struct MigrateAll {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub which: AllDatabases,
    /// Begin with the databases that pass the check, and leave out the others; without it none begins when one is refused
    #[arg(long, requires = "all_databases")]
    pub skip_blocked_databases: bool,
}
