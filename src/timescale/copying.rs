//! The copy of a plain table into a hypertable.
//!
//! Whoever makes a chunk keeps others from making one in the same hypertable until its transaction ends, and a part is one transaction.
//! So what several parts are copied of at once has its chunks made before each part, in transactions of their own.

use std::collections::HashMap;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::chunk::ChunkOf;
use super::declaration::{Dimension, Hypertable, Span};
use super::restore::of;
use super::target::make_chunk;
use crate::connection::wire::RawSession;
use crate::error::{Context, Error, Result};
use crate::source::catalog::{Column, Table};
use crate::sql;
use crate::target::ledger::Part;

/// Below this a part's rows are of many times, and COPY would go to and fro between many chunks: they are sorted on the source.
const CORRELATION_MIN: f32 = 0.8;
/// More chunks than these a part does not make beforehand: its rows are in no order of time.
const CHUNKS_MAX: usize = 2000;

/// timestamptz, timestamp, date.
const TIMES: [u32; 3] = [1184, 1114, 1082];
/// int8, int2, int4.
const INTEGERS: [u32; 3] = [20, 21, 23];

/// The tables whose rows are read in the order of their time: those that lie on the disk in another order.
///
/// # Errors
/// Whatever the server says.
pub async fn to_be_sorted(source: &Client, tables: &[&Table]) -> Result<HashMap<u32, String>> {
    let mut sorted = HashMap::new();
    for table in tables {
        let Some(time) = &table.hypertable else { continue };
        let row = source
            .query_typed_opt(
                "SELECT correlation FROM pg_catalog.pg_stats WHERE schemaname = $1 AND tablename = $2 AND attname = $3 AND NOT inherited",
                &[(&table.schema, Type::TEXT), (&table.name, Type::TEXT), (time, Type::TEXT)],
            )
            .await
            .context(|| format!("reading the statistics of {}", table.qualified()))?;
        let correlation: Option<f32> = row.and_then(|row| row.get(0));
        if correlation.is_some_and(|correlation| correlation.abs() < CORRELATION_MIN) {
            sorted.insert(table.relid, time.clone());
        }
    }
    Ok(sorted)
}

/// Makes the chunks that a part's rows are going to, each in a transaction of its own. What cannot be made here is made by the copy.
///
/// # Errors
/// When a session breaks.
pub(crate) async fn open_chunks(
    source: &mut RawSession,
    target: &Client,
    table: &Table,
    part: &Part,
    declared: &[Hypertable],
) -> Result<()> {
    let Some(hypertable) = of(table, declared) else { return Ok(()) };
    if let Err(error) = try_to_open(source, target, table, part, hypertable).await {
        if source.is_lost() || target.is_closed() {
            return Err(error);
        }
        tracing::debug!(%error, table = table.qualified(), "its chunks are made by the copy");
    }
    Ok(())
}

/// Makes the chunk that the rows of one of the source are going to, in a transaction of its own: with its range, so that both servers drop
/// the same rows with it. Where that meets another chunk, the copy finds the rows' way.
///
/// # Errors
/// When the session breaks.
pub(crate) async fn open_chunk(target: &Client, chunk: &ChunkOf) -> Result<()> {
    if chunk.is_gone || chunk.ranges.is_empty() {
        return Ok(());
    }
    make_chunk(target, &chunk.qualified(), &chunk.slices_json()).await.map(drop)
}

async fn try_to_open(
    source: &mut RawSession,
    target: &Client,
    table: &Table,
    part: &Part,
    hypertable: &Hypertable,
) -> Result<()> {
    let row = target
        .query_typed_opt(
            "SELECT d.interval_length FROM _timescaledb_catalog.dimension d \
             JOIN _timescaledb_catalog.hypertable h ON h.id = d.hypertable_id \
             WHERE h.schema_name = $1 AND h.table_name = $2 AND d.column_name = $3",
            &[(&table.schema, Type::TEXT), (&table.name, Type::TEXT), (&hypertable.time, Type::TEXT)],
        )
        .await
        .context(|| format!("reading the dimensions of {}", table.qualified()))?;
    let (Some(length), Some(column)) = (
        row.and_then(|row| row.get::<_, Option<i64>>(0)).filter(|length| *length > 0),
        table.columns.iter().find(|column| column.name == hypertable.time),
    ) else {
        return Ok(());
    };
    let Some(query) = starts_query(table, part, column, length) else { return Ok(()) };
    let rows = source.simple_query(&query).await?;
    let starts: Vec<i64> = rows.iter().filter_map(|row| row.first()?.as_deref()?.parse().ok()).collect();
    if starts.len() > CHUNKS_MAX {
        return Ok(());
    }
    let Some(partitions) = hash_partitions(hypertable) else { return Ok(()) };
    for start in starts {
        let time = (hypertable.time.as_str(), [start, start.saturating_add(length)]);
        for partition in &partitions {
            let slices: serde_json::Map<String, serde_json::Value> = std::iter::once(time)
                .chain(*partition)
                .map(|(column, range)| (column.to_owned(), range.to_vec().into()))
                .collect();
            let slices = serde_json::Value::Object(slices).to_string();
            let statement = format!(
                "SELECT FROM _timescaledb_functions.create_chunk({}::regclass, {}::jsonb)",
                sql::literal(&table.qualified()),
                sql::literal(&slices)
            );
            target.batch_execute(&statement).await.map_err(Error::from)?;
        }
    }
    Ok(())
}

