//! Rates over the last ten seconds, from samples of counters.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back a rate looks.
const WINDOW: Duration = Duration::from_secs(10);

/// The counters of which rates are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub copied_bytes: u64,
    pub received_bytes: u64,
    pub applied_transactions: u64,
    pub applied_changes: u64,
    /// The lag, which may fall.
    pub lag_bytes: u64,
}

/// The same per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub copied_bytes: f64,
    pub received_bytes: f64,
    pub applied_transactions: f64,
    pub applied_changes: f64,
    /// How fast the lag becomes less; negative where it grows.
    pub lag_bytes_shrinking: f64,
}

/// Samples of the counters, spanning a little more than the window.
#[derive(Debug, Default)]
pub(super) struct RateWindow {
    samples: VecDeque<(Instant, Counters)>,
    rates: Rates,
}

impl RateWindow {
    /// Takes a sample. Called about once a second; memory is bounded by the window, whatever the caller does.
    pub fn sample(&mut self, now: Instant, counters: Counters) {
        const SAMPLES_MAX: usize = 64;
        self.samples.push_back((now, counters));
        // Keep the newest sample that is at least a window old: the rate is taken from there.
        while self.samples.len() > SAMPLES_MAX
            || self.samples.get(1).is_some_and(|(time, _)| now.saturating_duration_since(*time) >= WINDOW)
        {
            self.samples.pop_front();
        }
        self.rates = match (self.samples.front(), self.samples.back()) {
            (Some(oldest), Some(newest)) => rates_between(oldest, newest),
            _ => Rates::default(),
        };
    }

    /// The rates at the last sample; all 0 before the second one.
    pub fn rates(&self) -> Rates {
        self.rates
    }
}

fn rates_between(oldest: &(Instant, Counters), newest: &(Instant, Counters)) -> Rates {
    let seconds = newest.0.saturating_duration_since(oldest.0).as_secs_f64();
    if seconds <= 0.0 {
        return Rates::default();
    }
    let (old, new) = (&oldest.1, &newest.1);
    // Counts of uncommitted parts can be taken back, hence saturating.
    let rate = |old: u64, new: u64| new.saturating_sub(old) as f64 / seconds;
    Rates {
        copied_bytes: rate(old.copied_bytes, new.copied_bytes),
        received_bytes: rate(old.received_bytes, new.received_bytes),
        applied_transactions: rate(old.applied_transactions, new.applied_transactions),
        applied_changes: rate(old.applied_changes, new.applied_changes),
        lag_bytes_shrinking: (old.lag_bytes as f64 - new.lag_bytes as f64) / seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(applied_changes: u64) -> Counters {
        Counters { applied_changes, ..Counters::default() }
    }

    #[test]
    fn a_steady_flow_has_its_rate_and_a_stopped_one_falls_to_zero_within_the_window() {
        let start = Instant::now();
        let mut window = RateWindow::default();
        for second in 0..=20 {
            window.sample(start + Duration::from_secs(second), changes(second * 500));
        }
        assert_eq!(window.rates().applied_changes, 500.0);
        window.sample(start + Duration::from_secs(25), changes(10_000));
        assert_eq!(window.rates().applied_changes, 250.0, "half of the window was idle");
        for second in 26..=30 {
            window.sample(start + Duration::from_secs(second), changes(10_000));
        }
        assert_eq!(window.rates().applied_changes, 0.0);
    }

    #[test]
    fn one_sample_has_no_rate_and_many_samples_take_no_more_memory() {
        let start = Instant::now();
        let mut window = RateWindow::default();
        window.sample(start, changes(1_000_000));
        assert_eq!(window.rates(), Rates::default());
        for _ in 0..10_000 {
            window.sample(start, changes(1_000_000));
        }
        assert!(window.samples.len() <= 64);
    }

    #[test]
    fn a_count_that_was_taken_back_is_no_negative_rate_but_a_growing_lag_is() {
        let start = Instant::now();
        let mut window = RateWindow::default();
        window.sample(start, Counters { copied_bytes: 100, lag_bytes: 0, ..Counters::default() });
        let later = Counters { copied_bytes: 50, lag_bytes: 400, ..Counters::default() };
        window.sample(start + Duration::from_secs(2), later);
        assert_eq!(window.rates().copied_bytes, 0.0);
        assert_eq!(window.rates().lag_bytes_shrinking, -200.0);
    }
}
