//! The command line, as clap reads it. What it means is in [`crate::commands`].

mod backfill;
mod care;
mod cutover;
mod databases;
mod filters;
mod pieces;
mod report;
mod settings;
mod standby;
mod suggest;
mod timescale;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::apply::conflict::OnConflict;
use crate::care::tune::Limit;
use crate::observe::logging::LogFormat;
use crate::pause::What;

pub use backfill::Backfill;
pub use care::{Care, Connections, Parallelism};
pub use cutover::{Cutover, CutoverHow, CutoverStart, CutoverWhen, Finish, Switch};
pub use databases::{AllDatabases, MigrateAll};
use filters::PART_OPTIONS;
pub use filters::{Filters, Place};
pub use pieces::by_pieces;
pub use report::Report;
pub use settings::{Completions, ConfigCommand, ConfigOptions, ManOptions};
pub use standby::StandbyOptions;
pub use suggest::SuggestHypertables;
pub use timescale::TimescaleOptions;
pub use values::{HttpAddress, Hypertables, Time};
use values::{
    at_least_one, parse_bytes, parse_duration, parse_http_address, parse_lag, parse_percent, parse_rate, parse_role_map,
};

/// walferry moves a live PostgreSQL database to another server: nothing lost, a short cutover, proven.
#[derive(Debug, Parser)]
#[command(version = env!("WALFERRY_VERSION"), about, max_term_width = 110, after_help = EXAMPLE, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How log lines look; they go to standard error.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "WALFERRY_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// Log the DETAIL of servers' errors too. It holds values of rows, which can be personal data: mind who reads the log
    #[arg(long, global = true)]
    pub log_detail: bool,
    /// A file with settings for all commands, in which each key is an option without its dashes: `walferry config example`
    #[arg(long, global = true, value_name = "FILE", env = crate::settings::VARIABLE)]
    pub config: Option<OsString>,
    /// What is to be said about that file, once there is a log to say it in.
    #[arg(skip)]
    pub warnings: Vec<String>,
}

const EXAMPLE: &str = "A first migration:
  walferry check   --source postgres://app@old/shop --target postgres://app@new/shop
  walferry migrate --source postgres://app@old/shop --target postgres://app@new/shop --dir /var/lib/walferry/shop
  walferry status  --dir /var/lib/walferry/shop          (in another terminal)
  walferry cutover --dir /var/lib/walferry/shop
  walferry clean   --dir /var/lib/walferry/shop

