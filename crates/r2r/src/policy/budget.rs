//! Holding a requested share of large-model tokens.
//!
//! The rule: with `r` the requested share and `s_t` a score from 0 to 1,
//!
//! ```text
//! large_t = s_t >= tau_t                     tau_{t+1} = tau_t + step (large_t - r)
//! ```
//!
//! A token of the large model raises the bar by `step (1 - r)`, one of the small model lowers it by `step r`. Nothing is
//! assumed about the scores, and yet (adaptive conformal inference, Gibbs & Candès, 2021):
//!
//! - The bar stays within `[-step r, 1 + step (1 - r)]`: above 1 nothing reaches it, so it falls; at 0 or below
//!   everything does, so it rises. Summing the rule over `n` tokens gives `tau_n - tau_0 = step (large - r n)`, hence the
//!   share differs from `r` by at most `(1 + step) / (step n)`.
//! - For the same reason no `(1 + step) / (step r) + 1` tokens pass in a row without the large model, nor
//!   `(1 + step) / (step (1 - r)) + 1` with it alone.
//!
//! A small `step` keeps close to the scores' own order and takes longer to settle; a large one spaces the large model's
//! tokens out evenly. `r` = 0 and `r` = 1 are exact.
//!
//! [`Neural`](super::Neural) and [`Entropy`](super::Entropy) hold a share, each sequence its own.

use crate::{Error, Result};

/// How far the bar moves, unless said otherwise: at a share of 1/8 the large model's share is within 0.05 of it after
/// 1,050 tokens, and no gap is longer than 421.
pub const STEP: f64 = 0.02;

/// The bar of one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BudgetState {
    share: f64,
    step: f64,
    bar: f64,
}

impl BudgetState {
    /// `share` of tokens from the large model, 0 to 1; `start` is where the bar begins, a router's threshold.
    ///
    /// # Errors
    /// Values outside 0 to 1, a step outside `(0, 1]`.
    pub fn new(share: f64, start: f64, step: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::setting("target_llm_ratio", share, "0 to 1"));
        }
        if !(0.0..=1.0).contains(&start) {
            return Err(Error::ThresholdOutOfRange { found: start });
        }
        if !(step > 0.0 && step <= 1.0) {
            return Err(Error::setting("the budget's step", step, "above 0, at most 1"));
        }
        Ok(Self { share, step, bar: start })
    }

    /// How far the bar moves.
    pub fn step(&self) -> f64 {
        self.step
    }

    /// Where the bar is.
    pub fn bar(&self) -> f64 {
        self.bar
    }

    /// Whether the large model chooses a token with this score, and moves the bar. A score that is not a number counts as
    /// 1: unsure.
    pub fn decide(&mut self, score: f64) -> bool {
        let score = if score.is_nan() { 1.0 } else { score.clamp(0.0, 1.0) };
        // Exact at the ends, where the bar would have to travel first.
        let large = if self.share <= 0.0 {
            false
        } else if self.share >= 1.0 {
            true
        } else {
            score >= self.bar
        };
        self.bar += self.step * (f64::from(u8::from(large)) - self.share);
        self.bar = self.bar.clamp(-self.step, 1.0 + self.step);
        large
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Scores of all sorts, the nastiest among them.
    fn scores(kind: u8, seed: u64, n: usize) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n)
            .map(|i| match kind {
                0 => rng.random::<f64>(),
                1 => rng.random::<f64>().powi(8),
                2 => 0.0,
                3 => 1.0,
                4 => f64::from(u8::from(i % 97 == 0)),
                5 => (i as f64 / n as f64).fract(),
                6 => 1.0 - i as f64 / n as f64,
                _ => f64::NAN,
            })
            .collect()
    }

    proptest! {
        #[test]
        fn the_share_is_held_whatever_the_scores(
            kind in 0u8..8, seed in 0u64..1000, share in 0.01f64..0.99, start in 0.0f64..=1.0, step in 0.005f64..0.2,
            n in 1usize..4000,
        ) {
            let mut state = BudgetState::new(share, start, step).unwrap();
            let large = scores(kind, seed, n).into_iter().filter(|&s| state.decide(s)).count();
            let off = (large as f64 / n as f64 - share).abs();
            let bound = (1.0 + step) / (step * n as f64);
            prop_assert!(off <= bound + 1e-9, "off by {off}, allowed {bound}");
        }

        #[test]
        fn neither_model_starves(
            kind in 0u8..8, seed in 0u64..1000, share in 0.05f64..0.95, start in 0.0f64..=1.0, step in 0.01f64..0.2,
        ) {
            let mut state = BudgetState::new(share, start, step).unwrap();
            let (most_without, most_with) =
                ((1.0 + step) / (step * share) + 1.0, (1.0 + step) / (step * (1.0 - share)) + 1.0);
            let (mut without, mut with) = (0.0, 0.0);
            for score in scores(kind, seed, 4000) {
                (without, with) = if state.decide(score) { (0.0, with + 1.0) } else { (without + 1.0, 0.0) };
                prop_assert!(without <= most_without && with <= most_with, "{without} {with}");
            }
        }
    }

    #[test]
    fn the_ends_are_exact() {
        for (share, expected) in [(0.0, 0), (1.0, 500)] {
            let mut state = BudgetState::new(share, 0.5, STEP).unwrap();
            assert_eq!(scores(0, 1, 500).into_iter().filter(|&s| state.decide(s)).count(), expected);
        }
        assert!(BudgetState::new(1.1, 0.5, STEP).is_err());
        assert!(BudgetState::new(0.5, f64::NAN, STEP).is_err());
        assert!(BudgetState::new(0.5, 0.5, 0.0).is_err());
    }

    /// Where scores are steady the bar settles at their quantile: high scores go to the large model.
    #[test]
    fn it_prefers_high_scores() {
        let mut state = BudgetState::new(0.125, 0.5, STEP).unwrap();
        let all = scores(0, 7, 20_000);
        let (large, small): (Vec<f64>, Vec<f64>) = all.into_iter().skip(2000).partition(|&s| state.decide(s));
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
        assert!(mean(&large) > 0.85 && mean(&small) < 0.5, "{} {}", mean(&large), mean(&small));
    }
}
