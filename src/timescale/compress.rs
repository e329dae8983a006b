//! Chunks of the target that are compressed while the migration runs, so that it needs no more room than it will keep.
//!
//! A chunk is compressed when it is old enough, when nobody writes to it, and when no part of the copy that is left has rows of its
//! time. The last is told from the first pages of each such part, so it may be wrong for rows that came late: those are written into
//! the compressed chunk then, which is slower and as right, and the chunk is compressed again. What is compressed is in TimescaleDB's
//! own catalog, so whatever dies here, the next look goes on.
//!
//! **Compression is not MVCC-safe**: it empties the chunk by a truncation, and a snapshot from before it sees neither the rows there nor
//! those that are compressed. So whoever reads the target under a snapshot holds a lock (`HOLD_COMPRESSION`), and nothing is
//! compressed meanwhile.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::copying::{head_query, span_text};
use super::declaration::{Hypertable, Span};
use super::recreate;
use super::recreate::compression::Work;
use super::restore::{self, of};
use crate::connection::ConnectionSpec;
use crate::error::{Context, Error, Result};
use crate::source::catalog::Table;
use crate::sql;
use crate::target::ledger::{self, LedgerTable};
use crate::target::warm::make_way;

/// How often it is looked for chunks that could be compressed.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long others who need the same connections may have to wait.
const TURN_MAX: Duration = Duration::from_secs(60);
/// A chunk that somebody waited for is left alone for so long.
const REST: Duration = Duration::from_secs(60);
/// How our statements begin, by which [`crate::target::warm::stop`] finds them.
pub(crate) const COMPRESSING: &str = "/* compressing */";
/// What is said by who reads hypertables of the target under a snapshot, before it is taken; it holds until the session ends. A
/// compression that is under way makes way.
pub(crate) const HOLD_COMPRESSION: &str = "SELECT pg_catalog.pg_advisory_lock_shared(8601870912342781808)";
const TRY_TO_BEGIN: &str = "SELECT pg_catalog.pg_try_advisory_lock(8601870912342781808)";
const END: &str = "SELECT pg_catalog.pg_advisory_unlock(8601870912342781808)";
/// Nobody waits behind us for long, and what is said of the ratio of a small chunk is of no use.
const SETTINGS: &str = "SET lock_timeout = '300ms'; SET client_min_messages = error";

/// Who keeps the chunks of a migration's hypertables compressed.
pub struct Compressor {
    /// Where the parts that are left are read from.
    pub source: ConnectionSpec,
    /// Where the chunks are.
    pub target: ConnectionSpec,
    /// What our sessions call themselves.
    pub application_name: String,
    /// The hypertables.
    pub declared: Vec<Hypertable>,
    /// The source's hypertables are made again: what is compressed there is compressed here.
    pub as_on_source: bool,
    /// Whoever has it uses the connections that others need too.
    pub turn: Arc<Mutex<()>>,
}

