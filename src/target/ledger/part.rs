//! The parts that a table is copied in: planned under a snapshot, and marked in the transaction that has copied them (I2).

use std::collections::BTreeSet;

use futures_util::future::try_join3;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{LedgerTable, insert_next_snapshot, tables};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::snapshot::SnapshotData;

/// A range of pages of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The table.
    pub relid: u32,
    /// Counted from 0 within the table.
    pub part: i32,
    /// The first page.
    pub first_page: i64,
    /// The page after the last; `None` for the last part, which is open-ended (H3).
    pub end_page: Option<i64>,
}

impl Part {
    /// Whether it is all of its table.
    pub fn is_whole(&self) -> bool {
        self.first_page == 0 && self.end_page.is_none()
    }
}

/// Gives every table that is not complete a new copy under one snapshot (H3): what a dead copy left in it is thrown
/// away in the same transaction, because ranges of two snapshots would miss rows that moved between them. A table whose rows
/// are to be compared keeps them.
///
/// `snapshot` is `None` when the slot's own snapshot, which is recorded already as the newest, is still alive.
///
/// # Errors
/// Whatever the server says; nothing is changed then.
pub async fn plan_copy(client: &mut Client, snapshot: Option<&SnapshotData>, parts: &[Part]) -> Result<()> {
    let transaction = client.transaction().await?;
    // A session of an earlier attempt may still have its commit on the way, though nobody hears the answer any more. This waits
    // for it; otherwise its rows would stay beside those of the new copy, or count as rows of the new snapshot.
    transaction
        .batch_execute("LOCK TABLE walferry.source_table, walferry.part IN ACCESS EXCLUSIVE MODE")
        .await
        .context(|| "waiting for earlier copy sessions on the target".into())?;
    let unfinished: Vec<LedgerTable> =
        tables(transaction.client()).await?.into_iter().filter(|table| !table.copied).collect();
    let planned: BTreeSet<u32> = parts.iter().map(|part| part.relid).collect();
    if planned != unfinished.iter().map(|table| table.table.relid).collect() {
        return Err(Error::new(ErrorKind::Transient, "an earlier copy session has completed a table meanwhile"));
    }
    if let Some(snapshot) = snapshot {
        insert_next_snapshot(transaction.client(), snapshot).await?;
    }
    let id: i32 = transaction.query_typed_one("SELECT max(id) FROM walferry.snapshot", &[]).await?.get(0);
    let relids: Vec<i64> = unfinished.iter().map(|table| i64::from(table.table.relid)).collect();
    let copied_anew: Vec<i64> =
        unfinished.iter().filter(|table| !table.compared).map(|table| i64::from(table.table.relid)).collect();
    let begun: Vec<i64> = transaction
        .query_typed(
            "SELECT DISTINCT relid FROM walferry.part WHERE relid = ANY ($1) AND copied",
            &[(&copied_anew, Type::INT8_ARRAY)],
        )
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    for table in unfinished.iter().filter(|table| begun.contains(&i64::from(table.table.relid))) {
        let (name, only) = (table.table.qualified(), table.table.only_on_target());
        let referred = "SELECT EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE contype = 'f' AND confrelid = pg_catalog.to_regclass($1))";
        // A foreign key that was there before the copy forbids TRUNCATE.
        let statement = match transaction.query_typed_one(referred, &[(&name, Type::TEXT)]).await?.get(0) {
            true => format!("SET LOCAL session_replication_role = replica; DELETE FROM {only}"),
            false => format!("TRUNCATE {only}"),
        };
        transaction.batch_execute(&statement).await.context(|| format!("emptying {}", table.table.qualified()))?;
    }
    let part_relids: Vec<i64> = parts.iter().map(|part| i64::from(part.relid)).collect();
    let numbers: Vec<i32> = parts.iter().map(|part| part.part).collect();
    let first_pages: Vec<i64> = parts.iter().map(|part| part.first_page).collect();
    let end_pages: Vec<Option<i64>> = parts.iter().map(|part| part.end_page).collect();
    // Sent in this order without waiting for each answer.
    try_join3(
        transaction.execute_typed("DELETE FROM walferry.part WHERE relid = ANY ($1)", &[(&relids, Type::INT8_ARRAY)]),
        transaction.execute_typed(
            "UPDATE walferry.source_table SET snapshot = $2, rows_copied = 0 WHERE relid = ANY ($1)",
            &[(&relids, Type::INT8_ARRAY), (&id, Type::INT4)],
        ),
        transaction.execute_typed(
            "INSERT INTO walferry.part (relid, part, first_page, end_page) SELECT * FROM unnest($1, $2, $3, $4)",
            &[
                (&part_relids, Type::INT8_ARRAY),
                (&numbers, Type::INT4_ARRAY),
                (&first_pages, Type::INT8_ARRAY),
                (&end_pages, Type::INT8_ARRAY),
            ],
        ),
    )
    .await?;
    transaction.commit().await.context(|| "planning the copy in the ledger".into())
}

/// Marks a part as copied, in the transaction that copied it. Answers whether the whole table is complete with it.
///
/// # Errors
/// `Transient` when the part was marked already or belongs to another plan: then the rows must not be committed.
pub async fn part_copied(client: &Client, part: &Part, rows: u64) -> Result<bool> {
    let (relid, rows) = (i64::from(part.relid), rows.cast_signed());
    // Sent in this order without waiting for each answer.
    let (marked, _, completed) = try_join3(
        client.execute_typed(
            "UPDATE walferry.part SET copied = true, rows = $3 \
             WHERE relid = $1 AND part = $2 AND NOT copied AND first_page = $4 AND end_page IS NOT DISTINCT FROM $5",
            &[
                (&relid, Type::INT8),
                (&part.part, Type::INT4),
                (&rows, Type::INT8),
                (&part.first_page, Type::INT8),
                (&part.end_page, Type::INT8),
            ],
        ),
        // This holds the table's row until the commit, so that of two last parts the later sees the earlier.
        client.execute_typed(
            "UPDATE walferry.source_table SET rows_copied = rows_copied + $2 WHERE relid = $1",
            &[(&relid, Type::INT8), (&rows, Type::INT8)],
        ),
        client.execute_typed(
            "UPDATE walferry.source_table SET copied = true, compared = false \
             WHERE relid = $1 AND NOT EXISTS (SELECT FROM walferry.part WHERE relid = $1 AND NOT copied)",
            &[(&relid, Type::INT8)],
        ),
    )
    .await?;
    if marked != 1 {
        // Perhaps our own, by a commit whose answer was lost.
        return Err(Error::new(ErrorKind::Transient, "the ledger has this part already, or has planned another"));
    }
    Ok(completed == 1)
}
