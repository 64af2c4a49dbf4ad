//! Who chooses a token: policies that look at what the small model computed and keep its token or ask the large model.
//!
//! A policy keeps its state for each sequence, so that a sequence's decisions do not depend on what else is in the batch.
//!
//! | policy | the large model is asked when |
//! |---|---|
//! | [`Neural`] | the router's probability reaches the threshold: the paper's method |
//! | [`Entropy`] | the entropy of the small model's distribution reaches the threshold |
//! | [`Immediate`] | every given measure of uncertainty reaches its threshold |
//! | [`Momentum`] | a running mean of certainty is low, with one bound for going and one for coming back |
//! | [`Rolling`], [`DuoRolling`], [`NeuralRolling`] | a measure is high, and until its mean over a window is low again |
//! | [`Random`] | a coin says so |
//! | [`AlwaysSmall`], [`AlwaysLarge`] | never, always |
//! | [`Oracle`] | somebody who knows says so: the upper bound |
//!
//! Policies with a memory begin as if the large model had chosen the last token. A policy may serve sequences with
//! different [`Settings`]: thresholds of their own, or a share of tokens that the large model is to choose, for which
//! the threshold moves (see [`BudgetState`]). [`PolicySpec`] makes a policy from its name.

mod budget;
mod fixed;
mod neural;
mod rolling;
mod settings;
mod spec;
pub mod uncertainty;

use std::collections::HashMap;

use tch::Tensor;

pub use budget::{BudgetState, STEP};
pub use fixed::{AlwaysLarge, AlwaysSmall, Foresight, Oracle, Random};
pub use neural::{Neural, NeuralRolling, SharedRouter};
pub use rolling::{DuoRolling, Entropy, Hysteresis, Immediate, Momentum, Rolling};
pub use settings::{Accepts, PROBABILITIES, Settings};
pub use spec::{Kind, PolicySpec};

use crate::{Error, Result};

/// A sequence, by a name that its owner gives and does not reuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sequence(pub u64);

/// What the small model computed for the next token of some sequences, a row for each.
#[derive(Debug, Clone, Copy)]
pub struct StepView<'a> {
    /// Raw logits, before temperature and penalties, `[rows, vocab]`.
    pub logits: &'a Tensor,
    /// Hidden states after the final norm, `[rows, hidden]`.
    pub hidden: &'a Tensor,
    /// The tokens that it chose, int64 `[rows]`.
    pub token: &'a Tensor,
}

/// What a policy says about a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// Whether the large model chooses the token.
    pub large: bool,
    /// What the policy looked at: a probability or a measure; 0 or 1 where there is none.
    pub score: f32,
}

/// Decides for each row whether the large model chooses its token.
pub trait Policy: Send {
    /// Its name in results, e.g. `neural`.
    fn name(&self) -> &'static str;

    /// What a sequence may ask of it; nothing, unless said otherwise.
    fn accepts(&self) -> Accepts {
        Accepts::default()
    }

    /// Begins a sequence with settings of its own. One that is not opened has the policy's.
    ///
    /// # Errors
    /// Settings that the policy does not [accept](Self::accepts).
    fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        let _ = sequence;
        self.accepts().check(self.name(), settings)
    }

    /// A decision for each row of `step`, which belong to `sequences`, in their order. Each sequence occurs once, and a
    /// call is one step of each.
    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>>;

    /// Forgets a sequence.
    fn close(&mut self, sequence: Sequence) {
        let _ = sequence;
    }
}

/// State of each sequence, made when it is first seen.
#[derive(Debug)]
pub(crate) struct PerSequence<S> {
    states: HashMap<Sequence, S>,
}

impl<S> Default for PerSequence<S> {
    fn default() -> Self {
        Self { states: HashMap::new() }
    }
}

impl<S> PerSequence<S> {
    pub fn get(&mut self, sequence: Sequence, new: impl FnOnce() -> S) -> &mut S {
        self.states.entry(sequence).or_insert_with(new)
    }

    pub fn set(&mut self, sequence: Sequence, state: S) {
        self.states.insert(sequence, state);
    }

    pub fn close(&mut self, sequence: Sequence) {
        self.states.remove(&sequence);
    }
}

/// Rows and sequences are as many, and none occurs twice.
pub(crate) fn check_rows(rows: usize, sequences: &[Sequence]) -> Result<()> {
    if rows != sequences.len() {
        return Err(Error::Input(format!("{rows} rows for {} sequences", sequences.len())));
    }
    let mut sorted = sequences.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|w| w[0] == w[1]) {
        Some(twice) => Err(Error::Input(format!("sequence {} occurs twice in one step", twice[0].0))),
        None => Ok(()),
    }
}

/// A threshold of a measure that may be any finite number.
pub(crate) fn check_finite(name: &str, value: f64) -> Result<()> {
    if value.is_finite() { Ok(()) } else { Err(Error::setting(name, value, "a finite number")) }
}
