//! One piece: read from the source under one snapshot, written and compared on the target in one transaction with its ledger row.
//!
//! ```text
//!  source: BEGIN REPEATABLE READ; LOCK; what is it now? ─┬─ COPY of the rows, decompressed ────────► COPY into the table
//!          (the snapshot is younger than the lock: H4)   └─ COPY of compressed batches, as they are ► COPY into the chunk's own table
//!          hash of the range ◄──────────────── equal? ──────────────► hash of the range; the ledger's row; COMMIT
//! ```

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, TryStreamExt};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::compare::There;
use super::plan::{Piece, Work};
use super::{ledger, overlap};
use crate::apply::conflict::OnConflict;
use crate::care::pace::Pace;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::table_progress::PartProgress;
use crate::sql;
use crate::target::role::ApplyRole;
use crate::timescale::chunks::{self, Chunk};
use crate::timescale::{rows, target as to};
use crate::verify::{RangeDigest, RangeHash};

/// What is sent to the target at once, in bytes.
const CHUNK_BYTES: usize = 128 * 1024;

/// How often a piece is tried whose rows others change meanwhile.
const ATTEMPTS: usize = 3;

/// What the pieces of a table have in common.
pub(super) struct Ways<'a> {
    pub(super) work: &'a Work,
    pub(super) there: &'a There,
    /// The schema of the extension's functions on the target.
    pub(super) extension_schema: Option<&'a str>,
    pub(super) hash: &'a RangeHash,
    pub(super) role: ApplyRole,
    pub(super) on_conflict: OnConflict,
    pub(super) pace: &'a Pace,
}

/// How a piece came over, as the ledger says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Compressed batches, as they are.
    AsItIs,
    /// By rows.
    Rows,
    /// By rows, around those that were there.
    Merged,
    /// It was there, to the last row.
    Found,
    /// The source has dropped it since the plan.
    Gone,
}

impl How {
    pub(super) fn name(self) -> &'static str {
        match self {
            How::AsItIs => "as_it_is",
            How::Rows => "rows",
            How::Merged => "merged",
            How::Found => "found",
            How::Gone => "gone",
        }
    }
}

/// A piece that is on the target.
pub(super) struct Copied {
    pub(super) how: How,
    pub(super) rows: i64,
    /// The chunk that was made for it, to be compressed now.
    pub(super) to_compress: Option<String>,
}

/// Brings a piece. Rows that others write at the same time make it try again, a few times.
///
/// # Errors
/// `Divergence` for rows that are in the way, or that are not the same afterwards; else what a server says. Nothing of the piece is
/// there then.
pub(super) async fn copy(
    ways: &Ways<'_>,
    piece: &Piece,
    source: &Client,
    target: &Client,
    mut begin_part: impl FnMut() -> Option<PartProgress>,
) -> Result<Copied> {
    let mut merges = false;
    for attempt in 1.. {
        let mut progress = begin_part();
        let outcome = attempt_copy(ways, piece, source, target, merges, &mut progress).await;
        if outcome.is_err() {
            // Whatever they were doing; a session that is gone needs none.
            let _ = tokio::join!(source.batch_execute("ROLLBACK"), target.batch_execute("ROLLBACK"));
        }
        match outcome {
            Ok(copied) => {
                if let Some(progress) = progress {
                    progress.committed();
                }
                return Ok(copied);
            }
            Err(error) if attempt < ATTEMPTS && is_met_by_others(&error) => {
                tracing::debug!(%error, "a piece is tried again");
                // A row with the same key is in the range of another piece, or has come since.
                merges |= error.sqlstate() == Some(&SqlState::UNIQUE_VIOLATION);
            }
            Err(error) => {
                let what = piece.chunk.as_ref().map_or_else(
                    || format!("{} of {}", piece.place, ways.work.table.qualified()),
                    |(schema, name)| {
                        format!("the chunk {} of {}", sql::qualified(schema, name), ways.work.table.qualified())
                    },
                );
                return Err(error.context(format!("copying {what}")));
            }
        }
    }
    Err(Error::new(ErrorKind::Other, "no attempt was made"))
}

/// Whether another attempt can find it otherwise: somebody wrote the same rows between two looks.
fn is_met_by_others(error: &Error) -> bool {
    let taken = |state: &SqlState| *state == SqlState::UNIQUE_VIOLATION || *state == SqlState::EXCLUSION_VIOLATION;
    error.kind() == ErrorKind::Different || error.sqlstate().is_some_and(taken)
}

