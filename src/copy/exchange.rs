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
use crate::timescale::rows;
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
) -> Result<Outcome> {
    let Some(table) = copier.tables.get(&part.relid) else {
        return Err(Error::new(ErrorKind::Other, format!("the ledger has a part of an unknown table {}", part.relid)));
    };
    let wanted = if table.bytes > READ_IN_RANGES_ABOVE_BYTES { jobs.max(1) } else { 1 };
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
    for (source, _) in pairs.iter() {
        snapshot::import(source, snapshot).await?;
        // In each of them: the watchdog can end one, and its lock with it, while the others go on reading.
        same_file &= is_same_file(connection::first_row(source, &file_statements(table)).await, table)?;
    }
    if !same_file {
        for (source, _) in pairs.iter() {
            source.batch_execute("ROLLBACK").await?;
        }
        pairs.extend(rest);
        return Ok(Outcome::Stale);
    }
    let sessions = Sessions::new(std::mem::take(pairs)).await?;
    let outcome = in_sessions(copier, table, part, &sessions).await;
    let used = sessions.into_inner();
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
