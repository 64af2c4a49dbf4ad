//! The routers of a study.

use std::path::{Path, PathBuf};

use nics_base::interrupt::Interrupt;
use tch::{Device, Kind as Dtype};

use super::settings::Study;
use super::{Labels, Models};
use crate::checkpoint::{Card, CommonArgs, LabelStatistics, load, save};
use crate::policy::uncertainty::{Evidence, TOP, entropy};
use crate::router::{Architecture, InitArgs, Router, RouterConfig, Storage};
use crate::training::{Hooks, train};
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

    /// Its folder.
    pub fn folder(self, routers: &Path) -> PathBuf {
        routers.join(match self {
            Self::R2r => "r2r",
            Self::Mismatch => "mismatch",
            Self::LogitsOnly => "logits-only",
            Self::HiddenOnly => "hidden-only",
            Self::NoToken => "no-token",
            Self::NoLogits => "no-logits",
        })
    }

    /// Parameters of the trained router under `routers`.
    pub fn parameters(self, routers: &Path, models: &Models) -> Result<usize> {
        let (router, _) = load(&self.folder(routers), Some(&models.embedding), Storage::F32, Device::Cpu)?;
        Ok(router.parameters()?.iter().map(|(_, p)| p.numel()).sum())
    }

    fn architecture(self) -> Architecture {
        match self {
            Self::R2r | Self::Mismatch => Architecture::HiddenTokenLogits,
            Self::LogitsOnly => Architecture::Logits,
            Self::HiddenOnly => Architecture::Hidden,
            Self::NoToken => Architecture::HiddenLogits,
            Self::NoLogits => Architecture::HiddenToken,
        }
    }
}

/// Trains every router and writes it into its folder under `dir`; those that are there are left.
///
/// # Errors
/// Labels of one kind alone, an interrupt.
pub fn train_routers(
    models: &Models,
    study: &Study,
    labels: [&Labels; 2],
    seed: u64,
    dir: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    let [training, validation] = labels;
    for kind in Kind::ALL {
        let folder = kind.folder(dir);
        if folder.exists() {
            continue;
        }
        let settings = &study.router;
        let architecture = kind.architecture();
        let args = InitArgs {
            hidden_states_size: architecture.takes_hidden().then(|| models.embedding.size()[1]),
            logits_size: architecture.takes_logits().then_some(settings.top_k),
            hidden_dims: settings.hidden_dims.clone(),
            expansion_factor: settings.expansion_factor,
            dropout_rate: settings.dropout_rate,
            ..InitArgs::default()
        };
        let config = RouterConfig { architecture, args };
        let mut router = Router::random(config.clone(), Some(&models.embedding), None, seed, Device::Cpu)?;
        let column = |labels: &Labels| {
            if kind == Kind::Mismatch {
                labels.mismatch.shallow_clone()
            } else {
                labels.divergent.shallow_clone()
            }
        };
        let rows = |labels: &Labels| labels.rows(settings.top_k, &column(labels));
        let mut run = settings.training.clone();
        run.seed += seed;
        let hooks = Hooks { interrupt: interrupt.clone(), ..Hooks::default() };
        let state = dir.join(format!("{}.state", kind.name().replace([',', ' '], "-")));
        std::fs::create_dir_all(&state)
            .map_err(|source| nics_core::Error::Io { path: state.clone(), source })?;
        let outcome = train(&mut router, &rows(training)?, &rows(validation)?, &run, Some(&state), hooks)?;
        let common = CommonArgs { threshold: outcome.threshold.threshold, input_type: inputs(architecture) };
        let mut card = Card::new(&config, common);
        let count =
            |t: &tch::Tensor| -> Result<u64> { Ok(t.f_sum(Dtype::Int64)?.f_int64_value(&[])? as u64) };
        card.tokenizer_hash = Some(models.tokenizer.clone());
        card.labels = Some(LabelStatistics {
            train: training.len() as u64,
            validation: validation.len() as u64,
            divergent: count(&training.divergent)?,
            mismatch: count(&training.mismatch)?,
        });
        card.validation_curve = outcome.validation.curve();
        save(&folder, &router, &card)?;
        let removed = std::fs::remove_dir_all(&state);
        removed.map_err(|source| nics_core::Error::Io { path: state, source })?;
    }
    Ok(())
}

fn inputs(architecture: Architecture) -> Vec<String> {
    [
        ("hidden_states", architecture.takes_hidden()),
        ("token", architecture.takes_token()),
        ("logits", architecture.takes_logits()),
    ]
    .into_iter()
    .filter(|(_, takes)| *takes)
    .map(|(name, _)| name.to_owned())
    .collect()
}

/// What policies look at, on labelled rows.
pub(super) struct Measures {
    pub entropy: Vec<f32>,
    pub aleatoric: Vec<f32>,
}

impl Measures {
    pub(super) fn of(labels: &Labels) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let numbers = |t: &tch::Tensor| -> Result<Vec<f32>> { Ok(Vec::try_from(t)?) };
        Ok(Self {
            entropy: numbers(&entropy(&labels.logits)?)?,
            aleatoric: numbers(&Evidence::of(&labels.logits, TOP)?.aleatoric)?,
        })
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
