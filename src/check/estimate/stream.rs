//! The two sessions of a stream: what is read on the source, and the transaction on the target that is never committed.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Mutex;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::sampling::{Built, Clock, Piece, Progress};
use super::{Trial, lock};
use crate::connection::wire::RawSession;
use crate::connection::{self, ConnectionSpec};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::source::catalog::{Column, Table};
use crate::sql;

/// How much longer than it was given the trial may take by the server's clock, for when ours has gone.
const SERVER_GRACE: Duration = Duration::from_secs(2);
/// How long a piece may hold its lock on the source, whatever the target does; by plan it takes a quarter of that.
const PIECE_MAX: Duration = Duration::from_secs(2);
/// The rows come in messages, one each; they are sent on in chunks of this size, as the copy does.
const CHUNK_BYTES: usize = 128 * 1024;
/// OIDs from here on are given to what users make ("System Catalog Initial Data" in the manual).
const FIRST_USER_OID: u32 = 16_384;
const APPLICATION_NAME: &str = "walferry check";

/// A session on the source, and one in a transaction on the target.
pub(super) struct Stream {
    source: RawSession,
    pub(super) target: Option<Target>,
    /// Why there is no target.
    pub(super) refused: Option<String>,
}

pub(super) struct Target {
    client: Client,
    schema: String,
    /// By position in the samples: the trial's tables, with the rows that are in them.
    tables: BTreeMap<usize, u64>,
}

/// Why a piece was not copied.
enum Failed {
    /// Before a row came: the session is as good as before.
    Refused(Error),
    /// In the middle of something.
    Broken(Error),
}

impl Stream {
    pub(super) async fn open(trial: &Trial<'_>, until: Instant, write: bool) -> Result<Stream> {
        let source = open_source(trial.source, until).await.context(|| "connecting to the source".into())?;
        let (target, refused) = match trial.target.filter(|_| write) {
            None => (None, None),
            Some(spec) => match Target::open(spec, until).await {
                Ok(target) => (Some(target), None),
                Err(error) => (None, Some(error.to_string())),
            },
        };
        Ok(Stream { source, target, refused })
    }

    pub(super) async fn run(mut self, trial: &Trial<'_>, progress: &Mutex<Progress<'_>>, number: usize, clock: Clock) {
        if let Err(error) = self.copy(trial, progress, number, &clock).await {
            lock(progress).note(error.to_string());
            return;
        }
        let Some(target) = self.target else { return };
        if let Err(error) = target.build_indexes(progress, &clock).await {
            lock(progress).note(format!("indexes: {error}"));
        }
        // Otherwise the server does it when we have gone; so that nothing is there any more when the check has ended.
        if let Err(error) = target.client.batch_execute("ROLLBACK").await {
            tracing::debug!(%error, "the session of the trial ended with its transaction");
        }
    }

    async fn copy(
        &mut self,
        trial: &Trial<'_>,
        progress: &Mutex<Progress<'_>>,
        number: usize,
        clock: &Clock,
    ) -> Result<()> {
        loop {
            // On its own line, so that the lock is not held while the piece is copied.
            let next = lock(progress).next(clock);
            let Some(piece) = next else { return Ok(()) };
            let table = lock(progress).samples[piece.sample].table;
            let outcome = self.copy_piece(progress, table, piece, clock, number).await;
            let error = match outcome {
                Ok(()) => continue,
                Err(Failed::Refused(error)) => {
                    self.source.simple_query("ROLLBACK").await?;
                    error
                }
                Err(Failed::Broken(error)) => {
                    let written = self.target.is_some();
                    *self = Stream::open(trial, clock.until, written).await?;
                    if let Some(refused) = self.refused.take() {
                        return Err(Error::new(ErrorKind::Other, refused));
                    }
                    error
                }
            };
            let mut progress = lock(progress);
            let sample = &mut progress.samples[piece.sample];
            sample.in_flight -= 1;
            sample.left_out = Some(error.to_string());
        }
    }

    async fn copy_piece(
        &mut self,
        progress: &Mutex<Progress<'_>>,
        table: &Table,
        piece: Piece,
        clock: &Clock,
        number: usize,
    ) -> std::result::Result<(), Failed> {
        if let Some(target) = &mut self.target {
            target.create(piece.sample, table).await.map_err(Failed::Broken)?;
        }
        let begun = Instant::now();
        self.source.copy_out(&copy_out_statement(table, piece)).await.map_err(Failed::Refused)?;
        let copied = async {
            match &mut self.target {
                Some(target) => target.take(&mut self.source, piece.sample, table).await,
                None => read(&mut self.source).await,
            }
        };
        let too_long = || {
            let text = format!("{} took too long for a trial, which holds a lock", table.qualified());
            Failed::Broken(Error::new(ErrorKind::Transient, text))
        };
        let rows = tokio::time::timeout(PIECE_MAX, copied).await.map_err(|_| too_long())?.map_err(Failed::Broken)?;
        let ended = Instant::now();
        let mut progress = lock(progress);
        progress.streams[number] = true;
        progress.first.get_or_insert(begun);
        progress.last = Some(ended);
        progress.samples[piece.sample].done(piece, rows, (ended - begun).as_secs_f64(), clock.piece_seconds);
        Ok(())
    }
}

async fn open_source(spec: &ConnectionSpec, until: Instant) -> Result<RawSession> {
    let mut source = RawSession::connect(spec, APPLICATION_NAME).await?;
    let limits = format!("{}; SET default_transaction_read_only = on", limits(until));
    source.simple_query(&limits).await?;
    Ok(source)
}

