//! What one side knows of a table, and what both sides have in common.
//!
//! The source's recorded catalog leaves generated columns out, because the stream and COPY do; here they count, since
//! the target computes them and may compute something else. So both sides are asked anew, and columns meet by name.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::error::{Context, Result};
use crate::source::catalog::Table;
use crate::source::version::Version;
use crate::sql;
use crate::timescale::HAS_CHUNKS;
use crate::timescale::chunks::{self, Hypertable, TimeType};

/// A table on one side.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// What to read from: an ordinary table without those that inherit from it, anything else as a whole.
    pub(super) from: String,
    /// Pages of 8 KiB in the main fork; 0 where it has none of its own.
    pub(super) pages: i64,
    /// The planner's estimate, scaled to the size of now; not positive where there is none.
    pub(super) estimated_rows: f64,
    /// Whether a range of pages is read without reading the others (TID range scans, PostgreSQL 14).
    pub(super) reads_page_ranges: bool,
    /// Whether floats print as they do since PostgreSQL 12.
    prints_floats_shortest: bool,
    /// Of a hypertable, how its chunks divide time.
    pub(super) times: Option<Times>,
    columns: Vec<LayoutColumn>,
}

/// How the chunks of a hypertable divide time.
#[derive(Clone, Debug)]
pub(super) struct Times {
    /// Unquoted.
    pub(super) column: String,
    pub(super) time: TimeType,
    /// Where each begins, in order, and about how many rows it has.
    pub(super) chunks: Vec<(i64, i64)>,
}

#[derive(Clone, Debug)]
struct LayoutColumn {
    name: String,
    /// Of a domain, that of its base.
    type_oid: u32,
    /// Whether a complete btree index starts with it.
    leads_index: bool,
    /// How far the order of the values is the order of the rows on disk, from -1 to 1 (`pg_stats.correlation`).
    correlation: Option<f32>,
}

/// What both sides have in common, and what they do not.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    /// In the source's order.
    pub(super) columns: Vec<SharedColumn>,
    /// Positions in `columns`; empty where the table has no key or a part of it is missing on a side.
    pub(super) key: Vec<usize>,
    /// Whether ranges of the key's first column can be read from an index on both sides, close to the order on disk.
    pub(super) splits_by_key: bool,
    pub(super) missing_on_target: Vec<String>,
    pub(super) extra_on_target: Vec<String>,
}

#[derive(Clone, Debug)]
pub(super) struct SharedColumn {
    pub(super) name: String,
    /// On both sides.
    pub(super) is_bytea: bool,
    /// The type's send function, where the text of a float is not the same on both sides and its bits are compared.
    pub(super) sent_by: Option<&'static str>,
}

const BYTEA: u32 = 17;
/// Types with floats in them, and their send functions.
const SEND: [(u32, &str); 18] = [
    (700, "float4send"),
    (701, "float8send"),
    (600, "point_send"),
    (601, "lseg_send"),
    (602, "path_send"),
    (603, "box_send"),
    (604, "poly_send"),
    (628, "line_send"),
    (718, "circle_send"),
    (1021, "array_send"),
    (1022, "array_send"),
    (1017, "array_send"),
    (1018, "array_send"),
    (1019, "array_send"),
    (1020, "array_send"),
    (1027, "array_send"),
    (629, "array_send"),
    (719, "array_send"),
];
/// int8, int2, int4.
const INTEGERS: [u32; 3] = [20, 21, 23];
/// Below this an index scan over a range reads the same pages again and again; one scan of the table is cheaper.
const CORRELATION_MIN: f32 = 0.8;

