//! One part of one table, from COPY to COPY.

use std::pin::{Pin, pin};

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, TryStreamExt};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::{Copier, Outcome};
use crate::care::pace::Pace;
use crate::connection::wire::RawSession;
use crate::connection::{self, Session};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::table_progress::PartProgress;
use crate::source::catalog::{Column, Table};
use crate::source::{slot, snapshot};
use crate::sql;
use crate::target::ledger::{self, Part};
use crate::timescale::{self, copy::How};

/// The source sends a message per row; the target gets chunks of this size.
const CHUNK_BYTES: usize = 128 * 1024;

/// A table of at least so many bytes that is copied as one part arrives frozen (`COPY … FREEZE`), as TRUNCATE in the same
/// transaction allows: its rows need no hint bits, no vacuum and no later freezing, and building the first index finds them all
/// visible. For smaller tables the new file, and the commit that has to be flushed for it, cost more than that saves.
const FREEZE_FROM_BYTES: i64 = 8 << 20;

/// Whether a part is worth arriving frozen.
pub(super) fn may_freeze(table: &Table, part: &Part) -> bool {
    let is_plain = table.chunk.as_ref().is_none_or(|chunk| !chunk.is_late && chunk.compressed.is_none());
    // The rows of a hypertable go to its chunks, which are not those that were emptied.
    part.is_whole() && table.bytes >= FREEZE_FROM_BYTES && is_plain && table.hypertable.is_none()
}

/// Copies one part, frozen or not, and marks it in the ledger, as one transaction on the target.
pub(super) async fn copy(
    source: &mut RawSession,
    target: &mut Client,
    snapshot: &str,
    (table, part, frozen): (&Table, &Part, bool),
    copier: &Copier,
) -> Result<Outcome> {
    let outcome = copy_rows(source, target, snapshot, (table, part, frozen), copier).await;
    // Ends the transaction on the source, and with it the lock (H9), whatever happened. When the session is gone, so is
    // the lock; one that was left in the middle of a COPY goes with this error.
    if source.is_usable()
        && let Err(error) = source.simple_query("ROLLBACK").await
    {
        tracing::debug!(%error, "the copy's session on the source ended with its transaction");
    }
    match outcome {
        // The watchdog ended the session. If it was an outage instead, the next connection or the import of the snapshot says so.
        Err(error) if source.is_lost() => {
            tracing::debug!(%error, "the copy's session on the source is gone");
            Ok(Outcome::MadeWay)
        }
        outcome => outcome.context(|| format!("copying {} from page {}", table.qualified(), part.first_page)),
    }
}

async fn copy_rows(
    source: &mut RawSession,
    target: &mut Client,
    snapshot: &str,
    (table, part, mut frozen): (&Table, &Part, bool),
    copier: &Copier,
) -> Result<Outcome> {
    let mut transaction = target.transaction().await?;
    if frozen && !make_empty(transaction.client(), table).await? {
        tracing::info!("somebody reads {} on the target: its rows do not arrive frozen", table.qualified());
        frozen = false;
        transaction.rollback().await?;
        transaction = target.transaction().await?;
    }
    // Safe to lose: the part and its mark go together, and the copy is durable before the next phase (I2).
    transaction
        .batch_execute(&format!("SET LOCAL synchronous_commit = off; {}", copier.role.begin_statement()))
        .await?;
    // The source last, so that its lock waits for nobody on the target.
    source.simple_query(&snapshot::import_statement(snapshot)).await.map_err(snapshot::not_imported)?;
    let answer = source.first_row(&file_statements(table)).await;
    if timescale::copy::is_dropped(table, &answer) {
        source.simple_query("ROLLBACK").await?;
        if let Some(chunk) = &table.chunk
            && timescale::copy::is_merged(source, chunk, |relid| copier.tables.contains_key(&relid)).await?
        {
            return Err(timescale::copy::was_merged_or_split(table));
        }
        timescale::live::note_gone(transaction.client(), table).await?;
        let complete = ledger::part_copied(transaction.client(), part, 0).await?;
        transaction.commit().await?;
        return Ok(Outcome::Copied(complete));
    }
    if !is_same_file(answer, table)? {
        return Ok(Outcome::Stale);
    }
    let mut progress = copier.board.table(table.relid).map(|progress| progress.begin_part());
    let how = timescale::copy::how(source, table, format_of(table)).await?;
    if let Some(chunk) = &table.chunk {
        timescale::copy::make_ready(transaction.client(), chunk, table, &how).await?;
    }
    let sorted_by = copier.sorted.get(&table.relid).map(String::as_str);
    let own = copy_out_statement(table, part, format_of(table), sorted_by);
    let statements = match how {
        How::Stale => return Ok(Outcome::Stale),
        How::Nothing => Vec::new(),
        How::AsTable => vec![(own, copy_in_statement(table, frozen))],
        How::Rows(out) => vec![(out, timescale::copy::copy_in_statement(table, format_of(table)))],
        How::Raw { out, into } => vec![(own, copy_in_statement(table, false)), (out, into)],
    };
    let mut rows = 0;
    for (out, into) in statements {
        source.copy_out(&out).await?;
        let mut into = CopyIn::begin(transaction.client(), &into, progress.as_mut(), copier.tune.pace()).await?;
        loop {
            let (rows, more) = source.copied(&mut into.chunk, CHUNK_BYTES).await?;
            into.pass_on(rows).await?;
            if !more {
                break;
            }
        }
        rows += into.finish().await?;
    }
    let complete = ledger::part_copied(transaction.client(), part, rows).await?;
    transaction.commit().await?;
    if let Some(progress) = progress {
        progress.committed();
    }
    Ok(Outcome::Copied(complete))
}