Try it first with: walferry demo
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 blocked, 4 different, 5 cutover given up, 130 interrupted";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prove on both servers that a migration can work; changes nothing
    #[command(
        after_help = "Example: walferry check --source postgres://app@old/shop --target postgres://app@new/shop\n\
        Exit codes: 0 ready, 3 blocked"
    )]
    Check(Check),
    /// Migrate, follow until the cutover, then keep the old primary current; run again, it goes on where it was
    #[command(
        after_help = "Example: walferry migrate --source postgres://app@old/shop --target postgres://app@new/shop --dir ./shop\n\
        With care for a busy source: walferry migrate … --copy-jobs 2 --copy-rate 50MiB --max-source-connections 13 \
        --source-wal-max 200GiB\n\
        Every database of a server: walferry migrate … --dir ./all --all-databases --roles --exclude-database 'test_*'\n\
        A range of some tables, without a slot, is `walferry backfill`, and may be called so: walferry migrate … --tables … --from … --until …\n\
        Ctrl-C stops it; the same command goes on. It ends with a switchback or `walferry finish`, or with a cutover without a way back.\n\
        Exit codes: 0 cut over or switched back, 3 blocked, 130 interrupted"
    )]
    Migrate(MigrateAgain),
    /// Go on after a loss: a new slot, every table compared, and only what differs copied again
    #[command(
        after_help = "Example: walferry resync --source postgres://app@old/shop --target postgres://app@new/shop --dir ./shop\n\
        For a slot that is lost, a queue or state directory that is lost or corrupt, and servers that have failed over.\n\
        It then goes on like `migrate`, and `migrate` goes on from it. Exit codes: 0 cut over, 3 blocked, 130 interrupted"
    )]
    Resync(Migrate),
    /// Show how a migration is
    #[command(after_help = "Example: walferry status --dir ./shop --watch")]
    Status(Status),
    /// Switch to the target
    #[command(after_help = "Examples: walferry cutover --dir ./shop --dry-run\n          \
        walferry cutover --dir ./shop --max-write-stall 2s\n          \
        walferry cutover --dir ./shop --pgbouncer postgres://admin@pooler:6432 --pgbouncer-include /etc/pgbouncer/shop.ini\n\
        What the applications see:\n  \
        --fence lock         writes wait, reads go on; then every session is ended once, and has to connect to the target\n  \
        --fence read-only    every session is ended at once; who comes back can read, and gets an error for each write\n  \
        --fence connections  every session is ended at once; who comes back is refused until it is over\n  \
        --fence tables       of a part of a database (its default): writes to it wait, then get an error; all else goes on\n  \
        --fence none         you have stopped the writers; readers are ended as with lock\n  \
        --pgbouncer …        one slow query and no error, where all go through it in transaction mode\n\
        Commands get WALFERRY_HOOK, WALFERRY_CUTOVER_ID, WALFERRY_SOURCE_HOST, _PORT, _DATABASE, _USER, the same for TARGET, and in \
        WALFERRY_CONNECTION_FILE the path of a file with WALFERRY_SOURCE_URL, _PASSWORD and the target's, to be read by a shell.\n\
        The old primary is kept current from then on, for a switchback; --no-reverse does without.\n\
        Exit codes: 0 switched (or, with --dry-run, ready), 5 given up and following again (not ready)")]
    Cutover(Cutover),
    /// Switch back to the old primary, with all that was written since the cutover
    #[command(after_help = "Example: walferry switchback --dir ./shop --max-write-stall 2s\n\
        The same as a cutover, the other way. Exit codes: 0 switched, 5 given up and following again")]
    Switchback(Switch),
    /// End the way back: the old primary is no longer kept current, and `migrate` exits
    #[command(after_help = "Example: walferry finish --dir ./shop\n\
        It works when the old one is gone. Then: walferry clean --dir ./shop")]
    Finish(Finish),
    /// Hold the apply or the copy while the queue goes on receiving
    #[command(after_help = "Example: walferry pause apply --dir ./shop\n\
        The copy ends the parts that it has begun; walferry tune --copy-rate slows it at once.\n\
        It stays held over a restart, until: walferry resume --dir ./shop")]
    Pause(PauseOptions),
    /// Let what was paused go on
    #[command(after_help = "Example: walferry resume --dir ./shop")]
    Resume(PauseOptions),
    /// Change how a running migration copies: how many jobs, how fast, for which lag of a standby it waits
    #[command(after_help = "Examples: walferry tune --dir ./shop --copy-jobs 2 --copy-rate 20MiB\n          \
        walferry tune --dir ./shop --copy-rate off\n\
        More jobs begin at once; jobs that are too many end after their part. It stays so over a restart, unless an option \
        of that start says otherwise. Without an option it shows how it is.")]
    Tune(TuneOptions),
    /// Compare all rows of both sides, of a running migration while writes go on
    #[command(after_help = "Examples: walferry verify --dir ./shop\n          \
        walferry verify --dir ./shop --tables public.orders,public.lines --show-values\n          \
        walferry verify --source postgres://app@old/shop --target postgres://app@new/shop\n\
        While a migration runs in --dir and follows, both sides are compared at one point while writes go on. Otherwise both \
        have to be quiet: rows that change meanwhile are reported as different.\n\
        Exit codes: 0 equal, 3 no such point to be had, 4 different")]
    Verify(Verify),
    /// Copy again what differs, of a migration that follows
    #[command(after_help = "Example: walferry repair --dir ./shop\n\
        The tables that the last `walferry verify` found to differ, or --tables, are compared with a new snapshot of the source, and \
        what differs is copied again; the queue goes on receiving. Exit codes: 0 done, 3 not now")]
    Repair(Repair),
    /// Fill a target with old rows by pieces, beside an application that writes the new ones to both databases
    #[command(after_help = backfill::EXAMPLES)]
    Backfill(Backfill),
    /// Make the report of a migration for the change ticket: one HTML file
    #[command(after_help = "Example: walferry report --dir ./shop > report.html\n\
        What was moved, how long it took, the downtime by step, plots, incidents, operator commands and the statements that changed a \
        server. It asks the target for the ledger, and does without where that does not answer. Make it before `walferry clean`.")]
    Report(Report),
    /// Remove what a migration left: slot, publications, ledger, fence, state directory
    #[command(after_help = "Example: walferry clean --dir ./shop\n\
        Without --dir it looks on both servers: walferry clean --source … --target …")]
    Clean(Clean),
    /// Look at a settings file, or print one to begin with
    #[command(after_help = "Examples: walferry config example > walferry.toml\n          \
        walferry config check walferry.toml\n          \
        walferry migrate --config walferry.toml --copy-jobs 2\n\
        The command line wins over the environment, and that over the file.")]
    Config(ConfigOptions),
    /// Print what makes a shell complete commands and options
    #[command(
        after_help = "Examples: walferry completions bash > ~/.local/share/bash-completion/completions/walferry\n          \
        walferry completions zsh > /usr/local/share/zsh/site-functions/_walferry\n          \
        walferry completions fish > ~/.config/fish/completions/walferry.fish"
    )]
    Completions(Completions),
    /// Print the manual page of the program or of a command, or write all of them
    #[command(after_help = "Examples: walferry man cutover | man -l -\n          \
        walferry man --out /usr/local/share/man/man1")]
    Man(ManOptions),
    /// Propose a file for `migrate --hypertables` from the source's statistics
    #[command(
        after_help = "Examples: walferry suggest-hypertables --source postgres://app@old/shop --memory 4GiB > hypertables.toml\n          \
        walferry suggest-hypertables --source postgres://app@old/shop --target postgres://app@new/shop --include-table 'metrics.*'\n\
        Each choice is explained in a comment; tables that are left alone stand there with the reason. Changes nothing."
    )]
    SuggestHypertables(SuggestHypertables),
    /// Two throwaway servers, live writes, a whole migration, a report
    #[command(after_help = "Example: walferry demo --seconds 10")]
    Demo(Demo),
}