async fn attempt_copy(
    ways: &Ways<'_>,
    piece: &Piece,
    source: &Client,
    target: &Client,
    merges: bool,
    progress: &mut Option<PartProgress>,
) -> Result<Copied> {
    let (name, condition) = (ways.work.table.qualified(), ways.work.condition(piece));
    let Some(from) = begin_on_source(ways.work, piece, source).await? else {
        return gone(ways, piece, target).await;
    };
    let made = match (&from.chunk, ways.there.has_same_dimensions) {
        (Some(chunk), true) => to::make_chunk(target, &name, &chunk.slices_json()).await?,
        _ => None,
    };
    let batches = match (&made, &from.chunk) {
        (Some(made), Some(chunk)) if !piece.is_cut && ways.there.takes_batches => {
            prepare_for_batches(ways, source, target, made, chunk).await?
        }
        _ => None,
    };
    let begin = format!("BEGIN; SET LOCAL synchronous_commit = off; {}", ways.role.begin_statement());
    target.batch_execute(&begin).await?;
    if ways.extension_schema.is_some() {
        // What meets rows that are compressed on the target may have to decompress any number of them.
        target.batch_execute(rows::SETTINGS).await?;
    }
    let mut there = name.clone();
    let mut how = How::Rows;
    if let (Some(batches), Some(made), Some(chunk)) = (&batches, &made, &from.chunk) {
        let of_target = sql::qualified(&made.0, &made.1);
        // Nobody writes to it until the commit: no unique index looks at what comes as it is.
        target.batch_execute(&format!("LOCK TABLE {of_target} IN SHARE MODE")).await?;
        if !to::has_rows(target, &of_target).await? {
            copy_batches(ways, source, target, chunk, batches, progress).await?;
            if let Some(sizes) = to::sizes(source, (&chunk.schema, &chunk.name)).await? {
                to::record_sizes(target, (&made.0, &made.1), &sizes).await?;
            }
            there = of_target;
            how = How::AsItIs;
        }
    }
    let expected = ways.hash.of(source, &from.relation, &condition).await?;
    if how == How::Rows {
        how = by_rows(ways, piece, (source, &from, &expected), target, merges, progress).await?;
    }
    let found = ways.hash.of(target, &there, &condition).await?;
    if found != expected && !(how == How::Merged && ways.on_conflict == OnConflict::Target) {
        let text = format!(
            "the target has {} rows of {name} where {condition}, and the source has {}{}",
            found.rows,
            expected.rows,
            if found.rows == expected.rows { " that are not the same" } else { "" }
        );
        return Err(Error::new(ErrorKind::Different, text).hint(
            "Somebody writes rows of this range on one side only. `walferry verify --tables` names them once both sides are quiet.",
        ));
    }
    if let (How::AsItIs, Some(progress)) = (how, progress.as_mut()) {
        progress.add(0, found.rows.max(0).cast_unsigned());
    }
    ledger::copied(target, &name, &piece.place, how.name(), found.rows, Some(&found.hash)).await?;
    target.batch_execute("COMMIT").await?;
    source.batch_execute("COMMIT").await?;
    let wants_compression =
        how != How::AsItIs && piece.is_compressed && !piece.is_cut && ways.extension_schema.is_some();
    let can_be = ways.there.hypertable.as_ref().is_some_and(|hypertable| hypertable.has_compression);
    let to_compress = made.filter(|_| wants_compression && can_be).map(|(schema, name)| sql::qualified(&schema, &name));
    Ok(Copied { how, rows: found.rows, to_compress })
}

/// What a piece is read from.
struct From {
    /// Ready for SQL.
    relation: String,
    chunk: Option<Chunk>,
}

/// Begins the transaction on the source, with what it reads from locked before its snapshot is taken: what was compressed or rewritten before is seen
/// as it is, and nothing of the kind happens until the end. `None` where the chunk is gone.
async fn begin_on_source(work: &Work, piece: &Piece, source: &Client) -> Result<Option<From>> {
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; LOCK TABLE";
    let (Some((schema, name)), Some(hypertable)) = (&piece.chunk, &work.hypertable) else {
        let relation = format!("ONLY {}", work.table.qualified());
        source.batch_execute(&format!("{begin} {relation} IN ACCESS SHARE MODE")).await?;
        return Ok(Some(From { relation, chunk: None }));
    };
    let relation = sql::qualified(schema, name);
    loop {
        let Some(before) = chunks::chunks(source, hypertable, Some((schema, name))).await?.pop() else {
            return Ok(None);
        };
        let inner = before.compressed.as_ref().map(|inner| format!(", {}", sql::qualified(&inner.schema, &inner.name)));
        let locked = source
            .batch_execute(&format!("{begin} {relation}{} IN ACCESS SHARE MODE", inner.unwrap_or_default()))
            .await;
        match locked {
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => {
                source.batch_execute("ROLLBACK").await?;
                continue;
            }
            locked => locked?,
        }
        match chunks::chunks(source, hypertable, Some((schema, name))).await?.pop() {
            Some(now) if now.compressed == before.compressed => return Ok(Some(From { relation, chunk: Some(now) })),
            _ => source.batch_execute("ROLLBACK").await?,
        }
    }
}

async fn gone(ways: &Ways<'_>, piece: &Piece, target: &Client) -> Result<Copied> {
    target.batch_execute("BEGIN").await?;
    ledger::copied(target, &ways.work.table.qualified(), &piece.place, How::Gone.name(), 0, None).await?;
    target.batch_execute("COMMIT").await?;
    Ok(Copied { how: How::Gone, rows: 0, to_compress: None })
}

