//! `walferry backfill`.

use clap::Args;

use super::values::{at_least_one, parse_http_address, parse_rate};
use super::{Directory, HttpAddress, Servers};
use crate::apply::conflict::OnConflict;
use crate::backfill::{Bound, parse_bound};
use crate::care::tune::Limit;

pub(super) const EXAMPLES: &str = "Examples: walferry backfill --dir ./fill --until 2026-11-21T00:00:00Z --dry-run
          walferry backfill --dir ./fill --until 2026-11-21T00:00:00Z
          walferry backfill --dir ./events --tables public.events --time-column public.events=created_at \\
              --from 2026-01-01 --until 2026-07-01
The one command for old rows by pieces: all tables up to --until, or a range of some (--tables, --from, --until). The target has
the schema already. Rows at or past --until are the application's. Hypertables are copied chunk by chunk, compressed chunks as they are
where both servers have the same version of TimescaleDB; other tables whole, or in ranges with --time-column. Each piece is compared.
Policies of the target rest meanwhile; continuous aggregates are refreshed at the end. Run again, it goes on with the pieces that are left.
It can be watched, paused and tuned like a migration: walferry status, pause copy, resume, tune --dir. docs/backfill.md says how to choose T.
Exit codes: 0 all is there, 3 blocked, 1 failed (the same command goes on), 4 rows differ or lack their parents, 130 interrupted";

/// `walferry backfill`.
#[derive(Debug, Args)]
pub struct Backfill {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub servers: Servers,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub directory: Directory,
    /// From this time on rows are the application's: a time, a day (from its beginning in UTC), or a number where the tables'
    /// time is one
    #[arg(long, value_parser = parse_bound, value_name = "T", allow_hyphen_values = true)]
    pub until: Bound,
    /// Leave older rows out; not of tables that are copied whole
    #[arg(long, value_parser = parse_bound, value_name = "TIME", allow_hyphen_values = true)]
    pub from: Option<Bound>,
    /// Only these tables (schema.name), separated by commas
    #[arg(long, value_delimiter = ',')]
    pub tables: Option<Vec<String>>,
    /// The column by which the bounds cut a table that is no hypertable; without it, such a table is copied whole. May be given again
    #[arg(long, value_parser = parse_time_column, value_name = "TABLE=COLUMN")]
    pub time_column: Vec<(String, String)>,
    /// Who wins where a row of the target has the key of an older row of the source and is another: nobody, and it stops; the source's
    /// row; or the target's
    #[arg(long, value_enum, default_value_t, value_name = "WHO")]
    pub on_conflict: OnConflict,
    /// Pieces copied at once [default: 4, or what was tuned before]
    #[arg(long, value_parser = at_least_one)]
    pub copy_jobs: Option<usize>,
    /// Copy at most so many bytes a second, over all jobs; `off` for as fast as it goes
    #[arg(long, value_parser = parse_rate, value_name = "SIZE")]
    pub copy_rate: Option<Limit<u64>>,
    /// Show the pieces, their sizes and how they would be copied; change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Where metrics, health and status are served, for reading only; `off` for nowhere
    #[arg(long, default_value = "127.0.0.1:9617", value_parser = parse_http_address, value_name = "ADDRESS")]
    pub http_addr: HttpAddress,
    /// One JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// `schema.table=column`.
fn parse_time_column(text: &str) -> Result<(String, String), String> {
    match text.rsplit_once('=') {
        Some((table, column)) if !table.is_empty() && !column.is_empty() => Ok((table.to_owned(), column.to_owned())),
        _ => Err("expected schema.table=column".to_owned()),
    }
}
