//! Changes of compressed rows that no stream shows: found before the fence by counting, and impossible from then on.
//!
//! A session that has `timescaledb.enable_compressed_direct_batch_delete` on deletes whole compressed rows, and one that has
//! `enable_direct_compress_copy` or `_insert` on writes them, past the chunk whose changes are published. Only the rows themselves tell:
//! both servers have as many. To count them takes as long as there are rows, so it is not done while applications wait:
//!
//! ```text
//!  ── guard ── older writers end ── common point P ── counted on both sides at P ── fence ── guard is still there ──► decision
//!                    │◄──────────── whatever changes is in the stream ─────────────────►│
//! ```
//!
//! **Invariant:** from the commit of a hypertable's guard on, for as long as the very same triggers are there, no session can delete
//! or write its compressed rows directly. They are row triggers of the hypertable itself that fire for no row (`WHEN (false)`). Whatever
//! its settings, the extension (from 2.28 on) deletes nothing directly where the hypertable has a row trigger for DELETE,
//! disabled or not, also by the name of a chunk; it writes nothing directly by INSERT where there is any trigger, by COPY where there are
//! two. Who writes by way of the hypertable holds a lock there that the making of the guard waits for; who began earlier by the name
//! of a chunk is waited out after it. So what was changed unseen was changed before P, and is counted at P; and what is
//! changed behind P comes in the stream. Not proof are statistics, the greatest `xmin`, sizes, and maps of visibility: none has to show a
//! deletion, and none shows a deletion and an insertion.
//!
//! What it does not hold back, and what nobody does by accident: writes to the relations inside of compression by their names, and
//! INSERT into a chunk by its name with direct compression on.
//!
//! Where a guard cannot be made (an older version, a lock that nobody yields, a right that is missing) or is gone, the rows of its
//! hypertable are counted behind the fence, as long as that takes ([`super::settle`]).
//!
//! How it dies: the guard stays. It changes nothing that anybody sees; the next cutover uses it, and `walferry clean` removes it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::try_join;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::live;
use super::recreate::places::Places;
use super::recreate::recompute;
use super::source::{self, Chunk, Hypertable};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::snapshot::{import_statement, not_imported};
use crate::sql;
use crate::target::ledger;
use crate::verify::point::PointTaker;

/// From this version on, what the extension does is decided by the triggers of the hypertable; before, by a chunk's where its name is used.
const PROVEN: (u32, u32) = (2, 28);

/// Two, since COPY heeds no single one.
const TRIGGERS: [&str; 2] = ["!walferry_seen_1", "!walferry_seen_2"];
const EXISTS: &str = "SELECT pg_catalog.to_regprocedure('walferry.seen()') IS NOT NULL";

/// How often it is tried to make or to remove a guard, each time with a short wait for its lock (H32).
const ATTEMPTS: u32 = 20;
const LOCK_TIMEOUT: &str = "lock_timeout=300ms";
const REST: Duration = Duration::from_millis(250);
/// How many points are taken until no chunk is rewritten while it is counted.
const POINTS: u32 = 5;
/// How many chunks are locked at once (H10).
const CHUNKS_AT_ONCE: usize = 100;

/// The hypertables that had as many rows on both sides, and the triggers that have guarded each since before.
#[derive(Debug, Default)]
pub struct Counted(BTreeMap<i32, BTreeSet<u32>>);

impl Counted {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those whose guard is still the same. Nothing of them can have changed unseen.
    ///
    /// # Errors
    /// Whatever the source says.
    pub(super) async fn guarded(&self, source: &Client) -> Result<BTreeSet<i32>> {
        let there: BTreeSet<u32> = triggers(source).await?.into_values().flatten().collect();
        let stands = |(id, triggers): (&i32, &BTreeSet<u32>)| triggers.is_subset(&there).then_some(*id);
        Ok(self.0.iter().filter_map(stands).collect())
    }
}

