//! Policies without a router: thresholds on measures of uncertainty, some with a memory.

use std::collections::VecDeque;

use super::settings::{ANY, Bars, NATS, check_threshold};
use super::uncertainty::{Evidence, TOP, entropy, numbers};
use super::{Accepts, Decision, PerSequence, Policy, Sequence, Settings, StepView, check_finite, check_rows};
use crate::{Error, Result};

/// The large model when the entropy in nats reaches the threshold.
#[derive(Debug)]
pub struct Entropy {
    bars: Bars,
}

/// Where the bar of a share begins, on the scale on which the largest entropy there could be is 1.
const ENTROPY_START: f64 = 0.04;

impl Entropy {
    /// The reference's threshold, in nats.
    pub const DEFAULT: f64 = 0.45;

    /// `threshold` in nats, which may be another for every sequence.
    pub fn new(threshold: f64) -> Result<Self> {
        check_threshold("entropy", Some(&NATS), threshold)?;
        Ok(Self { bars: Bars::fixed(threshold, ENTROPY_START) })
    }

    /// Holds a share of each sequence's tokens, unless it asks for another or for a threshold; bars move by `step`, on the
    /// scale on which the largest entropy there could be is 1 (see [`BudgetState`](super::BudgetState)).
    pub fn holding(self, share: f64, step: f64) -> Result<Self> {
        Ok(Self { bars: self.bars.holding(share, step)? })
    }
}

impl Policy for Entropy {
    fn name(&self) -> &'static str {
        "entropy"
    }

    fn accepts(&self) -> Accepts {
        Accepts { threshold: Some(NATS), target: true }
    }

    fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        self.accepts().check(self.name(), settings)?;
        self.bars.open(sequence, settings)
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let scores = numbers(&entropy(step.logits)?)?;
        check_rows(scores.len(), sequences)?;
        let most = (step.logits.size2()?.1.max(2) as f64).ln();
        let decide = |(&score, &sequence): (&f32, &Sequence)| {
            let nats = f64::from(score);
            Decision { large: self.bars.decide(sequence, nats, nats / most), score }
        };
        Ok(scores.iter().zip(sequences).map(decide).collect())
    }

    fn close(&mut self, sequence: Sequence) {
        self.bars.close(sequence);
    }
}

/// The large model when every measure that has a threshold reaches it.
#[derive(Debug, Clone, Copy)]
pub struct Immediate {
    /// Threshold of the aleatoric measure.
    pub aleatoric: Option<f64>,
    /// Threshold of the epistemic measure.
    pub epistemic: Option<f64>,
    /// Threshold of the entropy, in nats.
    pub entropy: Option<f64>,
}

impl Default for Immediate {
    /// The aleatoric measure at 2.275, as the reference has it when nothing is said.
    fn default() -> Self {
        Self { aleatoric: Some(2.275), epistemic: None, entropy: None }
    }
}

impl Policy for Immediate {
    fn name(&self) -> &'static str {
        "immediate"
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        if self.aleatoric.or(self.epistemic).or(self.entropy).is_none() {
            return Err(Error::setting("the immediate policy's thresholds", "none", "at least one"));
        }
        let evidence = Evidence::of(step.logits, TOP)?;
        let (aleatoric, epistemic) = (numbers(&evidence.aleatoric)?, numbers(&evidence.epistemic)?);
        let entropy = numbers(&entropy(step.logits)?)?;
        check_rows(entropy.len(), sequences)?;
        // A measure that is not a number reaches nothing.
        let reaches = |value: f32, threshold: Option<f64>| threshold.is_none_or(|t| f64::from(value) >= t);
        let decide = |i: usize| {
            let large = reaches(aleatoric[i], self.aleatoric)
                && reaches(epistemic[i], self.epistemic)
                && reaches(entropy[i], self.entropy);
            Decision { large, score: aleatoric[i] }
        };
        Ok((0..entropy.len()).map(decide).collect())
    }
}

/// A mean of certainty, `m <- f m + (1 - f) [aleatoric < threshold]`: the large model when it is at most `to_large`
/// after a token of the small one, or at most `to_small` after one of its own.
#[derive(Debug)]
pub struct Momentum {
    aleatoric: f64,
    factor: f64,
    to_large: f64,
    to_small: f64,
    states: PerSequence<Certainty>,
}

/// What [`Momentum`] remembers of a sequence.
#[derive(Debug)]
struct Certainty {
    aleatoric: f64,
    mean: f64,
    /// Whether the large model chose last.
    large: bool,
}

impl Certainty {
    fn new(aleatoric: f64) -> Self {
        Self { aleatoric, mean: 0.0, large: true }
    }
}

impl Momentum {
    /// The reference's factor and bounds are 0.7, 0.3 and 0.7.
    pub fn new(aleatoric: f64, factor: f64, to_large: f64, to_small: f64) -> Result<Self> {
        check_finite("the aleatoric threshold", aleatoric)?;
        for (name, value) in [("momentum_factor", factor), ("to_large", to_large), ("to_small", to_small)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::setting(name, value, "0 to 1"));
            }
        }
        Ok(Self { aleatoric, factor, to_large, to_small, states: PerSequence::default() })
    }
}

