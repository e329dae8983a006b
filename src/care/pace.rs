//! How fast the copy may go: a token bucket that all jobs share, and a rest for all of them.
//!
//! A chunk may pass as soon as nothing is owed, and is then paid for: so a chunk larger than the bucket passes too, and what
//! comes after it waits for as long as it takes to pay. Jobs take turns; a new limit holds at once, also for those that wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

/// The pace of a copy. Clones are one.
#[derive(Clone, Debug)]
pub struct Pace {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limits: watch::Sender<Limits>,
    bucket: Mutex<Bucket>,
    /// Jobs that wait here.
    waiting: AtomicUsize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Limits {
    /// Bytes a second.
    rate: Option<u64>,
    rests: bool,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace::new()
    }
}

impl Pace {
    /// As fast as it goes.
    pub fn new() -> Pace {
        let bucket = Mutex::new(Bucket::new(Instant::now()));
        let limits = watch::Sender::new(Limits::default());
        Pace { shared: Arc::new(Shared { limits, bucket, waiting: AtomicUsize::new(0) }) }
    }

    /// From now on at most so many bytes a second; `None` for as fast as it goes.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        self.shared.limits.send_modify(|limits| limits.rate = bytes_per_second);
    }

    /// How many bytes a second there may be.
    pub fn rate(&self) -> Option<u64> {
        self.shared.limits.borrow().rate
    }

    /// Whether nothing may pass at all.
    pub fn set_rests(&self, rests: bool) {
        self.shared.limits.send_modify(|limits| limits.rests = rests);
    }

    /// Whether a job waits here for its turn: then nothing moves, and nothing is wrong.
    pub fn holds_somebody(&self) -> bool {
        self.shared.waiting.load(Relaxed) > 0
    }

    /// Returns when a chunk of so many bytes may be passed on.
    pub async fn pass(&self, bytes: u64) {
        let mut limits = self.shared.limits.subscribe();
        if *limits.borrow() == Limits::default() {
            return;
        }
        let _waits = Waits::begin(&self.shared.waiting);
        let mut bucket = self.shared.bucket.lock().await;
        loop {
            let Limits { rate, rests } = *limits.borrow_and_update();
            let patience = match rate {
                _ if rests => Duration::MAX,
                None => return,
                Some(rate) => match bucket.take(bytes, rate, Instant::now()) {
                    Ok(()) => return,
                    Err(patience) => patience,
                },
            };
            // Until it is paid for, or until the limits change; whoever changes them is in here too, and never gone.
            let _ = timeout(patience, limits.changed()).await;
        }
    }

    /// Returns when the copy need not rest.
    pub async fn may_go_on(&self) {
        let mut limits = self.shared.limits.subscribe();
        let _waits = Waits::begin(&self.shared.waiting);
        let _ = limits.wait_for(|limits| !limits.rests).await;
    }
}

/// A job that waits, until it is dropped.
struct Waits<'a>(&'a AtomicUsize);

impl Waits<'_> {
    fn begin(waiting: &AtomicUsize) -> Waits<'_> {
        waiting.fetch_add(1, Relaxed);
        Waits(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Bytes that may pass; below zero, bytes that are owed.
#[derive(Debug)]
struct Bucket {
    balance: f64,
    at: Instant,
}

impl Bucket {
    fn new(now: Instant) -> Bucket {
        Bucket { balance: 0.0, at: now }
    }

    /// Takes the bytes, or says how long it takes until nothing is owed any more. Holds what comes in a second at most.
    fn take(&mut self, bytes: u64, rate: u64, now: Instant) -> Result<(), Duration> {
        let rate = rate as f64;
        let came = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.at = now;
        self.balance = (self.balance + came).min(rate);
        if self.balance < 0.0 {
            // A day is long enough to look again.
            return Err(Duration::try_from_secs_f64(-self.balance / rate).unwrap_or(Duration::MAX).min(DAY));
        }
        self.balance -= bytes as f64;
        Ok(())
    }
}

const DAY: Duration = Duration::from_secs(86_400);

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn over_time_no_more_passes_than_the_rate_and_what_one_chunk_owes() {
        const RATE: u64 = 1000;
        let begun = Instant::now();
        for chunk in [1, 10, 999, 5000] {
            let mut bucket = Bucket::new(begun);
            let mut passed = 0;
            // Asked far more often than anything can pass.
            for milliseconds in 0..60_000 {
                if bucket.take(chunk, RATE, begun + Duration::from_millis(milliseconds)).is_ok() {
                    passed += chunk;
                }
            }
            assert!(passed <= 60 * RATE + chunk, "{passed} in chunks of {chunk}");
            assert!(passed + chunk + RATE >= 60 * RATE.min(chunk * 1000), "{passed} in chunks of {chunk}");
        }
    }

    #[test]
    fn what_was_not_used_is_kept_for_a_second_at_most() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(begun);
        let later = begun + Duration::from_secs(3600);
        assert_eq!(bucket.take(150, 100, later), Ok(()));
        assert_eq!(bucket.take(1, 100, later), Err(Duration::from_millis(500)));
        assert_eq!(bucket.take(1, 100, later + Duration::from_millis(500)), Ok(()));
    }

    #[tokio::test]
    async fn a_new_limit_holds_at_once_also_for_those_that_wait() {
        let pace = Pace::new();
        pace.set_rate(Some(1));
        pace.pass(1 << 40).now_or_never().expect("nothing was owed");
        let waiting: Vec<_> = (0..4)
            .map(|_| {
                tokio::spawn({
                    let pace = pace.clone();
                    async move { pace.pass(1).await }
                })
            })
            .collect();
        while pace.shared.waiting.load(Relaxed) < 4 {
            tokio::task::yield_now().await;
        }
        assert!(pace.holds_somebody() && waiting.iter().all(|job| !job.is_finished()));
        pace.set_rate(None);
        for job in waiting {
            job.await.unwrap();
        }
        assert!(!pace.holds_somebody());
        pace.set_rests(true);
        let mut resting = Box::pin(async { tokio::join!(pace.pass(1), pace.may_go_on()) });
        assert!((&mut resting).now_or_never().is_none() && pace.holds_somebody());
        pace.set_rests(false);
        resting.await;
    }

    #[tokio::test]
    async fn a_job_that_is_dropped_while_it_waits_is_in_nobodys_way() {
        let pace = Pace::new();
        pace.set_rests(true);
        assert!(pace.pass(1).now_or_never().is_none());
        pace.set_rests(false);
        pace.set_rate(Some(1 << 40));
        pace.pass(1).await;
        assert!(!pace.holds_somebody());
    }
}
