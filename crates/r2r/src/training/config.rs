//! What decides a run's result.

use serde::{Deserialize, Serialize};

use crate::losses::{Loss, positive_weight};
use crate::{Error, Result};

/// The loss to be trained on; its class weights come from the labels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", deny_unknown_fields)]
pub enum LossKind {
    /// Weighted binary cross entropy.
    Bce {
        /// Multiplies the weight of divergent rows; 1 balances the classes.
        recall_factor: f64,
    },
    /// Focal loss.
    Focal {
        /// Weight of divergent rows.
        alpha: f64,
        /// How fast easy rows fade.
        gamma: f64,
    },
    /// Two-action preference.
    Dpo {
        /// How sharp the preference is.
        beta: f64,
    },
}

impl LossKind {
    /// The loss for `divergent` of `total` rows.
    pub(super) fn constants(self, divergent: usize, total: usize) -> Result<Loss> {
        Ok(match self {
            Self::Bce { recall_factor } => {
                Loss::Bce { positive_weight: positive_weight(divergent, total, recall_factor)? }
            }
            Self::Focal { alpha, gamma } => Loss::Focal { alpha, gamma },
            Self::Dpo { beta } => Loss::Dpo { beta, positive_share: divergent as f64 / total as f64 },
        })
    }
}

/// The settings of a run; the defaults are the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingConfig {
    /// Learning rate, constant. Default 5e-5.
    pub lr: f64,
    /// Decoupled weight decay of every parameter, biases and norms too. Default 5e-4.
    pub weight_decay: f64,
    /// Decay of the running means of gradient and squared gradient. Default `[0.9, 0.999]`.
    pub betas: [f64; 2],
    /// What keeps the update's denominator from 0. Default 1e-8.
    pub eps: f64,
    /// Rows of a batch. Default 1024.
    pub batch: usize,
    /// The most epochs. Default 50.
    pub epochs: usize,
    /// Epochs without a lower validation loss after which training ends. Default 10.
    pub patience: usize,
    /// Whether rows are shuffled anew for every epoch. Default true.
    pub shuffle: bool,
    /// The loss. Default weighted cross entropy with factor 1.
    pub loss: LossKind,
    /// Share of divergent rows that the threshold should catch. Default 0.95.
    pub min_recall: f64,
    /// Seed of shuffles and dropout. Default 0.
    pub seed: u64,
    /// Steps between two saved states within an epoch; after an epoch there always is one. Default 500.
    pub save_every: usize,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            lr: 5e-5,
            weight_decay: 5e-4,
            betas: [0.9, 0.999],
            eps: 1e-8,
            batch: 1024,
            epochs: 50,
            patience: 10,
            shuffle: true,
            loss: LossKind::Bce { recall_factor: 1.0 },
            min_recall: crate::thresholds::MIN_RECALL,
            seed: 0,
            save_every: 500,
        }
    }
}

impl TrainingConfig {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the field.
    pub fn validate(&self) -> Result<()> {
        let check = |field: &str, found: f64, holds: bool, expected: &str| {
            if holds { Ok(()) } else { Err(Error::setting(field, found, expected)) }
        };
        let positive = |x: f64| x.is_finite() && x > 0.0;
        check("lr", self.lr, positive(self.lr), "a number above 0")?;
        let decay = self.weight_decay;
        check("weight_decay", decay, decay.is_finite() && decay >= 0.0, "0 or a positive number")?;
        for beta in self.betas {
            check("betas", beta, (0.0..1.0).contains(&beta), "0 or more, below 1")?;
        }
        check("eps", self.eps, positive(self.eps), "a number above 0")?;
        for (field, value) in [
            ("batch", self.batch),
            ("epochs", self.epochs),
            ("patience", self.patience),
            ("save_every", self.save_every),
        ] {
            check(field, value as f64, value > 0, "at least 1")?;
        }
        check("min_recall", self.min_recall, (0.0..=1.0).contains(&self.min_recall), "0 to 1")?;
        match self.loss {
            LossKind::Bce { recall_factor: x } => check("recall_factor", x, positive(x), "a number above 0"),
            LossKind::Focal { alpha, gamma } => {
                check("alpha", alpha, (0.0..=1.0).contains(&alpha), "0 to 1")?;
                check("gamma", gamma, gamma.is_finite() && gamma >= 0.0, "0 or a positive number")
            }
            LossKind::Dpo { beta } => check("beta", beta, positive(beta), "a number above 0"),
        }
    }
}