impl Policy for Momentum {
    fn name(&self) -> &'static str {
        "momentum"
    }

    fn accepts(&self) -> Accepts {
        Accepts { threshold: Some(ANY), target: false }
    }

    fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        self.accepts().check(self.name(), settings)?;
        let threshold = settings.threshold.unwrap_or(self.aleatoric);
        self.states.set(sequence, Certainty::new(threshold));
        Ok(())
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let measure = numbers(&Evidence::of(step.logits, TOP)?.aleatoric)?;
        check_rows(measure.len(), sequences)?;
        let decide = |(&value, &sequence): (&f32, &Sequence)| {
            let state = self.states.get(sequence, || Certainty::new(self.aleatoric));
            let sure = if f64::from(value) < state.aleatoric { 1.0 } else { 0.0 };
            state.mean = self.factor * state.mean + (1.0 - self.factor) * sure;
            state.large = state.mean <= if state.large { self.to_small } else { self.to_large };
            Decision { large: state.large, score: value }
        };
        Ok(measure.iter().zip(sequences).map(decide).collect())
    }

    fn close(&mut self, sequence: Sequence) {
        self.states.close(sequence);
    }
}

/// Two states and a window: from small to large when a value reaches the threshold, back when the mean of the last
/// values since falls below it.
#[derive(Debug, Clone)]
pub struct Hysteresis {
    threshold: f64,
    window: usize,
    /// Whether the value that led to the large model counts towards the mean.
    counts_first: bool,
    large: bool,
    history: VecDeque<f64>,
}

impl Hysteresis {
    /// Begins with the large model and nothing seen.
    pub fn new(threshold: f64, window: usize, counts_first: bool) -> Self {
        Self { threshold, window: window.max(1), counts_first, large: true, history: VecDeque::new() }
    }

    /// Takes the next value; whether the large model chooses.
    pub fn step(&mut self, value: f64) -> bool {
        self.step_unless(value, false)
    }

    /// [`step`](Self::step), where `sure` keeps the small model whatever the value.
    pub fn step_unless(&mut self, value: f64, sure: bool) -> bool {
        if self.large {
            self.history.push_back(value);
            if self.history.len() > self.window {
                self.history.pop_front();
            }
            let mean = self.history.iter().sum::<f64>() / self.history.len() as f64;
            if mean < self.threshold {
                self.history.clear();
                self.large = false;
            }
        } else if value >= self.threshold && !sure {
            self.history.clear();
            if self.counts_first {
                self.history.push_back(value);
            }
            self.large = true;
        }
        self.large
    }
}

/// [`Hysteresis`] on the aleatoric measure, except that a low entropy keeps the small model.
#[derive(Debug)]
pub struct Rolling {
    aleatoric: f64,
    entropy: f64,
    window: usize,
    states: PerSequence<Hysteresis>,
}

impl Rolling {
    /// `entropy` in nats; the reference's window is 3.
    pub fn new(aleatoric: f64, entropy: f64, window: usize) -> Result<Self> {
        check_finite("the aleatoric threshold", aleatoric)?;
        check_finite("the entropy threshold", entropy)?;
        check_window(window)?;
        Ok(Self { aleatoric, entropy, window, states: PerSequence::default() })
    }
}

impl Policy for Rolling {
    fn name(&self) -> &'static str {
        "rolling"
    }

    fn accepts(&self) -> Accepts {
        Accepts { threshold: Some(ANY), target: false }
    }

    fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        self.accepts().check(self.name(), settings)?;
        let threshold = settings.threshold.unwrap_or(self.aleatoric);
        self.states.set(sequence, Hysteresis::new(threshold, self.window, true));
        Ok(())
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let measure = numbers(&Evidence::of(step.logits, TOP)?.aleatoric)?;
        let entropy = numbers(&entropy(step.logits)?)?;
        check_rows(measure.len(), sequences)?;
        let (threshold, window) = (self.aleatoric, self.window);
        let decide = |(i, &sequence): (usize, &Sequence)| {
            let state = self.states.get(sequence, || Hysteresis::new(threshold, window, true));
            let large = state.step_unless(f64::from(measure[i]), f64::from(entropy[i]) < self.entropy);
            Decision { large, score: measure[i] }
        };
        Ok(sequences.iter().enumerate().map(decide).collect())
    }

    fn close(&mut self, sequence: Sequence) {
        self.states.close(sequence);
    }
}

/// [`Hysteresis`] on the aleatoric measure; the value that led to the large model does not count towards the mean.
#[derive(Debug)]
pub struct DuoRolling {
    aleatoric: f64,
    window: usize,
    states: PerSequence<Hysteresis>,
}

impl DuoRolling {
    /// The reference's window is 3.
    pub fn new(aleatoric: f64, window: usize) -> Result<Self> {
        check_finite("the aleatoric threshold", aleatoric)?;
        check_window(window)?;
        Ok(Self { aleatoric, window, states: PerSequence::default() })
    }
}

impl Policy for DuoRolling {
    fn name(&self) -> &'static str {
        "duo rolling"
    }

    fn accepts(&self) -> Accepts {
        Accepts { threshold: Some(ANY), target: false }
    }

    fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        self.accepts().check(self.name(), settings)?;
        let threshold = settings.threshold.unwrap_or(self.aleatoric);
        self.states.set(sequence, Hysteresis::new(threshold, self.window, false));
        Ok(())
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let measure = numbers(&Evidence::of(step.logits, TOP)?.aleatoric)?;
        check_rows(measure.len(), sequences)?;
        let (threshold, window) = (self.aleatoric, self.window);
        let decide = |(&value, &sequence): (&f32, &Sequence)| {
            let state = self.states.get(sequence, || Hysteresis::new(threshold, window, false));
            Decision { large: state.step(f64::from(value)), score: value }
        };
        Ok(measure.iter().zip(sequences).map(decide).collect())
    }

    fn close(&mut self, sequence: Sequence) {
        self.states.close(sequence);
    }
}

pub(super) fn check_window(window: usize) -> Result<()> {
    if window > 0 { Ok(()) } else { Err(Error::setting("window_size", window, "at least 1")) }
}
