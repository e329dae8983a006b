//! How old the oldest transaction is that was received and is not applied yet, in bounded memory.
//!
//! Commit times are the stream's: microseconds since 2000-01-01 UTC by the source's clock ("Logical Replication
//! Message Formats" in the manual). Only their differences are used, and only against the same clock.

use std::collections::VecDeque;

use crate::lsn::Lsn;

/// Transactions nearer together than this share a mark.
const MARK_MICROSECONDS: i64 = 10_000;
/// More marks than this are thinned out to half.
const MARKS_MAX: usize = 4096;

/// A run of received transactions: when its first was committed, and where its last ends.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mark {
    first_commit_time: i64,
    last_end_lsn: Lsn,
}

/// The transactions between received and applied.
#[derive(Debug, Default)]
pub(super) struct Pending {
    marks: VecDeque<Mark>,
    /// Commit time of the newest transaction applied.
    applied_commit_time: Option<i64>,
    received_lsn: Lsn,
    applied_lsn: Lsn,
}

impl Pending {
    /// Positions from which the apply goes on. What an earlier process left between them is of unknown age; what this one has received keeps
    /// the age that it has.
    pub fn resume(&mut self, received_lsn: Lsn, applied_lsn: Lsn) {
        if received_lsn <= self.received_lsn && applied_lsn >= self.applied_lsn {
            self.applied_lsn = applied_lsn;
            while self.marks.front().is_some_and(|mark| mark.last_end_lsn <= applied_lsn) {
                self.marks.pop_front();
            }
            return;
        }
        *self = Pending { received_lsn, applied_lsn, ..Pending::default() };
    }

    /// A transaction was received whole. End LSNs only grow; what comes again after a reconnect is ignored.
    pub fn received(&mut self, end_lsn: Lsn, commit_time: i64) {
        if end_lsn <= self.received_lsn {
            return;
        }
        let backlog_of_unknown_age = self.marks.is_empty() && self.applied_lsn < self.received_lsn;
        self.received_lsn = end_lsn;
        match self.marks.back_mut() {
            Some(mark) if commit_time - mark.first_commit_time < MARK_MICROSECONDS => mark.last_end_lsn = end_lsn,
            // What an earlier process left stays of unknown age until it is applied: it must not look young.
            None if backlog_of_unknown_age => {}
            _ => self.marks.push_back(Mark { first_commit_time: commit_time, last_end_lsn: end_lsn }),
        }
        if self.marks.len() > MARKS_MAX {
            self.thin_out();
        }
    }

    /// Everything up to here is applied; the newest of it was committed then.
    pub fn applied(&mut self, end_lsn: Lsn, commit_time: i64) {
        if end_lsn < self.applied_lsn {
            return;
        }
        self.applied_lsn = end_lsn;
        self.applied_commit_time = Some(commit_time);
        while self.marks.front().is_some_and(|mark| mark.last_end_lsn <= end_lsn) {
            self.marks.pop_front();
        }
    }

    /// End LSN of the newest transaction received.
    pub fn received_lsn(&self) -> Lsn {
        self.received_lsn
    }

    /// End LSN of the newest transaction applied.
    pub fn applied_lsn(&self) -> Lsn {
        self.applied_lsn
    }

    /// Whether everything received is applied.
    pub fn is_empty(&self) -> bool {
        self.applied_lsn >= self.received_lsn
    }

    /// When the oldest transaction that is not applied was committed, or a little before; `None` where nobody knows.
    pub fn oldest_commit_time(&self) -> Option<i64> {
        // Within a mark the applied transaction says more than the mark's first; before it, the mark does.
        match (self.marks.front(), self.applied_commit_time) {
            (Some(mark), Some(applied)) => Some(mark.first_commit_time.max(applied)),
            (Some(mark), None) => Some(mark.first_commit_time),
            (None, applied) => applied,
        }
    }

