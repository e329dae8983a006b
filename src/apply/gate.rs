//! Holding the apply at an exact position for a moment, so that somebody can look at the target while it holds what the source
//! held at one point (`verify`).
//!
//! ```text
//!   hold() ──► rests() = E ──► up_to(P) ──► rests() = P ──► dropped: the apply goes on
//! ```
//!
//! Where the apply rests, everything that ends there or before is committed by every session, and nothing after it: a hold begins
//! between two units, and a unit under a hold ends with the transaction at the position it may go to. Nothing of this is
//! written down anywhere: with the [`Hold`] goes the hold, so whatever dies, the apply goes on.

use tokio::sync::watch;

use crate::lsn::Lsn;

/// What the apply passes before each unit. Clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate {
    /// Nothing that ends past it may be committed; `None` where nobody holds the apply.
    limit: watch::Sender<Option<Lsn>>,
    /// Where the apply rests because of it.
    resting: watch::Sender<Option<Lsn>>,
    /// Everything up to here is committed.
    reached: watch::Sender<Lsn>,
}

impl Gate {
    /// One that holds nobody.
    pub fn open() -> Gate {
        let (limit, resting) = (watch::Sender::new(None), watch::Sender::new(None));
        Gate { limit, resting, reached: watch::Sender::new(Lsn::ZERO) }
    }

    /// Waits until everything up to this position is committed.
    pub async fn is_reached(&self, end_lsn: Lsn) {
        // There is a sender in this gate, so it cannot fail.
        let _ = self.reached.subscribe().wait_for(|reached| *reached >= end_lsn).await;
    }

    /// Everything up to here is committed.
    pub(super) fn reach(&self, end_lsn: Lsn) {
        self.reached.send_replace(end_lsn);
    }

    /// Lets the apply end its unit and then rest, until the hold is dropped. One at a time: a second hold would end with the first.
    pub fn hold(&self) -> Hold {
        self.limit.send_replace(Some(Lsn::ZERO));
        Hold { gate: self.clone() }
    }

    /// Whether a unit may be begun that ends at `until` at the latest, or wherever there is no telling.
    pub(super) fn may_begin(&self, until: Option<Lsn>) -> bool {
        permits(*self.limit.borrow(), until)
    }

    /// Whether the transaction after this position may be applied: a limit is always the end of one.
    pub(super) fn may_pass(&self, at: Lsn) -> bool {
        self.limit.borrow().is_none_or(|limit| at < limit)
    }

    /// Waits until a unit that ends at `until` at the latest may not be begun.
    pub(super) async fn closes_for(&self, until: Option<Lsn>) {
        let mut limit = self.limit.subscribe();
        // There is a sender in this gate, so it cannot fail.
        let _ = limit.wait_for(|limit| !permits(*limit, until)).await;
    }

    /// Rests at this position while nothing past it may be applied; answers up to where it may go, where there is an end.
    pub(super) async fn pass(&self, at: Lsn) -> Option<Lsn> {
        self.reach(at);
        if self.may_pass(at) {
            return *self.limit.borrow();
        }
        let mut limit = self.limit.subscribe();
        // Before anything is applied again, whoever holds the apply must no longer think that it rests.
        let _resting = Resting::at(&self.resting, at);
        limit.wait_for(|limit| limit.is_none_or(|limit| at < limit)).await.map_or(None, |limit| *limit)
    }
}

fn permits(limit: Option<Lsn>, until: Option<Lsn>) -> bool {
    limit.is_none_or(|limit| until.is_some_and(|until| until <= limit))
}

/// Says that the apply rests, until it is dropped: also when the apply ends while it rests.
struct Resting<'a>(&'a watch::Sender<Option<Lsn>>);

impl<'a> Resting<'a> {
    fn at(resting: &'a watch::Sender<Option<Lsn>>, at: Lsn) -> Resting<'a> {
        resting.send_replace(Some(at));
        Resting(resting)
    }
}

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

/// The apply rests, or is about to; when this is dropped, it goes on.
#[derive(Debug)]
pub struct Hold {
    gate: Gate,
}

impl Hold {
    /// Lets it go to the end of a transaction, and rest again exactly there; if it is past that already, where it is.
    pub fn up_to(&self, end_lsn: Lsn) {
        self.gate.limit.send_replace(Some(end_lsn));
    }

    /// Waits until the apply rests at `least` or past it: everything up to the answer is committed on the target, nothing after it.
    pub async fn rests(&self, least: Lsn) -> Lsn {
        let mut resting = self.gate.resting.subscribe();
        let rested = resting.wait_for(|at| at.is_some_and(|at| at >= least)).await.map_or(None, |at| *at);
        // There is a sender in this hold's gate, so waiting cannot fail.
        rested.unwrap_or(least)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.gate.limit.send_replace(None);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_held_apply_rests_and_goes_exactly_as_far_as_it_may() {
        let gate = Gate::open();
        assert_eq!(gate.pass(Lsn(10)).now_or_never(), Some(None), "nobody holds it");
        let hold = gate.hold();
        let mut passing = Box::pin(gate.pass(Lsn(10)));
        assert!(passing.as_mut().now_or_never().is_none(), "it rests");
        assert_eq!(hold.rests(Lsn::ZERO).now_or_never(), Some(Lsn(10)));
        hold.up_to(Lsn(30));
        assert!(hold.rests(Lsn(30)).now_or_never().is_none(), "it is not there yet");
        assert_eq!(passing.as_mut().now_or_never(), Some(Some(Lsn(30))), "and goes on to the limit");
        drop(passing);
        assert!(gate.is_reached(Lsn(11)).now_or_never().is_none());
        assert!(gate.may_begin(Some(Lsn(30))) && !gate.may_begin(Some(Lsn(31))) && !gate.may_begin(None));
        let mut passing = Box::pin(gate.pass(Lsn(30)));
        assert!(passing.as_mut().now_or_never().is_none());
        assert_eq!(hold.rests(Lsn(30)).now_or_never(), Some(Lsn(30)));
        assert!(gate.is_reached(Lsn(30)).now_or_never().is_some());
        drop(hold);
        assert_eq!(passing.as_mut().now_or_never(), Some(None), "the hold is gone, and so is the limit");
    }

    #[tokio::test]
    async fn an_apply_that_ends_while_it_rests_rests_no_longer() {
        let gate = Gate::open();
        let hold = gate.hold();
        let mut passing = Box::pin(gate.pass(Lsn(10)));
        assert!(passing.as_mut().now_or_never().is_none());
        drop(passing);
        assert!(hold.rests(Lsn::ZERO).now_or_never().is_none(), "somebody could apply now");
    }
}
