//! How many connections a migration takes on each server, and how many jobs fit below the most that there may be.
//!
//! The sessions that it needs besides those of its jobs, at the busiest moment of each phase:
//!
//! | | source | target |
//! |---|---|---|
//! | copying | stream, slot, snapshot, locks, standbys; one now and then, and one for large objects once the copy jobs have ended | trimming, ledger; two now and then |
//! | following | stream, slot, readiness; the cutover's three, or one that keeps current what is not in the stream; one of a comparison; one now and then | trimming, ledger, readiness, the way back; the cutover's two, or vacuuming's, or one that keeps current what is not in the stream; one of a comparison; two now and then |
//!
//! A comparison while writes go on (`verify/point.rs`) takes two more on the source and one on the target where there is room for them, and is
//! refused otherwise.
//!
//! *Now and then* is what looks for a stall, adopts a changed table, lifts a fence, or asks the ledger something. The
//! preparation takes fewer. On the way back both servers have each other's place, with as many apply workers.

use crate::error::{Error, ErrorKind, Result};

const SOURCE_WHILE_COPYING: usize = 6;
const SOURCE_WHILE_FOLLOWING: usize = 8;
const TARGET_WHILE_COPYING: usize = 4;
const TARGET_WHILE_FOLLOWING: usize = 9;

/// What does something at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jobs {
    /// Parts that are copied, or ranges that are compared; each takes a session on both sides.
    pub copy: usize,
    /// Index builds; each takes a session on the target.
    pub index: usize,
    /// Apply workers; each takes a session on the target.
    pub apply: usize,
}

impl Jobs {
    /// Connections to the source at the busiest moment.
    pub fn source_connections(&self) -> usize {
        (SOURCE_WHILE_COPYING + self.copy).max(SOURCE_WHILE_FOLLOWING)
    }

    /// Connections to the target at the busiest moment.
    pub fn target_connections(&self) -> usize {
        (TARGET_WHILE_COPYING + self.copy + self.index).max(TARGET_WHILE_FOLLOWING + self.apply)
    }
}

/// The most connections that there may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    /// To the source.
    pub source: Option<usize>,
    /// To the target.
    pub target: Option<usize>,
}

impl Caps {
    /// As many jobs as fit, at most those that are wanted.
    ///
    /// # Errors
    /// `Usage` when not even one of each fits.
    pub fn fit(&self, wanted: Jobs) -> Result<Jobs> {
        let least = Jobs { copy: 1, index: 1, apply: 1 };
        for (side, cap, needed) in
            [("source", self.source, least.source_connections()), ("target", self.target, least.target_connections())]
        {
            if let Some(cap) = cap.filter(|cap| *cap < needed) {
                let text = format!("--max-{side}-connections {cap} is too few: a migration needs {needed} at least");
                return Err(Error::new(ErrorKind::Usage, text)
                    .hint(format!("Give --max-{side}-connections {needed} or more, or leave it out.")));
            }
        }
        let fits = |jobs: &Jobs| {
            jobs.source_connections() <= self.source.unwrap_or(usize::MAX)
                && jobs.target_connections() <= self.target.unwrap_or(usize::MAX)
        };
        // One more of each kind in turn, as long as there is room.
        let kinds: [fn(&mut Jobs) -> &mut usize; 3] =
            [|jobs| &mut jobs.copy, |jobs| &mut jobs.index, |jobs| &mut jobs.apply];
        let (mut jobs, mut wanted) = (least, wanted);
        loop {
            let before = jobs;
            for kind in kinds {
                let mut more = jobs;
                *kind(&mut more) += 1;
                if *kind(&mut more) <= *kind(&mut wanted) && fits(&more) {
                    jobs = more;
                }
            }
            if jobs == before {
                return Ok(jobs);
            }
        }
    }

    /// How many copy jobs fit beside the others.
    pub fn copy_jobs_max(&self, others: Jobs) -> Option<usize> {
        let source = self.source.map(|cap| cap.saturating_sub(SOURCE_WHILE_COPYING));
        let target = self.target.map(|cap| cap.saturating_sub(TARGET_WHILE_COPYING + others.index));
        source.into_iter().chain(target).min()
    }