    /// Joins marks two by two. The age it gives is then too large by at most the run's length, until the apply is
    /// inside the run and its own commit time says better.
    fn thin_out(&mut self) {
        let marks: Vec<Mark> = self.marks.drain(..).collect();
        let join = |pair: &[Mark]| Mark {
            first_commit_time: pair[0].first_commit_time,
            last_end_lsn: pair[pair.len() - 1].last_end_lsn,
        };
        self.marks.extend(marks.chunks(2).map(join));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    #[test]
    fn after_an_idle_hour_a_new_transaction_is_as_old_as_itself() {
        let mut pending = Pending::default();
        pending.received(Lsn(100), 0);
        pending.applied(Lsn(100), 0);
        assert!(pending.is_empty());
        pending.received(Lsn(200), 3600 * SECOND);
        assert!(!pending.is_empty());
        assert_eq!(pending.oldest_commit_time(), Some(3600 * SECOND));
    }

    #[test]
    fn the_oldest_unapplied_transaction_decides() {
        let mut pending = Pending::default();
        for second in 1..=10 {
            pending.received(Lsn(second * 100), second as i64 * SECOND);
        }
        assert_eq!(pending.oldest_commit_time(), Some(SECOND));
        pending.applied(Lsn(300), 3 * SECOND);
        assert_eq!(pending.oldest_commit_time(), Some(4 * SECOND));
        pending.applied(Lsn(1000), 10 * SECOND);
        assert!(pending.is_empty());
    }

    #[test]
    fn a_long_backlog_takes_bounded_memory_and_never_looks_younger_than_it_is() {
        let mut pending = Pending::default();
        for number in 1..=1_000_000_u64 {
            pending.received(Lsn(number), number as i64 * SECOND);
            assert!(pending.marks.len() <= MARKS_MAX);
        }
        assert_eq!(pending.oldest_commit_time(), Some(SECOND));
        for applied in [1, 1000, 123_456, 999_999] {
            pending.applied(Lsn(applied), applied as i64 * SECOND);
            let oldest = pending.oldest_commit_time().unwrap();
            assert!(oldest <= (applied as i64 + 1) * SECOND && oldest >= applied as i64 * SECOND, "{oldest}");
        }
    }

    #[test]
    fn a_backlog_of_an_earlier_process_is_of_unknown_age_until_some_of_it_is_applied() {
        let mut pending = Pending::default();
        pending.resume(Lsn(1000), Lsn(100));
        pending.received(Lsn(2000), 500 * SECOND);
        assert_eq!(pending.oldest_commit_time(), None);
        pending.applied(Lsn(200), 20 * SECOND);
        assert_eq!(pending.oldest_commit_time(), Some(20 * SECOND));
    }

    #[test]
    fn an_apply_that_begins_or_begins_again_does_not_forget_how_old_its_backlog_is() {
        let mut pending = Pending::default();
        pending.resume(Lsn(100), Lsn(100));
        for second in 2..=10 {
            pending.received(Lsn(second * 100), second as i64 * SECOND);
        }
        pending.resume(Lsn(900), Lsn(100));
        assert_eq!((pending.oldest_commit_time(), pending.received_lsn()), (Some(2 * SECOND), Lsn(1000)));
        pending.resume(Lsn(1000), Lsn(500));
        assert_eq!(pending.oldest_commit_time(), Some(6 * SECOND));
        // The target was put back: nobody knows what lies before.
        pending.resume(Lsn(1000), Lsn(200));
        assert_eq!(pending.oldest_commit_time(), None);
    }

    #[test]
    fn what_comes_again_after_a_reconnect_is_not_pending_again() {
        let mut pending = Pending::default();
        pending.received(Lsn(100), 0);
        pending.applied(Lsn(100), 0);
        pending.received(Lsn(100), 0);
        assert!(pending.is_empty());
        assert_eq!(pending.marks.len(), 0);
    }
}
