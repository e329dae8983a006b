//! `walferry report`.

use std::path::PathBuf;

use clap::Args;

use super::{Directory, Servers};

/// `walferry report`.
#[derive(Debug, Args)]
pub struct Report {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    /// Write it into this file, in the place of one that is there [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// One JSON object in place of the page
    #[arg(long)]
    pub json: bool,
}