    /// How many comparisons at once fit, for a command that does nothing else: each takes a session on both sides, and on each
    /// side there is one more.
    ///
    /// # Errors
    /// `Usage` when not even one fits.
    pub fn fit_comparison(&self, wanted: usize) -> Result<usize> {
        let room = self.source.into_iter().chain(self.target).min().map_or(wanted, |cap| cap.saturating_sub(1));
        if room == 0 {
            return Err(Error::new(ErrorKind::Usage, "a comparison needs 2 connections to each server at least")
                .hint("Give --max-source-connections and --max-target-connections 2 or more, or leave them out."));
        }
        Ok(wanted.min(room))
    }

    /// Looks whether the apply workers of a migration that goes on fit: their number is fixed when it begins.
    ///
    /// # Errors
    /// `Blocked` when they do not.
    pub fn fit_apply_workers(&self, workers: usize) -> Result<()> {
        let needed = TARGET_WHILE_FOLLOWING + workers;
        match self.target {
            Some(cap) if cap < needed => Err(Error::new(
                ErrorKind::Blocked,
                format!(
                    "--max-target-connections {cap} is too few: this migration began with {workers} apply workers, and needs {needed}"
                ),
            )
            .hint(format!("Give --max-target-connections {needed} or more, or leave it out."))),
            _ => Ok(()),
        }
    }
}

impl Caps {
    /// The connections to the source that the way back needs, where there may not be so many.
    pub fn lacking_for_way_back(&self, workers: usize) -> Option<usize> {
        let needed = TARGET_WHILE_FOLLOWING + workers;
        self.source.filter(|cap| *cap < needed).map(|_| needed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Jobs = Jobs { copy: 4, index: 2, apply: 4 };

    fn caps(source: impl Into<Option<usize>>, target: impl Into<Option<usize>>) -> Caps {
        Caps { source: source.into(), target: target.into() }
    }

    #[test]
    fn jobs_are_reduced_so_that_the_connections_fit() {
        assert_eq!(caps(None, None).fit(WANTED).unwrap(), WANTED);
        for source in 8..20 {
            for target in 10..20 {
                let jobs = caps(source, target).fit(WANTED).unwrap();
                assert!(jobs.source_connections() <= source && jobs.target_connections() <= target, "{jobs:?}");
                assert!(jobs.copy >= 1 && jobs.index >= 1 && jobs.apply >= 1);
                assert!(jobs.copy <= 4 && jobs.index <= 2 && jobs.apply <= 4);
            }
        }
        assert_eq!(caps(10, 13).fit(WANTED).unwrap(), WANTED);
        assert_eq!(caps(8, None).fit(WANTED).unwrap(), Jobs { copy: 2, ..WANTED });
        assert_eq!(caps(None, 10).fit(WANTED).unwrap(), Jobs { copy: 4, index: 2, apply: 1 });
        let one = Jobs { copy: 1, index: 1, apply: 1 };
        assert_eq!(caps(1000, 1000).fit(one).unwrap(), one);
    }

    #[test]
    fn too_few_connections_are_refused_with_the_least_that_works() {
        for (caps, least) in [(caps(7, None), "8 at least"), (caps(8, 9), "10 at least")] {
            let error = caps.fit(WANTED).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains(least), "{error}");
        }
        caps(8, 10).fit(WANTED).unwrap();
        assert_eq!(caps(None, 12).fit_apply_workers(4).unwrap_err().kind(), ErrorKind::Blocked);
        caps(None, 13).fit_apply_workers(4).unwrap();
        assert_eq!(caps(12, None).lacking_for_way_back(4), Some(13));
        assert_eq!(caps(13, None).lacking_for_way_back(4), None);
        assert_eq!(caps(1, 9).fit_comparison(4).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(caps(3, 9).fit_comparison(4).unwrap(), 2);
        assert_eq!(caps(None, None).fit_comparison(4).unwrap(), 4);
    }

    #[test]
    fn as_many_copy_jobs_as_fit_may_be_tuned() {
        assert_eq!(caps(None, None).copy_jobs_max(WANTED), None);
        assert_eq!(caps(10, None).copy_jobs_max(WANTED), Some(4));
        assert_eq!(caps(100, 12).copy_jobs_max(WANTED), Some(6));
    }
}
