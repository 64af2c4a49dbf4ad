//! A policy by its name, with the settings that a command line or a file gives it.

use serde::{Deserialize, Serialize};

use super::settings::{ANY, NATS, check_threshold};
use super::{
    Accepts, AlwaysLarge, AlwaysSmall, DuoRolling, Entropy, Immediate, Momentum, Neural, NeuralRolling,
    PROBABILITIES, Policy, Random, Rolling, STEP, Settings, SharedRouter,
};
use crate::{Error, Result};

/// The policies that need nobody who knows the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// [`Neural`]
    #[default]
    Neural,
    /// [`NeuralRolling`]
    NeuralRolling,
    /// [`Entropy`]
    Entropy,
    /// [`Immediate`]
    Immediate,
    /// [`Momentum`]
    Momentum,
    /// [`Rolling`]
    Rolling,
    /// [`DuoRolling`]
    DuoRolling,
    /// [`Random`]
    Random,
    /// [`AlwaysSmall`]
    AlwaysSmall,
    /// [`AlwaysLarge`]
    AlwaysLarge,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Neural,
        Self::NeuralRolling,
        Self::Entropy,
        Self::Immediate,
        Self::Momentum,
        Self::Rolling,
        Self::DuoRolling,
        Self::Random,
        Self::AlwaysSmall,
        Self::AlwaysLarge,
    ];

    /// Its name on command lines and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Neural => "neural",
            Self::NeuralRolling => "neural-rolling",
            Self::Entropy => "entropy",
            Self::Immediate => "immediate",
            Self::Momentum => "momentum",
            Self::Rolling => "rolling",
            Self::DuoRolling => "duo-rolling",
            Self::Random => "random",
            Self::AlwaysSmall => "always-small",
            Self::AlwaysLarge => "always-large",
        }
    }

    /// Whether it asks a router.
    pub fn needs_router(self) -> bool {
        matches!(self, Self::Neural | Self::NeuralRolling)
    }

    /// What may be set when it is made and, but for [`Immediate`], by each sequence.
    fn accepts(self) -> Accepts {
        let (threshold, target) = match self {
            Self::Neural => (Some(PROBABILITIES), true),
            Self::NeuralRolling => (Some(PROBABILITIES), false),
            Self::Entropy => (Some(NATS), true),
            Self::Immediate | Self::Momentum | Self::Rolling | Self::DuoRolling => (Some(ANY), false),
            Self::Random => (None, true),
            Self::AlwaysSmall | Self::AlwaysLarge => (None, false),
        };
        Accepts { threshold, target }
    }
}

