//! What decides a run's result.

use serde::{Deserialize, Serialize};

use super::{AdamWOptions, Result, Schedule, TrainError};

/// The settings of a run. Every field but `save_every` decides weights or log, so a run resumes only with equal ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Updates of the weights. Default 1000.
    pub steps: u64,
    /// Micro batches whose gradients make one update. Default 1.
    pub accumulation: u64,
    /// The highest learning rate, reached at the end of the warm-up. Default 1e-3.
    pub lr: f64,
    /// Where the cosine ends, as a share of `lr`; 1 keeps the rate constant after the warm-up. Default 0.1.
    pub min_lr_ratio: f64,
    /// Steps over which the rate rises from 0. Default 100.
    pub warmup: u64,
    /// Decay of the running means of gradient and squared gradient. Default `[0.9, 0.95]`.
    pub betas: [f64; 2],
    /// What keeps the update's denominator from 0. Default 1e-8.
    pub eps: f64,
    /// Decoupled weight decay of matrices; vectors (norm scales, biases) are not decayed. Default 0.1.
    pub weight_decay: f64,
    /// The most that the gradient's global norm may be; 0 is no limit. Default 1.
    pub clip: f64,
    /// Decay of an average of the weights, used for evaluation and the result; 0 is no average. Default 0.
    pub ema: f64,
    /// Seed of the data. Default 0.
    pub seed: u64,
    /// Steps between two saved states; the last step is always saved. Default 200.
    pub save_every: u64,
    /// Steps between two rows of the log; the last step always has one. Default 10.
    pub log_every: u64,
    /// Steps between two evaluations; 0 evaluates after the last step alone. Default 0.
    pub eval_every: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            accumulation: 1,
            lr: 1e-3,
            min_lr_ratio: 0.1,
            warmup: 100,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            ema: 0.0,
            seed: 0,
            save_every: 200,
            log_every: 10,
            eval_every: 0,
        }
    }
}

impl TrainConfig {
    /// Refuses settings that make no sense, naming the field.
    pub fn validate(&self) -> Result<()> {
        let unit = |x: f64| (0.0..1.0).contains(&x);
        let not_negative = |x: f64| x.is_finite() && x >= 0.0;
        check("steps", self.steps, self.steps > 0, "at least 1")?;
        check("accumulation", self.accumulation, self.accumulation > 0, "at least 1")?;
        check("lr", self.lr, not_negative(self.lr) && self.lr > 0.0, "a finite number above 0")?;
        check("min_lr_ratio", self.min_lr_ratio, (0.0..=1.0).contains(&self.min_lr_ratio), "0 to 1")?;
        check("warmup", self.warmup, self.warmup <= self.steps, "at most steps")?;
        check("betas[0]", self.betas[0], unit(self.betas[0]), "0 or more, below 1")?;
        check("betas[1]", self.betas[1], unit(self.betas[1]), "0 or more, below 1")?;
        check("eps", self.eps, not_negative(self.eps) && self.eps > 0.0, "a finite number above 0")?;
        check("weight_decay", self.weight_decay, not_negative(self.weight_decay), "0 or a positive number")?;
        check("clip", self.clip, not_negative(self.clip), "0 (no limit) or a positive number")?;
        check("ema", self.ema, unit(self.ema), "0 (none) or more, below 1")?;
        check("save_every", self.save_every, self.save_every > 0, "at least 1")?;
        check("log_every", self.log_every, self.log_every > 0, "at least 1")
    }

    /// The learning rate over the run.
    pub fn schedule(&self) -> Schedule {
        Schedule { steps: self.steps, warmup: self.warmup, floor: self.min_lr_ratio }
    }

    /// The optimiser's settings.
    pub fn adamw(&self) -> AdamWOptions {
        AdamWOptions { betas: self.betas, eps: self.eps, weight_decay: self.weight_decay }
    }
}

fn check(
    field: &'static str,
    value: impl std::fmt::Display,
    holds: bool,
    expected: &'static str,
) -> Result<()> {
    if holds { Ok(()) } else { Err(TrainError::Config { field, found: value.to_string(), expected }) }
}