impl Compressor {
    /// Compresses what can be, until it is dropped. There is nothing to do where nothing is declared to be compressed.
    pub async fn run(self) -> Infallible {
        let mut memory = Memory::default();
        loop {
            if !self.as_on_source && !self.declared.iter().any(|hypertable| after(hypertable).is_some()) {
                return std::future::pending().await;
            }
            let in_turn = self.turn.lock().await;
            if let Err(error) = self.look(&mut memory).await {
                tracing::debug!(%error, "compressing chunks waits");
            }
            drop(in_turn);
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn look(&self, memory: &mut Memory) -> Result<()> {
        let begun = Instant::now();
        let session = self.target.connect(&self.application_name).await?;
        let Some(extension) = restore::extension(&session).await? else { return Ok(()) };
        session.batch_execute(SETTINGS).await?;
        let mut watch = None;
        if self.as_on_source {
            return self.look_at_source(&session, &extension, memory, begun).await;
        }
        for entry in ledger::tables(&session).await? {
            let Some(hypertable) = of(&entry.table, &self.declared) else { continue };
            let Some(limit) = self.limit(&session, &entry, hypertable, memory).await? else { continue };
            for chunk in candidates(&session, hypertable, &limit).await? {
                if memory.rests.get(&chunk).is_some_and(|since| since.elapsed() < REST) {
                    continue;
                }
                if begun.elapsed() > TURN_MAX {
                    return Ok(());
                }
                let watch = match &mut watch {
                    Some(watch) => &*watch,
                    none => &*none.insert(self.target.connect(&self.application_name).await?),
                };
                match compress(&session, watch, &extension, &chunk).await? {
                    Compressed::Done | Compressed::Locked => {}
                    Compressed::MadeWay => drop(memory.rests.insert(chunk, Instant::now())),
                    Compressed::Held => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// The same where the source says which.
    async fn look_at_source(
        &self,
        session: &Client,
        extension: &str,
        memory: &mut Memory,
        begun: Instant,
    ) -> Result<()> {
        let source = self.source.connect(&self.application_name).await?;
        let candidates = recreate::compression::candidates(&source, session).await?;
        drop(source);
        if candidates.is_empty() {
            return Ok(());
        }
        let watch = self.target.connect(&self.application_name).await?;
        for (chunk, work) in candidates {
            if memory.rests.get(&chunk).is_some_and(|since| since.elapsed() < REST) {
                continue;
            }
            if begun.elapsed() > TURN_MAX {
                return Ok(());
            }
            let statement = match work {
                Work::Compress => statement(extension, &chunk),
                Work::Decompress => format!("{COMPRESSING} {}", recreate::compression::decompress(extension, &chunk)),
            };
            match run(session, &watch, &statement, &chunk).await? {
                Compressed::Done | Compressed::Locked => {}
                Compressed::MadeWay => drop(memory.rests.insert(chunk, Instant::now())),
                Compressed::Held => return Ok(()),
            }
        }
        Ok(())
    }

    /// What a chunk has to end before, besides its age, as a condition; `None` where none may be compressed yet.
    async fn limit(
        &self,
        target: &Client,
        entry: &LedgerTable,
        hypertable: &Hypertable,
        memory: &mut Memory,
    ) -> Result<Option<String>> {
        if after(hypertable).is_none() {
            return Ok(None);
        }
        if entry.copied {
            return Ok(Some("true".to_owned()));
        }
        let left = target
            .query_typed(
                &format!(
                    "SELECT first_page, end_page FROM walferry.part WHERE relid = {} AND NOT copied ORDER BY part",
                    entry.table.relid
                ),
                &[],
            )
            .await
            .context(|| "reading which parts are left".into())?;
        let left: Vec<(i64, Option<i64>)> = left.iter().map(|row| (row.get(0), row.get(1))).collect();
        if left.is_empty() || (left.len() == 1 && left[0] == (0, None)) {
            // Not begun, or all in one: it is compressed when it is there.
            return Ok(None);
        }
        let mut least: Option<String> = None;
        for part in left {
            let Some(head) = self.head(&entry.table, hypertable, part, memory).await? else { return Ok(None) };
            let literal = bound(hypertable, &head);
            least = Some(least.map_or(literal.clone(), |least| format!("least({least}, {literal})")));
        }
        let end = end_of_chunk(hypertable);
        Ok(least.map(|least| format!("{end} <= {least}")))
    }

    /// The least time in some pages of a part that is left, as text; `None` where nothing can be said.
    async fn head(
        &self,
        table: &Table,
        hypertable: &Hypertable,
        (first, end): (i64, Option<i64>),
        memory: &mut Memory,
    ) -> Result<Option<String>> {
        let key = (table.relid, first);
        if let Some(known) = memory.heads.get(&key) {
            return Ok(known.clone());
        }
        let length = (end.unwrap_or(table.pages) - first).max(1);
        let pages: Vec<i64> = (0..4).map(|quarter| first + length * quarter / 4).collect();
        let source = self.source.connect(&self.application_name).await?;
        let row = source
            .query_typed_one(&head_query(table, &hypertable.time, &pages), &[])
            .await
            .context(|| format!("reading how old the rows of {} are", table.qualified()))?;
        let (time, are_known): (Option<String>, Option<bool>) = (row.get(0), row.get(1));
        let head = time.filter(|_| are_known == Some(true));
        memory.heads.insert(key, head.clone());
        Ok(head)
    }
}

/// What is not asked again.
#[derive(Default)]
struct Memory {
    /// How old the rows are of a part that is left, by table and first page.
    heads: HashMap<(u32, i64), Option<String>>,
    /// Chunks that are left alone, and since when.
    rests: HashMap<String, Instant>,
}

/// Compresses again, before a cutover, what live changes have left partly uncompressed; as much as there is time for. What is left is
/// done by the policy afterwards.
///
/// # Errors
/// Whatever the server says.
pub async fn recompress(target: &Client, declared: &[Hypertable], limit: Duration) -> Result<()> {
    if !declared.iter().any(|hypertable| after(hypertable).is_some()) {
        return Ok(());
    }
    let begun = Instant::now();
    let Some(extension) = restore::extension(target).await? else { return Ok(()) };
    if !target.query_typed_one(TRY_TO_BEGIN, &[]).await?.get::<_, bool>(0) {
        return Ok(());
    }
    target.batch_execute(SETTINGS).await?;
    let mut outcome: Result<()> = Ok(());
    'all: for hypertable in declared.iter().filter(|hypertable| after(hypertable).is_some()) {
        for chunk in candidates(target, hypertable, "c.status & 1 = 1").await? {
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break 'all;
            }
            let milliseconds = left.as_millis();
            let statement = format!(
                "BEGIN; SET LOCAL statement_timeout = {milliseconds}; {}; COMMIT",
                statement(&extension, &chunk)
            );
            if let Err(error) = target.batch_execute(&statement).await {
                if target.is_closed() {
                    outcome = Err(error.into());
                    break 'all;
                }
                target.batch_execute("ROLLBACK").await?;
                tracing::debug!(%error, chunk, "not compressed again before the cutover");
            }
        }
    }
    outcome?;
    target.batch_execute(&format!("{END}; RESET lock_timeout; RESET client_min_messages")).await.map_err(Error::from)
}

fn after(hypertable: &Hypertable) -> Option<&Span> {
    hypertable.compression.as_ref()?.after.as_ref()
}

/// Chunks that are old enough, not compressed or only in part, and that nobody writes to; the oldest first.
async fn candidates(target: &Client, hypertable: &Hypertable, limit: &str) -> Result<Vec<String>> {
    let Some(after) = after(hypertable) else { return Ok(Vec::new()) };
    let now = match &hypertable.integer_now {
        Some((schema, name)) => format!("{}()::int8", sql::qualified(schema, name)),
        None => "now()".to_owned(),
    };
    // Of the status: 1 compressed, 2 not in order, 4 frozen, 8 partly compressed.
    let rows = target
        .query_typed(
            &format!(
                "SELECT c.name FROM ( \
                   SELECT pg_catalog.format('%I.%I', v.chunk_schema, v.chunk_name) AS name, k.status, v.range_end, v.range_end_integer \
                   FROM timescaledb_information.chunks v JOIN _timescaledb_catalog.chunk k \
                     ON (k.schema_name, k.table_name) = (v.chunk_schema, v.chunk_name) \
                   WHERE v.hypertable_schema = {} AND v.hypertable_name = {} \
                     AND (k.status & 1 = 0 OR k.status & 10 <> 0) AND k.status & 4 = 0) c \
                 WHERE {} <= {now} - {} AND {limit} \
                   AND NOT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.relation = c.name::regclass AND l.mode = 'RowExclusiveLock' \
                                   AND l.pid <> pg_catalog.pg_backend_pid()) \
                 ORDER BY c.range_end, c.range_end_integer",
                sql::literal(&hypertable.schema),
                sql::literal(&hypertable.name),
                end_of_chunk(hypertable),
                span_text(after)
            ),
            &[],
        )
        .await
        .context(|| format!("looking for chunks of {} to compress", hypertable.qualified()))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

fn end_of_chunk(hypertable: &Hypertable) -> &'static str {
    match hypertable.chunk_interval {
        Span::Integer(_) => "c.range_end_integer",
        Span::Interval(_) => "c.range_end",
    }
}

/// A time of the source as a value to compare the end of a chunk with. Our sessions are in UTC, as TimescaleDB takes times without a
/// zone to be.
fn bound(hypertable: &Hypertable, text: &str) -> String {
    let of = if matches!(hypertable.chunk_interval, Span::Integer(_)) { "int8" } else { "timestamptz" };
    format!("{}::{of}", sql::literal(text))
}

fn statement(extension: &str, chunk: &str) -> String {
    let function = sql::qualified(extension, "compress_chunk");
    format!("{COMPRESSING} SELECT {function}({}::regclass, if_not_compressed => true)", sql::literal(chunk))
}

/// What became of a chunk.
enum Compressed {
    Done,
    /// Somebody uses it.
    Locked,
    /// Somebody waited for it.
    MadeWay,
    /// Somebody reads the target under a snapshot.
    Held,
}

async fn compress(session: &Client, watch: &Client, extension: &str, chunk: &str) -> Result<Compressed> {
    run(session, watch, &statement(extension, chunk), chunk).await
}

async fn run(session: &Client, watch: &Client, statement: &str, chunk: &str) -> Result<Compressed> {
    let pid: i32 = session.query_typed_one("SELECT pg_catalog.pg_backend_pid()", &[]).await?.get(0);
    if !session.query_typed_one(TRY_TO_BEGIN, &[]).await?.get::<_, bool>(0) {
        return Ok(Compressed::Held);
    }
    let outcome = tokio::select! {
        outcome = session.batch_execute(statement) => outcome,
        error = make_way(watch, pid) => return Err(error),
    };
    if !session.is_closed() {
        session.batch_execute(END).await?;
    }
    match outcome {
        Ok(()) => Ok(Compressed::Done),
        Err(error) if session.is_closed() => Err(error.into()),
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(Compressed::Locked),
        Err(error) => {
            tracing::debug!(%error, chunk, "not compressed now");
            Ok(Compressed::MadeWay)
        }
    }
}
