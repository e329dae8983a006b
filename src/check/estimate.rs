//! How long the copy would take, from a short trial of it: real rows, read and written as the copy does it.
//!
//! ```text
//!   stream 1 ─┐  source: BEGIN READ ONLY; LOCK … ACCESS SHARE NOWAIT; COPY (a few pages of a large table) TO STDOUT; COMMIT
//!   stream 2 ─┴►                                        │ bytes, again and again, pages from all over the tables
//!                target: BEGIN; CREATE SCHEMA; CREATE TABLE; COPY … FROM STDIN …; CREATE INDEX on the key …; ROLLBACK
//! ```
//!
//! Nothing of it stays: what the trial makes on the target it makes in a transaction of its own that never commits. What that
//! costs the target is a transaction number for each stream, WAL, and room for the rows until the end. A temporary table would cost less
//! and prove less: it writes no WAL.
//!
//! The rate of two streams is measured and not extrapolated to more. The rate is by share of a table's pages, so that rows that COPY
//! sends larger or smaller than they are stored count right. Types that the empty target does not know yet are
//! stored as the bytes that come (`bytea`), or as `text`.
//!
//! Care for the source: no lock is waited for, and each is held for one piece, half a second at most by plan. Timeouts of the
//! server end the statements of a trial whose process has gone.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use serde::Serialize;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::report::{Finding, Severity, Side, first_ten, size};
use crate::connection::wire::RawSession;
use crate::connection::{self, ConnectionSpec};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::format;
use crate::source::catalog::{Column, Table};
use crate::sql;

/// Streams at once, at most: enough to see that two share a server, and little for the source to bear.
const STREAMS: usize = 2;
/// Tables that are tried, at most: the largest.
const TABLES: usize = 8;
/// Below this many bytes of tables one stream is enough: it reads them all.
const ONE_STREAM_BELOW_BYTES: i64 = 8 << 20;
/// A table is tried in at most so many places.
const PLACES: i64 = 64;
/// The first piece of a table, in its bytes with TOAST, and the least there is between two places.
const FIRST_PIECE_BYTES: i64 = 1 << 20;
/// How long a piece is to take, at most.
const PIECE_SECONDS: f64 = 0.5;
/// A piece takes at most so many times the pages of the one before.
const GROWTH: i64 = 4;
/// The share of the time that is the copy's; the indexes have the rest.
const COPY_SHARE: f64 = 0.7;
/// How much longer than it was given the trial may take, by its own clock, and how much longer by the server's.
const GRACE: Duration = Duration::from_secs(1);
const SERVER_GRACE: Duration = Duration::from_secs(2);
/// The rows come in messages, one each; they are sent on in chunks of this size, as the copy does.
const CHUNK_BYTES: usize = 128 * 1024;
/// OIDs from here on are given to what users make ("System Catalog Initial Data" in the manual).
const FIRST_USER_OID: u32 = 16_384;
const APPLICATION_NAME: &str = "walferry check";

/// How long the copy is expected to take, and how that is known.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The whole copy, without indexes.
    pub seconds: f64,
    /// What there is to copy: tables that have pages, with TOAST, without indexes.
    pub bytes: i64,
    /// What `seconds` comes from: these bytes over that time. None where there is nothing to copy.
    pub bytes_per_second: Option<f64>,
    /// Building the indexes, as far as it is not done beside the copy. None where no index was tried.
    pub index_seconds: Option<f64>,
    /// Size of all indexes on the source.
    pub index_bytes: i64,
    /// How long rows were copied in the trial.
    pub measured_seconds: f64,
    /// Streams that copied at the same time.
    pub streams: usize,
    /// Whether the rows were written to the target too, and not only read.
    pub written: bool,
    /// Whether the trial copied all there is.
    pub complete: bool,
    /// The tables that were tried, largest first.
    pub tables: Vec<TriedTable>,
}

