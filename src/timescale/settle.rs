//! What is carried and compared at the cutover, and what of TimescaleDB is part of the fingerprint.
//!
//! Behind the fence, when everything in the stream is applied:
//!
//! 1. Every chunk of the source's catalog must be known to the ledger, or have been published from its first moment and be empty still:
//!    then nothing of it was missed. What the source has dropped is dropped on the target.
//! 2. The rows of compressed chunks were as many on both sides: the deletion of a whole segment by a session that the settings did not
//!    reach is in no stream. That was counted before the fence, and a guard shows that nothing was deleted so since ([`unseen`]); where there
//!    is none, it is counted here.
//! 3. What the extension knows of the state of continuous aggregates is carried over: their rows have come through the stream like those
//!    of any hypertable, so watermarks, thresholds and invalidations fit them, and nothing has to be computed anew. Jobs likewise, as
//!    they are now, and still asleep.
//!
//! The decision itself wakes the jobs.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::recreate::places::{self, Places};
use super::recreate::recompute;
use super::source::{self, Chunk, Database, Hypertable};
use super::unseen::{self, Counted};
use super::{live, pause, prepare, recreate};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::Table;
use crate::sql;
use crate::target::ledger::{self, Migration};
use crate::unstreamed::large_object::Owners;

/// The state of continuous aggregates.
const STATE_OF_AGGREGATES: [&str; 5] = [
    "continuous_aggs_invalidation_threshold",
    "continuous_aggs_watermark",
    "continuous_aggs_hypertable_invalidation_log",
    "continuous_aggs_materialization_invalidation_log",
    "continuous_aggs_materialization_ranges",
];

/// Hypertables, their dimensions, compression settings and continuous aggregates, as objects of the fingerprint (I11); nothing where the
/// extension is not installed.
///
/// # Errors
/// Whatever the server says.
pub async fn fingerprint(client: &Client) -> Result<BTreeMap<String, String>> {
    let Some(database) = source::settings(client).await? else { return Ok(BTreeMap::new()) };
    let mut objects = BTreeMap::new();
    for hypertable in &database.hypertables {
        objects.insert(format!("hypertable {}", hypertable.qualified()), format!("{hypertable:?}"));
    }
    for aggregate in &database.aggregates {
        let shown = (aggregate.materialization, &aggregate.definition, aggregate.materialized_only);
        objects.insert(format!("continuous aggregate {}", aggregate.qualified()), format!("{shown:?}"));
    }
    Ok(objects)
}

/// Does all of it; the apply has passed everything that the source has written. Nothing where the extension is not installed.
///
/// # Errors
/// `Blocked` naming a chunk that was not published in time, `Different` naming one whose rows are not as many; else what the servers say.
pub async fn settle(
    source: &Client,
    target: &mut Client,
    (migration, counted): (&Migration, &Counted),
    owners: &Owners,
) -> Result<()> {
    let Some(mut of_source) = source::read(source).await? else { return Ok(()) };
    let recomputed = recompute::recorded(target).await?;
    of_source.chunks.retain(|chunk| !recompute::has_rows_of(&recomputed, chunk));
    of_source.hypertables.retain(|of| !recomputed.iter().any(|one| one.hypertable == of.id));
    let known = every_chunk_is_known(source, target, &of_source, migration).await?;
    // A chunk that nothing has come of is empty, and nothing on the target is of it.
    let living: Vec<Chunk> = of_source.chunks.iter().filter(|chunk| known.contains(&chunk.relid)).cloned().collect();
    let living = places::on_target(source, target, living).await?;
    let transaction = target.transaction().await?;
    let dropped = live::drop_what_is_gone(transaction.client(), &living).await?;
    if !dropped.is_empty() {
        tracing::info!(chunks = dropped.len(), "chunks that the source has dropped are dropped on the target");
    }
    transaction.commit().await.context(|| "dropping chunks on the target".into())?;
    rows_of_compressed_chunks_are_equal(source, target, &of_source, counted).await?;
    if !recomputed.is_empty() {
        let tables = ledger::tables(target).await?.into_iter().map(|entry| entry.table);
        let gone: Vec<Table> = tables.filter(live::is_gone).collect();
        recompute::nothing_is_lost(source, target, &gone).await?;
    }
    let transaction = target.transaction().await?;
    match recreate::is_recreated(transaction.client()).await? {
        true => {
            recreate::state::carry(source, transaction.client()).await?;
            recreate::jobs::bring_in_line(source, transaction.client(), owners).await?;
        }
        false => carry(source, transaction.client(), owners).await?,
    }
    transaction.commit().await.context(|| "carrying over the state of continuous aggregates and jobs".into())
}

/// The guard (I11): nothing of a chunk can have been missed. Answers those that the ledger knows.
async fn every_chunk_is_known(
    source: &Client,
    target: &Client,
    of_source: &Database,
    migration: &Migration,
) -> Result<BTreeSet<u32>> {
    let known: BTreeSet<u32> = ledger::tables(target).await?.iter().map(|entry| entry.table.relid).collect();
    let published = live::published(source, migration).await?;
    // One that nothing has come of, though all of it would have: it is empty.
    let missed = of_source
        .chunks
        .iter()
        .find(|chunk| !known.contains(&chunk.relid) && published.get(&chunk.relid) != Some(&true));
    let Some(chunk) = missed else { return Ok(known) };
    let text = format!("the chunk {} was made by a session that did not publish it", chunk.qualified());
    Err(Error::new(ErrorKind::Blocked, text)
        .hint("It is being copied now. Try again when `walferry status` says that it is ready."))
}