/// Asks for the beginnings of the chunks that a part has rows for, in TimescaleDB's unit: microseconds since 1970, or the integer.
fn starts_query(table: &Table, part: &Part, column: &Column, length: i64) -> Option<String> {
    let name = sql::identifier(&column.name);
    let until = part.end_page.map(|page| format!(" AND ctid < '({page},0)'::tid")).unwrap_or_default();
    let rows = format!("FROM ONLY {} WHERE ctid >= '({},0)'::tid{until}", table.qualified(), part.first_page);
    if TIMES.contains(&column.type_oid) {
        // A whole number of microseconds is an interval without months, which date_bin takes.
        let value =
            if column.type_oid == 1184 { name.clone() } else { format!("{name}::timestamp AT TIME ZONE 'UTC'") };
        return Some(format!(
            "SELECT (extract(epoch FROM b) * 1000000)::int8 FROM (SELECT DISTINCT date_bin('{length} microseconds'::interval, {value}, \
             '1970-01-01 00:00:00+00'::timestamptz) AS b {rows} AND isfinite({name})) bins"
        ));
    }
    INTEGERS.contains(&column.type_oid).then(|| {
        format!(
            "SELECT DISTINCT {name}::int8 - (({name}::int8 % {length}) + {length}) % {length} {rows} AND {name} IS NOT NULL"
        )
    })
}

/// A column, and from where to where of its hash.
type Slice<'a> = (&'a str, [i64; 2]);

/// The slices of the partitions by hash, one choice of them for each chunk of a time; `None` where ranges of another column cut chunks,
/// too.
fn hash_partitions(hypertable: &Hypertable) -> Option<Vec<Option<Slice<'_>>>> {
    match hypertable.dimensions.as_slice() {
        [] => Some(vec![None]),
        [Dimension::Hash { column, partitions }] => {
            let count = i64::from(*partitions);
            let length = i64::from(i32::MAX) / count;
            let slice = |at: i64| {
                let from = if at == 0 { i64::MIN } else { at * length };
                let to = if at + 1 == count { i64::MAX } else { (at + 1) * length };
                Some((column.as_str(), [from, to]))
            };
            Some((0..count).map(slice).collect())
        }
        _ => None,
    }
}

/// What of a hypertable is copied is before a moment: what the parts that are left have at their beginnings.
pub(super) fn head_query(table: &Table, time: &str, pages: &[i64]) -> String {
    let name = sql::identifier(time);
    let heads: Vec<String> = pages
        .iter()
        .map(|page| {
            let end = page + HEAD_PAGES;
            format!(
                "(SELECT min({name}) AS t, count(*) AS n FROM ONLY {} WHERE ctid >= '({page},0)'::tid AND ctid < '({end},0)'::tid)",
                table.qualified()
            )
        })
        .collect();
    format!("SELECT min(t)::text, bool_and(n > 0) FROM ({}) heads", heads.join(" UNION ALL "))
}

/// How many pages are read where a part begins, to know how old its rows are.
const HEAD_PAGES: i64 = 4;

/// The length of time in TimescaleDB's own words, for a condition on the end of a chunk.
pub(super) fn span_text(span: &Span) -> String {
    match span {
        Span::Integer(number) => number.to_string(),
        Span::Interval(text) => format!("{}::interval", sql::literal(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hypertable(dimensions: Vec<Dimension>) -> Hypertable {
        let text = "[[hypertable]]\ntable = 'public.m'\ntime = 'at'\nchunk_interval = 10\n";
        let declared = super::super::declaration::parse(text).unwrap().remove(0);
        Hypertable { dimensions, ..declared }
    }

    #[test]
    fn every_hash_is_in_one_partition() {
        let by_hash = hypertable(vec![Dimension::Hash { column: "d".into(), partitions: 4 }]);
        let slices: Vec<[i64; 2]> =
            hash_partitions(&by_hash).unwrap().into_iter().map(|slice| slice.unwrap().1).collect();
        assert_eq!(slices[0], [i64::MIN, 536_870_911]);
        assert_eq!(slices[3], [1_610_612_733, i64::MAX]);
        assert!(slices.windows(2).all(|pair| pair[0][1] == pair[1][0]));
        assert_eq!(hash_partitions(&hypertable(Vec::new())), Some(vec![None]));
        let by_range = Dimension::Range { column: "d".into(), interval: Span::Integer(5) };
        assert_eq!(hash_partitions(&hypertable(vec![by_range])), None);
    }
}