/// The columns of the batches, and the target's table for them.
struct Batches {
    from: String,
    into: String,
    columns: String,
    format: &'static str,
}

async fn prepare_for_batches(
    ways: &Ways<'_>,
    source: &Client,
    target: &Client,
    made: &(String, String),
    chunk: &Chunk,
) -> Result<Option<Batches>> {
    let (Some(inner), Some(schema)) =
        (chunk.compressed.as_ref().filter(|_| chunk.has_plain_batches()), ways.extension_schema)
    else {
        return Ok(None);
    };
    let columns = to::columns(source, &inner.schema, &inner.name).await?;
    let prepared = to::prepare_for_batches(target, schema, (&made.0, &made.1), inner, &columns).await?;
    let binary = ways.work.table.binary_safe() && columns.iter().all(|column| column.2);
    Ok(prepared.map(|into| Batches {
        from: sql::qualified(&inner.schema, &inner.name),
        into,
        columns: sql::identifiers(columns.iter().map(|column| column.0.as_str())),
        format: if binary { "binary" } else { "text" },
    }))
}

/// Rows that are not compressed first: among compressed ones each would be looked for.
async fn copy_batches(
    ways: &Ways<'_>,
    source: &Client,
    target: &Client,
    chunk: &Chunk,
    batches: &Batches,
    progress: &mut Option<PartProgress>,
) -> Result<()> {
    let (table, format) = (&ways.work.table, format_of(ways.work));
    let columns = table.column_list();
    // COPY of the relation itself reads what is in its own file.
    let out = format!("COPY {} ({columns}) TO STDOUT (FORMAT {format})", chunk.qualified());
    let into = format!("COPY {} ({columns}) FROM STDIN (FORMAT {format})", table.qualified());
    send(source, &out, target, &into, (ways.pace, false), progress).await?;
    let out = format!("COPY {} ({}) TO STDOUT (FORMAT {})", batches.from, batches.columns, batches.format);
    let into = format!("COPY {} ({}) FROM STDIN (FORMAT {})", batches.into, batches.columns, batches.format);
    send(source, &out, target, &into, (ways.pace, false), progress).await
}

fn format_of(work: &Work) -> &'static str {
    if work.table.binary_safe() { "binary" } else { "text" }
}

async fn by_rows(
    ways: &Ways<'_>,
    piece: &Piece,
    (source, from, expected): (&Client, &From, &RangeDigest),
    target: &Client,
    merges: bool,
    progress: &mut Option<PartProgress>,
) -> Result<How> {
    let (table, format) = (&ways.work.table, format_of(ways.work));
    let (name, condition, columns) = (table.qualified(), ways.work.condition(piece), table.column_list());
    let is_there = to::has_rows(target, &format!("{name} AS t WHERE {condition}")).await?;
    if is_there && ways.hash.of(target, &name, &condition).await? == *expected {
        return Ok(How::Found);
    }
    let merges = is_there || merges;
    let mut into = name.clone();
    if merges {
        overlap::make_stage(target, ways.work, ways.there).await?;
        into = overlap::STAGE.to_owned();
    }
    // A table without columns has rows all the same.
    let list = if columns.is_empty() { String::new() } else { format!(" ({columns})") };
    let out =
        format!("COPY (SELECT {columns} FROM {} AS t WHERE {condition}) TO STDOUT (FORMAT {format})", from.relation);
    let into = format!("COPY {into}{list} FROM STDIN (FORMAT {format})");
    send(source, &out, target, &into, (ways.pace, true), progress).await?;
    if !merges {
        return Ok(How::Rows);
    }
    overlap::merge(target, ways.work, ways.there, piece, ways.on_conflict).await?;
    Ok(How::Merged)
}

/// Sends what one COPY gives to another; a compressed batch does not say how many rows it has.
async fn send(
    source: &Client,
    out: &str,
    target: &Client,
    into: &str,
    (pace, counts_rows): (&Pace, bool),
    progress: &mut Option<PartProgress>,
) -> Result<()> {
    let mut rows = pin!(source.copy_out(out).await?);
    let mut sink = pin!(target.copy_in::<_, Bytes>(into).await?);
    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES * 2);
    let mut waiting = 0;
    loop {
        let row = rows.try_next().await.context(|| "reading from the source".into())?;
        if let Some(row) = &row {
            chunk.extend_from_slice(row);
            waiting += u64::from(counts_rows);
        }
        if chunk.len() >= CHUNK_BYTES || (row.is_none() && !chunk.is_empty()) {
            pace.pass(chunk.len() as u64).await;
            if let Some(progress) = progress {
                progress.add(chunk.len() as u64, waiting);
            }
            waiting = 0;
            sink.feed(chunk.split().freeze()).await?;
            chunk.reserve(CHUNK_BYTES * 2);
        }
        if row.is_none() {
            break;
        }
    }
    sink.as_mut().finish().await?;
    Ok(())
}
