//! Tables that are brought right again, after the stream or the target has lost something.
//!
//! Their rows on the target stay where they are; the copy then compares them with a new snapshot and replaces only what differs.

use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::insert_next_snapshot;
use crate::error::{Context, Result};
use crate::lsn::Lsn;
use crate::source::catalog::Table;
use crate::source::snapshot::SnapshotData;
use crate::target::adopt;
use crate::target::route::Routing;
use crate::timescale::live;

/// Back to the copy, wherever a migration was after it.
const BACK_TO_COPYING: &str = "phase = CASE WHEN phase IN ('catching_up', 'following') THEN 'copying' ELSE phase END";

/// Waits for what sessions of an earlier process may still commit, which would otherwise come on top of what is written now.
async fn lock(client: &Client) -> Result<()> {
    client
        .batch_execute(
            "SET LOCAL synchronous_commit = on; \
             LOCK TABLE walferry.source_table, walferry.part, walferry.apply_progress IN ACCESS EXCLUSIVE MODE",
        )
        .await
        .context(|| "waiting for earlier sessions on the target".into())
}

/// A table that is compared with the source again, as the source has it now.
#[derive(Clone, Debug, PartialEq)]
pub struct Redefinition {
    /// The table.
    pub table: Table,
    /// How its changes are spread.
    pub routing: Routing,
    /// Objects of the catalog's fingerprint that are dealt with by it: their hashes now, `None` for those that are gone.
    pub fingerprint: Vec<(String, Option<String>)>,
}

/// A piece of the stream that is thrown away, because it cannot be read any more.
pub struct ThrownAway<'a> {
    /// Where it ends: from here on the source sends everything again.
    pub up_to: Lsn,
    /// The directory of the queue that goes on there.
    pub queue: &'a str,
}

/// Has tables compared again under a snapshot whose xmin is at least `snapshot_floor`; one transaction. A snapshot past everything
/// that was applied or thrown away says which of the changes to come each table has seen (I3, H1). From that snapshot on, the tables
/// are what the source has now.
///
/// Where nothing is thrown away the stream goes on where it is. Else the tables have to be all that the piece had changes of.
///
/// # Errors
/// Whatever the server says; nothing is changed then.
pub async fn compare_again(
    client: &mut Client,
    tables: &[Redefinition],
    snapshot_floor: u64,
    thrown_away: Option<&ThrownAway<'_>>,
) -> Result<()> {
    let relids: Vec<i64> = tables.iter().map(|table| i64::from(table.table.relid)).collect();
    let transaction = client.transaction().await?;
    lock(transaction.client()).await?;
    for now in tables {
        adopt::redefine(transaction.client(), &now.table, now.routing, &now.fingerprint).await?;
    }
    transaction
        .execute(
            "UPDATE walferry.source_table SET compared = copied OR compared, copied = false, rows_copied = 0 \
             WHERE relid = ANY ($1)",
            &[&relids],
        )
        .await?;
    transaction
        .execute(
            &format!("UPDATE walferry.migration SET snapshot_floor = greatest(snapshot_floor, $1), {BACK_TO_COPYING}"),
            &[&snapshot_floor.cast_signed()],
        )
        .await?;
    if let Some(thrown_away) = thrown_away {
        let up_to = PgLsn::from(thrown_away.up_to);
        // A session that is past it already has its share of what the source sends again.
        transaction.execute("UPDATE walferry.apply_progress SET applied = greatest(applied, $1)", &[&up_to]).await?;
        transaction
            .execute("UPDATE walferry.migration SET consistent_point = $1, queue = $2", &[&up_to, &thrown_away.queue])
            .await?;
    }
    transaction.commit().await.context(|| "recording in the ledger which tables are compared again".into())
}

/// A new slot in the place of one that can no longer be followed.
pub struct Resynced<'a> {
    /// The new slot's consistent point: every change before it is forgotten, every one from it on comes.
    pub consistent_point: Lsn,
    /// Its snapshot.
    pub snapshot: &'a SnapshotData,
    /// The source's timeline now.
    pub source_timeline: i32,
    /// The directory of the queue that it fills.
    pub queue: &'a str,
    /// Every table that the source still has, as it has it now. The others are the migration's no more; that they are gone stays in
    /// the fingerprint (I11).
    pub tables: &'a [Redefinition],
    /// Chunks of hypertables that nobody knew: what the target has in their ranges is compared too.
    pub chunks: &'a [Table],
}

/// Records a new slot, and has every table compared again; one transaction. What was copied so far is what is compared; what was
/// not is copied under the new snapshot.
///
/// # Errors
/// Whatever the server says; nothing is changed then.
pub async fn record_resynced(client: &mut Client, resynced: &Resynced<'_>) -> Result<()> {
    let transaction = client.transaction().await?;
    lock(transaction.client()).await?;
    insert_next_snapshot(transaction.client(), resynced.snapshot).await?;
    for now in resynced.tables {
        adopt::redefine(transaction.client(), &now.table, now.routing, &now.fingerprint).await?;
        let (relid, insert_only) = (i64::from(now.table.relid), !now.table.has_usable_identity());
        transaction
            .execute("UPDATE walferry.source_table SET insert_only = $2 WHERE relid = $1", &[&relid, &insert_only])
            .await?;
    }
    let kept: Vec<i64> = resynced.tables.iter().map(|now| i64::from(now.table.relid)).collect();
    for table in ["part", "source_table"] {
        transaction.execute(&format!("DELETE FROM walferry.{table} WHERE relid <> ALL ($1)"), &[&kept]).await?;
    }
    transaction
        .batch_execute(
            "UPDATE walferry.source_table SET compared = copied OR compared, copied = false, rows_copied = 0",
        )
        .await?;
    for chunk in resynced.chunks {
        live::record(transaction.client(), chunk, false).await?;
        let compared = format!("UPDATE walferry.source_table SET compared = true WHERE relid = {}", chunk.relid);
        transaction.batch_execute(&compared).await?;
    }
    let begins = PgLsn::from(resynced.consistent_point);
    let binary = resynced.tables.iter().all(|now| now.table.binary_safe());
    transaction.execute("UPDATE walferry.apply_progress SET applied = $1", &[&begins]).await?;
    transaction
        .execute(
            &format!(
                "UPDATE walferry.migration SET consistent_point = $1, source_timeline = $2, snapshot_floor = $3, queue = $4, \
                     binary_format = $5, {BACK_TO_COPYING}"
            ),
            &[&begins, &resynced.source_timeline, &resynced.snapshot.xmax.cast_signed(), &resynced.queue, &binary],
        )
        .await?;
    transaction.commit().await.context(|| "recording the new slot in the ledger".into())
}
