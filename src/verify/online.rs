//! A comparison while writes go on, seen from the process that compares: it asks the running migration for a point that both sides
//! have in common (`point`), and compares under its snapshots, for as long as the conversation lasts.
//!
//! A table that is truncated or rewritten meanwhile can no longer be read under the snapshots (H4); such tables are compared
//! again at another point.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::point::{APPLICATION_NAME, CommonPoint};
use super::{Options, Progress, Report, Snapshots};
use crate::connection::ConnectionSpec;
use crate::control::{Answer, Conversation, Request};
use crate::error::{Error, ErrorKind, Result};
use crate::observe::format::duration;
use crate::source::catalog::Table;
use crate::state_directory::StateDirectory;

/// Points that are taken at most, for tables that change under the snapshots.
const POINTS: usize = 5;
/// How often it is said that the snapshots hold vacuum back.
const SNAPSHOT_AGE: Duration = Duration::from_secs(3600);

/// What is compared, and where the migration is that knows the points.
pub struct Online<'a> {
    /// Where the migration runs.
    pub directory: &'a StateDirectory,
    /// The server that is followed.
    pub source: &'a ConnectionSpec,
    /// The server that follows.
    pub target: &'a ConnectionSpec,
    /// The tables of the migration.
    pub tables: &'a [Table],
}

/// What was found, and where.
pub struct Compared {
    /// What was found.
    pub report: Report,
    /// The point at which all tables were compared but those that came later.
    pub point: CommonPoint,
    /// How long the snapshots of a point were held, at most.
    pub snapshots_held: Duration,
}

impl Online<'_> {
    /// Compares, in a conversation that was begun with [`Request::TakePoint`].
    ///
    /// # Errors
    /// What the migration says (`Blocked` where there is no point to be had), that the snapshots were lost, or whatever a server says.
    pub async fn compare(
        &self,
        mut conversation: Conversation,
        options: &Options,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Compared> {
        let mut point = take_point(&mut conversation).await?;
        let (first, mut held) = (point.clone(), Duration::ZERO);
        let mut wanted = options.tables.clone();
        let mut tables = Vec::new();
        let mut points = 1;
        loop {
            let began = Instant::now();
            let snapshots = Snapshots { source: point.source_snapshot.clone(), target: point.target_snapshot.clone() };
            let options = Options { tables: wanted, snapshots: Some(snapshots), ..options.clone() };
            let found = tokio::select! {
                found = super::compare(
                    self.tables,
                    || self.source.connect(APPLICATION_NAME),
                    || self.target.connect(APPLICATION_NAME),
                    &options,
                    progress,
                ) => found,
                error = lost(&mut conversation) => Err(error),
                never = say_how_old_the_snapshots_are(began) => match never {},
            };
            let found = found.map_err(|error| match error.next_step() {
                None => {
                    error.hint("The snapshots last as long as the migration's process, and until a cutover. Try again.")
                }
                Some(_) => error,
            })?;
            held = held.max(began.elapsed());
            tables.extend(found.tables);
            if found.stale.is_empty() || points == POINTS {
                let report = Report { sample_percent: found.sample_percent, stale: found.stale, ..Report::new(tables) };
                return Ok(Compared { report, point: first, snapshots_held: held });
            }
            info!("at another point, because they were truncated or rewritten: {}", found.stale.join(", "));
            wanted = Some(found.stale);
            points += 1;
            conversation = Conversation::begin(self.directory, &Request::TakePoint).await?;
            point = take_point(&mut conversation).await?;
        }
    }
}

async fn take_point(conversation: &mut Conversation) -> Result<CommonPoint> {
    loop {
        match conversation.next().await? {
            Answer::Point(point) => return Ok(point),
            Answer::Waits(why) => info!("{why}"),
            _ => return Err(Error::new(ErrorKind::Other, "the migration answered something else")),
        }
    }
}

/// Waits until the snapshots are no longer held.
async fn lost(conversation: &mut Conversation) -> Error {
    match conversation.next().await {
        Err(error) => error.context("the snapshots are lost"),
        Ok(_) => Error::new(ErrorKind::Other, "the migration answered something else"),
    }
}

async fn say_how_old_the_snapshots_are(began: Instant) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(SNAPSHOT_AGE).await;
        let age = duration(began.elapsed().as_secs_f64());
        warn!(
            "the snapshots have been held for {age}: vacuum waits for them on both servers; --tables compares in smaller steps"
        );
    }
}
