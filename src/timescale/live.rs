//! TimescaleDB in the stream of changes: what is its own work, and chunks that come and go.
//!
//! - **Own work.** Compression, recompression and decompression move rows between a chunk and its compressed rows; as changes of the
//!   chunk they come between messages of the extension, and change nothing that a user sees. They are left out (markers nest).
//! - **A new chunk** that the catalog shows to have been published in the very statement that made it has all of its rows in the
//!   stream. Any other was published too late: it is published now, what is older is waited out, and it is copied (H1, H2).
//! - **A chunk that was merged** into another is not in the catalog any more either, and its rows are: its changes are applied. Where it was
//!   not copied yet, the copy stops (`copy.rs`).
//! - **A chunk that is gone** (retention, `drop_chunks`, TRUNCATE) comes in no change. It is known by not being in the source's catalog
//!   any more: what the target has in its place is dropped, and whatever of it still comes in the stream is left out, since all of it
//!   has no effect in the end. Before anything of a newer chunk in the same range is applied, the older one has been found to be gone.
//!
//! How it dies: what is found is written into the ledger in one transaction with what is dropped on the target, before anything of it is
//! applied; found again, it is the same.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::chunk::ChunkOf;
use super::recreate::{places, recompute};
use super::source::{self, Chunk, Slice};
use crate::apply::change::Announced;
use crate::apply::layout::Layout;
use crate::decode::Relation;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::{self, Table};
use crate::sql;
use crate::target::ledger::{self, Migration};
use crate::target::route::Routing;
use crate::target::serial;
use crate::target::writer::Writer;

/// How the extension's messages begin.
const PREFIX: &str = "::timescaledb-";

/// Which changes of a transaction are the extension's own work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnWork {
    /// Messages that begin such work, without those that end it.
    depth: u32,
}

impl OwnWork {
    /// Looks at the prefix of a message of the transaction.
    pub fn note(&mut self, prefix: &str) {
        match prefix.strip_prefix(PREFIX) {
            Some("compression-start" | "decompression-start") => self.depth += 1,
            Some("compression-end" | "decompression-end") => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }

    /// Whether a change of a table is left out: the extension's own work on a chunk, or a chunk that is gone.
    pub fn covers(self, layout: &Layout, relid: u32) -> bool {
        let Some(place) = layout.find(relid) else { return layout.has_hypertables && self.depth > 0 };
        match &layout.tables[place].table.chunk {
            Some(chunk) => self.depth > 0 || chunk.is_gone,
            None => false,
        }
    }
}

/// Whether a table is a chunk that the source has dropped.
pub fn is_gone(table: &Table) -> bool {
    table.chunk.as_ref().is_some_and(|chunk| chunk.is_gone)
}

/// What the announcement of a table that nobody knows is: with hypertables, a new chunk.
///
/// # Errors
/// `SchemaChanged`, so that the apply stops in front of the transaction, and [`take_up`] is asked.
pub fn known_or_new(layout: &Layout, relation: &Relation<'_>) -> Result<()> {
    if !layout.has_hypertables {
        return Ok(());
    }
    let name = sql::qualified(relation.schema, relation.name);
    Err(Error::new(ErrorKind::SchemaChanged, format!("{name} is new on the source, and not known to be a chunk"))
        .hint("Run the same command again: it looks at the source's chunks anew."))
}

/// Empties tables that the source emptied together, hypertables among them. There the extension drops the chunks.
///
/// # Errors
/// `Divergence` when a chunk was emptied without its hypertable, or a chunk that was copied later would be emptied too; else what the
/// server says.
pub async fn truncate(writer: &mut Writer, layout: &Layout, emptied: &[&Table], restart_identity: bool) -> Result<()> {
    let relids: BTreeSet<u32> = emptied.iter().map(|table| table.relid).collect();
    let alone = emptied.iter().find(|table| table.chunk.as_ref().is_some_and(|chunk| !relids.contains(&chunk.relid)));
    if let Some(chunk) = alone {
        let text = format!("{} was emptied by TRUNCATE on the source, without its hypertable", chunk.qualified());
        return Err(Error::new(ErrorKind::Divergence, text).hint(copied_again(chunk)));
    }
    // Copied late, after this, though the target's TRUNCATE would take its rows too.
    let newer = layout.tables.iter().map(|entry| &entry.table).find(|table| {
        table.chunk.as_ref().is_some_and(|of| {
            relids.contains(&of.relid) && !relids.contains(&table.relid) && !of.is_gone && !of.is_late
        })
    });
    if let Some(newer) = newer {
        let text =
            format!("a TRUNCATE of the source came before the copy of {} and is applied after it", newer.qualified());
        return Err(Error::new(ErrorKind::Divergence, text).hint(copied_again(newer)));
    }
    let of_hypertables: BTreeSet<u32> = emptied.iter().filter_map(|table| Some(table.chunk.as_ref()?.relid)).collect();
    let (hypertables, others): (Vec<&Table>, Vec<&Table>) =
        emptied.iter().filter(|table| table.chunk.is_none()).partition(|table| of_hypertables.contains(&table.relid));
    let identity = if restart_identity { " RESTART IDENTITY" } else { "" };
    for hypertable in hypertables {
        // The rows of an aggregate may be in one of another name.
        let mut chunks = emptied.iter().filter_map(|table| table.chunk.as_ref());
        let of = chunks.find(|chunk| chunk.relid == hypertable.relid);
        let name = of.map_or_else(|| hypertable.qualified(), ChunkOf::qualified);
        let statement = format!("TRUNCATE {name}{identity}");
        writer.execute(statement.clone(), &[]).await.context(|| statement)?;
    }
    if others.is_empty() { Ok(()) } else { serial::truncate(writer, &others, restart_identity).await }
}

/// What goes past a TRUNCATE: a snapshot that has seen it.
fn copied_again(chunk: &Table) -> String {
    let (schema, name) =
        chunk.chunk.as_ref().map_or((&chunk.schema, &chunk.name), |chunk| (&chunk.schema, &chunk.name));
    format!("The same command with `--recopy {schema}.{name}` takes the hypertable as it is now.")
}

/// What [`take_up`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TakenUp {
    /// New chunks of which everything is in the stream.
    pub new: Vec<String>,
    /// Chunks that the source has dropped.
    pub gone: Vec<String>,
    /// Chunks that were published too late, and have to be copied: the phases begin again with that.
    pub late: Vec<String>,
}

