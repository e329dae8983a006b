//! What happened and how fast it went, kept in the state directory for the report: it outlives the process, and is bounded.
//!
//! `history.jsonl` has a point for each second at first. When there are `POINTS_MAX`, every other one goes, and from then on they
//! are taken half as often; so a migration of weeks takes as much room as one of hours.

use std::convert::Infallible;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Entry, Recorder, What};
use crate::crashsafe;
use crate::error::{Context, Result};
use crate::observe::board::StatusBoard;
use crate::observe::history;
use crate::observe::status::{Direction, Event, Phase, Status};
use crate::report;

/// The file's name in the state directory.
pub const FILE: &str = "history.jsonl";
const TICK: Duration = Duration::from_secs(1);
/// As many points are kept.
const POINTS_MAX: usize = 4096;

/// How it was at one moment: what the plots of the last hour show, and what only the report has beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The moment, and what was measured then.
    #[serde(flatten)]
    pub measured: history::Point,
    /// What it did.
    pub phase: Phase,
    /// See [`Status`].
    pub lag_bytes: Option<u64>,
}

impl Point {
    fn of(status: &Status) -> Point {
        Point { measured: history::Point::of(status), phase: status.phase, lag_bytes: status.lag.bytes }
    }
}

/// Keeps points and events, until it is dropped.
pub struct Keeper {
    path: PathBuf,
    recorder: Recorder,
    board: StatusBoard,
    points: usize,
    /// Every how many ticks a point is taken.
    stride: usize,
    ticks: usize,
    /// The newest event that is in the record.
    newest: Option<Event>,
    /// Whether what was copied is in the record.
    has_moved: bool,
}

impl Keeper {
    /// Goes on with what a state directory has.
    pub fn new(directory: &Path, recorder: Recorder, board: StatusBoard) -> Keeper {
        let path = directory.join(FILE);
        let points = read(directory).unwrap_or_default();
        let apart = |two: &[Point]| {
            usize::try_from((two[1].measured.time - two[0].measured.time + 500) / 1000).unwrap_or(1).max(1)
        };
        // What it was at last; two points can be apart because no process ran.
        let stride = points.windows(2).rev().take(20).map(apart).min().unwrap_or(1).min(1 << 16);
        let is_moved = |entry: &Entry| matches!(&entry.what, What::Fact { name, .. } if name == report::MOVED);
        let has_moved = super::read(directory).unwrap_or_default().iter().any(is_moved);
        Keeper { path, recorder, board, points: points.len(), stride, ticks: 0, newest: None, has_moved }
    }

    /// Keeps what there is each second.
    pub async fn keep(&mut self) -> Infallible {
        loop {
            self.tick();
            tokio::time::sleep(TICK).await;
        }
    }

    /// Keeps what there is now.
    pub fn tick(&mut self) {
        let status = self.board.snapshot();
        self.events(&status.events);
        self.note_what_was_moved(&status);
        self.ticks += 1;
        if (self.ticks - 1).is_multiple_of(self.stride)
            && let Err(error) = self.add(&Point::of(&status))
        {
            tracing::debug!(%error, "a point of the history was not kept");
        }
    }

    /// Once the rows are there, and before the way back has tables of its own.
    fn note_what_was_moved(&mut self, status: &Status) {
        let is_there =
            matches!(status.phase, Phase::CatchingUp | Phase::Following | Phase::CuttingOver | Phase::CutOver);
        if self.has_moved || !is_there || status.direction != Direction::There || status.copy.tables_total == 0 {
            return;
        }
        if let Ok(value) = serde_json::to_string(&report::Moved::of(status)) {
            self.recorder.write(What::Fact { name: report::MOVED.to_owned(), value }, false);
            self.has_moved = true;
        }
    }

    /// Events since the last look.
    fn events(&mut self, events: &[Event]) {
        let known = self.newest.as_ref().and_then(|newest| events.iter().rposition(|event| event == newest));
        for event in events.iter().skip(known.map_or(0, |at| at + 1)) {
            self.recorder.event(event);
        }
        self.newest = events.last().cloned().or(self.newest.take());
    }

    fn add(&mut self, point: &Point) -> Result<()> {
        let path = self.path.clone();
        let doing = || format!("writing {}", path.display());
        let mut line = serde_json::to_vec(point).map_err(std::io::Error::from).context(doing)?;
        line.push(b'\n');
        if self.points >= POINTS_MAX {
            self.thin_out()?;
        }
        let file = std::fs::OpenOptions::new().append(true).open(&self.path);
        let mut file = match file {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => crashsafe::create_private(&self.path)?,
            file => file.context(doing)?,
        };
        file.write_all(&line).context(doing)?;
        self.points += 1;
        Ok(())
    }

    fn thin_out(&mut self) -> Result<()> {
        let points = read(self.path.parent().unwrap_or(&self.path))?;
        let mut content = Vec::new();
        let kept: Vec<&Point> = points.iter().step_by(2).collect();
        for point in &kept {
            if let Ok(line) = serde_json::to_vec(point) {
                content.extend_from_slice(&line);
                content.push(b'\n');
            }
        }
        crashsafe::replace(&self.path, &content)?;
        (self.points, self.stride) = (kept.len(), self.stride * 2);
        Ok(())
    }
}

/// The points of a state directory.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn read(directory: &Path) -> Result<Vec<Point>> {
    let path = directory.join(FILE);
    match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        content => {
            let content = content.context(|| format!("reading {}", path.display()))?;
            Ok(content.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::status::Level;
    use crate::record::read as entries;

    #[test]
    fn the_history_stays_small_and_spans_everything() {
        let directory = tempfile::tempdir().unwrap();
        let board = StatusBoard::new();
        let mut keeper = Keeper::new(directory.path(), Recorder::at(directory.path()), board);
        let mut point = Point::of(&keeper.board.snapshot());
        for second in 0..3 * POINTS_MAX as i64 {
            // As `tick` does, at its pace.
            keeper.ticks += 1;
            if (keeper.ticks - 1).is_multiple_of(keeper.stride) {
                point.measured.time = second * 1000;
                keeper.add(&point).unwrap();
            }
        }
        let points = read(directory.path()).unwrap();
        assert!(points.len() <= POINTS_MAX && points.len() > POINTS_MAX / 4, "{}", points.len());
        assert_eq!(points[0].measured.time, 0);
        assert!(points.last().unwrap().measured.time > 3 * POINTS_MAX as i64 * 999);
        let again = Keeper::new(directory.path(), Recorder::at(directory.path()), StatusBoard::new());
        assert_eq!((again.points, again.stride), (points.len(), keeper.stride), "a later process goes on at its pace");
    }

    #[test]
    fn every_event_is_kept_once() {
        let directory = tempfile::tempdir().unwrap();
        let board = StatusBoard::new();
        let recorder = Recorder::at(directory.path());
        recorder.open();
        let mut keeper = Keeper::new(directory.path(), recorder, board.clone());
        for number in 0..30 {
            board.event(Level::Info, format!("event {number}"));
            if number % 7 == 0 {
                keeper.tick();
            }
        }
        keeper.tick();
        keeper.tick();
        let kept: Vec<String> = entries(directory.path())
            .unwrap()
            .into_iter()
            .filter_map(|entry| match entry.what {
                What::Event { event } => Some(event.text),
                _ => None,
            })
            .collect();
        assert_eq!(kept, (0..30).map(|number| format!("event {number}")).collect::<Vec<_>>());
    }
}
