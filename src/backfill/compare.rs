//! Whether the target's tables can take the rows; what cannot be is named before anything is copied.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::plan::Work;
use crate::check::Severity;
use crate::check::existing;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::{Column, Table};
use crate::target::role::ApplyRole;
use crate::timescale::chunks::{self, Hypertable};

/// What is known of a table on the target.
#[derive(Clone, Debug, Default)]
pub(super) struct There {
    /// Its OID.
    pub(super) relid: u32,
    /// The hypertable, if it is one.
    pub(super) hypertable: Option<Hypertable>,
    /// Its chunks can be made with the source's ranges.
    pub(super) has_same_dimensions: bool,
    /// Compressed rows can be taken as they are, as far as the tables and the versions decide.
    pub(super) takes_batches: bool,
    /// The columns of a unique index, by which a row is found that is there already; empty where there is none.
    pub(super) key: Vec<Column>,
}

/// Compares, and answers for each table what the target has.
///
/// # Errors
/// `Blocked`, with every difference by name.
pub(super) async fn compare(source: &Client, target: &Client, work: &[Work], role: ApplyRole) -> Result<Vec<There>> {
    let tables: Vec<Table> = work.iter().map(|one| one.table.clone()).collect();
    let mut against: Vec<String> = Vec::new();
    for finding in existing::differences_of(target, &tables, role).await? {
        if finding.severity == Severity::Blocker && finding.code != "target-key-missing" {
            let message = finding.message.replace(", and --data-only makes none", "");
            against.push(format!("{}: {message}", finding.object));
        }
    }
    if !against.is_empty() {
        let text = format!("the target cannot take the rows: {}", against.join("; "));
        return Err(Error::new(ErrorKind::Blocked, text).hint(
            "Bring the target's schema to the source's first, for example by pg_dump --schema-only and your own migrations; then run the same command again.",
        ));
    }
    let versions = (chunks::extension(source).await?, chunks::extension(target).await?);
    let same_version =
        versions.0.is_some() && versions.0.as_ref().map(|one| &one.0) == versions.1.as_ref().map(|one| &one.0);
    let hypertables = if versions.1.is_some() { chunks::hypertables(target).await? } else { Vec::new() };
    let mut there = Vec::new();
    for one in work {
        let table = &one.table;
        let hypertable = hypertables.iter().find(|other| (&other.schema, &other.name) == (&table.schema, &table.name));
        let (relid, key) = key(target, table).await?;
        let both = one.hypertable.as_ref().zip(hypertable);
        let has_same_dimensions = both.is_some_and(|(from, to)| from.dimensions == to.dimensions);
        let takes_batches = has_same_dimensions
            && same_version
            && both.is_some_and(|(from, to)| to.has_compression && !from.skips_chunks && !to.skips_chunks);
        there.push(There { relid, hypertable: hypertable.cloned(), has_same_dimensions, takes_batches, key });
    }
    Ok(there)
}

/// The table's OID, and the columns of its first unique index over columns that rows come with, the primary key before others.
async fn key(target: &Client, table: &Table) -> Result<(u32, Vec<Column>)> {
    let rows = target
        .query_typed(
            "SELECT c.oid, (SELECT pg_catalog.array_agg(a.attname::text ORDER BY k.place) \
                            FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(number, place) \
                            JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number \
                            WHERE k.place <= i.indnkeyatts) \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate \
                  AND i.indpred IS NULL AND i.indexprs IS NULL \
             WHERE n.nspname = $1 AND c.relname = $2 ORDER BY i.indisprimary DESC NULLS LAST, i.indexrelid",
            &[(&table.schema, Type::TEXT), (&table.name, Type::TEXT)],
        )
        .await
        .context(|| format!("reading the keys of {} on the target", table.qualified()))?;
    let mut relid = 0;
    for row in rows {
        relid = row.get(0);
        let names: Vec<String> = row.get::<_, Option<Vec<String>>>(1).unwrap_or_default();
        let column = |name: &String| {
            table.columns.iter().find(|column| column.name == *name && column.equality_schema.is_some()).cloned()
        };
        let columns: Option<Vec<Column>> = names.iter().map(column).collect();
        if let Some(columns) = columns.filter(|columns| !columns.is_empty()) {
            return Ok((relid, columns));
        }
    }
    Ok((relid, Vec::new()))
}
