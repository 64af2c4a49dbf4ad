//! What one sequence asks of a policy that serves many: a threshold or a share of its own.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::{BudgetState, PerSequence, STEP, Sequence};
use crate::{Error, Result};

/// What a policy is to do differently for one sequence; what is absent stays as the policy was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// What the policy's score is held against, in the score's own unit. Not together with a target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// The share of this sequence's tokens that the large model is to choose, 0 to 1.
    #[serde(rename = "target_llm_ratio", skip_serializing_if = "Option::is_none")]
    pub target: Option<f64>,
    /// What a policy draws for this sequence, in place of what follows from the sequence's name, so that the same request
    /// draws the same.
    #[serde(skip)]
    pub seed: Option<u64>,
}

impl Settings {
    /// Nothing different.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Thresholds of a probability. Nothing reaches one above 1: the small model writes alone.
pub const PROBABILITIES: RangeInclusive<f64> = 0.0..=2.0;
/// Thresholds of an entropy in nats; no vocabulary reaches the end.
pub(super) const NATS: RangeInclusive<f64> = 0.0..=100.0;
/// Thresholds of a measure that may be any finite number.
pub(super) const ANY: RangeInclusive<f64> = f64::MIN..=f64::MAX;

/// Which [`Settings`] a policy has.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Accepts {
    /// Its thresholds; `None` when it has none to set.
    pub threshold: Option<RangeInclusive<f64>>,
    /// Whether it can hold a share.
    pub target: bool,
}

impl Accepts {
    /// Whether the policy named `policy` can do what is asked of it.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the field.
    pub fn check(&self, policy: &str, settings: &Settings) -> Result<()> {
        if let (Some(threshold), Some(target)) = (settings.threshold, settings.target) {
            let found = format!("{threshold} beside a target_llm_ratio of {target}");
            return Err(Error::setting("threshold", found, "one of the two"));
        }
        if let Some(threshold) = settings.threshold {
            check_threshold(policy, self.threshold.as_ref(), threshold)?;
        }
        match settings.target {
            Some(target) if !self.target => {
                let expected = format!("none: the {policy} policy holds no share");
                Err(Error::setting("target_llm_ratio", target, expected))
            }
            Some(target) if !(0.0..=1.0).contains(&target) => {
                Err(Error::setting("target_llm_ratio", target, "0 to 1"))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a threshold is in a policy's range.
pub(super) fn check_threshold(policy: &str, range: Option<&RangeInclusive<f64>>, found: f64) -> Result<()> {
    match range {
        None => Err(Error::setting("threshold", found, format!("none: the {policy} policy has none to set"))),
        Some(range) if range.contains(&found) => Ok(()),
        Some(range) if *range == PROBABILITIES => {
            Err(Error::setting("threshold", found, "0 to 1, or up to 2 for what nothing reaches"))
        }
        Some(range) if *range == ANY => Err(Error::setting("threshold", found, "a finite number")),
        Some(range) => {
            Err(Error::setting("threshold", found, format!("{} to {}", range.start(), range.end())))
        }
    }
}

/// What one sequence's scores are held against.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bar {
    /// A threshold.
    Fixed(f64),
    /// One that moves so that a share is held.
    Moving(BudgetState),
}

/// The bar of each sequence, over one that holds for all that say nothing.
#[derive(Debug)]
pub(super) struct Bars {
    new: Bar,
    /// Where a moving bar begins, on the scale from 0 to 1.
    start: f64,
    states: PerSequence<Bar>,
}

impl Bars {
    /// A fixed threshold for all; `start` is where the bars of shares begin.
    pub fn fixed(threshold: f64, start: f64) -> Self {
        Self { new: Bar::Fixed(threshold), start: start.clamp(0.0, 1.0), states: PerSequence::default() }
    }

    /// A share for all that do not say otherwise, in place of the threshold.
    pub fn holding(self, share: f64, step: f64) -> Result<Self> {
        Ok(Self { new: Bar::Moving(BudgetState::new(share, self.start, step)?), ..self })
    }

    /// Begins a sequence; `settings` have been checked.
    pub fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        let step = match self.new {
            Bar::Moving(state) => state.step(),
            Bar::Fixed(_) => STEP,
        };
        let bar = match (settings.threshold, settings.target) {
            (Some(threshold), _) => Bar::Fixed(threshold),
            (None, Some(share)) => Bar::Moving(BudgetState::new(share, self.start, step)?),
            (None, None) => self.new,
        };
        self.states.set(sequence, bar);
        Ok(())
    }

    /// Whether the large model chooses: `score` in its own unit for a threshold, `unit` on the scale from 0 to 1 for a
    /// share.
    pub fn decide(&mut self, sequence: Sequence, score: f64, unit: f64) -> bool {
        let new = self.new;
        match self.states.get(sequence, || new) {
            Bar::Fixed(threshold) => score >= *threshold,
            Bar::Moving(state) => state.decide(unit),
        }
    }

    pub fn close(&mut self, sequence: Sequence) {
        self.states.close(sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(threshold: Option<f64>, target: Option<f64>) -> Settings {
        Settings { threshold, target, ..Settings::default() }
    }

    #[test]
    fn a_wrong_setting_names_its_field() {
        let all = Accepts { threshold: Some(PROBABILITIES), target: true };
        for good in [(None, None), (Some(0.0), None), (Some(2.0), None), (None, Some(0.0)), (None, Some(1.0))]
        {
            all.check("neural", &settings(good.0, good.1)).unwrap();
        }
        let message = |accepts: &Accepts, threshold, target| {
            accepts.check("neural", &settings(threshold, target)).unwrap_err().to_string()
        };
        assert!(message(&all, Some(0.5), Some(0.5)).contains("one of the two"));
        for wrong in [-0.1, 2.1, f64::NAN, f64::INFINITY] {
            assert!(message(&all, Some(wrong), None).starts_with("threshold is "), "{wrong}");
            assert!(message(&all, None, Some(wrong)).starts_with("target_llm_ratio is "), "{wrong}");
        }
        let none = Accepts::default();
        assert!(message(&none, Some(0.5), None).contains("the neural policy has none to set"));
        assert!(message(&none, None, Some(0.5)).contains("the neural policy holds no share"));
    }

    #[test]
    fn every_sequence_has_a_bar_of_its_own() {
        let mut bars = Bars::fixed(0.5, 0.5);
        let [own, shared, held] = [Sequence(0), Sequence(1), Sequence(2)];
        bars.open(own, &settings(Some(0.9), None)).unwrap();
        bars.open(held, &settings(None, Some(0.25))).unwrap();
        let mut large = 0;
        for _ in 0..1000 {
            assert!(!bars.decide(own, 0.7, 0.7) && bars.decide(shared, 0.7, 0.7));
            large += usize::from(bars.decide(held, 0.7, 0.7));
        }
        assert!((200..=300).contains(&large), "{large}");
        bars.close(own);
        assert!(bars.decide(own, 0.7, 0.7), "forgotten");
        let mut bars = bars.holding(0.0, STEP).unwrap();
        assert!(!bars.decide(Sequence(3), 1.0, 1.0));
    }
}
