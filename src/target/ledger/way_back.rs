//! The way back: a second ledger on the server that was left, for the stream from the server that took over.
//!
//! | | forward | back |
//! |---|---|---|
//! | ledger on | the new server | the old server |
//! | rows come from | a copy | the cutover: both sides are equal at the release position |
//! | stream begins at | the slot's consistent point | the release position |
//!
//! It is written before the fence, with everything but that position, which the cutover fills in as its last act before the
//! decision. Whether it counts stands in the *forward* ledger, in the deciding transaction: until then it is a draft.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::try_join3;
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{FORMAT, Migration, count, insert_snapshot, new_ledger, to_json};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::source::catalog::Table;
use crate::source::snapshot::SnapshotData;
use crate::sql;
use crate::state_directory::queue_name;
use crate::target::route::Routing;

/// What the forward ledger says of the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WayBack {
    /// Its slot is there and can be decoded (H37); nothing more.
    Prepared,
    /// The cutover decided with it: the old server is kept current.
    Armed,
    /// `walferry finish` ended it.
    Finished,
}

impl WayBack {
    /// As it stands in the ledger.
    pub fn name(self) -> &'static str {
        match self {
            WayBack::Prepared => "prepared",
            WayBack::Armed => "armed",
            WayBack::Finished => "finished",
        }
    }

    pub(super) fn parse(name: &str) -> Result<WayBack> {
        let known =
            [WayBack::Prepared, WayBack::Armed, WayBack::Finished].into_iter().find(|state| state.name() == name);
        known.ok_or_else(|| {
            let text = format!("the ledger has a way back that is `{name}`, which this version does not know");
            Error::new(ErrorKind::Other, text)
        })
    }
}

/// What the stream of the way back needs to know, but for where it begins.
pub struct Draft<'a> {
    /// What no other draft is called.
    pub name: &'a str,
    /// The migration from the new server to the old one.
    pub migration: &'a Migration,
    /// The tables as the new server has them, and which of them the stream shows inserts of only.
    pub tables: &'a [(Table, bool)],
    /// The new server's catalog (I11). An empty hash stands for an object that the cutover itself is going to change.
    pub fingerprint: &'a BTreeMap<String, String>,
}

/// Writes the draft on the old server, in the place of an earlier one of the same migration; one transaction.
///
/// # Errors
/// `Blocked` when the old server has a schema `walferry` that is not of this migration; else what the server says.
pub async fn draft(client: &mut Client, draft: &Draft<'_>) -> Result<()> {
    let migration = draft.migration;
    let relids: Vec<i64> = draft.tables.iter().map(|(table, _)| i64::from(table.relid)).collect();
    let definitions = draft.tables.iter().map(|(table, _)| to_json(table)).collect::<Result<Vec<String>>>()?;
    let insert_only: Vec<bool> = draft.tables.iter().map(|(_, insert_only)| *insert_only).collect();
    let routings: Vec<&str> = draft.tables.iter().map(|(table, _)| Routing::of(table).name()).collect();
    let (objects, hashes): (Vec<&str>, Vec<&str>) =
        draft.fingerprint.iter().map(|(object, hash)| (object.as_str(), hash.as_str())).unzip();
    let transaction = client.transaction().await?;
    // A dead standby of the server that is left must not hold it up (H34).
    transaction.batch_execute("SET LOCAL synchronous_commit = local").await?;
    // A cutover that was given up at its end may have left its guard.
    let of_another = "SELECT pg_catalog.to_regnamespace('walferry') IS NOT NULL AND pg_catalog.to_regclass('walferry.migration') IS NULL \
                      AND pg_catalog.to_regprocedure('walferry.moved()') IS NULL";
    if transaction.query_typed_one(of_another, &[]).await?.get(0) {
        let text = "the old server has a schema walferry that is not walferry's";
        return Err(Error::new(ErrorKind::Blocked, text).hint("Rename it, or cut over with --no-reverse."));
    }
    let exists = "SELECT pg_catalog.to_regclass('walferry.migration') IS NOT NULL";
    if transaction.query_typed_one(exists, &[]).await?.get(0) {
        let id = transaction.query_typed_opt("SELECT id FROM walferry.migration", &[]).await?;
        let id: Option<String> = id.map(|row| row.get(0));
        if let Some(other) = id.filter(|id| *id != migration.id) {
            let text = format!("the old server holds the ledger of another migration ({other})");
            return Err(Error::new(ErrorKind::Blocked, text)
                .hint("`walferry clean` removes what that one left; or cut over with --no-reverse."));
        }
    }
    transaction.batch_execute("DROP SCHEMA IF EXISTS walferry CASCADE").await?;
    transaction.batch_execute(&new_ledger()).await.context(|| "writing the ledger of the way back".into())?;
    transaction
        .execute(
            "INSERT INTO walferry.migration (format, id, source_system, source_timeline, source_database, slot, publication, \
                 insert_only_publication, binary_format, apply_workers, phase, pre_data_restored, post_data_restored, cutover, scope) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 'following', true, true, jsonb_build_object('draft', $11::text), $12)",
            &[
                &FORMAT,
                &migration.id,
                &migration.source_system,
                &migration.source_timeline,
                &migration.source_database,
                &migration.slot,
                &migration.publication,
                &migration.insert_only_publication,
                &migration.binary,
                &count(migration.apply_workers),
                &draft.name,
                &to_json(&migration.scope)?,
            ],
        )
        .await
        .context(|| "writing the way back into its ledger".into())?;
    insert_snapshot(transaction.client(), 0, &everything_before(Lsn::ZERO)).await?;
    // Sent in this order without waiting for each answer.
    try_join3(
        transaction.execute_typed(
            "INSERT INTO walferry.source_table (relid, definition, insert_only, routing, snapshot, copied) \
             SELECT r, d::jsonb, i, g, 0, true FROM unnest($1, $2, $3, $4) u(r, d, i, g)",
            &[
                (&relids, Type::INT8_ARRAY),
                (&definitions, Type::TEXT_ARRAY),
                (&insert_only, Type::BOOL_ARRAY),
                (&routings, Type::TEXT_ARRAY),
            ],
        ),
        transaction.execute_typed(
            "INSERT INTO walferry.fingerprint SELECT * FROM unnest($1, $2)",
            &[(&objects, Type::TEXT_ARRAY), (&hashes, Type::TEXT_ARRAY)],
        ),
        transaction.execute_typed(
            "INSERT INTO walferry.apply_progress SELECT worker, '0/0' FROM generate_series(0, $1 - 1) worker",
            &[(&count(migration.apply_workers), Type::INT4)],
        ),
    )
    .await
    .context(|| "writing the tables into the ledger of the way back".into())?;
    transaction.commit().await.context(|| "writing the ledger of the way back".into())
}