/// Gives a table that has no rows a new file, for a COPY with FREEZE. Not where somebody has a lock on it: then the transaction
/// is to be rolled back.
async fn make_empty(target: &Client, table: &Table) -> Result<bool> {
    let name = table.qualified();
    let statements =
        format!("LOCK TABLE ONLY {name} IN ACCESS EXCLUSIVE MODE NOWAIT; SELECT EXISTS (SELECT FROM ONLY {name})");
    let has_rows = match connection::first_row(target, &statements).await {
        Err(error) if error.sqlstate() == Some(&SqlState::LOCK_NOT_AVAILABLE) => return Ok(false),
        row => row?.first().and_then(Option::as_deref) != Some("f"),
    };
    if has_rows {
        let text = format!("{name} on the target holds rows that are not ours: somebody else writes there");
        return Err(Error::new(ErrorKind::Divergence, text)
            .hint("Find out who it is and stop it, then empty the table and run the same command again."));
    }
    target.batch_execute(&format!("TRUNCATE ONLY {name}")).await?;
    Ok(true)
}

/// What COPY sends for a table.
pub(super) fn format_of(table: &Table) -> &'static str {
    if table.binary_safe() { "binary" } else { "text" }
}

/// Sends what a COPY statement gives in an ordinary session on the source to a table of the target; answers the number of rows.
pub(super) async fn send_rows(
    source: &Client,
    copy_out: &str,
    target: &Client,
    table: &Table,
    progress: Option<&mut PartProgress>,
    pace: &Pace,
) -> Result<u64> {
    let mut rows = pin!(source.copy_out(copy_out).await?);
    let mut into = CopyIn::begin(target, &copy_in_statement(table, false), progress, pace).await?;
    let mut waiting = 0;
    while let Some(row) = rows.try_next().await? {
        into.chunk.extend_from_slice(&row);
        waiting += 1;
        if into.chunk.len() >= CHUNK_BYTES {
            into.pass_on(waiting).await?;
            waiting = 0;
        }
    }
    into.pass_on(waiting).await?;
    into.finish().await
}

/// A COPY into a table of the target.
struct CopyIn<'a> {
    sink: Pin<Box<tokio_postgres::CopyInSink<Bytes>>>,
    /// What is to be passed on next.
    chunk: BytesMut,
    progress: Option<&'a mut PartProgress>,
    /// Where a chunk waits for its turn, out of care for the source.
    pace: &'a Pace,
    /// Messages of the source: each is a row, but the last one in binary, which is the trailer. So the newest is not shown
    /// until another follows.
    messages: u64,
    rows_shown: u64,
}

impl<'a> CopyIn<'a> {
    async fn begin(
        target: &Client,
        statement: &str,
        progress: Option<&'a mut PartProgress>,
        pace: &'a Pace,
    ) -> Result<CopyIn<'a>> {
        let sink = Box::pin(target.copy_in::<_, Bytes>(statement).await?);
        Ok(CopyIn { sink, chunk: BytesMut::with_capacity(CHUNK_BYTES * 2), progress, pace, messages: 0, rows_shown: 0 })
    }

    /// Passes the chunk on, which came in so many messages.
    async fn pass_on(&mut self, messages: u64) -> Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        self.pace.pass(self.chunk.len() as u64).await;
        if let Some(progress) = self.progress.as_deref_mut() {
            let rows = (self.messages + messages).saturating_sub(1);
            progress.add(self.chunk.len() as u64, rows - self.rows_shown);
            self.rows_shown = rows;
        }
        self.messages += messages;
        self.sink.feed(self.chunk.split().freeze()).await?;
        self.chunk.reserve(CHUNK_BYTES * 2);
        Ok(())
    }

    async fn finish(mut self) -> Result<u64> {
        let rows = self.sink.as_mut().finish().await?;
        if let Some(progress) = self.progress {
            progress.add(0, rows.saturating_sub(self.rows_shown));
        }
        Ok(rows)
    }
}

