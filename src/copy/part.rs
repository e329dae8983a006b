//! One part of one table, from COPY to COPY.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, TryStreamExt};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::Outcome;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::table_progress::PartProgress;
use crate::source::catalog::{Column, Table};
use crate::source::snapshot;
use crate::target::ledger::{self, Part};

/// The source sends a message per row; the target gets chunks of this size.
const CHUNK_BYTES: usize = 128 * 1024;

/// Copies one part, and marks it in the ledger, as one transaction on the target.
pub(super) async fn copy(
    source: &Client,
    target: &mut Client,
    snapshot: &str,
    table: &Table,
    part: &Part,
    board: &StatusBoard,
) -> Result<Outcome> {
    let outcome = copy_rows(source, target, snapshot, table, part, board).await;
    // Ends the transaction on the source, and with it the lock (H9), whatever happened. When the session is gone, so is
    // the lock.
    let ended = source.batch_execute("ROLLBACK").await;
    match outcome {
        // The watchdog ended the session. If it was an outage instead, the next connection or the import of the snapshot says so.
        Err(error) if ended.is_err() && source.is_closed() => {
            tracing::debug!(%error, "the copy's session on the source is gone");
            Ok(Outcome::MadeWay)
        }
        outcome => outcome.context(|| format!("copying {} from page {}", table.qualified(), part.first_page)),
    }
}

async fn copy_rows(
    source: &Client,
    target: &mut Client,
    snapshot: &str,
    table: &Table,
    part: &Part,
    board: &StatusBoard,
) -> Result<Outcome> {
    snapshot::import(source, snapshot).await?;
    if !is_same_file(source, table).await? {
        return Ok(Outcome::Stale);
    }
    let transaction = target.transaction().await?;
    // Safe to lose: the part and its mark go together, and the copy is durable before the next phase (I2).
    transaction
        .batch_execute("SET LOCAL synchronous_commit = off; SET LOCAL session_replication_role = replica")
        .await?;
    let mut progress = board.table(table.relid).map(|progress| progress.begin_part());
    let statement = copy_out_statement(table, part, format_of(table));
    let rows = send_rows(source, &statement, transaction.client(), table, progress.as_mut()).await?;
    let complete = ledger::part_copied(transaction.client(), part, rows).await?;
    transaction.commit().await?;
    if let Some(progress) = progress {
        progress.committed();
    }
    Ok(Outcome::Copied(complete))
}

/// What COPY sends for a table.
pub(super) fn format_of(table: &Table) -> &'static str {
    if table.binary_safe() { "binary" } else { "text" }
}

/// Sends what a COPY statement on the source gives to a table of the target; answers the number of rows.
pub(super) async fn send_rows(
    source: &Client,
    copy_out: &str,
    target: &Client,
    table: &Table,
    mut progress: Option<&mut PartProgress>,
) -> Result<u64> {
    let rows = source.copy_out(copy_out).await?;
    let columns = if table.columns.is_empty() { String::new() } else { format!(" ({})", table.column_list()) };
    let statement = format!("COPY {}{columns} FROM STDIN (FORMAT {})", table.qualified(), format_of(table));
    let sink = target.copy_in::<_, Bytes>(&statement).await?;
    let (mut rows, mut sink) = (pin!(rows), pin!(sink));

    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES * 2);
    // A message is a row, but the last one in binary, which is the trailer: the newest is not shown until another follows.
    let (mut earlier, mut rows_shown) = (0, 0);
    let mut is_first = true;
    while let Some(row) = rows.try_next().await? {
        earlier += u64::from(!is_first);
        is_first = false;
        chunk.extend_from_slice(&row);
        if chunk.len() >= CHUNK_BYTES {
            if let Some(progress) = progress.as_deref_mut() {
                progress.add(chunk.len() as u64, earlier - rows_shown);
            }
            rows_shown = earlier;
            sink.feed(chunk.split().freeze()).await?;
            chunk.reserve(CHUNK_BYTES * 2);
        }
    }
    let bytes_left = chunk.len() as u64;
    if !chunk.is_empty() {
        sink.feed(chunk.freeze()).await?;
    }
    let rows = sink.finish().await?;
    if let Some(progress) = progress {
        progress.add(bytes_left, rows.saturating_sub(rows_shown));
    }
    Ok(rows)
}

/// Locks the table, and answers whether the snapshot still shows its rows (H4).
///
/// TRUNCATE and a rewriting ALTER TABLE put a new file in the place of the old one at once, whatever older snapshots see: under
/// them the table reads as empty. From the lock on, the file stays.
pub(super) async fn is_same_file(source: &Client, table: &Table) -> Result<bool> {
    let locked = source.batch_execute(&format!("LOCK TABLE ONLY {} IN ACCESS SHARE MODE", table.qualified())).await;
    let gone = |error: &tokio_postgres::Error| matches!(error.code(), Some(code) if *code == SqlState::UNDEFINED_TABLE || *code == SqlState::INVALID_SCHEMA_NAME);
    let changed = || {
        Error::new(
            ErrorKind::SchemaChanged,
            format!("the table {} was dropped or renamed on the source", table.qualified()),
        )
        .hint("Give the table its name again, or start the migration anew: `walferry clean`, then `walferry migrate`.")
    };
    match locked {
        Err(error) if gone(&error) => return Err(changed()),
        locked => locked?,
    }
    let row = source
        .query_one(
            "SELECT c.relfilenode, pg_catalog.pg_relation_filenode($2::text::regclass), $2::text::regclass::oid, \
                    (SELECT array_agg(concat_ws(' ', a.atttypid, a.atttypmod, a.attname) ORDER BY a.attnum) \
                     FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
                       AND a.attgenerated = '') \
             FROM pg_catalog.pg_class c WHERE c.oid = $1",
            &[&table.relid, &table.qualified()],
        )
        .await?;
    let (in_snapshot, now, relid): (u32, Option<u32>, u32) = (row.get(0), row.get(1), row.get(2));
    if relid != table.relid {
        return Err(changed());
    }
    // Under this snapshot it must have the columns that the ledger has: from the snapshot on, its rows in the stream are read by them.
    let columns: Vec<String> = row.get::<_, Option<_>>(3).unwrap_or_default();
    let known = |column: &Column| format!("{} {} {}", column.type_oid, column.type_modifier, column.name);
    if columns != table.columns.iter().map(known).collect::<Vec<String>>() {
        let text = format!("the columns of {} have changed on the source before it was copied", table.qualified());
        return Err(Error::new(ErrorKind::SchemaChanged, text)
            .hint(format!(
                "The same command with `{}` says what the target needs for that, and takes the table as it is now. Or undo the change \
                 on the source, and run the same command again.",
                Table::recopy_option(&[table])
            )));
    }
    Ok(now == Some(in_snapshot))
}

fn copy_out_statement(table: &Table, part: &Part, format: &str) -> String {
    let whole = part.first_page == 0 && part.end_page.is_none();
    if whole {
        let columns = if table.columns.is_empty() { String::new() } else { format!(" ({})", table.column_list()) };
        return format!("COPY {}{columns} TO STDOUT (FORMAT {format})", table.qualified());
    }
    let from = format!("ctid >= '({},0)'::tid", part.first_page);
    let until = part.end_page.map(|page| format!(" AND ctid < '({page},0)'::tid")).unwrap_or_default();
    format!(
        "COPY (SELECT {} FROM ONLY {} WHERE {from}{until}) TO STDOUT (FORMAT {format})",
        table.column_list(),
        table.qualified()
    )
}
