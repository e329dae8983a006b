//! A table whose rows are on the target already, from an earlier copy that the stream could not be followed from to the end: it
//! is compared with the snapshot, and the rows of the places that differ are exchanged.
//!
//! ```text
//!   source: BEGIN; SET TRANSACTION SNAPSHOT; LOCK; is it the same file (H4)?
//!   both:   hash ranges, then cells of the hash of the key (module `verify`), in several sessions
//!   target: BEGIN; DELETE the cells that differ; COPY the source's rows of these cells; the part's row in the ledger; COMMIT
//! ```
//!
//! How it dies: until that COMMIT the table is as it was, and is compared again from the start, under this snapshot or another; after
//! it, the table is a copied one like any other (I2, I3). Nothing else writes to the target meanwhile: the apply begins when all
//! tables are there.
//!
//! All deletions come before all insertions, so no unique index is in the way: what stays is the same on both sides.

use tokio_postgres::Client;

use super::part::{file_statements, format_of, is_same_file, send_rows};
use super::{Copier, Outcome};
use crate::connection;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::status::Level;
use crate::source::catalog::Table;
use crate::source::snapshot;
use crate::target::ledger::{self, Part};
use crate::timescale::exchange::{self as chunk_exchange, Found, Hypertables};
use crate::timescale::{self, ChunkOf, rows};
use crate::verify::{self, Mismatch, Sessions};

/// A table of more bytes is read in ranges, by all sessions.
const READ_IN_RANGES_ABOVE_BYTES: i64 = 64 << 20;

/// Sessions in pairs: on the source, and on the target.
type Pairs = Vec<(Client, Client)>;

/// Compares one table, and exchanges what differs. The sessions come back without a transaction, unless one of them broke: then
/// there are none.
pub(super) async fn exchange(
    copier: &Copier,
    snapshot: &str,
    part: &Part,
    jobs: usize,
    pairs: &mut Pairs,
    hypertables: &mut Hypertables,
) -> Result<Outcome> {
    let Some(table) = copier.tables.get(&part.relid) else {
        return Err(Error::new(ErrorKind::Other, format!("the ledger has a part of an unknown table {}", part.relid)));
    };
    if table.is_hypertable {
        let target = copier.target.connect(&copier.application_name).await?;
        return without_rows(table, part, &target).await;
    }
    let in_ranges = table.bytes > READ_IN_RANGES_ABOVE_BYTES && table.chunk.is_none();
    let wanted = if in_ranges { jobs.max(1) } else { 1 };
    // One may have made way since.
    pairs.retain(|(source, target)| !source.is_closed() && !target.is_closed());
    // Nor does anybody need those that were tuned away.
    pairs.truncate(jobs.max(1));
    while pairs.len() < wanted {
        pairs.push(tokio::try_join!(
            copier.source.connect(&copier.application_name),
            copier.target.connect(&copier.application_name)
        )?);
    }
    let rest = pairs.split_off(wanted);
    let mut same_file = true;
    for (source, target) in pairs.iter() {
        snapshot::import(source, snapshot).await?;
        // In each of them: the watchdog can end one, and its lock with it, while the others go on reading.
        let answer = connection::first_row(source, &file_statements(table)).await;
        if timescale::copy::is_dropped(table, &answer) {
            source.batch_execute("ROLLBACK").await?;
            return without_rows(table, part, target).await;
        }
        same_file &= is_same_file(answer, table)?;
    }
    if !same_file {
        for (source, _) in pairs.iter() {
            source.batch_execute("ROLLBACK").await?;
        }
        pairs.extend(rest);
        return Ok(Outcome::Stale);
    }
    let (outcome, used) = match (&table.chunk, pairs.pop()) {
        (Some(chunk), Some((mut source, target))) => {
            let outcome = of_chunk(copier, (table, chunk, part), &mut source, &target, hypertables).await;
            (outcome, vec![(source, target)])
        }
        (_, last) => {
            let sessions = Sessions::new(std::mem::take(pairs).into_iter().chain(last).collect()).await?;
            let outcome = in_sessions(copier, table, part, &sessions).await;
            (outcome, sessions.into_inner())
        }
    };
    // Ends the transactions on the source, and with them the locks (H9). It also shows which session is gone.
    let mut made_way = false;
    for (source, _) in &used {
        made_way |= source.batch_execute("ROLLBACK").await.is_err() && source.is_closed();
    }
    if outcome.is_ok() {
        pairs.extend(used);
        pairs.extend(rest);
    }
    match outcome {
        // The watchdog ended the session (H9). If it was an outage instead, the next connection says so.
        Err(error) if made_way => {
            tracing::debug!(%error, "a session of the comparison on the source is gone");
            Ok(Outcome::MadeWay)
        }
        outcome => outcome.context(|| format!("comparing {} with the source", table.qualified())),
    }
}