/// Compares the source's chunks with the ledger, and writes into it what came and went. Nothing may be applied meanwhile.
///
/// `announced` is what made the apply stop, if it was that: it is known afterwards, in one way or another.
///
/// # Errors
/// Whatever the servers say.
pub async fn take_up(
    source: &Client,
    target: &mut Client,
    migration: &Migration,
    announced: Option<&Announced>,
) -> Result<TakenUp> {
    source.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let read = read(source, migration).await;
    source.batch_execute("ROLLBACK").await?;
    let (mut chunks, mut tables, published) = read?;
    let recomputed = recompute::recorded(target).await?;
    chunks.retain(|_, chunk| !recompute::has_rows_of(&recomputed, chunk));
    tables.retain(|_, table| !recompute::is_one_of(&recomputed, table));
    let known: BTreeMap<u32, Table> =
        ledger::tables(target).await?.into_iter().map(|entry| (entry.table.relid, entry.table)).collect();
    let mut taken_up = TakenUp::default();
    let mut new: Vec<(Table, bool)> = Vec::new();
    for (relid, mut table) in tables.clone().into_iter().filter(|(relid, _)| !known.contains_key(relid)) {
        let Some(chunk) = &mut table.chunk else { continue };
        let complete = published.get(&relid) == Some(&true);
        chunk.is_late = true;
        let list = if complete { &mut taken_up.new } else { &mut taken_up.late };
        list.push(table.qualified());
        new.push((table, complete));
    }
    let gone: Vec<&Table> = known
        .values()
        .filter(|table| table.chunk.as_ref().is_some_and(|of| !of.is_gone) && !chunks.contains_key(&table.relid))
        .filter(|table| !is_merged(table, tables.values().filter(|other| known.contains_key(&other.relid))))
        .collect();
    taken_up.gone = gone.iter().map(|table| table.qualified()).collect();
    if let Some(announced) = announced
        && !known.contains_key(&announced.relid)
        && !chunks.contains_key(&announced.relid)
    {
        new.push((dropped_before_it_was_seen(announced), true));
        taken_up.gone.push(sql::qualified(&announced.schema, &announced.name));
    }
    let late: Vec<&Table> = new.iter().filter(|(_, complete)| !complete).map(|(table, _)| table).collect();
    let floor = publish(source, migration, &late, &published).await?;

    // Nothing of a new chunk is on the target yet: what is in its range there is of one that is gone.
    let living: Vec<Chunk> = chunks.into_values().filter(|chunk| known.contains_key(&chunk.relid)).collect();
    let living = places::on_target(source, target, living).await?;
    let transaction = target.transaction().await?;
    for (table, complete) in &new {
        record(transaction.client(), table, *complete).await?;
    }
    for table in gone {
        note_gone(transaction.client(), table).await?;
    }
    drop_what_is_gone(transaction.client(), &living).await?;
    if let Some(floor) = floor {
        let again = format!(
            "UPDATE walferry.migration SET snapshot_floor = greatest(snapshot_floor, {floor}), phase = 'copying'; SET LOCAL synchronous_commit = on"
        );
        transaction.batch_execute(&again).await.context(|| "noting chunks that are copied late".into())?;
    }
    transaction.commit().await.context(|| "writing the source's chunks into the ledger".into())?;
    Ok(taken_up)
}