/// Guards the source's hypertables, and counts their rows at a common point.
///
/// # Errors
/// `Different` naming a hypertable that has not as many rows on both sides; else whatever the servers or `points` say.
pub async fn count(points: &PointTaker, application_name: &str) -> Result<Counted> {
    let source = points.source.connect(application_name).await?;
    let is_proven = |of: &source::Extension| of.number() >= PROVEN;
    if !source::extension(&source).await?.as_ref().is_some_and(is_proven) {
        return Ok(Counted::default());
    }
    let Some(database) = source::read(&source).await? else { return Ok(Counted::default()) };
    let compressed: BTreeSet<i32> =
        database.chunks.iter().filter(|of| of.compressed.is_some()).map(|of| of.hypertable).collect();
    let mut guarded = BTreeMap::new();
    for hypertable in database.hypertables.iter().filter(|of| of.compression || compressed.contains(&of.id)) {
        match guard(&source, (&points.source, application_name), hypertable).await {
            Ok(triggers) => drop(guarded.insert(hypertable.id, triggers)),
            Err(error) if source.is_closed() => return Err(error),
            Err(error) => {
                tracing::info!(hypertable = hypertable.qualified(), %error, "its rows are counted behind the fence");
            }
        }
    }
    older_writers_have_ended(&source).await?;
    for _ in 0..POINTS {
        if guarded.is_empty() {
            break;
        }
        let mut held = points.take(&|why| tracing::info!(why, "counting the rows of hypertables")).await?;
        let (here, there) = (held.point.source_snapshot.clone(), held.point.target_snapshot.clone());
        let sides = [(&points.source, here), (&points.target, there)];
        let outcome = tokio::select! {
            error = held.keep() => return Err(error),
            outcome = are_equal(sides, application_name, &guarded) => outcome,
        };
        match outcome {
            Ok(true) => return Ok(Counted(guarded)),
            Ok(false) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    // Compressed anew all the time.
    Ok(Counted::default())
}

/// A chunk, or the relation of its compressed rows, that a snapshot shows and that is not there.
fn is_gone(error: &Error) -> bool {
    matches!(error.sqlstate(), Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME))
}

/// Makes the guard of a hypertable where it is not there; answers its triggers.
async fn guard(source: &Client, session: (&ConnectionSpec, &str), hypertable: &Hypertable) -> Result<BTreeSet<u32>> {
    let there = triggers(source).await?.remove(&hypertable.relid).unwrap_or_default();
    if there.len() == TRIGGERS.len() {
        return Ok(there);
    }
    if !source.query_typed_one(EXISTS, &[]).await?.get::<_, bool>(0) {
        // A new chunk gets the triggers by the hand of the hypertable's owner, who must find the function.
        source
            .batch_execute(
                "BEGIN; CREATE SCHEMA IF NOT EXISTS walferry; GRANT USAGE ON SCHEMA walferry TO PUBLIC; \
                 CREATE OR REPLACE FUNCTION walferry.seen() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; \
                 GRANT EXECUTE ON FUNCTION walferry.seen() TO PUBLIC; COMMIT",
            )
            .await
            .context(|| "making the function of the guard".into())?;
    }
    for name in TRIGGERS {
        let exists = "SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = $1 AND tgname = $2)";
        let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
            [(&hypertable.relid, Type::OID), (&name, Type::TEXT)];
        if source.query_typed_one(exists, &parameters).await?.get::<_, bool>(0) {
            continue;
        }
        let statement = format!(
            "CREATE TRIGGER {} AFTER DELETE ON {} FOR EACH ROW WHEN (false) EXECUTE FUNCTION walferry.seen()",
            sql::identifier(name),
            hypertable.qualified()
        );
        past_the_extension(session, &statement).await?;
    }
    let made = triggers(source).await?.remove(&hypertable.relid).unwrap_or_default();
    if made.len() == TRIGGERS.len() {
        return Ok(made);
    }
    let text = format!("the guard of {} was removed while it was made", hypertable.qualified());
    Err(Error::new(ErrorKind::Blocked, text))
}

/// The guards' triggers by their tables; their functions say whose they are.
async fn triggers(source: &Client) -> Result<BTreeMap<u32, BTreeSet<u32>>> {
    let rows = source
        .query_typed(
            "SELECT tgrelid, oid FROM pg_catalog.pg_trigger WHERE tgfoid = pg_catalog.to_regprocedure('walferry.seen()')",
            &[],
        )
        .await
        .context(|| "looking for the guards of hypertables".into())?;
    let mut triggers: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for row in rows {
        triggers.entry(row.get(0)).or_default().insert(row.get(1));
    }
    Ok(triggers)
}

/// Runs a statement in a session of its own, to which the hypertable is an ordinary table: the extension would make a trigger on
/// each of its chunks, and lock them all. It is loaded by the first statement that changes the catalog, and so has no part in that one.
async fn past_the_extension((spec, application_name): (&ConnectionSpec, &str), statement: &str) -> Result<()> {
    let spec = spec.with_setting("timescaledb.disable_load=on").with_setting(LOCK_TIMEOUT);
    for attempt in 1.. {
        let session = spec.connect(application_name).await?;
        match session.batch_execute(statement).await {
            Err(error)
                if attempt < ATTEMPTS
                    && matches!(
                        error.code(),
                        Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED)
                    ) => {}
            outcome => return outcome.context(|| statement.to_owned()),
        }
        tokio::time::sleep(REST).await;
    }
    Ok(())
}

