//! The options of a cutover and of its way back.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::values::{Time, parse_duration, parse_time};
use super::{Directory, Servers};
use crate::cutover::FenceMode;

/// `walferry cutover`.
#[derive(Debug, Args)]
pub struct Cutover {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub switch: Switch,
    /// Without a way back: the old primary is not kept current, and `migrate` exits
    #[arg(long)]
    pub no_reverse: bool,
}

/// `walferry finish`.
#[derive(Debug, Args)]
pub struct Finish {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// `walferry switchback`, and what `walferry cutover` has of it.
#[derive(Debug, Args)]
pub struct Switch {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub how: CutoverHow,
    /// Show what stands against it and how long writers would have to wait; touch nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// How a cutover is done, whether by hand or by itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "How to cut over")]
pub struct CutoverHow {
    /// Give up when it takes longer in all; rows of hypertables are counted before that, for as long at most
    #[arg(long, default_value = "30s", value_parser = parse_duration, value_name = "DURATION")]
    pub timeout: Duration,
    /// Give up when writers have to wait longer
    #[arg(long, default_value = "5s", value_parser = parse_duration, value_name = "DURATION")]
    pub max_write_stall: Duration,
    /// How writers are held meanwhile; with each of them but `tables` the source's database is read-only by default afterwards
    /// [default: lock; `tables` where only a part of the database is migrated]
    #[arg(long, value_enum, value_name = "HOW")]
    pub fence: Option<FenceMode>,
    /// What the cutover names and refuses though it does not matter: an object that changed since the start, `role NAME`,
    /// `subscription NAME`; may be given again
    #[arg(long, value_name = "OBJECT")]
    pub waive: Vec<String>,
    /// Only where `walferry verify` has found all rows equal within this time
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub require_verified: Option<Duration>,
    /// Before writers are held, read what the applications read most into the target's memory, for half of --timeout at most; takes the
    /// extension pg_prewarm there
    #[arg(long)]
    pub prewarm: bool,
    /// Each sequence is so many values ahead on the target
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub sequence_margin: u32,
    /// Run this by `sh -c` when writers are held; when it fails the cutover is given up
    #[arg(long, value_name = "COMMAND")]
    pub on_fence: Option<String>,
    /// Run this when the target is the primary, before anybody is let go: to point applications at it. A failure is shown and
    /// takes nothing back. After a crash it can run a second time
    #[arg(long, value_name = "COMMAND")]
    pub on_switch: Option<String>,
    /// Run this when a cutover that held writers was given up and they are free again
    #[arg(long, value_name = "COMMAND")]
    pub on_abort: Option<String>,
    /// Each of these commands is killed, with its children, when it takes longer
    #[arg(long, default_value = "10s", value_parser = parse_duration, value_name = "DURATION")]
    pub hook_timeout: Duration,
    /// The admin console of a PgBouncer in front of the source: its clients wait instead of being ended, until --on-switch or
    /// --pgbouncer-include has pointed it at the target
    #[arg(long, env = "WALFERRY_PGBOUNCER", hide_env_values = true, value_name = "URL")]
    pub pgbouncer: Option<String>,
    /// The database as PgBouncer calls it [default: as the source does]
    #[arg(long, value_name = "NAME")]
    pub pgbouncer_database: Option<String>,
    /// A file that PgBouncer's configuration includes: its entry for the database is pointed at the target, and reloaded
    #[arg(long, value_name = "FILE")]
    pub pgbouncer_include: Option<PathBuf>,
}

/// Whether a migration cuts over by itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "When to cut over")]
pub struct CutoverWhen {
    /// `auto` cuts over without being asked, as soon as it is ready and within the times below
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub cutover: CutoverStart,
    /// Not while the target is further behind
    #[arg(long, default_value = "5s", value_parser = parse_duration, value_name = "DURATION")]
    pub max_lag: Duration,
    /// Not before this time, such as 2026-11-21T02:00:00Z
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    pub not_before: Option<Time>,
    /// Not after this time: from then on it only follows
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    pub not_after: Option<Time>,
    /// Rest between a try that was given up and the next
    #[arg(long, default_value = "30s", value_parser = parse_duration, value_name = "DURATION")]
    pub retry_pause: Duration,
}

/// Who begins a cutover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum CutoverStart {
    /// `walferry cutover`
    #[default]
    Asked,
    /// The migration itself
    Auto,
}