/// The rows of a hypertable are in its chunks, and a chunk that the source has dropped has none: neither is compared.
async fn without_rows(table: &Table, part: &Part, target: &Client) -> Result<Outcome> {
    target.batch_execute("BEGIN").await?;
    if table.chunk.is_some() {
        timescale::live::note_gone(target, table).await?;
    }
    let complete = ledger::part_copied(target, part, 0).await?;
    target.batch_execute("COMMIT").await?;
    Ok(Outcome::Copied(complete))
}

/// A chunk, whose rows may stand in other chunks on the target.
async fn of_chunk(
    copier: &Copier,
    (table, chunk, part): (&Table, &ChunkOf, &Part),
    source: &mut Client,
    target: &Client,
    hypertables: &mut Hypertables,
) -> Result<Outcome> {
    let other = match chunk_exchange::look(source, target, (table, chunk), format_of(table), hypertables).await? {
        Found::Stale => return Ok(Outcome::Stale),
        Found::Same => None,
        Found::Other(other) => Some(other),
    };
    target
        .batch_execute(&format!("BEGIN; SET LOCAL synchronous_commit = off; {}", copier.role.begin_statement()))
        .await?;
    let mut progress = copier.board.table(table.relid).map(|progress| progress.begin_part());
    let mut copied = 0;
    if let Some(other) = &other {
        target.batch_execute(rows::SETTINGS).await?;
        let deleted = target.execute_typed(&other.delete, &[]).await?;
        copied = send_rows(source, &other.out, target, &other.into, progress.as_mut(), copier.tune.pace()).await?;
        if copied.cast_signed() != other.rows {
            let text = format!("{copied} rows of {} came over, and it has {}", table.qualified(), other.rows);
            return Err(Error::new(ErrorKind::Divergence, text).hint("Run the same command again."));
        }
        let text = format!(
            "{}: its {copied} rows were copied again into {}, in the place of {deleted} on the target",
            table.qualified(),
            chunk.qualified()
        );
        copier.board.event(Level::Info, text);
    }
    let complete = ledger::part_copied(target, part, copied).await?;
    target.batch_execute("COMMIT").await?;
    if let Some(progress) = progress {
        progress.committed();
    }
    Ok(Outcome::Copied(complete))
}

async fn in_sessions(copier: &Copier, table: &Table, part: &Part, sessions: &Sessions) -> Result<Outcome> {
    let mismatch = verify::mismatch(table, sessions, &verify::Options::default(), &|_| {}).await?;
    let lent = sessions.lend().await?;
    exchange_rows(copier, table, part, &mismatch, lent.source()?, lent.target()?).await
}

async fn exchange_rows(
    copier: &Copier,
    table: &Table,
    part: &Part,
    mismatch: &Mismatch,
    source: &Client,
    target: &Client,
) -> Result<Outcome> {
    // Safe to lose: the rows and their mark go together, and the copy is durable before the next phase (I2).
    target
        .batch_execute(&format!("BEGIN; SET LOCAL synchronous_commit = off; {}", copier.role.begin_statement()))
        .await?;
    if table.hypertable.is_some() {
        target.batch_execute(rows::SETTINGS).await?;
    }
    let mut progress = copier.board.table(table.relid).map(|progress| progress.begin_part());
    let mut deleted = 0;
    for condition in &mismatch.conditions {
        let statement = format!("DELETE FROM {} AS t WHERE {condition}", mismatch.target);
        deleted += target.execute_typed(&statement, &[]).await?;
    }
    let mut copied = 0;
    for condition in &mismatch.conditions {
        let statement = copy_out_statement(table, mismatch, condition);
        copied += send_rows(source, &statement, target, table, progress.as_mut(), copier.tune.pace()).await?;
    }
    let now = mismatch.rows_target - deleted.cast_signed() + copied.cast_signed();
    if now != mismatch.rows_source {
        let text = format!(
            "the target would have {now} rows of {} and the source has {}: somebody else writes to the target",
            table.qualified(),
            mismatch.rows_source
        );
        return Err(Error::new(ErrorKind::Divergence, text)
            .hint("Find out who writes there and stop it, then run the same command again."));
    }
    let complete = ledger::part_copied(target, part, copied).await?;
    target.batch_execute("COMMIT").await?;
    if let Some(progress) = progress {
        progress.committed();
    }
    if !mismatch.conditions.is_empty() {
        let text = format!(
            "{}: of {} rows {copied} were copied again, in the place of {deleted} on the target",
            table.qualified(),
            mismatch.rows_source
        );
        copier.board.event(Level::Info, text);
    }
    Ok(Outcome::Copied(complete))
}

fn copy_out_statement(table: &Table, mismatch: &Mismatch, condition: &str) -> String {
    format!(
        "COPY (SELECT {} FROM {} AS t WHERE {condition}) TO STDOUT (FORMAT {})",
        table.column_list(),
        mismatch.source,
        format_of(table)
    )
}
