//! The routers of a study, and thresholds at given shares of the validation rows.

use std::path::Path;

use tch::{Device, Tensor};

use super::Models;
use crate::checkpoint::{Card, load};
use crate::labels::pipeline::{Documents, LabelColumn, LabelSet};
use crate::policy::uncertainty::{Evidence, TOP, entropy};
use crate::router::{Architecture, InitArgs, Router, RouterConfig, Storage};
use crate::training::Rows;
use crate::{Error, Result};

/// A router of the study.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Hidden state, token and logits; trained on divergences.
    R2r,
    /// The same, trained on mismatches.
    Mismatch,
    /// Logits alone.
    LogitsOnly,
    /// Hidden state alone.
    HiddenOnly,
    /// Without the token.
    NoToken,
    /// Without the logits.
    NoLogits,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::R2r, Self::Mismatch, Self::LogitsOnly, Self::HiddenOnly, Self::NoToken, Self::NoLogits];

    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::R2r => "R2R",
            Self::Mismatch => "router on mismatches",
            Self::LogitsOnly => "R2R, logits alone",
            Self::HiddenOnly => "R2R, hidden state alone",
            Self::NoToken => "R2R, no token",
            Self::NoLogits => "R2R, no logits",
        }
    }

    /// Its name on command lines.
    pub fn word(self) -> &'static str {
        match self {
            Self::R2r => "r2r",
            Self::Mismatch => "mismatch",
            Self::LogitsOnly => "logits-only",
            Self::HiddenOnly => "hidden-only",
            Self::NoToken => "no-token",
            Self::NoLogits => "no-logits",
        }
    }

    /// What a router of this kind reads.
    pub fn architecture(self) -> Architecture {
        match self {
            Self::R2r | Self::Mismatch => Architecture::HiddenTokenLogits,
            Self::LogitsOnly => Architecture::Logits,
            Self::HiddenOnly => Architecture::Hidden,
            Self::NoToken => Architecture::HiddenLogits,
            Self::NoLogits => Architecture::HiddenToken,
        }
    }

    /// Reads a router of this kind for the models of a pair.
    ///
    /// # Errors
    /// A folder that does not load, a router of another kind or tokenizer.
    pub fn load(self, dir: &Path, models: &Models) -> Result<(Router, Card)> {
        let (router, card) = load(dir, Some(&models.small.embed_tokens), Storage::F32, Device::Cpu)?;
        let (found, expected) = (router.config().architecture, self.architecture());
        if found != expected {
            let expected = format!("{} for {}", expected.name(), self.word());
            return Err(Error::setting(&format!("the type of {}", dir.display()), found.name(), expected));
        }
        card.check_tokenizer("the pair", &models.tokenizer)?;
        Ok((router, card))
    }
}

/// What policies look at, on labelled rows.
pub struct Measures {
    rows: Rows,
    entropy: Vec<f32>,
    aleatoric: Vec<f32>,
}

impl Measures {
    /// Of the rows of labels that count. All logits have to be among them.
    ///
    /// # Errors
    /// Labels with fewer logits than the vocabulary has, which leave the entropy unknown.
    pub fn of(labels: &LabelSet, models: &Models) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let (vocab, hidden) = models.small.embed_tokens.size2()?;
        let args =
            InitArgs { hidden_states_size: Some(hidden), logits_size: Some(vocab), ..InitArgs::default() };
        let config = RouterConfig { architecture: Architecture::HiddenTokenLogits, args };
        let (rows, _) = labels.read(&config, LabelColumn::Divergent, Documents::All)?;
        let logits = rows.logits.as_ref().ok_or_else(|| Error::Input("the labels have no logits".into()))?;
        let numbers = |t: &Tensor| -> Result<Vec<f32>> { Ok(Vec::try_from(t)?) };
        let (entropy, aleatoric) =
            (numbers(&entropy(logits)?)?, numbers(&Evidence::of(logits, TOP)?.aleatoric)?);
        Ok(Self { rows, entropy, aleatoric })
    }

    /// Entropies in nats.
    pub fn entropy(&self) -> &[f32] {
        &self.entropy
    }

    /// The aleatoric measure.
    pub fn aleatoric(&self) -> &[f32] {
        &self.aleatoric
    }

    /// A router's probabilities.
    pub fn probabilities(&self, router: &Router) -> Result<Vec<f32>> {
        let _guard = tch::no_grad_guard();
        let logits = match (&self.rows.logits, router.config().top_k()) {
            (Some(all), Some(k)) => Some(all.f_narrow(1, 0, k)?.f_contiguous()?),
            _ => None,
        };
        let mut features = self.rows.features();
        features.logits = logits.as_ref();
        Ok(Vec::try_from(router.probability(&features)?)?)
    }
}

/// The threshold that a share of the values reaches, half way to the next lower one. Values that are not numbers reach
/// none.
pub(super) fn threshold_at(values: &[f32], rate: f64) -> Result<f64> {
    let mut sorted: Vec<f64> = values.iter().filter(|v| v.is_finite()).map(|&v| f64::from(v)).collect();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let above = (rate * values.len() as f64).round() as usize;
    match (above.checked_sub(1).and_then(|i| sorted.get(i)), sorted.get(above)) {
        (Some(a), Some(b)) => Ok(f64::midpoint(*a, *b)),
        (Some(a), None) | (None, Some(a)) => Ok(*a),
        (None, None) => sorted.last().copied().ok_or(Error::NonFiniteFeatures { what: "a policy's measure" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_lets_the_share_through() {
        let values: Vec<f32> = (0..100).map(|i| i as f32).collect();
        for rate in [0.05, 0.3, 0.9] {
            let threshold = threshold_at(&values, rate).unwrap();
            let share = values.iter().filter(|v| f64::from(**v) >= threshold).count() as f64 / 100.0;
            assert!((share - rate).abs() < 1e-9);
        }
        assert!(threshold_at(&[f32::NAN], 0.5).is_err());
        assert!(threshold_at(&[f32::NAN, 3.0], 1.0).is_ok());
    }
}