/// The two servers.
#[derive(Clone, Debug, Args)]
pub struct Servers {
    /// The server to move away from: a URL or key=value pairs as libpq has them
    #[arg(long, env = "WALFERRY_SOURCE", hide_env_values = true)]
    pub source: Option<String>,
    /// The server to move to
    #[arg(long, env = "WALFERRY_TARGET", hide_env_values = true)]
    pub target: Option<String>,
    /// A command that prints the source's password; run at every connect
    #[arg(long, value_name = "COMMAND")]
    pub source_password_command: Option<String>,
    /// A command that prints the target's password; run at every connect
    #[arg(long, value_name = "COMMAND")]
    pub target_password_command: Option<String>,
}

/// Roles on the target: who owns what, and who may do what.
#[derive(Debug, Args)]
pub struct Roles {
    /// Create the roles on the target that own something in the database or are granted something, with their passwords where the
    /// source lets us read them, settings and memberships; those that are there already stay as they are
    #[arg(long)]
    pub roles: bool,
    /// Give nothing to its owner: all objects belong to the role that connects to the target
    #[arg(long)]
    pub no_owner: bool,
    /// Grant and revoke nothing
    #[arg(long)]
    pub no_privileges: bool,
    /// The role OLD of the source is NEW on the target, wherever it owns or is granted something; may be given several times
    #[arg(long, value_parser = parse_role_map, value_name = "OLD=NEW")]
    pub role_map: Vec<(String, String)>,
}

impl Roles {
    /// The same for the rest of the program.
    pub fn owners(&self) -> crate::unstreamed::large_object::Owners {
        crate::unstreamed::large_object::Owners {
            create_roles: self.roles,
            no_owner: self.no_owner,
            no_privileges: self.no_privileges,
            role_map: self.role_map.clone(),
        }
    }
}

