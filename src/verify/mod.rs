//! Proves that both sides hold the same rows, and names the rows that are not the same. It changes nothing.
//!
//! ```text
//!            plan                compare                          narrow                       report
//!  table ──► key ranges, or ──► per range: row count and a ──► only where they differ:     ──► counts, and the keys
//!            page ranges        sum of 128-bit row hashes,      cells of a hash of the key,     that are missing, extra
//!            of each side       computed in both servers        until few rows are left;        or different, with the
//!                               at the same time                their hashes come over here     columns that differ
//! ```
//!
//! The hash (see `hash`) is over what the types' output functions print, so two values are equal exactly when `psql`
//! would show the same bytes: `1.0` is not `1.00`, `-0` is not `0`, `'A'` is not `'a'` under any collation. The
//! sum does not depend on the order of the rows, so no server sorts anything.
//!
//! How a table is cut decides nothing about the outcome, only about speed and what is read twice. Key ranges are used
//! only for integers, whose order is the same on every server; text sorts by collation, and two servers can disagree
//! about it. Every other table is read once on each side in ranges of pages, and its rows are told apart by cells of a hash
//! of the key (or of the whole row where there is no key), which means the same on both sides.
//!
//! Every function works on sessions that the caller opened, and either in the transactions that the caller began in them or under
//! [`Options::snapshots`]: with one snapshot per side that belong together the answer is exact; with writers and without
//! snapshots, rows in motion show as differences. `point` takes snapshots that belong together while writes go on (`prefix`:
//! whether what a snapshot shows is a beginning of the stream), in the process that applies; `record` keeps what came of it.
//! Sessions must be pinned as `connection` does it (TimeZone, DateStyle, extra_float_digits, client_encoding UTF8, …).

mod compare;
mod hash;
mod history;
mod layout;
mod narrow;
pub mod online;
mod plan;
pub mod point;
mod prefix;
mod range;
pub mod record;
pub mod report;
mod sample;
pub mod sequences;
mod snapshots;

pub use compare::{Lent, Mismatch, Sessions, choose, compare, compare_table, mismatch};
pub use range::{RangeDigest, RangeHash};
pub use record::{Verification, last, require};
pub use report::{Difference, DifferenceKind, Report, TableReport};
pub use snapshots::Snapshots;

/// What to compare, and how much of a difference to show.
#[derive(Clone, Debug)]
pub struct Options {
    /// Ranges compared at the same time; each takes one session on each side. At least 1.
    pub jobs: usize,
    /// Only these tables, as `schema.name` or with quotes as PostgreSQL prints them; `None` for all.
    pub tables: Option<Vec<String>>,
    /// Whether a difference shows the values of its row (they may be personal data). Keys are always shown.
    pub show_values: bool,
    /// How many differing keys are named per table.
    pub max_keys: usize,
    /// About so many rows per range, and so the unit of progress.
    pub range_rows: i64,
    /// Compare about this percentage of each table's rows, drawn anew each time; `None` for all.
    pub sample_percent: Option<f64>,
    /// What the sessions are to see, which are then opened without a transaction. Each range is read in a transaction of its own.
    pub snapshots: Option<Snapshots>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            jobs: 4,
            tables: None,
            show_values: false,
            max_keys: 20,
            range_rows: 500_000,
            sample_percent: None,
            snapshots: None,
        }
    }
}

/// One more range of a table has been compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// `"schema"."name"`.
    pub table: String,
    /// Ranges compared so far.
    pub ranges_done: usize,
    /// Ranges in all.
    pub ranges_total: usize,
    /// Rows of the source in this range.
    pub rows: i64,
}
