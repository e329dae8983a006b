//! The options of `walferry config`, `completions` and `man`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use clap_complete::Shell;

/// `walferry config`.
#[derive(Debug, Args)]
pub struct ConfigOptions {
    /// What to do with it.
    #[command(subcommand)]
    pub what: ConfigCommand,
}

/// The commands of `walferry config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say all that is wrong with a settings file, and whom each key is for; no server is asked
    #[command(after_help = "Example: walferry config check walferry.toml\n\
        Values are read as those of the options. Keys that nobody knows are named with the nearest one that is known.\n\
        Exit codes: 0 it can be used, 2 it cannot")]
    Check {
        /// The file
        #[arg(env = crate::settings::VARIABLE)]
        file: PathBuf,
        /// One JSON object on standard output
        #[arg(long)]
        json: bool,
    },
    /// Print a settings file with every key, commented out
    #[command(after_help = "Example: walferry config example > walferry.toml")]
    Example,
}

/// `walferry completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// For which shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// `walferry man`.
#[derive(Debug, Args)]
pub struct ManOptions {
    /// The page of this command instead of that of the program
    #[arg(conflicts_with = "out")]
    pub command: Option<String>,
    /// Write the pages of the program and of all commands into this directory
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}