/// The table on this side, or `None` where there is none of that name.
pub(super) async fn read(client: &Client, table: &Table, side: &str) -> Result<Option<Layout>> {
    let doing = || format!("reading the layout of table {} on the {side}", table.qualified());
    let found = client
        .query_opt(
            &format!(
                "SELECT c.oid, c.relkind = 'r' AND NOT {HAS_CHUNKS}, \
                    CASE WHEN c.relkind = 'r' THEN pg_catalog.pg_relation_size(c.oid) ELSE 0 END \
                      / pg_catalog.current_setting('block_size')::int8, \
                    CASE WHEN c.relkind = 'r' AND c.relpages > 0 \
                         THEN c.reltuples::float8 / c.relpages * pg_catalog.pg_relation_size(c.oid) \
                              / pg_catalog.current_setting('block_size')::int8 \
                         ELSE c.reltuples::float8 END, \
                    pg_catalog.current_setting('server_version_num')::int4 / 10000, \
                    c.relkind = 'r' AND c.relhassubclass \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"
            ),
            &[&table.schema, &table.name],
        )
        .await
        .context(doing)?;
    let Some(found) = found else { return Ok(None) };
    let relid: u32 = found.get(0);
    let version = Version(u32::try_from(found.get::<_, i32>(4)).unwrap_or_default());
    let columns = client
        .query(
            "SELECT a.attname, \
                    coalesce((SELECT t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid AND t.typtype = 'd'), a.atttypid), \
                    EXISTS (SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid \
                            JOIN pg_catalog.pg_am m ON m.oid = x.relam \
                            WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND i.indisvalid \
                              AND i.indpred IS NULL AND m.amname = 'btree'), \
                    (SELECT s.correlation FROM pg_catalog.pg_stats s WHERE s.schemaname = $2 AND s.tablename = $3 \
                       AND s.attname = a.attname AND NOT s.inherited) \
             FROM pg_catalog.pg_attribute a WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped \
             ORDER BY a.attnum",
            &[&relid, &table.schema, &table.name],
        )
        .await
        .context(doing)?;
    // A hypertable without chunks has no row, and needs no other look than any table.
    let hypertable = if found.get(5) { chunks::hypertable(client, &table.schema, &table.name).await? } else { None };
    let times = match &hypertable {
        Some(hypertable) => times(client, hypertable).await?,
        None => None,
    };
    // The rows of a hypertable are in its chunks, which need not be the same on both sides.
    let only = if found.get(1) && hypertable.is_none() { "ONLY " } else { "" };
    Ok(Some(Layout {
        from: format!("{only}{}", sql::qualified(&table.schema, &table.name)),
        pages: found.get(2),
        estimated_rows: found.get(3),
        reads_page_ranges: version.scans_page_ranges() && hypertable.is_none(),
        times,
        prints_floats_shortest: version.prints_floats_shortest(),
        columns: columns
            .into_iter()
            .map(|row| LayoutColumn {
                name: row.get(0),
                type_oid: row.get(1),
                leads_index: row.get(2),
                correlation: row.get(3),
            })
            .collect(),
    }))
}

/// About how many bytes a row takes, and one that is compressed.
const ROW_BYTES: i64 = 80;
const COMPRESSED_ROW_BYTES: i64 = 8;

async fn times(client: &Client, hypertable: &Hypertable) -> Result<Option<Times>> {
    let Some(first) = hypertable.dimensions.first() else { return Ok(None) };
    let Some(time) = first.time_type.clone() else { return Ok(None) };
    let all = chunks::chunks(client, hypertable, None).await?;
    let rows =
        |chunk: &chunks::Chunk| chunk.bytes / if chunk.compressed.is_some() { COMPRESSED_ROW_BYTES } else { ROW_BYTES };
    let chunks = all.iter().map(|chunk| (chunk.range(hypertable).0, rows(chunk))).collect();
    Ok(Some(Times { column: first.column.clone(), time, chunks }))
}

impl Layout {
    /// How many rows there are, roughly; only speed depends on it.
    pub(super) fn rows(&self) -> i64 {
        // Without an estimate: about 80 bytes a row.
        if self.estimated_rows > 0.0 { self.estimated_rows as i64 } else { self.pages.saturating_mul(100) }
    }

