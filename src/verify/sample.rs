//! A part of a table, drawn anew each time: the same rows on both sides.

use std::hash::{BuildHasher, RandomState};

use super::hash::Cells;

/// Rows in a range of keys when only some ranges are compared: so few that they come from all over the table.
pub(super) const SAMPLED_RANGE_ROWS: i64 = 20_000;
/// Cells of the key's hash, as bits, of which some are compared where the table is not cut by its keys.
const CELL_BITS: u32 = 10;

/// How much of a table, and which.
#[derive(Clone)]
pub(super) struct Sample {
    share: f64,
    dice: RandomState,
}

impl Sample {
    pub(super) fn new(percent: f64) -> Sample {
        Sample { share: (percent / 100.0).clamp(0.0, 1.0), dice: RandomState::new() }
    }

    /// Some of 0, 1, … `count` - 1, in their order; at least one where there is any.
    pub(super) fn of(&self, count: usize) -> Vec<usize> {
        let wanted = ((count as f64 * self.share).ceil() as usize).max(1);
        let mut all: Vec<usize> = (0..count).collect();
        all.sort_by_cached_key(|at| self.dice.hash_one(at));
        all.truncate(wanted);
        all.sort_unstable();
        all
    }

    /// Some cells of the key's hash.
    pub(super) fn cells(&self) -> Cells {
        let cells = self.of(1 << CELL_BITS).into_iter().map(|cell| cell as i64).collect();
        Cells { bits: CELL_BITS, cells }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_the_size_that_was_asked_for_and_is_another_each_time() {
        let sample = |percent: f64| Sample::new(percent).of(1000);
        assert_eq!([1.0, 10.0, 100.0].map(|percent| sample(percent).len()), [10, 100, 1000]);
        assert_eq!(sample(0.000_1).len(), 1);
        assert!(Sample::new(50.0).of(0).is_empty());
        let ten: Vec<Vec<usize>> = (0..10).map(|_| sample(10.0)).collect();
        assert!(ten.iter().any(|other| *other != ten[0]));
        assert!(ten.iter().all(|some| some.is_sorted() && some.iter().all(|at| *at < 1000)));
        assert_eq!(Sample::new(25.0).cells().cells.len(), 256);
    }
}
