//! A cutover without touching anything: what stands against it, and how long writers would have to wait.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_postgres::Client;

use super::ready::{Finding, Weight};
use super::{Cutover, FenceMode, Options, Sessions, pgbouncer, sequences, unique};
use crate::apply::Applied;
use crate::error::{Error, ErrorKind, Result};
use crate::observe::wall_clock;
use crate::target::ledger;

/// How many markers are sent; the median counts.
const MARKERS: usize = 3;
/// How long ending the others' sessions takes, of which there is no telling before: one look more after a pause.
const ENDING_SESSIONS_MS: f64 = 10.0;

/// What a rehearsal found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rehearsal {
    /// The version of this object's form.
    pub version: u32,
    /// Whether a cutover would begin now.
    pub ready: bool,
    /// How writers would be held.
    pub fence: FenceMode,
    /// Everything that was looked at.
    pub preconditions: Vec<Finding>,
    /// Tables that would be locked; 0 where the fence locks none.
    pub tables_to_lock: usize,
    /// Sequences that would be set.
    pub sequences: usize,
    /// What was measured, and what comes of it; null where it could not be.
    pub estimate: Option<Measured>,
    /// How the estimate is made, and what is not in it.
    pub estimated_from: String,
}

/// What was measured, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// When: RFC 3339, UTC.
    pub at: String,
    /// How long writers would wait.
    pub downtime_ms: f64,
    /// A marker, from the source through the queue until the target has committed it.
    pub marker_ms: f64,
    /// The last look at catalog and constraints.
    pub last_look_ms: f64,
    /// A statement that does nothing, on the source.
    pub source_round_trip_ms: f64,
    /// The same on the target.
    pub target_round_trip_ms: f64,
    /// A synchronous commit on the target.
    pub target_commit_ms: f64,
}

impl Measured {
    /// Measures what a cutover waits for.
    ///
    /// # Errors
    /// Whatever the servers say, or `Other` when the apply has ended.
    pub(crate) async fn take(
        source: &Client,
        target: &Client,
        applied: &watch::Receiver<Applied>,
        last_look: Duration,
    ) -> Result<Measured> {
        let source_round_trip_ms = timed(source.query_typed_one("SELECT 1", &[])).await?;
        let target_round_trip_ms = timed(target.query_typed_one("SELECT 1", &[])).await?;
        let target_commit_ms = timed(ledger::make_durable(target)).await?;
        let mut markers = Vec::with_capacity(MARKERS);
        for _ in 0..MARKERS {
            markers.push(timed(super::send_and_await_marker(source, applied)).await?);
        }
        markers.sort_by(f64::total_cmp);
        let mut measured = Measured {
            at: wall_clock::now_rfc3339(),
            downtime_ms: 0.0,
            marker_ms: markers[markers.len() / 2],
            last_look_ms: milliseconds(last_look),
            source_round_trip_ms,
            target_round_trip_ms,
            target_commit_ms,
        };
        measured.downtime_ms = measured.sum();
        Ok(measured)
    }

    /// Step by step, as `Cutover::switch` waits: what goes side by side counts as the longest of it.
    fn sum(&self) -> f64 {
        let fence = self.source_round_trip_ms;
        let drain = self.marker_ms;
        let close = 3.0 * self.source_round_trip_ms + ENDING_SESSIONS_MS;
        let sequences = self.source_round_trip_ms + self.target_round_trip_ms;
        let settle = self.marker_ms.max(self.last_look_ms).max(sequences);
        let switch = self.source_round_trip_ms + self.target_commit_ms;
        let release = 2.0 * self.source_round_trip_ms;
        fence + drain + close + settle + switch + release
    }
}