/// Whether the range of a chunk that is not in the source's catalog any more belongs to one that was there beside it: then its rows live on
/// there, and those changes of it that still come in the stream count.
fn is_merged<'a>(table: &Table, mut living: impl Iterator<Item = &'a Table>) -> bool {
    let Some(chunk) = table.chunk.as_ref().filter(|chunk| !chunk.ranges.is_empty()) else { return false };
    let covers = |other: &ChunkOf| {
        let mut ranges = chunk.ranges.iter().zip(&other.ranges);
        other.relid == chunk.relid
            && other.ranges.len() == chunk.ranges.len()
            && ranges.all(|((start, end), (other_start, other_end))| start < other_end && other_start < end)
    };
    living.any(|other| other.chunk.as_ref().is_some_and(covers))
}

/// Waits until a transaction that has come in the stream is visible: its commit record is decoded before it is (H1), and a chunk that it
/// has made would be taken for one that is gone already.
///
/// # Errors
/// Whatever the source says.
pub async fn until_visible(source: &Client, xid: u32) -> Result<()> {
    // Released when it is visible.
    let running = "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'transactionid' AND granted \
                   AND mode = 'ExclusiveLock' AND transactionid::text = $1)";
    let xid = xid.to_string();
    loop {
        let row = source.query_typed_one(running, &[(&xid, Type::TEXT)]).await;
        if !row.context(|| format!("waiting for transaction {xid} of the source"))?.get::<_, bool>(0) {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Notes in the ledger that the source has dropped a chunk: nothing more of it is applied.
///
/// # Errors
/// Whatever the server says.
pub async fn note_gone(target: &Client, table: &Table) -> Result<()> {
    let mark = format!(
        "UPDATE walferry.source_table SET definition = jsonb_set(definition, '{{chunk,is_gone}}', 'true'), copied = true, \
             snapshot = coalesce(snapshot, (SELECT min(id) FROM walferry.snapshot)) WHERE relid = {}",
        table.relid
    );
    target.batch_execute(&mark).await.context(|| format!("noting that {} is gone", table.qualified()))
}

type Read = (BTreeMap<u32, Chunk>, BTreeMap<u32, Table>, BTreeMap<u32, bool>);

/// The source's chunks and tables by their relids, and those of them that are published, whether from their first moment.
async fn read(source: &Client, migration: &Migration) -> Result<Read> {
    let chunks = source::chunks(source).await?.into_iter().map(|chunk| (chunk.relid, chunk)).collect();
    let tables = catalog::tables(source).await?.into_iter().map(|table| (table.relid, table)).collect();
    Ok((chunks, tables, published(source, migration).await?))
}

/// Which tables are in the migration's publications; true for those that were published in the statement that made them: the rows of
/// the catalog that never change, those of its system columns, have the same `xmin` then.
pub(crate) async fn published(source: &Client, migration: &Migration) -> Result<BTreeMap<u32, bool>> {
    let rows = source
        .query_typed(
            "SELECT r.prrelid, bool_or(r.xmin = a.xmin) FROM pg_catalog.pg_publication_rel r \
             JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = r.prrelid AND a.attname = 'tableoid' AND a.attnum < 0 \
             WHERE p.pubname IN ($1, $2) GROUP BY 1",
            &[(&migration.publication, Type::TEXT), (&migration.insert_only_publication, Type::TEXT)],
        )
        .await
        .context(|| "looking which chunks are published".into())?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Whether every chunk of the source is known to the ledger, or was published from its first moment.
///
/// # Errors
/// Whatever the servers say.
pub async fn are_all_published(source: &Client, target: &Client, migration: &Migration) -> Result<bool> {
    let recomputed = recompute::recorded(target).await?;
    let mut chunks = source::chunks(source).await?;
    chunks.retain(|chunk| !recompute::has_rows_of(&recomputed, chunk));
    let published = published(source, migration).await?;
    let known: BTreeSet<u32> = ledger::tables(target).await?.iter().map(|entry| entry.table.relid).collect();
    Ok(chunks.iter().all(|chunk| known.contains(&chunk.relid) || published.get(&chunk.relid) == Some(&true)))
}

/// Publishes chunks that are not, and answers from which xid on a snapshot has seen all that was not streamed of them (H2).
async fn publish(
    source: &Client,
    migration: &Migration,
    late: &[&Table],
    published: &BTreeMap<u32, bool>,
) -> Result<Option<u64>> {
    if late.is_empty() {
        return Ok(None);
    }
    for table in late.iter().filter(|table| !published.contains_key(&table.relid)) {
        let publication =
            if table.has_usable_identity() { &migration.publication } else { &migration.insert_only_publication };
        let statement =
            format!("ALTER PUBLICATION {} ADD TABLE ONLY {}", sql::identifier(publication), table.qualified());
        source.batch_execute(&statement).await.context(|| format!("publishing the chunk {}", table.qualified()))?;
    }
    // Whatever began before now has a smaller xid than this one.
    let assigned: i64 = source
        .query_typed_one("SELECT pg_catalog.txid_current()", &[])
        .await
        .context(|| "taking an xid".into())?
        .get(0);
    Ok(Some(assigned.cast_unsigned()))
}

/// The source's chunks that are not among these tables, as chunks that came late; none of those that are computed on the target.
///
/// # Errors
/// Whatever the server says.
pub async fn unknown(source: &Client, target: &Client, known: &[&Table]) -> Result<Vec<Table>> {
    let recomputed = recompute::recorded(target).await?;
    let known: BTreeSet<u32> = known.iter().map(|table| table.relid).collect();
    let mut unknown = catalog::tables(source).await?;
    unknown.retain(|table| {
        table.chunk.is_some() && !known.contains(&table.relid) && !recompute::is_one_of(&recomputed, table)
    });
    for chunk in unknown.iter_mut().filter_map(|table| table.chunk.as_mut()) {
        chunk.is_late = true;
    }
    Ok(unknown)
}

/// Writes a new chunk into the ledger: all of it comes in the stream, or it has to be copied.
///
/// # Errors
/// Whatever the server says.
pub async fn record(target: &Client, table: &Table, complete: bool) -> Result<()> {
    let definition = serde_json::to_string(table).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    // Of one that is whole in the stream, no snapshot of before has seen anything.
    let statement = format!(
        "INSERT INTO walferry.source_table (relid, definition, insert_only, routing, snapshot, copied) \
         SELECT {}, {}::jsonb, {}, {}, CASE WHEN {complete} THEN (SELECT min(id) FROM walferry.snapshot) END, {complete} \
         ON CONFLICT (relid) DO NOTHING",
        table.relid,
        sql::literal(&definition),
        !table.has_usable_identity(),
        sql::literal(Routing::of(table).name())
    );
    target.batch_execute(&statement).await.context(|| format!("writing {} into the ledger", table.qualified()))
}

/// A chunk of which only its announcement is left.
fn dropped_before_it_was_seen(announced: &Announced) -> Table {
    Table {
        relid: announced.relid,
        schema: announced.schema.clone(),
        name: announced.name.clone(),
        unlogged: false,
        is_partition: false,
        identity: announced.identity,
        columns: Vec::new(),
        key: Vec::new(),
        has_other_unique: false,
        pages: 0,
        bytes: 0,
        estimated_rows: 0.0,
        updates_and_deletes: 0,
        relfilenode: None,
        firing: Vec::new(),
        chunk: Some(ChunkOf {
            relid: announced.relid,
            schema: announced.schema.clone(),
            name: announced.name.clone(),
            hypertable: 0,
            chunk: 0,
            dimensions: Vec::new(),
            ranges: Vec::new(),
            on_target: None,
            compressed: None,
            status: 0,
            is_late: true,
            is_gone: true,
            stands_in: None,
        }),
        is_hypertable: false,
        hypertable: None,
    }
}

/// Drops the target's chunks in whose range the source has none any more. In the session's open transaction, with the extension at
/// work.
///
/// # Errors
/// Whatever the server says.
pub async fn drop_what_is_gone(target: &Client, living: &[Chunk]) -> Result<Vec<String>> {
    let mut dropped = Vec::new();
    let of_target = source::chunks(target).await?;
    let (_, gone) = by_range(&of_target, &living.iter().collect::<Vec<_>>());
    let recomputed = recompute::on_target(target).await?;
    let gone: Vec<&Chunk> = gone.into_iter().filter(|chunk| !recomputed.contains(&chunk.hypertable)).collect();
    if !gone.is_empty() {
        target.batch_execute(DROP_IN_SILENCE).await.context(|| "dropping chunks on the target".into())?;
    }
    for chunk in gone {
        let name = chunk.qualified();
        let statement =
            format!("SELECT _timescaledb_functions.drop_chunk({}::pg_catalog.regclass)", sql::literal(&name));
        target.batch_execute(&statement).await.context(|| format!("dropping {name} on the target"))?;
        dropped.push(name);
    }
    Ok(dropped)
}

/// Chunks of the target: those in whose range the source has one, and those in whose range it has none any more.
pub(super) fn by_range<'a>(of_target: &'a [Chunk], living: &[&Chunk]) -> (Vec<&'a Chunk>, Vec<&'a Chunk>) {
    let mut of_source: BTreeMap<i32, Vec<&Chunk>> = BTreeMap::new();
    for chunk in living {
        of_source.entry(chunk.hypertable).or_default().push(chunk);
    }
    let ranges: BTreeSet<(i32, &[Slice])> = living.iter().map(|chunk| (chunk.hypertable, &chunk.slices[..])).collect();
    of_target.iter().partition(|chunk| {
        // Nearly always; to compare each with each would take the square of their number.
        ranges.contains(&(chunk.hypertable, &chunk.slices[..])) || {
            let others = of_source.get(&chunk.hypertable).map(Vec::as_slice).unwrap_or_default();
            others.iter().any(|other| overlap(chunk, other))
        }
    })
}
/// Aggregates keep what they have of chunks that go: otherwise the extension calls it invalid, and a refresh would take it away.
const DROP_IN_SILENCE: &str = "SELECT pg_catalog.set_config(name, 'on', true) FROM pg_catalog.pg_settings WHERE name = 'timescaledb.skip_cagg_invalidation'";

/// Whether two chunks of one hypertable have a place in common. Its dimensions have the same ids on both servers.
pub(super) fn overlap(a: &Chunk, b: &Chunk) -> bool {
    a.slices.iter().all(|slice| {
        let other = b.slices.iter().find(|other| other.dimension == slice.dimension);
        other.is_none_or(|other| slice.start < other.end && other.start < slice.end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timescale::source::Slice;

    #[test]
    fn what_is_between_the_extensions_markers_is_its_own_work_however_they_nest() {
        let mut work = OwnWork::default();
        let depth_after: Vec<u32> = [
            "::timescaledb-compression-start",
            "::timescaledb-decompression-start",
            "walferry",
            "::timescaledb-decompression-end",
            "::timescaledb-other",
            "::timescaledb-compression-end",
            "::timescaledb-compression-end",
        ]
        .iter()
        .map(|prefix| {
            work.note(prefix);
            work.depth
        })
        .collect();
        assert_eq!(depth_after, [1, 2, 2, 1, 1, 0, 0]);
    }

    #[test]
    fn chunks_overlap_only_where_all_their_dimensions_do() {
        let chunk = |slices: &[(i32, i64, i64)]| Chunk {
            id: 1,
            relid: 1,
            schema: "s".into(),
            name: "c".into(),
            hypertable: 1,
            slices: slices.iter().map(|&(dimension, start, end)| Slice { dimension, start, end }).collect(),
            status: 0,
            compressed: None,
            tiered: false,
        };
        let a = chunk(&[(1, 0, 10), (2, 0, 5)]);
        assert!(overlap(&a, &chunk(&[(1, 9, 20), (2, 0, 5)])));
        assert!(!overlap(&a, &chunk(&[(1, 10, 20), (2, 0, 5)])), "the end is not in it");
        assert!(!overlap(&a, &chunk(&[(1, 0, 10), (2, 5, 9)])), "another partition");
    }
}