/// The server's own clock over the trial.
fn limits(until: Instant) -> String {
    let left = (until + SERVER_GRACE).saturating_duration_since(Instant::now()).as_millis().max(1);
    format!(
        "SET lock_timeout = '100ms'; SET statement_timeout = {left}; SET idle_in_transaction_session_timeout = {left}"
    )
}

/// One message, so that the lock is held no longer than the rows take.
fn copy_out_statement(table: &Table, piece: Piece) -> String {
    let name = table.qualified();
    format!(
        "BEGIN READ ONLY; LOCK TABLE ONLY {name} IN ACCESS SHARE MODE NOWAIT; \
         COPY (SELECT {} FROM ONLY {name} WHERE ctid >= '({},0)'::tid AND ctid < '({},0)'::tid) TO STDOUT (FORMAT {}); COMMIT",
        table.column_list(),
        piece.first_page,
        piece.end_page,
        format_of(table)
    )
}

fn format_of(table: &Table) -> &'static str {
    if table.binary_safe() { "binary" } else { "text" }
}

/// Reads a COPY to its end.
async fn read(source: &mut RawSession) -> Result<u64> {
    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES * 2);
    let mut rows = 0;
    loop {
        let (messages, more) = source.copied(&mut chunk, CHUNK_BYTES).await?;
        chunk.clear();
        rows += messages;
        if !more {
            return Ok(rows);
        }
    }
}

impl Target {
    async fn open(spec: &ConnectionSpec, until: Instant) -> Result<Target> {
        let client = spec.connect(APPLICATION_NAME).await?;
        let schema = connection::first_row(&client, "SELECT pg_backend_pid()").await?.into_iter().next().flatten();
        let schema = sql::identifier(&format!("walferry_trial_{}", schema.unwrap_or_default()));
        // As the copy does it, where it may.
        let begin = format!(
            "{}; SET client_min_messages = error; BEGIN; SET LOCAL synchronous_commit = off; \
             SELECT set_config('session_replication_role', 'replica', true) \
             WHERE has_parameter_privilege('session_replication_role', 'SET'); CREATE SCHEMA {schema}",
            limits(until)
        );
        client.batch_execute(&begin).await.context(|| "making room for the trial on the target".into())?;
        Ok(Target { client, schema, tables: BTreeMap::new() })
    }

    fn name(&self, sample: usize) -> String {
        format!("{}.t{sample}", self.schema)
    }

    async fn create(&mut self, sample: usize, table: &Table) -> Result<()> {
        if self.tables.contains_key(&sample) {
            return Ok(());
        }
        let known = |column: &Column| match column.type_oid {
            ..FIRST_USER_OID => column.type_name.clone(),
            _ if table.binary_safe() => "bytea".to_owned(),
            _ => "text".to_owned(),
        };
        let columns: Vec<String> =
            table.columns.iter().map(|column| format!("{} {}", sql::identifier(&column.name), known(column))).collect();
        self.client
            .batch_execute(&format!("CREATE TABLE {} ({})", self.name(sample), columns.join(", ")))
            .await
            .context(|| "making the trial's table on the target".into())?;
        self.tables.insert(sample, 0);
        Ok(())
    }

    /// Takes what a COPY on the source gives; answers the number of rows.
    async fn take(&mut self, source: &mut RawSession, sample: usize, table: &Table) -> Result<u64> {
        let statement = format!("COPY {} FROM STDIN (FORMAT {})", self.name(sample), format_of(table));
        let mut sink = pin!(self.client.copy_in::<_, Bytes>(&statement).await?);
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES * 2);
        loop {
            let (_, more) = source.copied(&mut chunk, CHUNK_BYTES).await?;
            if !chunk.is_empty() {
                sink.feed(chunk.split().freeze()).await?;
                chunk.reserve(CHUNK_BYTES * 2);
            }
            if !more {
                break;
            }
        }
        let rows = sink.as_mut().finish().await?;
        *self.tables.entry(sample).or_default() += rows;
        Ok(rows)
    }

    /// Builds an index on the key of each table, while there is time.
    async fn build_indexes(&self, progress: &Mutex<Progress<'_>>, clock: &Clock) -> Result<()> {
        for (&sample, &rows) in &self.tables {
            let (table, whole) = {
                let progress = lock(progress);
                let sample = &progress.samples[sample];
                let share = sample.pages_done as f64 / sample.table.pages as f64;
                (sample.table, sample.rows as f64 / share.max(f64::MIN_POSITIVE))
            };
            if rows == 0 || table.key.is_empty() || Instant::now() >= clock.until {
                continue;
            }
            let key = sql::identifiers(table.key_columns().map(|column| column.name.as_str()));
            let begun = Instant::now();
            // Not unique: a row that was updated between two pieces is here twice.
            self.client.batch_execute(&format!("CREATE INDEX trial_{sample} ON {} ({key})", self.name(sample))).await?;
            let seconds = begun.elapsed().as_secs_f64();
            let measure = format!("SELECT pg_relation_size('{}.trial_{sample}'::regclass)", self.schema);
            let bytes: i64 = self.client.query_typed_one(&measure, &[]).await?.get(0);
            let deeper = whole.max(2.0).ln() / (rows as f64).max(2.0).ln();
            lock(progress).indexes.push(Built { bytes, seconds: seconds * deeper.max(1.0) });
        }
        Ok(())
    }
}
