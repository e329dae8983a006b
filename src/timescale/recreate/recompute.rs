//! Continuous aggregates that are computed anew on the target, and neither copied nor followed: `--caggs recompute`.
//!
//! Which they are is decided once, before the publications, and is in the ledger. An aggregate whose rows cannot be computed any more,
//! since raw rows of them are gone or retention may drop them on the way, is copied all the same: nothing is lost by asking for this.
//! When the raw rows are there and the schema is finished, each is refreshed on the target up to where the source has materialized it,
//! those that others stand on first. From then on the extension logs there what the apply changes below, as it does for any writer
//! (from 2.23 on, whatever the role of the session), and its own policy computes that after the cutover; nothing waits for it behind the fence.
//!
//! How it dies: a refresh goes with its row in the ledger, but in a transaction of its own, so it may be made twice, to the same end.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::super::source::{self, Chunk, ContinuousAggregate, Database, Dimension};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::sql;

/// The first version that logs what changes in every session, whatever its role.
pub const LOGS_ALL_WRITES_FROM: (u32, u32) = (2, 23);

/// What becomes of the rows of continuous aggregates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Caggs {
    /// They are copied and followed like those of tables.
    #[default]
    Copy,
    /// They are computed anew on the target from the raw rows; copied all the same where those are gone.
    Recompute,
}

/// Why an aggregate is copied all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It has rows over times of which there are no raw rows; those are there from this time on, where there are any.
    RawIsGone(Option<String>),
    /// A retention policy of what it stands on runs meanwhile.
    RetentionRuns,
}

/// Which aggregates of a source can be recomputed, and why not the others. `jobs_rest` where the source's jobs are paused.
///
/// # Errors
/// Whatever the server says.
pub async fn look(
    source: &Client,
    database: &Database,
    jobs_rest: bool,
) -> Result<Vec<(ContinuousAggregate, Option<Kept>)>> {
    let mut found = Vec::new();
    for aggregate in &database.aggregates {
        let drops = |job: &&source::Job| {
            job.scheduled && job.proc_name == "policy_retention" && job.hypertable == Some(aggregate.raw)
        };
        let kept = match raw_is_gone(source, database, aggregate).await? {
            Some(kept) => Some(kept),
            None if !jobs_rest && database.jobs.iter().any(|job| drops(&job)) => Some(Kept::RetentionRuns),
            None => None,
        };
        found.push((aggregate.clone(), kept));
    }
    Ok(found)
}

/// Whether it has a row that begins where what it stands on has no chunk.
async fn raw_is_gone(source: &Client, database: &Database, aggregate: &ContinuousAggregate) -> Result<Option<Kept>> {
    let time = |id: i32| database.hypertable(id).and_then(|of| of.dimensions.first());
    let (Some(rows), Some(bucket), Some(raw)) =
        (database.hypertable(aggregate.materialization), time(aggregate.materialization), time(aggregate.raw))
    else {
        return Ok(None);
    };
    let ranges = ranges(&database.chunks, aggregate.raw, raw.id);
    let column = sql::identifier(&bucket.column);
    for (start, end) in gaps(&ranges) {
        let from = start.map(|start| format!("{column} >= {}", as_time(bucket, start)));
        let to = end.map(|end| format!("{column} < {}", as_time(bucket, end)));
        let condition: Vec<String> = from.into_iter().chain(to).collect();
        let condition = if condition.is_empty() { "true".to_owned() } else { condition.join(" AND ") };
        let query = format!("SELECT EXISTS (SELECT FROM {} WHERE {condition})", rows.qualified());
        let has_rows = source.query_typed_one(&query, &[]).await;
        if !has_rows
            .context(|| format!("looking for rows of {} without raw rows", aggregate.qualified()))?
            .get::<_, bool>(0)
        {
            continue;
        }
        let Some((first, _)) = ranges.first() else { return Ok(Some(Kept::RawIsGone(None))) };
        let first = source.query_typed_one(&format!("SELECT ({})::text", as_time(raw, *first)), &[]).await;
        let first = first.context(|| "reading since when there are raw rows".into())?.get(0);
        return Ok(Some(Kept::RawIsGone(first)));
    }
    Ok(None)
}

