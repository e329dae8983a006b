//! How many connections of ours to a server are open, and the most that there may be (H28).
//!
//! Every session is counted, whatever it speaks: ordinary ones, those of the copy, replication, and those of `pg_dump`. An
//! attempt counts from before it is made, so that the server can never have more of them than this says.
//!
//! What keeps a migration below the most is that its jobs are chosen to fit (`care::connections`). Here it is only waited, and
//! not for ever, until what has just been closed is gone from the server too: a limit that could hold up the lifting of a fence
//! would do more harm than one connection more.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// How long a server may take to end the session of a connection that we closed. Matters only where there is a most.
const LINGER: Duration = Duration::from_millis(500);
/// How long to wait for a connection that is about to be gone.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// The connections to one server. Clones count together.
#[derive(Clone, Debug)]
pub struct ConnectionCount {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    now: AtomicUsize,
    peak: AtomicUsize,
    max: Option<usize>,
    linger: Duration,
    wait_max: Duration,
    freed: Notify,
}

impl ConnectionCount {
    /// None is open; there may be at most so many.
    pub fn new(max: Option<usize>) -> ConnectionCount {
        ConnectionCount::with(max, LINGER, WAIT_MAX)
    }

    fn with(max: Option<usize>, linger: Duration, wait_max: Duration) -> ConnectionCount {
        let (now, peak, freed) = (AtomicUsize::new(0), AtomicUsize::new(0), Notify::new());
        ConnectionCount { shared: Arc::new(Shared { now, peak, max, linger, wait_max, freed }) }
    }

    /// How many are open.
    pub fn now(&self) -> usize {
        self.shared.now.load(Relaxed)
    }

    /// The most that have been open at once.
    pub fn peak(&self) -> usize {
        self.shared.peak.load(Relaxed)
    }

    /// The most that may be open at once, where there is a limit.
    pub fn max(&self) -> Option<usize> {
        self.shared.max
    }

    /// How many more may be opened; without a limit, as many as you like.
    pub fn room(&self) -> usize {
        self.shared.max.map_or(usize::MAX, |max| max.saturating_sub(self.now()))
    }

    /// Counts one that is about to be made. Where that would be one too many, it waits until another is gone, but not for ever.
    pub(super) async fn admit(&self) -> Counted {
        let max = self.shared.max.unwrap_or(usize::MAX);
        let deadline = Instant::now() + self.shared.wait_max;
        while self.shared.now.fetch_update(Relaxed, Relaxed, |now| (now < max).then_some(now + 1)).is_err() {
            if timeout_at(deadline, self.shared.freed.notified()).await.is_err() {
                tracing::warn!(max, "more connections to a server are needed than may be: one more is opened");
                self.shared.now.fetch_add(1, Relaxed);
                break;
            }
        }
        self.shared.peak.fetch_max(self.now(), Relaxed);
        Counted { _guard: Arc::new(Guard(Arc::clone(&self.shared))) }
    }
}

/// A connection that counts until the last clone of this is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    _guard: Arc<Guard>,
}

#[derive(Debug)]
struct Guard(Arc<Shared>);

impl Drop for Guard {
    fn drop(&mut self) {
        let shared = Arc::clone(&self.0);
        let gone = move || {
            shared.now.fetch_sub(1, Relaxed);
            shared.freed.notify_one();
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if self.0.max.is_some() => {
                let linger = self.0.linger;
                drop(runtime.spawn(async move {
                    tokio::time::sleep(linger).await;
                    gone();
                }));
            }
            _ => gone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_open_is_counted_and_the_most_of_it_is_remembered() {
        let count = ConnectionCount::new(None);
        let (first, second) = (count.admit().await, count.clone().admit().await);
        let clone = first.clone();
        drop(first);
        assert_eq!((count.now(), count.peak(), count.max()), (2, 2, None), "a clone of it is still there");
        drop((clone, second));
        assert_eq!((count.now(), count.peak(), count.room()), (0, 2, usize::MAX));
    }

    #[tokio::test]
    async fn no_more_are_opened_than_may_be_while_waiting_helps() {
        let count = ConnectionCount::with(Some(2), Duration::from_millis(5), Duration::from_secs(60));
        let (first, _second) = (count.admit().await, count.admit().await);
        assert_eq!(count.room(), 0);
        let mut third = Box::pin(count.admit());
        assert!(futures_util::FutureExt::now_or_never(&mut third).is_none(), "there is no room");
        drop(first);
        let _third = third.await;
        assert_eq!((count.now(), count.peak()), (2, 2));
    }

    #[tokio::test]
    async fn h28_a_limit_never_holds_anything_up_for_ever() {
        let count = ConnectionCount::with(Some(1), LINGER, Duration::from_millis(5));
        let _first = count.admit().await;
        let _second = count.admit().await;
        assert_eq!((count.now(), count.peak()), (2, 2));
    }
}
