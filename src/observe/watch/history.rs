//! What was measured in the last hour, for the plots: what the migration remembers, and then what the view sees.

use std::collections::VecDeque;

use crate::observe::history;
use crate::observe::status::Status;

/// An hour, with a point a second.
const POINTS_MAX: usize = 3600;

/// For how long a remembered point speaks: a little longer than they are apart.
const KNOWN_FOR_SECONDS: usize = 4;

/// What is measured at one moment; `None` where it is not known.
type Point = [Option<f64>; MEASURES];

const MEASURES: usize = 6;

/// Something that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// Seconds that the target is behind.
    Lag,
    /// Changes applied a second.
    Changes,
    /// Bytes copied a second.
    Copied,
    /// Bytes received a second.
    Received,
    /// Bytes in the queue.
    Queue,
    /// Bytes of WAL that the source keeps.
    Wal,
}

/// A point for each second.
#[derive(Debug, Default)]
pub(super) struct History {
    points: VecDeque<Point>,
    /// Points that were ever added: columns keep their place when old points go.
    added: usize,
}

impl History {
    pub fn add(&mut self, status: &Status) {
        let bytes = |bytes: u64| Some(bytes as f64);
        self.push([
            status.lag.seconds,
            Some(status.apply.changes_per_second),
            Some(status.copy.bytes_per_second),
            Some(status.stream.bytes_per_second),
            bytes(status.queue.bytes),
            status.source.retained_wal_bytes.and_then(bytes),
        ]);
    }

    /// What the migration remembers of the time before, oldest first. Seconds between its points are like the point before them; a time
    /// without points is a gap.
    pub fn remember(&mut self, points: &[history::Point]) {
        let bytes = |bytes: u64| Some(bytes as f64);
        for (place, point) in points.iter().enumerate() {
            let measured = [
                point.lag_seconds,
                Some(point.changes_per_second),
                Some(point.copied_bytes_per_second),
                Some(point.received_bytes_per_second),
                bytes(point.queue_bytes),
                point.retained_wal_bytes.and_then(bytes),
            ];
            let until_next = points.get(place + 1).map_or(1000, |next| next.time - point.time);
            let seconds = usize::try_from((until_next + 500) / 1000).unwrap_or(1).clamp(1, POINTS_MAX);
            for second in 0..seconds {
                let known = second < KNOWN_FOR_SECONDS;
                self.push(if known { measured } else { [None; MEASURES] });
            }
        }
    }

    /// A second of which nothing is known.
    pub fn add_gap(&mut self) {
        self.push([None; MEASURES]);
    }

    fn push(&mut self, point: Point) {
        if self.points.len() == POINTS_MAX {
            self.points.pop_front();
        }
        self.points.push_back(point);
        self.added += 1;
    }

    /// The newest that is known.
    pub fn now(&self, measure: Measure) -> Option<f64> {
        self.points.back().and_then(|point| point[measure as usize])
    }

    /// The most in what is kept.
    pub fn most(&self, measure: Measure) -> Option<f64> {
        self.points.iter().filter_map(|point| point[measure as usize]).reduce(f64::max)
    }

    /// Seconds that are kept.
    pub fn seconds(&self) -> usize {
        self.points.len()
    }

    /// All that is kept in at most so many columns, oldest first: the most of the seconds that share one. A column holds the same seconds
    /// from one call to the next, until there are twice as many.
    pub fn columns(&self, measure: Measure, columns_max: usize) -> Vec<Option<f64>> {
        let columns_max = columns_max.max(2);
        let mut shared = 1;
        // The first and the last column may be partly filled.
        while self.points.len().div_ceil(shared) + 1 > columns_max && self.points.len() > columns_max {
            shared *= 2;
        }
        let first = self.added - self.points.len();
        let mut columns: Vec<Option<f64>> = Vec::new();
        let mut last = None;
        for (place, point) in self.points.iter().enumerate() {
            let column = (first + place) / shared;
            if last != Some(column) {
                columns.push(None);
                last = Some(column);
            }
            if let (Some(newest), Some(value)) = (columns.last_mut(), point[measure as usize]) {
                *newest = Some(newest.map_or(value, |other| other.max(value)));
            }
        }
        let surplus = columns.len().saturating_sub(columns_max);
        columns.split_off(surplus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::status::Phase;

    fn lagging(seconds: impl IntoIterator<Item = f64>) -> History {
        let mut history = History::default();
        let mut status = Status::not_running(Phase::Following);
        for lag in seconds {
            status.lag.seconds = Some(lag);
            history.add(&status);
        }
        history
    }

    #[test]
    fn a_peak_is_seen_however_many_seconds_share_a_column() {
        let history = lagging((0..3000).map(|second| if second == 1234 { 60.0 } else { 0.1 }));
        let columns = history.columns(Measure::Lag, 40);
        assert!(columns.len() <= 40, "{}", columns.len());
        assert_eq!(columns.iter().filter(|column| **column == Some(60.0)).count(), 1);
        assert_eq!((history.most(Measure::Lag), history.now(Measure::Lag)), (Some(60.0), Some(0.1)));
    }

    #[test]
    fn few_seconds_have_a_column_each_and_a_gap_is_a_gap() {
        let mut history = lagging([1.0, 2.0]);
        history.add_gap();
        assert_eq!(history.columns(Measure::Lag, 40), [Some(1.0), Some(2.0), None]);
        assert_eq!(history.now(Measure::Lag), None);
    }

    #[test]
    fn what_the_migration_remembers_comes_first_with_a_second_for_each_and_gaps_where_it_was_away() {
        let point = |time, lag_seconds| history::Point {
            time,
            lag_seconds,
            ..history::Point::of(&Status::not_running(Phase::Following))
        };
        let mut history = History::default();
        history.remember(&[point(10_000, Some(1.0)), point(12_004, Some(2.0)), point(20_001, Some(3.0))]);
        let mut status = Status::not_running(Phase::Following);
        status.lag.seconds = Some(4.0);
        history.add(&status);
        let (one, two) = (Some(1.0), Some(2.0));
        let expected = [one, one, two, two, two, two, None, None, None, None, Some(3.0), Some(4.0)];
        assert_eq!(history.columns(Measure::Lag, 40), expected);
    }

    #[test]
    fn an_hour_is_kept_and_no_more() {
        let history = lagging((0..10_000).map(f64::from));
        assert_eq!(history.seconds(), POINTS_MAX);
        assert_eq!(history.columns(Measure::Lag, 50).last(), Some(&Some(9999.0)));
    }
}