/// A table in the trial.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TriedTable {
    /// `"schema"."name"`.
    pub table: String,
    /// Its size with TOAST, without indexes.
    pub bytes: i64,
    /// How much of that was copied, by share of its pages.
    pub measured_bytes: i64,
    /// The time of all streams for that.
    pub measured_seconds: f64,
    /// Why it was left out, or given up half way.
    pub left_out: Option<String>,
}

/// What to try.
pub(super) struct Trial<'a> {
    pub(super) source: &'a ConnectionSpec,
    /// None where the target is not to be had.
    pub(super) target: Option<&'a ConnectionSpec>,
    /// All that is copied, largest first.
    pub(super) tables: &'a [Table],
    /// Size of all indexes, where it could be read.
    pub(super) index_bytes: Option<i64>,
    pub(super) copy_jobs: usize,
    pub(super) index_jobs: usize,
    /// How many more connections each server lets us open.
    pub(super) free_connections: i64,
    /// How long the trial may take.
    pub(super) limit: Duration,
}

/// Size of all indexes of the tables; none when somebody holds a lock on one of them.
pub(super) async fn index_bytes(client: &Client, tables: &[Table]) -> Option<i64> {
    let relids: Vec<u32> = tables.iter().map(|table| table.relid).collect();
    client.batch_execute("BEGIN; SET LOCAL lock_timeout = '100ms'").await.ok()?;
    let answer = client
        .query_one(
            "SELECT coalesce(sum(pg_relation_size(indexrelid)), 0)::int8 FROM pg_index WHERE indrelid = ANY($1)",
            &[&relids],
        )
        .await;
    client.batch_execute("ROLLBACK").await.ok()?;
    answer.ok().map(|row| row.get(0))
}

/// Tries a copy. That it cannot be tried is a finding too, and no error.
pub(super) async fn run(trial: &Trial<'_>) -> (Option<Estimate>, Finding) {
    let bytes = trial.tables.iter().filter(|table| table.pages > 0).map(|table| table.bytes).sum();
    let progress = Mutex::new(Progress::new(trial));
    if bytes == 0 {
        let estimate = lock(&progress).estimate(trial, bytes, true);
        let message = "There are no rows to copy, so the copy takes no longer than the tables' schema.";
        return (estimate, finding("no rows".into(), message.into()));
    }
    let refused = attempt(trial, &progress, bytes).await.err();
    let progress = lock(&progress);
    let written = refused.is_none() && trial.target.is_some();
    let estimate = progress.estimate(trial, bytes, written);
    let why_not_written = refused.or_else(|| trial.target.is_none().then(|| "the target cannot be used".to_owned()));
    let message = match &estimate {
        Some(estimate) => progress.message(estimate, trial, why_not_written.as_deref()),
        None => {
            let reasons = progress.reasons();
            let reasons = if reasons.is_empty() { "no piece of it ended in time".to_owned() } else { reasons };
            format!("The copy could not be tried, so that nothing is known of its time: {reasons}.")
        }
    };
    let tried: Vec<String> = progress.samples.iter().map(|sample| sample.table.qualified()).collect();
    (estimate, finding(first_ten(&tried), message))
}

