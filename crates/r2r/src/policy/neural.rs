//! Policies that ask the router.

use std::sync::Arc;
use std::sync::Mutex;

use super::rolling::check_window;
use super::{Decision, Hysteresis, PerSequence, Policy, Score, Sequence, StepView, check_rows};
use crate::router::{Router, route};
use crate::{Error, Result};

/// A router that several policies may share; its tensors have one owner at a time.
pub type SharedRouter = Arc<Mutex<Router>>;

fn probabilities(router: &SharedRouter, step: &StepView) -> Result<Vec<f32>> {
    let router = router.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(route(&router, step.logits, step.hidden, step.token, 0.5)?.probability)
}

fn check_threshold(threshold: f64) -> Result<()> {
    if (0.0..=1.0).contains(&threshold) {
        Ok(())
    } else {
        Err(Error::ThresholdOutOfRange { found: threshold })
    }
}

/// The large model when the router's probability reaches the threshold.
#[derive(Debug)]
pub struct Neural {
    router: SharedRouter,
    threshold: f64,
}

impl Neural {
    /// A router at a threshold, which may be another for every request.
    pub fn new(router: SharedRouter, threshold: f64) -> Result<Self> {
        check_threshold(threshold)?;
        Ok(Self { router, threshold })
    }
}

impl Policy for Neural {
    fn name(&self) -> &'static str {
        "neural"
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let scores = probabilities(&self.router, step)?;
        check_rows(scores.len(), sequences)?;
        Ok(scores
            .into_iter()
            .map(|score| Decision { large: f64::from(score) >= self.threshold, score })
            .collect())
    }
}

impl Score for Neural {
    fn name(&self) -> &'static str {
        "neural"
    }

    fn scores(&self, step: &StepView) -> Result<Vec<f32>> {
        probabilities(&self.router, step)
    }
}

/// [`Hysteresis`] on the router's probability.
#[derive(Debug)]
pub struct NeuralRolling {
    router: SharedRouter,
    threshold: f64,
    window: usize,
    states: PerSequence<Hysteresis>,
}

impl NeuralRolling {
    /// The reference's window is 3.
    pub fn new(router: SharedRouter, threshold: f64, window: usize) -> Result<Self> {
        check_threshold(threshold)?;
        check_window(window)?;
        Ok(Self { router, threshold, window, states: PerSequence::default() })
    }
}

impl Policy for NeuralRolling {
    fn name(&self) -> &'static str {
        "neural rolling"
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let scores = probabilities(&self.router, step)?;
        check_rows(scores.len(), sequences)?;
        let (threshold, window) = (self.threshold, self.window);
        let decide = |(&score, &sequence): (&f32, &Sequence)| {
            let state = self.states.get(sequence, || Hysteresis::new(threshold, window, true));
            Decision { large: state.step(f64::from(score)), score }
        };
        Ok(scores.iter().zip(sequences).map(decide).collect())
    }

    fn close(&mut self, sequence: Sequence) {
        self.states.close(sequence);
    }
}
