//! Which tokens of a rendered conversation are trained on (the vendor's label rule).
//!
//! The target at a position is the token after it: labels are shifted here, once, and the loss compares them with
//! unshifted logits.

use nics_core::{Error, Result};

/// A position without a target.
pub const IGNORED: i64 = -100;

/// The tokens by which turns are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnTokens {
    /// `<|role_start|>assistant<|role_end|>`.
    pub assistant_header: Vec<u32>,
    /// `<|turn_end|>`.
    pub turn_end: u32,
}

impl TurnTokens {
    /// What the token at each position should predict: inside assistant turns, after the header up to and including the
    /// turn's end, the next token; elsewhere [`IGNORED`]. A last turn without an end is taken to reach the end of `ids`,
    /// and `true` says so.
    ///
    /// # Errors
    /// `Error::Input` when there is no assistant turn: nothing could be learned.
    pub fn labels(&self, ids: &[u32]) -> Result<(Vec<i64>, bool)> {
        let mut labels = vec![IGNORED; ids.len()];
        let header = self.assistant_header.as_slice();
        let (mut at, mut found, mut truncated) = (0, false, false);
        while let Some(start) = ids[at..].windows(header.len()).position(|w| w == header) {
            let from = at + start + header.len();
            let end = ids[from..].iter().position(|&id| id == self.turn_end);
            truncated = end.is_none();
            at = end.map_or(ids.len(), |end| from + end + 1);
            for i in from..at {
                labels[i - 1] = i64::from(ids[i]);
            }
            found = true;
        }
        if !found {
            return Err(Error::input("the conversation has no assistant turn to learn from"));
        }
        Ok((labels, truncated))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURNS: fn() -> TurnTokens = || TurnTokens { assistant_header: vec![1, 2, 3], turn_end: 9 };

    #[test]
    fn every_assistant_turn_counts_and_nothing_else() {
        let ids = [1, 5, 3, 7, 9, 1, 2, 3, 7, 8, 9, 1, 5, 3, 7, 9, 1, 2, 3, 6, 9];
        let (labels, truncated) = TURNS().labels(&ids).unwrap();
        let targets: Vec<(usize, i64)> =
            labels.iter().copied().enumerate().filter(|(_, l)| *l != IGNORED).collect();
        assert_eq!(targets, [(7, 7), (8, 8), (9, 9), (18, 6), (19, 9)]);
        assert!(!truncated);
    }

    #[test]
    fn a_turn_cut_short_ends_with_the_sequence() {
        let (labels, truncated) = TURNS().labels(&[1, 2, 3, 7, 8]).unwrap();
        assert_eq!(labels, [IGNORED, IGNORED, 7, 8, IGNORED]);
        assert!(truncated);
    }

    #[test]
    fn a_conversation_without_assistant_is_refused() {
        assert!(TURNS().labels(&[1, 5, 3, 7, 9]).is_err());
    }
}