fn finding(object: String, message: String) -> Finding {
    Finding::new(Severity::Info, Side::Source, "copy-time", object, message)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Copies for a while, and builds indexes. The error says why the target was not written to.
async fn attempt(trial: &Trial<'_>, progress: &Mutex<Progress<'_>>, bytes: i64) -> std::result::Result<(), String> {
    let begun = Instant::now();
    let until = begun + trial.limit;
    let wanted = if bytes < ONE_STREAM_BELOW_BYTES { 1 } else { STREAMS };
    let allowed = usize::try_from(trial.free_connections).unwrap_or(0);
    let mut refused = None;
    // What is dropped here half way, its server takes back: when the connection ends, and at the latest by its own timeout.
    let outcome = tokio::time::timeout_at(until + GRACE, async {
        let mut streams = Vec::new();
        for _ in 0..wanted.min(trial.copy_jobs).min(allowed) {
            streams.push(Stream::open(trial, until, refused.is_none()).await?);
            if let Some(why) = streams.iter_mut().find_map(|stream| stream.refused.take()) {
                refused = Some(why);
            }
        }
        if streams.is_empty() {
            return Err(Error::new(ErrorKind::Other, "the servers let us open no more connections"));
        }
        if refused.is_some() {
            streams.iter_mut().for_each(|stream| stream.target = None);
        }
        // From here: what it took to connect is none of the copy's time.
        let copy_until = Instant::now() + until.saturating_duration_since(Instant::now()).mul_f64(COPY_SHARE);
        let clock = Clock { copy_until, until, piece_seconds: PIECE_SECONDS.min(trial.limit.as_secs_f64() / 10.0) };
        let mut running: Vec<_> = streams
            .into_iter()
            .enumerate()
            .map(|(number, stream)| stream.run(trial, progress, number, clock))
            .collect();
        match (running.pop(), running.pop()) {
            (Some(one), Some(other)) => drop(tokio::join!(one, other)),
            (Some(one), None) => one.await,
            _ => {}
        }
        Ok(())
    })
    .await;
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => lock(progress).note(error.to_string()),
        Err(_) => lock(progress).note("it was ended when its time was over".into()),
    }
    refused.map_or(Ok(()), Err)
}

/// When what ends.
#[derive(Clone, Copy)]
struct Clock {
    copy_until: Instant,
    until: Instant,
    piece_seconds: f64,
}

/// A table that is tried.
struct Sample<'a> {
    table: &'a Table,
    /// Places from which pieces are taken: how many there are (a power of two), and how many were taken.
    places: i64,
    taken: i64,
    /// Pages of the next piece.
    piece_pages: i64,
    pages_done: i64,
    rows: u64,
    seconds: f64,
    in_flight: usize,
    left_out: Option<String>,
}

/// A range of pages.
#[derive(Clone, Copy)]
struct Piece {
    sample: usize,
    first_page: i64,
    end_page: i64,
}

/// An index of the trial.
struct Built {
    bytes: i64,
    /// For as many rows as the whole table has: sorting n rows takes n log n.
    seconds: f64,
}

struct Progress<'a> {
    samples: Vec<Sample<'a>>,
    first: Option<Instant>,
    last: Option<Instant>,
    /// Whether a stream has copied anything.
    streams: [bool; STREAMS],
    indexes: Vec<Built>,
    notes: Vec<String>,
}

impl<'a> Progress<'a> {
    fn new(trial: &Trial<'a>) -> Progress<'a> {
        let tried = trial.tables.iter().filter(|table| table.pages > 0 && !table.columns.is_empty()).take(TABLES);
        let samples = tried.map(Sample::new).collect();
        Progress { samples, first: None, last: None, streams: [false; STREAMS], indexes: Vec::new(), notes: Vec::new() }
    }

    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// What a stream copies next: of the table that has had the least time for its size.
    fn next(&mut self, clock: &Clock) -> Option<Piece> {
        let left = clock.copy_until.saturating_duration_since(Instant::now()).as_secs_f64();
        if left == 0.0 {
            return None;
        }
        let had = |sample: &Sample<'_>| {
            (sample.seconds + sample.in_flight as f64 * clock.piece_seconds) / sample.table.bytes.max(1) as f64
        };
        let open = |sample: &Sample<'_>| sample.taken < sample.places && sample.left_out.is_none();
        let (at, _) = self
            .samples
            .iter()
            .enumerate()
            .filter(|(_, sample)| open(sample))
            .min_by(|(_, one), (_, other)| had(one).total_cmp(&had(other)))?;
        Some(self.samples[at].take(at, left))
    }

