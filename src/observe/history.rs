//! The last hour of a migration, for whoever begins to look at it: the page and `status --watch` plot it.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::observe::status::Status;
use crate::observe::wall_clock;

/// How far points are apart.
pub const INTERVAL: Duration = Duration::from_secs(2);
/// An hour of it.
const POINTS_MAX: usize = 1800;

/// What the plots show, at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Milliseconds since 1970.
    pub time: i64,
    /// Seconds that the target is behind.
    pub lag_seconds: Option<f64>,
    /// Changes applied a second.
    pub changes_per_second: f64,
    /// Bytes of the stream received a second.
    pub received_bytes_per_second: f64,
    /// Bytes copied a second.
    pub copied_bytes_per_second: f64,
    /// Bytes in the queue.
    pub queue_bytes: u64,
    /// Bytes of WAL that the source keeps for the slot.
    pub retained_wal_bytes: Option<u64>,
}

impl Point {
    /// What a status says, as of now.
    pub fn of(status: &Status) -> Point {
        Point {
            time: wall_clock::now_milliseconds(),
            lag_seconds: status.lag.seconds,
            changes_per_second: status.apply.changes_per_second,
            received_bytes_per_second: status.stream.bytes_per_second,
            copied_bytes_per_second: status.copy.bytes_per_second,
            queue_bytes: status.queue.bytes,
            retained_wal_bytes: status.source.retained_wal_bytes,
        }
    }
}

/// The newest points, one for each [`INTERVAL`].
#[derive(Clone, Debug, Default)]
pub(super) struct History(VecDeque<Point>);

impl History {
    /// Keeps a point, unless the last one is newer than the interval. Offered ones come every second, and never quite on time.
    pub fn add(&mut self, point: Point) {
        let interval = i64::try_from(INTERVAL.as_millis()).unwrap_or(i64::MAX);
        // A clock that was set back must not stop it for as long.
        let since = self.0.back().map(|last| point.time - last.time);
        if since.is_some_and(|since| (0..interval * 3 / 4).contains(&since)) {
            return;
        }
        if self.0.len() == POINTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(point);
    }

    /// All of them, oldest first.
    pub fn points(&self) -> Vec<Point> {
        self.0.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::status::Phase;

    fn at(time: i64) -> Point {
        Point { time, ..Point::of(&Status::not_running(Phase::Copying)) }
    }

    #[test]
    fn the_history_is_an_hour_and_no_more() {
        let mut history = History::default();
        for second in 0..2 * 3600 + 20 {
            history.add(at(second * 1000));
        }
        let points = history.points();
        assert_eq!(points.len(), POINTS_MAX);
        assert_eq!(points.last().map(|point| point.time), Some((2 * 3600 + 18) * 1000));
        assert!(points.windows(2).all(|two| two[1].time - two[0].time == 2000), "every other second");
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_stop_it() {
        let mut history = History::default();
        history.add(at(3_600_000));
        history.add(at(1000));
        history.add(at(1500));
        assert_eq!(history.points().len(), 2);
    }
}
