//! Positions of the rows of a layer. A hook may leave some out, but most follow each other: runs take next to no memory.

use std::ops::Range;

/// Ascending positions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Positions {
    runs: Vec<Range<i64>>,
    len: usize,
}

impl Positions {
    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The last one.
    pub fn last(&self) -> Option<i64> {
        Some(self.runs.last()?.end - 1)
    }

    /// Whether they are 0, 1, … up to before `position`, perhaps with more behind.
    pub fn begin_with(&self, position: usize) -> bool {
        position == 0 || self.runs.first().is_some_and(|r| r.start == 0 && r.end >= position as i64)
    }

    /// How many are less than `position`.
    pub fn before(&self, position: i64) -> usize {
        self.runs.iter().map(|r| (position.min(r.end) - r.start).max(0) as usize).sum()
    }

    /// Adds some behind the last one; they ascend.
    pub fn extend(&mut self, positions: &[i64]) {
        for &p in positions {
            match self.runs.last_mut() {
                Some(run) if run.end == p => run.end += 1,
                _ => self.runs.push(p..p + 1),
            }
        }
        self.len += positions.len();
    }

    /// Keeps the first `len`.
    pub fn truncate(&mut self, len: usize) {
        let mut left = len.min(self.len);
        self.len = left;
        self.runs.retain_mut(|run| {
            let own = ((run.end - run.start) as usize).min(left);
            left -= own;
            run.end = run.start + own as i64;
            own > 0
        });
    }

    /// All of them.
    pub fn to_vec(&self) -> Vec<i64> {
        self.runs.iter().flat_map(Clone::clone).collect()
    }

    /// Starts and ends of the runs.
    pub fn runs(&self) -> Vec<i64> {
        self.runs.iter().flat_map(|r| [r.start, r.end]).collect()
    }

    /// From starts and ends; `None` when they do not ascend.
    pub fn of_runs(ends: &[i64]) -> Option<Self> {
        let ascending = ends.len().is_multiple_of(2)
            && ends.first().is_none_or(|first| *first >= 0)
            && ends.chunks_exact(2).all(|r| r[0] < r[1])
            && ends.windows(2).all(|w| w[0] <= w[1]);
        let len =
            ends.chunks_exact(2).try_fold(0usize, |sum, r| sum.checked_add(r[1].checked_sub(r[0])? as usize));
        let runs = ends.chunks_exact(2).map(|r| r[0]..r[1]).collect();
        Some(Self { runs, len: len.filter(|_| ascending)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_a_list_of_positions(steps in prop::collection::vec(1i64..4, 0..40), cut in 0i64..100) {
            let list: Vec<i64> = steps.iter().scan(-1, |p, s| { *p += s; Some(*p) }).collect();
            let mut positions = Positions::default();
            positions.extend(&list);
            prop_assert_eq!(positions.to_vec(), list.clone());
            prop_assert_eq!((positions.len(), positions.last()), (list.len(), list.last().copied()));
            prop_assert_eq!(Positions::of_runs(&positions.runs()), Some(positions.clone()));
            let before = list.iter().filter(|p| **p < cut).count();
            prop_assert_eq!(positions.before(cut), before);
            let whole = (0..cut).eq(list.iter().copied().take(cut as usize));
            prop_assert_eq!(positions.begin_with(cut as usize), whole);
            positions.truncate(before);
            prop_assert_eq!(positions.to_vec(), list[..before].to_vec());
        }
    }
}
