//! Policies that ask the router.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tch::{Kind, Tensor};

use super::rolling::check_window;
use super::settings::{Bars, check_threshold};
use super::{
    Accepts, Decision, Hysteresis, PROBABILITIES, PerSequence, Policy, Sequence, Settings, StepView,
    check_rows,
};
use crate::Result;
use crate::router::{Architecture, Features, Router, largest_logits};

/// A router that several policies may share; its tensors have one owner at a time.
pub type SharedRouter = Arc<Mutex<Router>>;

/// A router with what it remembers of each sequence: nothing, but for [`Architecture::MultiLogits`], which reads the
/// largest logits of the last few positions. Before there are so many, the oldest stands for those before it.
#[derive(Debug)]
struct Asked {
    router: SharedRouter,
    /// Positions that the router reads.
    slots: usize,
    /// Largest logits of the positions before, float32 `[1, K]` each, oldest first; at most one less than there are slots.
    past: PerSequence<VecDeque<Tensor>>,
}

impl Asked {
    fn new(router: SharedRouter) -> Self {
        let config = router.lock().unwrap_or_else(PoisonError::into_inner).config().clone();
        let slots = match config.architecture {
            Architecture::MultiLogits => config.args.neural_window_size.max(1) as usize,
            _ => 1,
        };
        Self { router, slots, past: PerSequence::default() }
    }

    /// The probability of each row.
    fn probabilities(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<f32>> {
        check_rows(step.token.size1()? as usize, sequences)?;
        let router = self.router.lock().unwrap_or_else(PoisonError::into_inner);
        let largest = router.config().top_k().map(|k| largest_logits(step.logits, k)).transpose()?;
        let window = match &largest {
            Some(now) if self.slots > 1 => Some(window(&mut self.past, now, sequences, self.slots)?),
            _ => None,
        };
        let features = Features {
            hidden: Some(step.hidden),
            token: Some(step.token),
            logits: window.as_ref().or(largest.as_ref()),
            positions: None,
        };
        let probabilities = Vec::<f32>::try_from(router.probability(&features)?)?;
        check_rows(probabilities.len(), sequences)?;
        // Only now: a step that failed is made again.
        if let (Some(now), Some(_)) = (largest, window) {
            for (row, &sequence) in sequences.iter().enumerate() {
                let past = self.past.get(sequence, VecDeque::new);
                past.push_back(now.f_narrow(0, row as i64, 1)?);
                if past.len() >= self.slots {
                    past.pop_front();
                }
            }
        }
        Ok(probabilities)
    }

    fn close(&mut self, sequence: Sequence) {
        self.past.close(sequence);
    }
}

/// Each sequence's last `slots` positions beside each other, `now` (`[rows, K]`) the last: `[rows, slots * K]`.
fn window(
    past: &mut PerSequence<VecDeque<Tensor>>,
    now: &Tensor,
    sequences: &[Sequence],
    slots: usize,
) -> Result<Tensor> {
    let mut rows = Vec::with_capacity(sequences.len());
    for (row, &sequence) in sequences.iter().enumerate() {
        let now = now.f_narrow(0, row as i64, 1)?;
        let past = past.get(sequence, VecDeque::new);
        let mut parts: Vec<&Tensor> = past.iter().chain([&now]).collect();
        let oldest = parts[0];
        while parts.len() < slots {
            parts.insert(0, oldest);
        }
        rows.push(Tensor::f_cat(&parts, 1)?);
    }
    Ok(Tensor::f_cat(&rows, 0)?.f_to_kind(Kind::Float)?)
}

/// The large model when the router's probability reaches the threshold.
#[derive(Debug)]
pub struct Neural {
    asked: Asked,
    bars: Bars,
}

impl Neural {
    /// A router at a threshold in [`PROBABILITIES`], which may be another for every sequence.
    pub fn new(router: SharedRouter, threshold: f64) -> Result<Self> {
        check_threshold("neural", Some(&PROBABILITIES), threshold)?;
        Ok(Self { asked: Asked::new(router), bars: Bars::fixed(threshold, threshold) })
    }

    /// Holds a share of each sequence's tokens, unless it asks for another or for a threshold; bars begin at the threshold
    /// and move by `step` (see [`BudgetState`](super::BudgetState)).
    pub fn holding(self, share: f64, step: f64) -> Result<Self> {
        Ok(Self { bars: self.bars.holding(share, step)?, ..self })
    }
}

impl Policy for Neural {
    fn name(&self) -> &'static str {
        "neural"
    }

    fn accepts(&self) -> Accepts {
        Accepts { threshold: Some(PROBABILITIES), target: true }
    }

    fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        self.accepts().check(self.name(), settings)?;
        self.bars.open(sequence, settings)
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let scores = self.asked.probabilities(step, sequences)?;
        let decide = |(&score, &sequence): (&f32, &Sequence)| {
            let p = f64::from(score);
            Decision { large: self.bars.decide(sequence, p, p), score }
        };
        Ok(scores.iter().zip(sequences).map(decide).collect())
    }

    fn close(&mut self, sequence: Sequence) {
        self.asked.close(sequence);
        self.bars.close(sequence);
    }
}

/// [`Hysteresis`] on the router's probability.
#[derive(Debug)]
pub struct NeuralRolling {
    asked: Asked,
    threshold: f64,
    window: usize,
    states: PerSequence<Hysteresis>,
}

impl NeuralRolling {
    /// The reference's window is 3.
    pub fn new(router: SharedRouter, threshold: f64, window: usize) -> Result<Self> {
        check_threshold("neural rolling", Some(&PROBABILITIES), threshold)?;
        check_window(window)?;
        Ok(Self { asked: Asked::new(router), threshold, window, states: PerSequence::default() })
    }
}

impl Policy for NeuralRolling {
    fn name(&self) -> &'static str {
        "neural rolling"
    }

    fn accepts(&self) -> Accepts {
        Accepts { threshold: Some(PROBABILITIES), target: false }
    }

    fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        self.accepts().check(self.name(), settings)?;
        let threshold = settings.threshold.unwrap_or(self.threshold);
        self.states.set(sequence, Hysteresis::new(threshold, self.window, true));
        Ok(())
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let scores = self.asked.probabilities(step, sequences)?;
        let (threshold, window) = (self.threshold, self.window);
        let decide = |(&score, &sequence): (&f32, &Sequence)| {
            let state = self.states.get(sequence, || Hysteresis::new(threshold, window, true));
            Decision { large: state.step(f64::from(score)), score }
        };
        Ok(scores.iter().zip(sequences).map(decide).collect())
    }

    fn close(&mut self, sequence: Sequence) {
        self.asked.close(sequence);
        self.states.close(sequence);
    }
}
