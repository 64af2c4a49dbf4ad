//! Policies that do not look at the step: a coin, the two ends, and somebody who knows.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Accepts, Decision, PerSequence, Policy, Sequence, Settings, StepView, check_rows};
use crate::{Error, Result};

/// The large model with a given probability.
#[derive(Debug)]
pub struct Random {
    share: f64,
    seed: u64,
    states: PerSequence<Coin>,
}

/// One sequence's coin.
#[derive(Debug)]
struct Coin {
    share: f64,
    rng: ChaCha8Rng,
}

impl Coin {
    fn new(share: f64, seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self { share, rng }
    }
}

impl Random {
    /// Coins of each sequence follow from `seed` and its name alone, or its own [seed](Settings::seed).
    pub fn new(share: f64, seed: u64) -> Result<Self> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::setting("the random policy's share", share, "0 to 1"));
        }
        Ok(Self { share, seed, states: PerSequence::default() })
    }
}

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn accepts(&self) -> Accepts {
        Accepts { threshold: None, target: true }
    }

    fn open(&mut self, sequence: Sequence, settings: &Settings) -> Result<()> {
        self.accepts().check(self.name(), settings)?;
        let share = settings.target.unwrap_or(self.share);
        self.states.set(sequence, Coin::new(share, self.seed, settings.seed.unwrap_or(sequence.0)));
        Ok(())
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        check_rows(rows(step)?, sequences)?;
        let (share, seed) = (self.share, self.seed);
        let decide = |&sequence: &Sequence| {
            let coin = self.states.get(sequence, || Coin::new(share, seed, sequence.0));
            let thrown = coin.rng.random::<f64>();
            Decision { large: thrown < coin.share, score: thrown as f32 }
        };
        Ok(sequences.iter().map(decide).collect())
    }

    fn close(&mut self, sequence: Sequence) {
        self.states.close(sequence);
    }
}

/// The small model chooses every token.
#[derive(Debug, Clone, Copy, Default)]
pub struct AlwaysSmall;

impl Policy for AlwaysSmall {
    fn name(&self) -> &'static str {
        "always small"
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        check_rows(rows(step)?, sequences)?;
        Ok(vec![Decision { large: false, score: 0.0 }; sequences.len()])
    }
}

/// The large model chooses every token.
#[derive(Debug, Clone, Copy, Default)]
pub struct AlwaysLarge;

impl Policy for AlwaysLarge {
    fn name(&self) -> &'static str {
        "always large"
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        check_rows(rows(step)?, sequences)?;
        Ok(vec![Decision { large: true, score: 1.0 }; sequences.len()])
    }
}

/// Knows whether a token of the small model would change the path: runs the large model, continues both ways and asks a
/// judge, or looks it up.
pub trait Foresight: Send {
    /// For the next token of a sequence: how likely it changes the path (the mean of the judge's scores), given the small
    /// model's choice.
    fn divergence(&mut self, sequence: Sequence, token: i64) -> Result<f32>;

    /// Forgets a sequence.
    fn close(&mut self, sequence: Sequence) {
        let _ = sequence;
    }
}

/// The large model where [`Foresight`] says that the small one's token changes the path (0.5 or more).
pub struct Oracle<F> {
    foresight: F,
}

impl<F: Foresight> Oracle<F> {
    /// Asks `foresight` at every step.
    pub fn new(foresight: F) -> Self {
        Self { foresight }
    }
}

impl<F: Foresight> Policy for Oracle<F> {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let tokens: Vec<i64> = Vec::try_from(step.token)?;
        check_rows(tokens.len(), sequences)?;
        let mut decide = |(&token, &sequence): (&i64, &Sequence)| {
            let score = self.foresight.divergence(sequence, token)?;
            Ok(Decision { large: score >= 0.5, score })
        };
        tokens.iter().zip(sequences).map(&mut decide).collect()
    }

    fn close(&mut self, sequence: Sequence) {
        self.foresight.close(sequence);
    }
}

fn rows(step: &StepView) -> Result<usize> {
    step.token.size1().map(|n| n as usize).map_err(Error::from)
}
