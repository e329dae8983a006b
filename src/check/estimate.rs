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

mod sampling;
mod stream;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tokio_postgres::Client;

use self::sampling::{Clock, Progress};
use self::stream::Stream;
use super::report::{Finding, Severity, Side, first_ten};
use crate::connection::ConnectionSpec;
use crate::error::{Error, ErrorKind};
use crate::source::catalog::Table;

/// Streams at once, at most: enough to see that two share a server, and little for the source to bear.
const STREAMS: usize = 2;
/// Below this many bytes of tables one stream is enough: it reads them all.
const ONE_STREAM_BELOW_BYTES: i64 = 8 << 20;
/// How long a piece is to take, at most.
const PIECE_SECONDS: f64 = 0.5;
/// The share of the time that is the copy's; the indexes have the rest.
const COPY_SHARE: f64 = 0.7;
/// How much longer than it was given the trial may take by our own clock.
const GRACE: Duration = Duration::from_secs(1);

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
    /// Size of all indexes on the source; 0 where somebody held a lock on one of them.
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
    /// The target's `wal_level` is `minimal`: what a transaction writes to a table of its own then goes past the WAL.
    pub(super) no_wal: bool,
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
    let why_not_written = refused
        .or_else(|| trial.target.is_none().then(|| "the target cannot be used, as another finding says".to_owned()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::server::{ServerPrograms, ThrowawayServer};
    use crate::source::catalog;

    pub(super) fn trial<'a>(spec: &'a ConnectionSpec, tables: &'a [Table]) -> Trial<'a> {
        Trial {
            source: spec,
            target: Some(spec),
            tables,
            index_bytes: Some(4 << 20),
            copy_jobs: 4,
            index_jobs: 2,
            free_connections: 10,
            no_wal: false,
            limit: Duration::from_secs(600),
        }
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

        let (estimate, finding) = run(&Trial { limit: Duration::from_nanos(1), ..trial(&spec, &tables) }).await;
        assert!(estimate.is_none() && finding.message.starts_with("The copy could not be tried"), "{finding:?}");
        let (estimate, finding) = run(&Trial { free_connections: 0, ..trial(&spec, &tables) }).await;
        assert!(estimate.is_none() && finding.message.contains("no more connections"), "{finding:?}");
        // One that takes connections and never says a word: nothing but our own clock ends this.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let text = format!("host=127.0.0.1 port={} user=app dbname=shop", silent.local_addr().unwrap().port());
        let silent = ConnectionSpec::parse(&text).unwrap();
        let short = Trial { target: Some(&silent), limit: Duration::from_millis(1), ..trial(&spec, &tables) };
        let (estimate, finding) = run(&short).await;
        assert!(estimate.is_none() && finding.message.contains("ended when its time was over"), "{finding:?}");
    }
}
