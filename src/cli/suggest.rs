//! The options of `walferry suggest-hypertables`.

use clap::Args;

use super::values::parse_bytes;
use super::{Filters, Servers};

/// `walferry suggest-hypertables`.
#[derive(Debug, Args)]
pub struct SuggestHypertables {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub filters: Filters,
    /// Memory of the target for its newest chunks: one is to be a quarter of it [default: shared_buffers of --target]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    pub memory: Option<u64>,
}