    fn reads_in_key_order(&self, name: &str) -> bool {
        self.columns.iter().any(|column| {
            column.name == name
                && INTEGERS.contains(&column.type_oid)
                && column.leads_index
                && column.correlation.is_none_or(|correlation| correlation.abs() >= CORRELATION_MIN)
        })
    }
}

/// What both sides have in common; `key` holds the names of the key's columns.
pub(super) fn shared(source: &Layout, target: &Layout, key: &[&str]) -> Shared {
    let on_target: BTreeMap<&str, &LayoutColumn> = target.columns.iter().map(|c| (c.name.as_str(), c)).collect();
    let mut columns = Vec::with_capacity(source.columns.len());
    let mut missing_on_target = Vec::new();
    let same_text = source.prints_floats_shortest == target.prints_floats_shortest;
    let send = |oid: u32| SEND.iter().find(|(known, _)| *known == oid).map(|(_, function)| *function);
    for column in &source.columns {
        match on_target.get(column.name.as_str()) {
            Some(other) => columns.push(SharedColumn {
                name: column.name.clone(),
                is_bytea: column.type_oid == BYTEA && other.type_oid == BYTEA,
                sent_by: send(column.type_oid).filter(|_| !same_text && column.type_oid == other.type_oid),
            }),
            None => missing_on_target.push(column.name.clone()),
        }
    }
    let on_source = |name: &str| source.columns.iter().any(|column| column.name == name);
    let extra_on_target: Vec<String> =
        target.columns.iter().filter(|c| !on_source(&c.name)).map(|c| c.name.clone()).collect();
    let place = |name: &&str| columns.iter().position(|column| column.name == *name);
    let key_places: Vec<usize> = key.iter().map(place).collect::<Option<_>>().unwrap_or_default();
    let splits_by_key = !key_places.is_empty()
        && key.first().is_some_and(|first| source.reads_in_key_order(first) && target.reads_in_key_order(first));
    Shared { columns, key: key_places, splits_by_key, missing_on_target, extra_on_target }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(columns: &[(&str, u32, bool, Option<f32>)]) -> Layout {
        let columns = columns
            .iter()
            .map(|&(name, type_oid, leads_index, correlation)| LayoutColumn {
                name: name.into(),
                type_oid,
                leads_index,
                correlation,
            })
            .collect();
        Layout {
            from: "ONLY t".into(),
            pages: 1,
            estimated_rows: -1.0,
            reads_page_ranges: true,
            prints_floats_shortest: true,
            times: None,
            columns,
        }
    }

    #[test]
    fn a_column_that_only_one_side_has_is_named() {
        let source = layout(&[("id", 23, true, None), ("a", 25, false, None)]);
        let target = layout(&[("b", 25, false, None), ("id", 23, true, None)]);
        let shared = shared(&source, &target, &["id"]);
        assert_eq!(shared.missing_on_target, ["a"]);
        assert_eq!(shared.extra_on_target, ["b"]);
        assert_eq!(shared.key, [0]);
    }

    #[test]
    fn a_key_that_one_side_has_only_in_part_is_no_key() {
        let source = layout(&[("a", 23, true, None), ("b", 23, false, None)]);
        let target = layout(&[("a", 23, true, None)]);
        let shared = shared(&source, &target, &["a", "b"]);
        assert_eq!(shared.key, Vec::<usize>::new());
        assert!(!shared.splits_by_key);
    }

    #[test]
    fn only_integers_in_disk_order_with_an_index_on_both_sides_split_by_key() {
        let good = layout(&[("id", 20, true, Some(0.99))]);
        assert!(shared(&good, &good, &["id"]).splits_by_key);
        for bad in [(25, true, Some(1.0)), (20, false, Some(1.0)), (20, true, Some(0.1))] {
            let bad = layout(&[("id", bad.0, bad.1, bad.2)]);
            assert!(!shared(&good, &bad, &["id"]).splits_by_key);
            assert!(!shared(&bad, &good, &["id"]).splits_by_key);
        }
    }
}