impl std::str::FromStr for Kind {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|k| k.name() == s).ok_or_else(|| {
            format!("{s:?} is no policy: expected one of {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Values of the reference implementation that nothing here sets.
mod reference {
    pub const ALEATORIC: f64 = 2.275;
    pub const WINDOW: usize = 3;
    pub const MOMENTUM: (f64, f64, f64) = (0.7, 0.3, 0.7);
    pub const ENTROPY: f64 = super::Entropy::DEFAULT;
}

/// A policy that can be made: its name and what is set. What is absent has the reference's value; a router's threshold
/// is the one in its file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicySpec {
    /// Which one.
    pub kind: Kind,
    /// What its score is held against: a probability, nats, or the aleatoric measure. Beside a target, where the bar of
    /// each sequence begins.
    pub threshold: Option<f64>,
    /// The share of tokens that the large model is to choose.
    pub target: Option<f64>,
    /// How far the bar of a share moves; [`STEP`] when absent.
    pub step: Option<f64>,
    /// Values over which [`Rolling`], [`DuoRolling`] and [`NeuralRolling`] take the mean; 3 when absent.
    pub window: Option<usize>,
    /// Seed of [`Random`].
    pub seed: u64,
}

impl PolicySpec {
    /// The policy of this name as the reference has it.
    pub fn new(kind: Kind) -> Self {
        Self { kind, ..Self::default() }
    }

    /// What each sequence may ask of the policy.
    pub fn accepts(&self) -> Accepts {
        match self.kind {
            // Its three thresholds are those of the whole policy.
            Kind::Immediate => Accepts::default(),
            kind => kind.accepts(),
        }
    }

    /// Whether a sequence may ask for this.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the field.
    pub fn check(&self, settings: &Settings) -> Result<()> {
        self.accepts().check(self.kind.name(), settings)
    }

    /// Whether what is set is the policy's to set, and in range.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the field.
    pub fn validate(&self) -> Result<()> {
        let (name, accepts) = (self.kind.name(), self.kind.accepts());
        if let Some(threshold) = self.threshold {
            check_threshold(name, accepts.threshold.as_ref(), threshold)?;
        }
        accepts.check(name, &Settings { target: self.target, ..Settings::default() })?;
        match self.step {
            Some(step) if !(step > 0.0 && step <= 1.0) => {
                return Err(Error::setting("the budget's step", step, "above 0, at most 1"));
            }
            _ => {}
        }
        let rolls = matches!(self.kind, Kind::Rolling | Kind::DuoRolling | Kind::NeuralRolling);
        match self.window {
            Some(window) if !rolls => {
                Err(Error::setting("window_size", window, format!("none: the {name} policy has no window")))
            }
            Some(0) => Err(Error::setting("window_size", 0, "at least 1")),
            _ if self.kind == Kind::Random && self.target.is_none() => {
                Err(Error::setting("target_llm_ratio", "missing", "the random policy's share, 0 to 1"))
            }
            _ => Ok(()),
        }
    }

    /// The policy. `router` with the threshold of its file is for those that [need one](Kind::needs_router).
    ///
    /// # Errors
    /// As [`validate`](Self::validate), and `Error::Input` without a router where one is needed.
    pub fn build(&self, router: Option<(SharedRouter, f64)>) -> Result<Box<dyn Policy>> {
        self.validate()?;
        let router = if self.kind.needs_router() {
            Some(router.ok_or_else(|| {
                Error::Input(format!("the {} policy asks a router, and none is given", self.kind))
            })?)
        } else {
            None
        };
        let window = self.window.unwrap_or(reference::WINDOW);
        let step = self.step.unwrap_or(STEP);
        let aleatoric = self.threshold.unwrap_or(reference::ALEATORIC);
        Ok(match (self.kind, router) {
            (Kind::Neural, Some((router, threshold))) => {
                let policy = Neural::new(router, self.threshold.unwrap_or(threshold))?;
                Box::new(match self.target {
                    Some(share) => policy.holding(share, step)?,
                    None => policy,
                })
            }
            (Kind::NeuralRolling, Some((router, threshold))) => {
                Box::new(NeuralRolling::new(router, self.threshold.unwrap_or(threshold), window)?)
            }
            (Kind::Entropy, _) => {
                let policy = Entropy::new(self.threshold.unwrap_or(reference::ENTROPY))?;
                Box::new(match self.target {
                    Some(share) => policy.holding(share, step)?,
                    None => policy,
                })
            }
            (Kind::Immediate, _) => {
                Box::new(Immediate { aleatoric: Some(aleatoric), epistemic: None, entropy: None })
            }
            (Kind::Momentum, _) => {
                let (factor, to_large, to_small) = reference::MOMENTUM;
                Box::new(Momentum::new(aleatoric, factor, to_large, to_small)?)
            }
            (Kind::Rolling, _) => Box::new(Rolling::new(aleatoric, reference::ENTROPY, window)?),
            (Kind::DuoRolling, _) => Box::new(DuoRolling::new(aleatoric, window)?),
            (Kind::Random, _) => Box::new(Random::new(self.target.unwrap_or(0.0), self.seed)?),
            (Kind::AlwaysSmall, _) => Box::new(AlwaysSmall),
            (Kind::AlwaysLarge, _) => Box::new(AlwaysLarge),
            (Kind::Neural | Kind::NeuralRolling, None) => {
                return Err(Error::Input(format!(
                    "the {} policy asks a router, and none is given",
                    self.kind
                )));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_has_a_name_and_says_what_it_accepts() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
            if kind.needs_router() {
                assert!(
                    PolicySpec::new(kind).build(None).is_err_and(|e| e.to_string().contains("asks a router"))
                );
                continue;
            }
            let target = (kind == Kind::Random).then_some(0.5);
            let spec = PolicySpec { target, ..PolicySpec::new(kind) };
            assert_eq!(spec.build(None).unwrap().accepts(), spec.accepts(), "{kind}");
        }
        assert!("oracle".parse::<Kind>().unwrap_err().contains("always-small"));
    }

    #[test]
    fn what_is_not_a_policys_is_refused() {
        let wrong = |spec: PolicySpec| spec.validate().unwrap_err().to_string();
        let of = PolicySpec::new;
        assert!(wrong(of(Kind::Random)).contains("target_llm_ratio is missing"));
        assert!(wrong(PolicySpec { threshold: Some(0.5), ..of(Kind::AlwaysLarge) }).contains("threshold"));
        assert!(wrong(PolicySpec { threshold: Some(3.0), ..of(Kind::Neural) }).contains("threshold is 3"));
        assert!(wrong(PolicySpec { target: Some(0.5), ..of(Kind::Rolling) }).contains("holds no share"));
        assert!(
            wrong(PolicySpec { target: Some(1.5), ..of(Kind::Entropy) }).contains("target_llm_ratio is 1.5")
        );
        assert!(wrong(PolicySpec { window: Some(2), ..of(Kind::Neural) }).contains("no window"));
        assert!(wrong(PolicySpec { step: Some(0.0), ..of(Kind::Neural) }).contains("step"));
        PolicySpec { threshold: Some(0.4), target: Some(0.1), ..of(Kind::Neural) }.validate().unwrap();
    }
}