/// Locks the table, and asks for what [`is_same_file`] looks at.
pub(super) fn file_statements(table: &Table) -> String {
    let name = sql::literal(&table.qualified());
    let known =
        |column: &Column| sql::literal(&format!("{} {} {}", column.type_oid, column.type_modifier, column.name));
    let columns: Vec<String> = table.columns.iter().map(known).collect();
    format!(
        "LOCK TABLE ONLY {} IN ACCESS SHARE MODE; \
         SELECT c.relfilenode = pg_catalog.pg_relation_filenode({name}::text::regclass), \
                {name}::text::regclass::oid = c.oid, \
                coalesce((SELECT array_agg(concat_ws(' ', a.atttypid, a.atttypmod, a.attname) ORDER BY a.attnum) \
                          FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
                            AND coalesce(pg_catalog.to_jsonb(a)->>'attgenerated', '') = ''), '{{}}') = ARRAY[{}]::text[] \
         FROM pg_catalog.pg_class c WHERE c.oid = {}",
        table.qualified(),
        columns.join(", "),
        table.relid
    )
}

/// Whether the snapshot still shows the table's rows (H4), by the answer to [`file_statements`].
///
/// TRUNCATE and a rewriting ALTER TABLE put a new file in the place of the old one at once, whatever older snapshots see: under
/// them the table reads as empty. From the lock on, the file stays.
pub(super) fn is_same_file(answer: Result<Vec<Option<String>>>, table: &Table) -> Result<bool> {
    let changed = || {
        Error::new(
            ErrorKind::SchemaChanged,
            format!("the table {} was dropped or renamed on the source", table.qualified()),
        )
        .hint(format!(
            "Give the table its name again. Or go on with it under its new name, or without it when it was dropped: {}",
            slot::RESYNC
        ))
    };
    let answer = match answer {
        Err(error)
            if error.sqlstate().is_some_and(|state| {
                *state == SqlState::UNDEFINED_TABLE || *state == SqlState::INVALID_SCHEMA_NAME
            }) =>
        {
            return Err(changed());
        }
        answer => answer?,
    };
    let is_true = |at: usize| answer.get(at).and_then(Option::as_deref) == Some("t");
    if !is_true(1) {
        return Err(changed());
    }
    // Under this snapshot it must have the columns that the ledger has: from the snapshot on, its rows in the stream are read by them.
    if !is_true(2) {
        let text = format!("the columns of {} have changed on the source before it was copied", table.qualified());
        return Err(Error::new(ErrorKind::SchemaChanged, text)
            .hint(format!(
                "The same command with `{}` says what the target needs for that, and takes the table as it is now. Or undo the change \
                 on the source, and run the same command again.",
                Table::recopy_option(&[table])
            )));
    }
    Ok(is_true(0))
}

fn copy_in_statement(table: &Table, frozen: bool) -> String {
    let columns = if table.columns.is_empty() { String::new() } else { format!(" ({})", table.column_list()) };
    let freeze = if frozen { ", FREEZE" } else { "" };
    format!("COPY {}{columns} FROM STDIN (FORMAT {}{freeze})", table.qualified(), format_of(table))
}

fn copy_out_statement(table: &Table, part: &Part, format: &str, sorted_by: Option<&str>) -> String {
    if part.is_whole() && sorted_by.is_none() {
        let columns = if table.columns.is_empty() { String::new() } else { format!(" ({})", table.column_list()) };
        return format!("COPY {}{columns} TO STDOUT (FORMAT {format})", table.qualified());
    }
    let from = format!("ctid >= '({},0)'::tid", part.first_page);
    let until = part.end_page.map(|page| format!(" AND ctid < '({page},0)'::tid")).unwrap_or_default();
    let order = sorted_by.map(|column| format!(" ORDER BY {}", sql::identifier(column))).unwrap_or_default();
    format!(
        "COPY (SELECT {} FROM ONLY {} WHERE {from}{until}{order}) TO STDOUT (FORMAT {format})",
        table.column_list(),
        table.qualified()
    )
}