    /// The result, if anything was measured, or nothing is to be copied.
    fn estimate(&self, trial: &Trial<'_>, bytes: i64, written: bool) -> Option<Estimate> {
        let mut tables = Vec::new();
        let (mut measured, mut spent, mut known, mut known_seconds) = (0.0, 0.0, 0, 0.0);
        for sample in &self.samples {
            let share = sample.pages_done as f64 / sample.table.pages as f64;
            let done = sample.table.bytes as f64 * share;
            if sample.pages_done > 0 {
                known += sample.table.bytes;
                known_seconds += sample.seconds / share;
            }
            measured += done;
            spent += sample.seconds;
            tables.push(TriedTable {
                table: sample.table.qualified(),
                bytes: sample.table.bytes,
                measured_bytes: done.round() as i64,
                measured_seconds: sample.seconds,
                left_out: sample.left_out.clone(),
            });
        }
        if bytes > 0 && measured == 0.0 {
            return None;
        }
        let streams = self.streams.iter().filter(|copied| **copied).count();
        // Tables that were not tried go at the rate of those that were.
        let rest = if measured > 0.0 { (bytes - known) as f64 * spent / measured } else { 0.0 };
        let seconds = (known_seconds + rest) / streams.max(1) as f64;
        let index_bytes = trial.index_bytes.unwrap_or(0);
        let (built, took) = self
            .indexes
            .iter()
            .fold((0, 0.0), |(bytes, seconds), index| (bytes + index.bytes, seconds + index.seconds));
        let at_once = streams.min(trial.index_jobs).max(1) as f64;
        let index_seconds = match (trial.index_bytes, built) {
            (Some(0), _) => Some(0.0),
            (Some(all), 1..) => Some(all as f64 * took / built as f64 / at_once),
            _ => None,
        };
        let with_pages = trial.tables.iter().filter(|table| table.pages > 0).count();
        let complete = with_pages == self.samples.len()
            && self.samples.iter().all(|sample| sample.pages_done == sample.table.pages);
        Some(Estimate {
            seconds,
            bytes,
            bytes_per_second: (bytes > 0).then(|| bytes as f64 / seconds.max(f64::MIN_POSITIVE)),
            index_seconds,
            index_bytes,
            measured_seconds: self.first.zip(self.last).map_or(0.0, |(first, last)| (last - first).as_secs_f64()),
            streams,
            written,
            complete,
            tables,
        })
    }

    /// The result in a few sentences.
    fn message(&self, estimate: &Estimate, trial: &Trial<'_>, why_not_written: Option<&str>) -> String {
        let names = |tried: &mut dyn Iterator<Item = &TriedTable>| {
            first_ten(&tried.map(|table| table.table.clone()).collect::<Vec<_>>())
        };
        let measured = names(&mut estimate.tables.iter().filter(|table| table.measured_bytes > 0));
        let streams = if estimate.streams == 1 { "1 stream".into() } else { format!("{} streams", estimate.streams) };
        let rate = format::size_rate(estimate.bytes_per_second.unwrap_or_default());
        let mut message = match why_not_written {
            None => format!("The copy takes about {}", about(estimate.seconds)),
            Some(_) => format!("The reading alone takes about {}", about(estimate.seconds)),
        };
        message.push_str(&format!(
            ": {} at {rate}, measured for {} with {streams} of {measured}",
            size(estimate.bytes),
            format::duration(estimate.measured_seconds),
        ));
        if estimate.complete {
            message.push_str(", which is all there is, so that what a large table would take is not seen");
        }
        match estimate.index_seconds {
            Some(0.0) => message.push_str("; there are no indexes."),
            Some(seconds) => message.push_str(&format!(
                "; indexes ({}) about {} more, by the keys of the same rows. They begin as soon as a table is copied.",
                size(estimate.index_bytes),
                about(seconds)
            )),
            None if why_not_written.is_some() => message.push('.'),
            None => message.push_str("; indexes were not tried."),
        }
        if let Some(why) = why_not_written {
            message.push_str(&format!(" Writing was not tried, and may be slower: {why}."));
        }
        if trial.copy_jobs > estimate.streams && !estimate.complete {
            message.push_str(&format!(
                " With {} copy jobs it may be faster; that was not tried and is not counted on.",
                trial.copy_jobs
            ));
        }
        let reasons = self.reasons();
        if !reasons.is_empty() {
            message.push_str(&format!(" Not all was tried: {reasons}."));
        }
        message
    }