/// Where the state directory is.
#[derive(Debug, Args)]
pub struct Directory {
    /// The state directory: queue, configuration, lock, control socket
    #[arg(long, env = "WALFERRY_DIR")]
    pub dir: PathBuf,
}

/// `walferry check`.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub standbys: StandbyOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub parallelism: Parallelism,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub connections: Connections,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub roles: Roles,
    /// The state directory that the migration would have, to check its disk
    #[arg(long, env = "WALFERRY_DIR")]
    pub dir: Option<PathBuf>,
    /// Check for a migration with --no-reverse (matters for --plan)
    #[arg(long)]
    pub no_reverse: bool,
    /// Check for a migration with --replica-identity-full
    #[arg(long)]
    pub replica_identity_full: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub filters: Filters,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub place: Place,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub timescale: TimescaleOptions,
    /// Copy rows for at most this long in a transaction that is rolled back, to estimate the time of the copy; 0 for no such trial
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=3600), value_name = "N")]
    pub estimate_seconds: u64,
    /// Print every statement that a migration with these options may run on either server, in order, with its condition and what
    /// takes it back; asks no server
    #[arg(long)]
    pub plan: bool,
    /// Check also what `migrate --replicate-ddl` needs
    #[arg(long, conflicts_with_all = PART_OPTIONS)]
    pub replicate_ddl: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub all: AllDatabases,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// `walferry migrate`.
#[derive(Debug, Args)]
pub struct MigrateAgain {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub migrate: Migrate,
    /// Bring the schema with its keys and indexes, no rows, and end
    #[arg(long, conflicts_with_all = ["recopy", "data_only", "replicate_ddl", "replica_identity_full", "hypertables", "all_databases"])]
    pub schema_only: bool,
    /// Compare these tables (schema.name) with the source again before going on, and copy what differs
    #[arg(long, value_name = "TABLE", num_args = 1.., conflicts_with = "all_databases")]
    pub recopy: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub all: MigrateAll,
}

/// `walferry migrate` and `walferry resync`.
#[derive(Debug, Args)]
pub struct Migrate {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub standbys: StandbyOptions,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub parallelism: Parallelism,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub care: Care,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub connections: Connections,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub roles: Roles,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub filters: Filters,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub place: Place,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub timescale: TimescaleOptions,
    /// Tables larger than this are copied in ranges
    #[arg(long, default_value = "1GiB", value_parser = parse_bytes, value_name = "SIZE")]
    pub split_above: u64,
    /// Memory for all index builds together on the target, shared out as maintenance_work_mem [default: a quarter of its
    /// shared_buffers, at most 1GiB for each build and at least the server's own setting]
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    pub index_memory: Option<u64>,
    /// How long applied changes are kept in the queue, for a target that fails over and loses its newest commits
    #[arg(long, default_value = "1h", value_parser = parse_duration, value_name = "DURATION")]
    pub queue_keep: Duration,
    /// Who wins where somebody else has written to the target: nobody, and the migration stops; the source's row; or the target's
    #[arg(long, value_enum, default_value_t, value_name = "WHO")]
    pub on_conflict: OnConflict,
    /// Have the whole old row identify each table whose updates and deletes would name no row (REPLICA IDENTITY FULL), from before
    /// the slot until `walferry clean` puts back what there was
    #[arg(long)]
    pub replica_identity_full: bool,
    /// Make no way back ready: nothing of it is written to the source, and the cutover is for good
    #[arg(long)]
    pub no_reverse: bool,
    /// Have the target run the DDL of the source, in its place among the rows, by event triggers on the source (PostgreSQL 14 or
    /// newer); fixed when the migration begins. What cannot be replayed stops the apply, as all DDL does without this
    #[arg(long, conflicts_with_all = PART_OPTIONS)]
    pub replicate_ddl: bool,
    /// Where metrics, health and status are served, for reading only; `off` for nowhere
    #[arg(long, default_value = "127.0.0.1:9617", value_parser = parse_http_address, value_name = "ADDRESS")]
    pub http_addr: HttpAddress,
    /// When it has been cut over: one JSON object on standard output
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub when: CutoverWhen,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub how: CutoverHow,
}