/// What a copy has seen that holds all that was committed before a position, and nothing since.
fn everything_before(position: Lsn) -> SnapshotData {
    SnapshotData { xmin: u64::MAX, xmax: u64::MAX, running: BTreeSet::new(), insert_lsn: position }
}

/// Has the stream of a draft begin at the release position; one commit that is on disk when this returns.
///
/// # Errors
/// Whatever the server says, also when the draft is another by now.
pub async fn begin_at(client: &Client, draft: &str, release: Lsn) -> Result<()> {
    // `local`: a dead standby must not hold up a cutover (H34). A cutover that was given up long ago may still have this under way.
    let statements = format!(
        "BEGIN; SET LOCAL synchronous_commit = local; \
         DO $begin$ BEGIN \
             UPDATE walferry.migration SET consistent_point = '{release}', queue = '{queue}' WHERE cutover->>'draft' = {draft}; \
             IF NOT FOUND THEN RAISE EXCEPTION 'the way back was drafted anew'; END IF; \
         END $begin$; \
         UPDATE walferry.snapshot SET insert_lsn = '{release}'; \
         UPDATE walferry.apply_progress SET applied = '{release}'; COMMIT",
        draft = sql::literal(draft),
        queue = queue_name(release)
    );
    client.batch_execute(&statements).await.context(|| "writing where the way back begins".into())
}

/// Fills in the hashes of what the cutover itself has changed on the new server, but for what is not there or left to be done.
///
/// # Errors
/// Whatever the server says.
pub async fn complete_fingerprint(client: &Client, now: &BTreeMap<String, String>) -> Result<()> {
    let (objects, hashes): (Vec<&str>, Vec<&str>) =
        now.iter().map(|(object, hash)| (object.as_str(), hash.as_str())).unzip();
    client
        .execute_typed(
            "UPDATE walferry.fingerprint f SET hash = u.hash FROM unnest($1, $2) u(object, hash) \
             WHERE f.object = u.object AND f.hash = ''",
            &[(&objects, Type::TEXT_ARRAY), (&hashes, Type::TEXT_ARRAY)],
        )
        .await
        .context(|| "writing into the ledger what the cutover has changed".into())?;
    Ok(())
}

/// The statement of the deciding transaction that makes the draft count, or says that there is no way back.
pub fn decide(armed: bool) -> String {
    let state = if armed { format!("'{}'", WayBack::Armed.name()) } else { "NULL".to_owned() };
    format!("UPDATE walferry.migration SET way_back = {state};")
}

/// Writes into the forward ledger, before the cutover, whether the slot is there and was looked at.
///
/// # Errors
/// Whatever the server says.
pub async fn prepared(client: &Client, is_prepared: bool) -> Result<()> {
    let state = if is_prepared { format!("'{}'", WayBack::Prepared.name()) } else { "NULL".to_owned() };
    let statement = format!("UPDATE walferry.migration SET way_back = {state} WHERE phase <> 'cut_over'");
    client.batch_execute(&statement).await.context(|| "writing into the ledger how far the way back is".into())
}

/// Writes into the forward ledger that the way back has ended.
///
/// # Errors
/// Whatever the server says.
pub async fn finished(client: &Client) -> Result<()> {
    let statement = format!(
        "BEGIN; SET LOCAL synchronous_commit = on; UPDATE walferry.migration SET way_back = '{}'; COMMIT",
        WayBack::Finished.name()
    );
    client.batch_execute(&statement).await.context(|| "writing into the ledger that the way back has ended".into())
}