/// The rows of hypertables with compressed chunks, where these were not counted before the fence.
async fn rows_of_compressed_chunks_are_equal(
    source: &Client,
    target: &Client,
    of_source: &Database,
    counted: &Counted,
) -> Result<()> {
    let of_target = source::read(target).await?;
    let Some(of_target) = of_target else {
        return Err(Error::new(ErrorKind::Different, "the extension timescaledb is gone from the target"));
    };
    let places = Places::of(of_source, &of_target);
    // By hypertable: the ranges of chunks need not be the same, but all rows of compressed ranges are in some chunk.
    let of_compressed = |database: &Database| -> BTreeSet<i32> {
        let chunks = database.chunks.iter().filter(|chunk| chunk.compressed.is_some());
        chunks.map(|chunk| chunk.hypertable).collect()
    };
    let (compressed, compressed_there) = (of_compressed(of_source), of_compressed(&of_target));
    let guarded = counted.guarded(source).await?;
    for hypertable in of_source.hypertables.iter().filter(|of| !guarded.contains(&of.id)) {
        let on_target: &Hypertable = places.hypertable(hypertable)?;
        if !compressed.contains(&hypertable.id) && !compressed_there.contains(&on_target.id) {
            continue;
        }
        let of_it = |database: &Database, id: i32| -> Vec<Chunk> {
            database.chunks.iter().filter(|chunk| chunk.hypertable == id).cloned().collect()
        };
        let (here, there) = (of_it(of_source, hypertable.id), of_it(&of_target, on_target.id));
        let counts = futures_util::future::try_join(unseen::rows(source, &here), unseen::rows(target, &there));
        let (here, there) = counts.await?;
        if here != there {
            return Err(unseen::different(hypertable, here, there));
        }
    }
    Ok(())
}

/// The state of continuous aggregates and the jobs, as the source has them now.
async fn carry(source: &Client, target: &Client, owners: &Owners) -> Result<()> {
    let doing = |name: &str| format!("carrying over {name} of TimescaleDB");
    for name in STATE_OF_AGGREGATES {
        let qualified = sql::qualified("_timescaledb_catalog", name);
        let there = "SELECT pg_catalog.to_regclass($1) IS NOT NULL";
        if !source.query_one(there, &[&qualified]).await?.get::<_, bool>(0) {
            continue;
        }
        let rows = prepare::rows_as_json(source, &qualified, name, "", owners).await?;
        let insert = prepare::insert_statement(&qualified, name, &rows, owners);
        target.batch_execute(&format!("DELETE FROM {qualified}; {insert}")).await.context(|| doing(name))?;
    }
    let jobs = sql::qualified("_timescaledb_catalog", "bgw_job");
    let rows = prepare::rows_as_json(source, &jobs, "bgw_job", "WHERE id >= 1000", owners).await?;
    let insert = prepare::insert_statement(&jobs, "bgw_job", &rows, owners);
    let paused = pause::noted(target).await?;
    let jobs_now = source::jobs(source).await?;
    let running = jobs_now.iter().filter(|job| job.scheduled || paused.contains(&job.id));
    let scheduled: Vec<i32> = running.map(|job| job.id).collect();
    target
        .batch_execute(&format!(
            "DELETE FROM {jobs} WHERE id >= 1000; {insert}; DELETE FROM walferry.timescaledb_job; \
             INSERT INTO walferry.timescaledb_job SELECT unnest('{{{}}}'::int4[])",
            scheduled.iter().map(i32::to_string).collect::<Vec<_>>().join(",")
        ))
        .await
        .context(|| doing("jobs"))
}

/// Part of the deciding transaction: the jobs that ran on the source run from now on. Nothing where there are none.
///
/// # Errors
/// Whatever the target says.
pub async fn wake_jobs(target: &Client) -> Result<String> {
    let exists = "SELECT pg_catalog.to_regclass('walferry.timescaledb_job') IS NOT NULL";
    if !target.query_typed_one(exists, &[]).await?.get::<_, bool>(0) {
        return Ok(String::new());
    }
    let Some(extension) = source::extension(target).await? else { return Ok(String::new()) };
    Ok(format!(
        "SELECT {}(j.id, scheduled => true{}) \
         FROM walferry.timescaledb_job j JOIN _timescaledb_catalog.bgw_job b ON b.id = j.id ORDER BY j.id;",
        sql::qualified(&extension.schema, "alter_job"),
        with_timezone(target, "pg_catalog.to_jsonb(b)->>'timezone'").await?
    ))
}

/// The argument of `alter_job` for the time zone of a job's schedule: a call that does not give it takes it away. Nothing where the
/// function does not have it.
pub(super) async fn with_timezone(target: &Client, value: &str) -> Result<String> {
    let has =
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc WHERE proname = 'alter_job' AND 'timezone' = ANY (proargnames))";
    let has: bool = target.query_typed_one(has, &[]).await.context(|| "looking at alter_job".into())?.get(0);
    Ok(if has { format!(", timezone => {value}") } else { String::new() })
}