/// `walferry status`.
#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
    /// Show it all the time: on a terminal as a view that fills it (q quits), elsewhere as lines every second
    #[arg(long, conflicts_with = "json")]
    pub watch: bool,
    /// Exit with 1 when the migration has failed or is not running
    #[arg(long)]
    pub exit_code: bool,
}

/// `walferry pause` and `walferry resume`.
#[derive(Debug, Args)]
pub struct PauseOptions {
    /// What; `pause` holds the apply and `resume` lets all go on unless it is said
    #[arg(value_enum)]
    pub what: Option<What>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// `walferry tune`.
#[derive(Debug, Args)]
pub struct TuneOptions {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    /// Tables, or ranges of large tables, copied at once
    #[arg(long, value_parser = at_least_one, value_name = "N")]
    pub copy_jobs: Option<usize>,
    /// Copy at most so many bytes a second, over all jobs; `off` for as fast as it goes
    #[arg(long, value_parser = parse_rate, value_name = "SIZE")]
    pub copy_rate: Option<Limit<u64>>,
    /// The copy waits while a physical standby of the source lags more than this; `off` to let it lag
    #[arg(long, value_parser = parse_lag, value_name = "DURATION")]
    pub max_standby_lag: Option<Limit<Duration>>,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// `walferry verify`.
#[derive(Clone, Debug, Args)]
pub struct Verify {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    /// The state directory of the migration whose servers to compare
    #[arg(long, env = "WALFERRY_DIR")]
    pub dir: Option<PathBuf>,
    /// Only these tables (schema.name), separated by commas
    #[arg(long, value_delimiter = ',')]
    pub tables: Option<Vec<String>>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub filters: Filters,
    /// Compare only about so much of each table, drawn anew each time: a percentage
    #[arg(long, value_parser = parse_percent, value_name = "PERCENT")]
    pub sample: Option<f64>,
    /// Ranges compared at once
    #[arg(long, default_value_t = 4, value_parser = at_least_one)]
    pub jobs: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub connections: Connections,
    /// Differing rows that are named per table
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pub max_keys: u32,
    /// Show the values of rows that differ; they can be personal data
    #[arg(long)]
    pub show_values: bool,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// `walferry repair`.
#[derive(Debug, Args)]
pub struct Repair {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    /// These tables (schema.name), separated by commas [default: those that the last `verify` found to differ]
    #[arg(long, value_delimiter = ',')]
    pub tables: Option<Vec<String>>,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// `walferry clean`.
#[derive(Debug, Args)]
pub struct Clean {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    /// The state directory of the migration
    #[arg(long, env = "WALFERRY_DIR")]
    pub dir: Option<PathBuf>,
    /// The standby that the slot is on, where a migration had one and its state directory is lost
    #[arg(long, env = "WALFERRY_STREAM_FROM", hide_env_values = true, value_name = "URL")]
    pub stream_from: Option<String>,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// `walferry demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// About how many rows there are at the start
    #[arg(long, default_value_t = 300_000)]
    pub rows: u64,
    /// Sessions that write all the time
    #[arg(long, default_value_t = 4)]
    pub writers: u32,
    /// How long the migration follows, and how long the application goes on at the target
    #[arg(long, default_value_t = 5)]
    pub seconds: u32,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_and_every_example_is_a_command_line() {
        let mut parsed = 0;
        let program = Cli::command();
        let all =
            program.get_subcommands().flat_map(|command| std::iter::once(command).chain(command.get_subcommands()));
        for command in all {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{} has none", command.get_name());
            for line in help.replace("\\\n", " ").lines() {
                let line =
                    line.trim_start().trim_start_matches("Examples:").trim_start_matches("Example:").trim_start();
                // Up to what only a shell understands.
                let words: Vec<&str> = line.split_whitespace().take_while(|word| !["|", ">"].contains(word)).collect();
                if words.first() == Some(&"walferry") && !line.contains('…') && !words.contains(&"--config") {
                    let read = Cli::try_parse_from(&words);
                    assert!(read.is_ok(), "{line}: {}", read.unwrap_err());
                    parsed += 1;
                }
            }
        }
        assert!(parsed >= 20, "{parsed}");
    }
}
