//! What of a database is moved, and where to: the filters.

use clap::Args;

use super::values::{Hypertables, parse_hypertables, parse_schemas};
use crate::source::scope::Scope;

/// What of the database is moved. Patterns are those of pg_dump.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "A part of a database")]
pub struct Filters {
    /// Only tables that this pattern names (schema.table, * and ?); may be given again
    #[arg(long, value_name = "PATTERN")]
    pub include_table: Vec<String>,
    /// No table that this pattern names, whatever includes it
    #[arg(long, value_name = "PATTERN")]
    pub exclude_table: Vec<String>,
    /// Only what is in schemas that this pattern names, besides what --include-table names
    #[arg(long, value_name = "PATTERN")]
    pub include_schema: Vec<String>,
    /// Nothing of schemas that this pattern names
    #[arg(long, value_name = "PATTERN")]
    pub exclude_schema: Vec<String>,
}

/// What DDL is not replicated with: a statement can speak of more than what is moved, and of names that the target does not have.
pub(super) const PART_OPTIONS: [&str; 7] =
    ["include_table", "exclude_table", "include_schema", "exclude_schema", "data_only", "map_schema", "hypertables"];

/// What of the database is moved where.
#[derive(Debug, Args)]
#[command(next_help_heading = "A part of a database")]
pub struct Place {
    /// The target has the tables already, empty: only rows are moved, their columns found by name
    #[arg(long)]
    pub data_only: bool,
    /// From the cutover on this schema has another name on the target; until then its own. There is no way back from that: with
    /// --no-reverse only; may be given again
    #[arg(long, value_parser = parse_schemas, value_name = "OLD=NEW", conflicts_with = "data_only")]
    pub map_schema: Vec<(String, String)>,
    /// A TOML file that says which tables are TimescaleDB hypertables on the target, with their chunks, compression and policies;
    /// `walferry suggest-hypertables` writes one. There is no way back from that: with --no-reverse only
    #[arg(long, value_parser = parse_hypertables, value_name = "FILE", conflicts_with_all = ["data_only", "map_schema"])]
    pub hypertables: Option<Hypertables>,
}

impl Filters {
    /// The same for the rest of the program.
    pub fn scope(&self, place: Option<&Place>) -> Scope {
        Scope {
            include_tables: self.include_table.clone(),
            exclude_tables: self.exclude_table.clone(),
            include_schemas: self.include_schema.clone(),
            exclude_schemas: self.exclude_schema.clone(),
            data_only: place.is_some_and(|place| place.data_only),
            map_schemas: place.map_or_else(Vec::new, |place| place.map_schema.clone()),
            hypertables: place.and_then(|place| place.hypertables.clone()).unwrap_or_default().0,
        }
    }
}