/// Waits for the transactions that write to any relation now: those that write to a chunk by its name may have begun before the guard.
async fn older_writers_have_ended(source: &Client) -> Result<()> {
    let doing = || "waiting for the transactions that write to the source".to_owned();
    let writing = "SELECT DISTINCT virtualtransaction FROM pg_catalog.pg_locks WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' \
                   AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()) \
                   AND relation IN (SELECT c.oid FROM _timescaledb_catalog.chunk k JOIN pg_catalog.pg_class c ON c.relname = k.table_name)";
    let rows = source.query_typed(writing, &[]).await.context(doing)?;
    let writers: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let left = "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks WHERE virtualtransaction = ANY ($1))";
    while source.query_typed_one(left, &[(&writers, Type::TEXT_ARRAY)]).await.context(doing)?.get::<_, bool>(0) {
        tokio::time::sleep(REST).await;
    }
    Ok(())
}

/// Whether all rows could be counted under the snapshots of one point: then there are as many on both sides.
///
/// Of the source's chunks those that the ledger knows: of any other nothing has come, or it is going to be copied as it is now. What the
/// source has dropped may still be on the target.
async fn are_equal(
    [(source, here), (target, there)]: [(&ConnectionSpec, String); 2],
    application_name: &str,
    guarded: &BTreeMap<i32, BTreeSet<u32>>,
) -> Result<bool> {
    let (source, target) = try_join(source.connect(application_name), target.connect(application_name)).await?;
    try_join(under(&source, &here), under(&target, &there)).await?;
    let (of_source, of_target, known, recomputed) = tokio::try_join!(
        source::read(&source),
        source::read(&target),
        ledger::tables(&target),
        recompute::recorded(&target)
    )?;
    try_join(end(&source), end(&target)).await?;
    let (Some(of_source), Some(of_target)) = (of_source, of_target) else { return Ok(false) };
    // The target may have other ids, where everything was made again.
    let places = Places::of(&of_source, &of_target);
    let known: BTreeSet<u32> = known.iter().map(|entry| entry.table.relid).collect();
    let living: Vec<&Chunk> = of_source.chunks.iter().filter(|chunk| known.contains(&chunk.relid)).collect();
    let on_target: Vec<Chunk> = living.iter().filter_map(|chunk| places.chunk(chunk)).collect();
    let (there_are, _) = live::by_range(&of_target.chunks, &on_target.iter().collect::<Vec<_>>());
    let is_in_question =
        |of: &&Hypertable| guarded.contains_key(&of.id) && !recomputed.iter().any(|one| one.hypertable == of.id);
    for hypertable in of_source.hypertables.iter().filter(is_in_question) {
        let of_it = |chunks: &[&Chunk], id: i32| -> Vec<Chunk> {
            chunks.iter().filter(|chunk| chunk.hypertable == id).map(|chunk| (*chunk).clone()).collect()
        };
        let (living, there_are) = (of_it(&living, hypertable.id), of_it(&there_are, places.hypertable(hypertable)?.id));
        let counts = try_join(rows_under(&source, &here, &living), rows_under(&target, &there, &there_are));
        match counts.await? {
            (Some(here), Some(there)) if here == there => {}
            (Some(here), Some(there)) => return Err(different(hypertable, here, there)),
            _ => return Ok(false),
        }
    }
    Ok(true)
}

async fn under(client: &Client, snapshot: &str) -> Result<()> {
    client.batch_execute(&import_statement(snapshot)).await.map_err(|error| not_imported(error.into()))
}

async fn end(client: &Client) -> Result<()> {
    Ok(client.batch_execute("ROLLBACK").await?)
}

/// The rows of chunks under a snapshot; `None` where it does not show all of them any more (H4).
async fn rows_under(client: &Client, snapshot: &str, chunks: &[Chunk]) -> Result<Option<i64>> {
    let mut sum = 0;
    for chunks in chunks.chunks(CHUNKS_AT_ONCE) {
        under(client, snapshot).await?;
        let rows = locked_rows(client, chunks).await;
        end(client).await?;
        match rows? {
            Some(rows) => sum += rows,
            None => return Ok(None),
        }
    }
    Ok(Some(sum))
}