    /// What was in the way.
    fn reasons(&self) -> String {
        let tables = self.samples.iter().filter_map(|sample| {
            sample.left_out.as_ref().map(|reason| format!("{}: {reason}", sample.table.qualified()))
        });
        tables.chain(self.notes.iter().cloned()).collect::<Vec<_>>().join("; ")
    }
}

/// A time that nobody should take for exact.
fn about(seconds: f64) -> String {
    match seconds {
        ..1.0 => "a second".to_owned(),
        ..90.0 => format!("{seconds:.0} s"),
        ..5400.0 => format!("{:.0} min", seconds / 60.0),
        _ => {
            let minutes = (seconds / 60.0).round();
            format!("{:.0} h {:02.0} min", (minutes / 60.0).floor(), minutes % 60.0)
        }
    }
}

impl<'a> Sample<'a> {
    fn new(table: &'a Table) -> Sample<'a> {
        // Bytes of a page with what is TOASTed from it.
        let page_bytes = (table.bytes / table.pages).max(1);
        let piece_pages = (FIRST_PIECE_BYTES / page_bytes).max(1);
        // No place of a small table is larger than a piece, so that all of it is read.
        let places =
            ((table.pages + piece_pages - 1) / piece_pages).clamp(1, PLACES).cast_unsigned().next_power_of_two();
        Sample {
            table,
            places: places.cast_signed(),
            taken: 0,
            piece_pages,
            pages_done: 0,
            rows: 0,
            seconds: 0.0,
            in_flight: 0,
            left_out: None,
        }
    }

    /// The next piece, of no more than what can be done in the time that is left.
    fn take(&mut self, sample: usize, seconds_left: f64) -> Piece {
        // An odd step visits each place of a power of two once; with this one the first few are far apart.
        let place = self.taken * ((self.places * 5 / 8) | 1) % self.places;
        self.taken += 1;
        self.in_flight += 1;
        let (first_page, end_page) =
            (place * self.table.pages / self.places, (place + 1) * self.table.pages / self.places);
        let mut pages = self.piece_pages;
        if self.pages_done > 0 {
            let fits = self.pages_done as f64 / self.seconds.max(1e-6) * seconds_left;
            pages = pages.min(fits as i64).max(1);
        }
        Piece { sample, first_page, end_page: end_page.min(first_page + pages) }
    }

    fn done(&mut self, piece: Piece, rows: u64, seconds: f64, piece_seconds: f64) {
        let pages = piece.end_page - piece.first_page;
        self.in_flight -= 1;
        self.pages_done += pages;
        self.rows += rows;
        self.seconds += seconds;
        let fits = (pages as f64 * piece_seconds / seconds.max(1e-6)) as i64;
        self.piece_pages = fits.clamp(1, self.piece_pages.saturating_mul(GROWTH));
    }
}

/// A session on the source, and one in a transaction on the target.
struct Stream {
    source: RawSession,
    target: Option<Target>,
    /// Why there is no target.
    refused: Option<String>,
}

struct Target {
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
    async fn open(trial: &Trial<'_>, until: Instant, write: bool) -> Result<Stream> {
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

    async fn run(mut self, trial: &Trial<'_>, progress: &Mutex<Progress<'_>>, number: usize, clock: Clock) {
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
        let rows = match &mut self.target {
            Some(target) => target.take(&mut self.source, piece.sample, table).await,
            None => read(&mut self.source).await,
        };
        let rows = rows.map_err(Failed::Broken)?;
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
            let bytes: i64 = self.client.query_one(&measure, &[]).await?.get(0);
            let deeper = whole.max(2.0).ln() / (rows as f64).max(2.0).ln();
            lock(progress).indexes.push(Built { bytes, seconds: seconds * deeper.max(1.0) });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::server::{ServerPrograms, ThrowawayServer};
    use crate::source::catalog::{self, ReplicaIdentity};

    fn table(name: &str, pages: i64, bytes: i64) -> Table {
        let column = Column {
            name: "id".into(),
            number: 1,
            type_oid: 20,
            type_name: "bigint".into(),
            type_modifier: -1,
            not_null: true,
            identity_always: false,
            binary_safe: true,
            byte_equal: true,
            equality_schema: Some("pg_catalog".into()),
        };
        Table {
            relid: 1,
            schema: "public".into(),
            name: name.into(),
            unlogged: false,
            is_partition: false,
            identity: ReplicaIdentity::Default,
            columns: vec![column],
            key: vec![0],
            has_other_unique: false,
            pages,
            bytes,
            estimated_rows: -1.0,
            updates_and_deletes: 0,
            relfilenode: None,
        }
    }

    fn trial<'a>(spec: &'a ConnectionSpec, tables: &'a [Table]) -> Trial<'a> {
        Trial {
            source: spec,
            target: Some(spec),
            tables,
            index_bytes: Some(4 << 20),
            copy_jobs: 4,
            index_jobs: 2,
            free_connections: 10,
            limit: Duration::from_secs(5),
        }
    }

    fn spec() -> ConnectionSpec {
        ConnectionSpec::parse("host=127.0.0.1 user=app dbname=shop").unwrap()
    }

    #[test]
    fn every_page_of_a_small_table_is_read_once_and_a_large_one_is_read_all_over() {
        for pages in [1, 2, 3, 127, 128, 129, 1000, 8191] {
            let table = table("t", pages, pages * 8192);
            let mut sample = Sample::new(&table);
            let mut seen = vec![0; pages as usize];
            while sample.taken < sample.places {
                let piece = sample.take(0, 1.0);
                (piece.first_page..piece.end_page).for_each(|page| seen[page as usize] += 1);
            }
            assert_eq!(seen, vec![1; pages as usize]);
        }
        let table = table("t", 1 << 20, 8 << 30);
        let mut sample = Sample::new(&table);
        let firsts: Vec<i64> = (0..64).map(|_| sample.take(0, 1.0).first_page).collect();
        let mut sorted = firsts.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 64, "{firsts:?}");
        assert!(firsts[1].abs_diff(firsts[0]) > 1 << 18, "{firsts:?}");
    }

    #[test]
    fn a_piece_takes_no_longer_than_it_may_by_the_rate_of_those_before() {
        let table = table("t", 1 << 20, 8 << 30);
        let mut sample = Sample::new(&table);
        let piece = sample.take(0, 5.0);
        assert_eq!(piece.end_page - piece.first_page, 128);
        // 128 pages in 10 ms: half a second would hold 6400, but it grows by four.
        sample.done(piece, 1, 0.01, 0.5);
        let piece = sample.take(0, 5.0);
        assert_eq!(piece.end_page - piece.first_page, 512);
        sample.done(piece, 1, 5.12, 0.5);
        let piece = sample.take(0, 5.0);
        assert_eq!(piece.end_page - piece.first_page, 50);
        sample.done(piece, 1, 0.5, 0.5);
        let piece = sample.take(0, 0.01);
        assert_eq!(piece.end_page - piece.first_page, 1, "only what fits into the time that is left");
    }

    #[test]
    fn what_was_not_tried_goes_at_the_rate_of_what_was_and_streams_share_the_work() {
        let (spec, mut tables) = (spec(), vec![table("large", 1000, 8_000_000), table("slow", 100, 1_000_000)]);
        tables.extend((0..7).map(|_| table("small", 10, 100_000)));
        let trial = trial(&spec, &tables);
        let mut progress = Progress::new(&trial);
        assert_eq!(progress.samples.len(), TABLES);
        let whole = |sample, pages| Piece { sample, first_page: 0, end_page: pages };
        progress.samples[0].in_flight = 1;
        progress.samples[0].done(whole(0, 100), 10, 1.0, 0.5);
        progress.samples[1].in_flight = 1;
        progress.samples[1].done(whole(1, 50), 10, 3.0, 0.5);
        progress.streams = [true, true];
        progress.indexes.push(Built { bytes: 1 << 20, seconds: 0.5 });
        let estimate = progress.estimate(&trial, 9_700_000, true).unwrap();
        // 10 s and 6 s for the two; 1.3 MB in 4 s for the other 0.7 MB; by two streams.
        let seconds = (10.0 + 6.0 + 700_000.0 * 4.0 / 1_300_000.0) / 2.0;
        assert!((estimate.seconds - seconds).abs() < 1e-6, "{estimate:?}");
        assert!((estimate.bytes_per_second.unwrap() - 9_700_000.0 / seconds).abs() < 1e-3);
        assert!((estimate.index_seconds.unwrap() - 1.0).abs() < 1e-9, "4 MiB of indexes, 2 at once");
        assert_eq!((estimate.complete, estimate.streams, estimate.tables[0].measured_bytes), (false, 2, 800_000));
        let message = progress.message(&estimate, &trial, None);
        assert!(message.starts_with("The copy takes about 9 s: 9.3 MiB at "), "{message}");
        assert!(message.contains("with 2 streams of \"public\".\"large\", \"public\".\"slow\"; indexes"), "{message}");
        assert!(message.contains("With 4 copy jobs it may be faster; that was not tried"), "{message}");
        let message = progress.message(&estimate, &trial, Some("it is full"));
        assert!(message.starts_with("The reading alone takes about 9 s"), "{message}");
    }

    #[test]
    fn times_are_said_as_roughly_as_they_are_known() {
        let texts = [0.2, 42.4, 720.0, 5399.0, 90_000.0].map(about);
        assert_eq!(texts, ["a second", "42 s", "12 min", "90 min", "25 h 00 min"]);
    }

    #[tokio::test]
    async fn h09_a_table_that_somebody_has_locked_is_left_out_and_nobody_waits_for_the_trial() {
        let programs = ServerPrograms::find(None).unwrap();
        let server = ThrowawayServer::start(&programs, "estimate", &[("autovacuum", "off")]).await.unwrap();
        let client = server.connect("postgres").await.unwrap();
        let make = "CREATE TABLE public.locked (id bigint PRIMARY KEY, text text); \
                    CREATE TABLE public.free (id bigint PRIMARY KEY); \
                    INSERT INTO public.locked SELECT n, repeat('x', 500) FROM generate_series(1, 30000) n; \
                    INSERT INTO public.free SELECT generate_series(1, 1000)";
        client.batch_execute(make).await.unwrap();
        let tables = catalog::tables(&client).await.unwrap();
        assert_eq!(tables[0].name, "locked");
        client.batch_execute("BEGIN; LOCK TABLE public.locked IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let text = format!("host=127.0.0.1 port={} user=postgres dbname=postgres sslmode=disable", server.port());
        let spec = ConnectionSpec::parse(&text).unwrap();
        let (estimate, finding) = run(&trial(&spec, &tables)).await;
        let estimate = estimate.unwrap();
        assert!(estimate.tables[0].left_out.as_ref().unwrap().contains("could not obtain lock"), "{finding:?}");
        assert_eq!((estimate.tables[0].measured_bytes, estimate.complete), (0, false));
        assert_eq!((estimate.tables[1].measured_bytes, &estimate.tables[1].left_out), (tables[1].bytes, &None));
        assert!(finding.message.contains("Not all was tried: \"public\".\"locked\""), "{finding:?}");
    }
}
