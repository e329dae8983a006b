//! Care for the source: a migration runs beside somebody's production, and may not be what brings it down (H28).
//!
//! ```text
//!  --copy-rate, walferry tune ──────► tune ──┐
//!  pg_stat_replication ──► standbys ─────────┴─► pace ──► every chunk of the copy waits here for its turn
//!  pg_replication_slots ──► wal: says when our slot keeps too much, or that the slot is to be given up
//!  --max-source-connections, --max-target-connections ──► connections: how many jobs fit
//! ```
//!
//! | what | limit | when it is reached |
//! |---|---|---|
//! | reading | `--copy-rate`, over all jobs | the jobs wait between two chunks |
//! | the source's standbys | `--max-standby-lag` | the copy rests until the lag is half of that |
//! | WAL that our slot keeps | `--source-wal-max` | a warning; with `--on-source-wal-max give-up` the slot is dropped |
//! | connections | `--max-source-connections`, `--max-target-connections` | fewer jobs, from the start |
//!
//! A copy that rests holds its snapshot, and its lock on the table of the part: the snapshot would be held anyway, and whoever
//! waits behind the lock has it at once (H9, `copy::watchdog`).

pub mod connections;
pub mod pace;
pub mod standbys;
pub mod tune;
pub mod wal;

use std::time::Duration;

use connections::Caps;
use tune::Limit;
use wal::OnSourceWalMax;

/// How long the source's standbys may lag while it is copied from, unless it is said.
pub const MAX_STANDBY_LAG: Duration = Duration::from_secs(30);

/// What the command line says of it. `None` is what was not said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Parts copied at once.
    pub copy_jobs: Option<usize>,
    /// Bytes a second, over all jobs.
    pub copy_rate: Option<Limit<u64>>,
    /// How far a standby of the source may be behind.
    pub max_standby_lag: Option<Limit<Duration>>,
    /// How many bytes of WAL our slot may make the source keep.
    pub source_wal_max: Option<u64>,
    /// What happens when it is more.
    pub on_source_wal_max: OnSourceWalMax,
    /// How many connections there may be.
    pub caps: Caps,
}