/// From their locks on, the chunks' files stay as they are.
async fn locked_rows(client: &Client, chunks: &[Chunk]) -> Result<Option<i64>> {
    let relations: Vec<(u32, String)> = chunks
        .iter()
        .flat_map(|chunk| {
            let compressed = chunk.compressed.as_ref().map(|compressed| (compressed.relid, compressed.qualified()));
            std::iter::once((chunk.relid, chunk.qualified())).chain(compressed)
        })
        .collect();
    let names: Vec<&str> = relations.iter().map(|(_, name)| name.as_str()).collect();
    let lock = format!("LOCK TABLE ONLY {} IN ACCESS SHARE MODE", names.join(", ONLY "));
    client.batch_execute(&lock).await.context(|| "locking chunks to count their rows".into())?;
    let values: Vec<String> =
        relations.iter().map(|(relid, name)| format!("({relid}::oid, {})", sql::literal(name))).collect();
    let is_shown = format!(
        "SELECT pg_catalog.count(*) FROM (VALUES {}) r(relid, name) JOIN pg_catalog.pg_class c ON c.oid = r.relid \
         WHERE pg_catalog.to_regclass(r.name) = c.oid AND c.relfilenode = pg_catalog.pg_relation_filenode(c.oid)",
        values.join(", ")
    );
    let shown: i64 =
        client.query_typed_one(&is_shown, &[]).await.context(|| "looking at the files of chunks".into())?.get(0);
    if usize::try_from(shown) != Ok(relations.len()) {
        return Ok(None);
    }
    rows(client, chunks).await.map(Some)
}

/// The rows of chunks, without decompressing any: each compressed row says how many it stands for.
pub(super) async fn rows(client: &Client, chunks: &[Chunk]) -> Result<i64> {
    let mut counts = Vec::new();
    for chunk in chunks {
        counts.push(format!("SELECT pg_catalog.count(*)::int8 AS n FROM ONLY {}", chunk.qualified()));
        if let Some(compressed) = &chunk.compressed {
            counts.push(format!(
                "SELECT coalesce(pg_catalog.sum(_ts_meta_count), 0)::int8 AS n FROM ONLY {}",
                compressed.qualified()
            ));
        }
    }
    let mut sum = 0;
    // Each of them is locked: not too many at once (H10).
    for counts in counts.chunks(2 * CHUNKS_AT_ONCE) {
        let query = format!("SELECT coalesce(pg_catalog.sum(n), 0)::int8 FROM ({}) counts", counts.join(" UNION ALL "));
        let row = client.query_typed_one(&query, &[]).await.context(|| "counting the rows of chunks".into())?;
        sum += row.get::<_, i64>(0);
    }
    Ok(sum)
}

/// That a hypertable has not as many rows on both sides.
pub(super) fn different(hypertable: &Hypertable, here: i64, there: i64) -> Error {
    let text =
        format!("the hypertable {} has {here} rows on the source and {there} on the target", hypertable.qualified());
    Error::new(ErrorKind::Different, text).hint(format!(
        "A session that began before the migration, or set timescaledb.enable_compressed_direct_batch_delete (or \
         enable_direct_compress_copy, enable_direct_compress_insert) itself, has changed whole segments of compressed rows, which no stream \
         shows. End those sessions; then `walferry repair --tables {}.{}`, and cut over again.",
        hypertable.schema, hypertable.name
    ))
}

/// Removes the guards, for `clean`; the schema too, where nothing else is in it. Answers whether there was one.
///
/// # Errors
/// Whatever the server says.
pub async fn remove(server: &ConnectionSpec, client: &Client, application_name: &str) -> Result<bool> {
    if !client
        .query_typed_one(EXISTS, &[])
        .await
        .context(|| "looking for the guards of hypertables".into())?
        .get::<_, bool>(0)
    {
        return Ok(false);
    }
    past_the_extension((server, application_name), "DROP FUNCTION walferry.seen() CASCADE").await?;
    client
        .batch_execute(
            "DO $clean$ BEGIN DROP SCHEMA walferry; EXCEPTION WHEN dependent_objects_still_exist THEN NULL; END $clean$",
        )
        .await
        .context(|| "removing the guards of hypertables".into())?;
    Ok(true)
}
