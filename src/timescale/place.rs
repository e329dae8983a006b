//! Which chunk of the target holds the range that a chunk of the source has.
//!
//! An UPDATE or DELETE of a hypertable opens every chunk of it before it leaves out those that its conditions exclude: with a thousand
//! chunks that takes 28 ms a statement, with five thousand five times that. So what changes rows of one chunk names the target's chunk of
//! exactly that range, where there is one; rows come in by the hypertable all the same. Of a compressed one, the extension decompresses what
//! the statement meets as it does by the hypertable.
//!
//! Where it has gone since, the statement is refused, and the replay row by row, which names the hypertable, judges (I5).

use std::collections::HashMap;

use super::chunk::ChunkOf;
use crate::connection::wire::RawSession;
use crate::error::{Context, Result};
use crate::source::catalog::Table;
use crate::sql;

/// What a session has found out; for as long as it lives, which is no longer than the tables are known as they are.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Tables by their places, as they are on the target; `None` where no chunk has just that range.
    known: HashMap<usize, Option<Table>>,
    /// Whether chunks of the target share slices, by a table of constraints (up to 2.27).
    shares_slices: Option<bool>,
}

impl Places {
    /// The table at a place by the name that changes of its rows go to, if that is another than the hypertable's.
    pub(crate) fn get(&self, place: usize) -> Option<&Table> {
        self.known.get(&place)?.as_ref()
    }

    /// Whether the table at a place has to be looked for.
    pub(crate) fn is_unknown(&self, place: usize, table: &Table) -> bool {
        let has_ranges = table.chunk.as_ref().is_some_and(|chunk| !chunk.ranges.is_empty());
        has_ranges && !self.known.contains_key(&place)
    }

    /// Looks for tables at their places.
    ///
    /// # Errors
    /// Whatever the server says.
    pub(crate) async fn find(&mut self, session: &mut RawSession, wanted: &[(usize, &Table)]) -> Result<()> {
        let doing = || "looking for the target's chunks".to_owned();
        let shares_slices = match self.shares_slices {
            Some(known) => known,
            None => {
                let exists = "SELECT pg_catalog.to_regclass('_timescaledb_catalog.chunk_constraint') IS NOT NULL";
                let rows = session.simple_query(exists).await.context(doing)?;
                *self.shares_slices.insert(rows.first().and_then(|row| row.first()?.as_deref()) == Some("t"))
            }
        };
        let chunks: Vec<(usize, &ChunkOf)> =
            wanted.iter().filter_map(|(place, table)| Some((*place, table.chunk.as_ref()?))).collect();
        let rows = session.simple_query(&query(&chunks, shares_slices)).await.context(doing)?;
        self.known.extend(chunks.iter().map(|(place, _)| (*place, None)));
        for row in rows {
            let [Some(place), Some(schema), Some(name)] = &row[..] else { continue };
            let found = wanted.iter().find(|(wanted, _)| wanted.to_string() == *place);
            let Some(&(place, table)) = found else { continue };
            let mut table = table.clone();
            if let Some(chunk) = &mut table.chunk {
                chunk.on_target = Some(sql::qualified(schema, name));
            }
            self.known.insert(place, Some(table));
        }
        Ok(())
    }
}

/// The chunks of exactly these ranges, by the names of hypertables and dimensions: numbers of the extension's catalog may be others.
fn query(chunks: &[(usize, &ChunkOf)], shares_slices: bool) -> String {
    let values: Vec<String> = chunks
        .iter()
        .flat_map(|(place, chunk)| {
            let ranges = chunk.dimensions.iter().zip(&chunk.ranges);
            ranges.map(move |(dimension, (start, end))| {
                format!(
                    "({place}, {}, {}, {}, {}, '{start}'::int8, '{end}'::int8)",
                    chunk.ranges.len(),
                    sql::literal(chunk.hypertable_on_target().0),
                    sql::literal(chunk.hypertable_on_target().1),
                    sql::literal(dimension)
                )
            })
        })
        .collect();
    let of_slice = if shares_slices {
        "JOIN _timescaledb_catalog.chunk_constraint n ON n.dimension_slice_id = s.id JOIN _timescaledb_catalog.chunk k ON k.id = n.chunk_id"
    } else {
        "JOIN _timescaledb_catalog.chunk k ON k.id = s.chunk_id"
    };
    format!(
        "SELECT w.place, k.schema_name, k.table_name \
         FROM (VALUES {}) w(place, dimensions, schema_name, table_name, dimension, range_start, range_end) \
         JOIN _timescaledb_catalog.hypertable h ON h.schema_name = w.schema_name AND h.table_name = w.table_name \
         JOIN _timescaledb_catalog.dimension d ON d.hypertable_id = h.id AND d.column_name = w.dimension \
         JOIN _timescaledb_catalog.dimension_slice s \
           ON s.dimension_id = d.id AND s.range_start = w.range_start AND s.range_end = w.range_end \
         {of_slice} AND k.hypertable_id = h.id \
         WHERE pg_catalog.to_regclass(pg_catalog.format('%I.%I', k.schema_name, k.table_name)) IS NOT NULL \
         GROUP BY w.place, w.dimensions, k.id, k.schema_name, k.table_name HAVING pg_catalog.count(*) = w.dimensions",
        values.join(", ")
    )
}