/// Where a hypertable has chunks in its first dimension: disjoint, in order.
fn ranges(chunks: &[Chunk], hypertable: i32, dimension: i32) -> Vec<(i64, i64)> {
    let slices = chunks.iter().filter(|chunk| chunk.hypertable == hypertable).flat_map(|chunk| &chunk.slices);
    let slices: BTreeSet<(i64, i64)> =
        slices.filter(|slice| slice.dimension == dimension).map(|slice| (slice.start, slice.end)).collect();
    let mut ranges: Vec<(i64, i64)> = Vec::new();
    for (start, end) in slices {
        match ranges.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

/// What is between disjoint ranges, before the first and behind the last.
fn gaps(ranges: &[(i64, i64)]) -> Vec<(Option<i64>, Option<i64>)> {
    let starts = ranges.iter().map(|(start, _)| Some(*start)).chain([None]);
    let ends = [None].into_iter().chain(ranges.iter().map(|(_, end)| Some(*end)));
    ends.zip(starts).collect()
}

/// A time of the extension's own unit as a value of a dimension's type.
fn as_time(dimension: &Dimension, time: i64) -> String {
    let function = match dimension.column_type.as_str() {
        "timestamp with time zone" => "to_timestamp",
        "timestamp without time zone" => "to_timestamp_without_timezone",
        "date" => "to_date",
        other => return format!("{time}::bigint::{other}"),
    };
    format!("_timescaledb_functions.{function}({time})")
}

/// An aggregate that is recomputed, as the ledger has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recomputed {
    /// The OID of the source's hypertable with its rows.
    pub relid: u32,
    /// The id of that in the source's extension.
    pub hypertable: i32,
    /// Schema and name of the view, unquoted.
    pub view: (String, String),
    /// Whether that has been done.
    pub is_refreshed: bool,
}

/// The statements that note in the ledger which aggregates are recomputed.
pub fn notes(database: &Database, found: &[(ContinuousAggregate, Option<Kept>)]) -> String {
    let mut statements =
        "CREATE TABLE walferry.timescaledb_recomputed (hypertable integer PRIMARY KEY, relid oid NOT NULL, \
         view_schema text NOT NULL, view_name text NOT NULL, refreshed boolean NOT NULL DEFAULT false); "
            .to_owned();
    for (aggregate, _) in found.iter().filter(|(_, kept)| kept.is_none()) {
        let Some(rows) = database.hypertable(aggregate.materialization) else { continue };
        statements.push_str(&format!(
            "INSERT INTO walferry.timescaledb_recomputed VALUES ({}, {}, {}, {}); ",
            rows.id,
            rows.relid,
            sql::literal(&aggregate.schema),
            sql::literal(&aggregate.name)
        ));
    }
    statements
}

/// The aggregates that are recomputed, those that others stand on first; none where nothing else was asked for.
///
/// # Errors
/// Whatever the target says.
pub async fn recorded(target: &Client) -> Result<Vec<Recomputed>> {
    let doing = || "reading from the ledger which continuous aggregates are recomputed".to_owned();
    let exists = "SELECT pg_catalog.to_regclass('walferry.timescaledb_recomputed') IS NOT NULL";
    if !target.query_typed_one(exists, &[]).await.context(doing)?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let rows = target
        .query_typed(
            "SELECT relid, hypertable, view_schema, view_name, refreshed FROM walferry.timescaledb_recomputed ORDER BY hypertable",
            &[],
        )
        .await
        .context(doing)?;
    let one = |row: &tokio_postgres::Row| Recomputed {
        relid: row.get(0),
        hypertable: row.get(1),
        view: (row.get(2), row.get(3)),
        is_refreshed: row.get(4),
    };
    Ok(rows.iter().map(one).collect())
}

/// Whether a table holds rows of one of these aggregates.
pub fn is_one_of(recomputed: &[Recomputed], table: &Table) -> bool {
    let relid = table.chunk.as_ref().map_or(table.relid, |chunk| chunk.relid);
    recomputed.iter().any(|one| one.relid == relid)
}

/// Whether a chunk of the source does.
pub fn has_rows_of(recomputed: &[Recomputed], chunk: &Chunk) -> bool {
    recomputed.iter().any(|one| one.hypertable == chunk.hypertable)
}

/// Leaves such tables out.
pub fn without(tables: &mut Vec<Table>, recomputed: &[Recomputed]) {
    tables.retain(|table| !is_one_of(recomputed, table));
}

/// The ids that the target has for the hypertables with the rows of these aggregates.
///
/// # Errors
/// Whatever the target says.
pub async fn on_target(target: &Client) -> Result<BTreeSet<i32>> {
    let recomputed = recorded(target).await?;
    if recomputed.is_empty() {
        return Ok(BTreeSet::new());
    }
    let Some(database) = source::settings(target).await? else { return Ok(BTreeSet::new()) };
    let is_one = |aggregate: &&ContinuousAggregate| {
        recomputed.iter().any(|one| one.view == (aggregate.schema.clone(), aggregate.name.clone()))
    };
    Ok(database.aggregates.iter().filter(is_one).map(|aggregate| aggregate.materialization).collect())
}

/// Refreshes those that are not yet, up to where the source has them. The raw rows are all there. Answers their views.
///
/// # Errors
/// Whatever the servers say.
pub async fn refresh(source: &Client, target: &Client) -> Result<Vec<String>> {
    let mut refreshed = Vec::new();
    let recomputed = recorded(target).await?;
    if recomputed.iter().all(|one| one.is_refreshed) {
        return Ok(refreshed);
    }
    let (Some(of_source), Some(of_target)) = (source::settings(source).await?, source::settings(target).await?) else {
        return Ok(refreshed);
    };
    for one in recomputed.iter().filter(|one| !one.is_refreshed) {
        let there = |database: &Database| {
            let mut all = database.aggregates.iter();
            all.find(|aggregate| one.view == (aggregate.schema.clone(), aggregate.name.clone())).cloned()
        };
        // One that is gone from the source is found by the fingerprint (I11).
        let (Some(here), Some(there)) = (there(&of_source), there(&of_target)) else { continue };
        let time = of_target.hypertable(there.raw).and_then(|raw| raw.dimensions.first());
        let (Some(time), Some(watermark)) = (time, here.watermark) else { continue };
        let name = there.qualified();
        let statement = format!(
            "CALL {}({}::pg_catalog.regclass, NULL, {})",
            sql::qualified(&of_target.extension.schema, "refresh_continuous_aggregate"),
            sql::literal(&name),
            as_time(time, watermark)
        );
        // The least time that there is: the source has not refreshed it yet either.
        if watermark > BEFORE_ALL_TIMES {
            target.batch_execute(&statement).await.context(|| format!("computing {name} on the target"))?;
        }
        let note = format!(
            "UPDATE walferry.timescaledb_recomputed SET refreshed = true WHERE hypertable = {}",
            one.hypertable
        );
        target.batch_execute(&note).await.context(|| format!("noting that {name} is computed"))?;
        refreshed.push(name);
    }
    Ok(refreshed)
}

/// Past the least values of all types of time in the extension's own unit, and before any that is used: -4713 BC is the earliest.
const BEFORE_ALL_TIMES: i64 = -210_866_803_200_000_000;

/// Behind the fence: what the source has dropped on the way is in the aggregates of the target too.
///
/// # Errors
/// `Different` naming an aggregate that has fewer rows on the target over a chunk that is gone.
pub async fn nothing_is_lost(source: &Client, target: &Client, gone: &[Table]) -> Result<()> {
    let recomputed = recorded(target).await?;
    if recomputed.is_empty() || gone.is_empty() {
        return Ok(());
    }
    let (Some(of_source), Some(of_target)) = (source::settings(source).await?, source::settings(target).await?) else {
        return Ok(());
    };
    for one in &recomputed {
        let found = |database: &Database| {
            let mut all = database.aggregates.iter();
            let aggregate = all.find(|aggregate| one.view == (aggregate.schema.clone(), aggregate.name.clone()))?;
            let rows = database.hypertable(aggregate.materialization)?;
            Some((rows.qualified(), rows.dimensions.first()?.clone(), database.hypertable(aggregate.raw)?.relid))
        };
        let (Some((here, bucket, raw)), Some((there, ..))) = (found(&of_source), found(&of_target)) else { continue };
        for table in gone {
            let Some(chunk) = table.chunk.as_ref().filter(|chunk| chunk.relid == raw) else { continue };
            let Some((start, end)) = chunk.ranges.first().copied() else { continue };
            let column = sql::identifier(&bucket.column);
            let count = |relation: &str| {
                format!(
                    "SELECT pg_catalog.count(*) FROM {relation} WHERE {column} >= {} AND {column} < {}",
                    as_time(&bucket, start),
                    as_time(&bucket, end)
                )
            };
            let doing = || format!("comparing {here} over a chunk that is gone");
            let of_source: i64 = source.query_typed_one(&count(&here), &[]).await.context(doing)?.get(0);
            let of_target: i64 = target.query_typed_one(&count(&there), &[]).await.context(doing)?.get(0);
            if of_source > of_target {
                let text = format!(
                    "the continuous aggregate {} has {of_source} rows on the source and {of_target} on the target over the chunk {}, \
                     which the source has dropped since the migration began: they cannot be computed any more",
                    sql::qualified(&one.view.0, &one.view.1),
                    table.qualified()
                );
                return Err(Error::new(ErrorKind::Different, text)
                    .hint("Begin anew with `--caggs copy`: `walferry clean`, then `walferry migrate`."));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timescale::source::Slice;

    #[test]
    fn what_lies_between_chunks_and_beyond_them_is_looked_at() {
        let chunk = |start: i64, end: i64| Chunk {
            id: 1,
            relid: 1,
            schema: "c".into(),
            name: "k".into(),
            hypertable: 6,
            slices: vec![Slice { dimension: 5, start, end }, Slice { dimension: 6, start: 0, end: 9 }],
            status: 0,
            compressed: None,
            tiered: false,
        };
        let other = Chunk { hypertable: 7, ..chunk(500, 600) };
        let ranges = ranges(&[chunk(10, 20), other, chunk(20, 30), chunk(10, 20), chunk(40, 50)], 6, 5);
        assert_eq!(ranges, [(10, 30), (40, 50)]);
        assert_eq!(gaps(&ranges), [(None, Some(10)), (Some(30), Some(40)), (Some(50), None)]);
        assert_eq!(gaps(&[]), [(None, None)]);
    }
}
