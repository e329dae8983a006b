//! How much a migration does at once, what it may take, and how careful it is with the source.

use std::time::Duration;

use clap::Args;

use super::values::{at_least_one, parse_bytes, parse_lag, parse_queue_size, parse_rate};
use crate::care::tune::Limit;
use crate::care::wal::OnSourceWalMax;

/// How much is done at once.
#[derive(Debug, Args)]
pub struct Parallelism {
    /// Tables, or ranges of large tables, copied at once [default: 4; `migrate`: or what was tuned before]
    #[arg(long, value_parser = at_least_one)]
    pub copy_jobs: Option<usize>,
    /// Indexes built at once
    #[arg(long, default_value_t = 2, value_parser = at_least_one)]
    pub index_jobs: usize,
    /// Sessions that apply changes; fixed when the migration begins
    #[arg(long, default_value_t = 4, value_parser = at_least_one)]
    pub apply_workers: usize,
    /// The queue on disk takes at most this much; then the source is not read until there is room [default: 64GiB, or four
    /// fifths of the free disk where that is less; at least 1MiB]
    #[arg(long, value_parser = parse_queue_size, value_name = "SIZE")]
    pub queue_max_bytes: Option<u64>,
}

/// How many connections there may be.
#[derive(Clone, Debug, Args)]
pub struct Connections {
    /// Open at most so many connections to the source; fewer jobs then do what there is to do
    #[arg(long, value_parser = at_least_one, value_name = "N")]
    pub max_source_connections: Option<usize>,
    /// Open at most so many connections to the target
    #[arg(long, value_parser = at_least_one, value_name = "N")]
    pub max_target_connections: Option<usize>,
}

impl Connections {
    /// The same for the rest of the program.
    pub fn caps(&self) -> crate::care::connections::Caps {
        crate::care::connections::Caps { source: self.max_source_connections, target: self.max_target_connections }
    }
}

/// Care for the source.
#[derive(Debug, Args)]
pub struct Care {
    /// Copy at most so many bytes a second, over all jobs; `off` for as fast as it goes [default: off, or what was tuned before]
    #[arg(long, value_parser = parse_rate, value_name = "SIZE")]
    pub copy_rate: Option<Limit<u64>>,
    /// The copy waits while a physical standby of the source lags more than this; `off` to let it lag [default: 30s, or what was
    /// tuned before]
    #[arg(long, value_parser = parse_lag, value_name = "DURATION")]
    pub max_standby_lag: Option<Limit<Duration>>,
    /// Say so when our slot makes the source keep more WAL than this
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    pub source_wal_max: Option<u64>,
    /// What happens then: a warning; or the slot is dropped to save the source, and the migration ends until `walferry resync`
    #[arg(long, value_enum, default_value_t, value_name = "WHAT", requires = "source_wal_max")]
    pub on_source_wal_max: OnSourceWalMax,
}