async fn timed<T, E: Into<Error>>(work: impl Future<Output = Result<T, E>>) -> Result<f64> {
    let began = Instant::now();
    work.await.map_err(Into::into)?;
    Ok(milliseconds(began.elapsed()))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

impl Cutover<'_> {
    /// Looks at everything that a cutover would, and touches nothing but the WAL, in which markers are sent, and our ledger.
    ///
    /// # Errors
    /// `Aborted` when a server cannot be asked, or it takes longer than the options' timeout.
    pub async fn rehearse(&self, options: &Options) -> Result<Rehearsal> {
        let limit = super::options::limit(options.timeout_seconds);
        let late = |_| Error::new(ErrorKind::Aborted, "the rehearsal took longer than --timeout");
        let rehearsed = tokio::time::timeout(limit, self.rehearse_without_limit(options)).await.map_err(late)?;
        rehearsed.map_err(|error| error.with_kind(ErrorKind::Aborted))
    }

    async fn rehearse_without_limit(&self, options: &Options) -> Result<Rehearsal> {
        let sessions = Sessions::open(self, options).await?;
        let mut preconditions = self.preconditions(&sessions, options).await?;
        let tables = self.tables_by_name();
        if let Some(pooler) = &options.pgbouncer {
            let look = pgbouncer::Known::look(pooler, self.source).await.map(drop);
            // What cannot be reached is what an operator wants to hear of here.
            let look = look.map_err(|error| error.with_kind(ErrorKind::Blocked));
            preconditions.push(Finding::of("pgbouncer", "its admin console answers and knows the database", look)?);
        }
        let began = Instant::now();
        let ((), constraints) = tokio::try_join!(
            async {
                let selection = self.scope.select(&sessions.inspector).await?;
                crate::source::catalog::fingerprint_of(&sessions.inspector, selection.as_ref()).await.map(drop)
            },
            async { Ok(unique::hold(&sessions.checker, &tables).await) }
        )?;
        let last_look = began.elapsed();
        preconditions.push(Finding::of("constraints", "the target's deferrable constraints hold", constraints)?);
        let decision = self.try_decision(&sessions, &tables).await.map(drop).map_err(|error| match error.kind() {
            ErrorKind::Aborted => error.with_kind(ErrorKind::Blocked),
            _ => error,
        });
        preconditions.push(Finding::of("decision", "what the decision makes fits the target", decision)?);
        let sequences = sequences::list(&sessions.source, &sessions.target, self.scope, 0).await?.count();
        let patience = super::options::limit(options.max_write_stall_seconds);
        let measured = Measured::take(&sessions.source, &sessions.target, &self.applied, last_look);
        let estimate = match tokio::time::timeout(patience, measured).await {
            Ok(measured) => Some(measured?),
            Err(_) => None,
        };
        preconditions.push(match &estimate {
            Some(measured) => {
                let text = format!("source, queue and apply pass it on in {:.0} ms", measured.marker_ms);
                Finding { name: "marker".into(), weight: Weight::Ok, text, hint: None }
            }
            None => Finding {
                name: "marker".into(),
                weight: Weight::Blocks,
                text: "a marker did not come through source, queue and apply within --max-write-stall".into(),
                hint: Some("`walferry status` shows the lag, and whether the apply is paused.".into()),
            },
        });
        let insert_only =
            self.tables.iter().filter(|(table, insert_only)| *insert_only && table.chunk.is_none()).count();
        let mut estimated_from = "a marker through source, queue and apply (the median of three), round trips to both servers, a commit \
             on the target and a look at catalog and constraints, added up as the steps wait for them. Not in it: waiting for \
             transactions that hold locks when the fence comes, commands of yours, PgBouncer's pause"
            .to_owned();
        if insert_only > 0 {
            estimated_from.push_str(&format!(
                "; and comparing the {insert_only} tables without a replica identity row by row, which can take longest"
            ));
        }
        Ok(Rehearsal {
            version: 1,
            ready: preconditions.iter().all(|finding| finding.weight != Weight::Blocks),
            fence: options.fence,
            preconditions,
            tables_to_lock: if options.fence.locks() { tables.len() } else { 0 },
            sequences,
            estimate,
            estimated_from,
        })
    }
}
