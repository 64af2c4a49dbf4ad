//! What a reply cost.

use serde::{Deserialize, Serialize};

use super::{Source, TokenEvent};

/// Tokens by who chose them, and what the large model read for its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens that the small model chose.
    pub small_tokens: u64,
    /// Tokens that the large model chose; each is one call.
    pub large_tokens: u64,
    /// Tokens that the large model read.
    pub large_read: u64,
    /// Of the small model's tokens, those that the large one was asked for and did not give.
    #[serde(default)]
    pub degraded_tokens: u64,
}

impl Usage {
    /// Counts a token.
    pub fn note(&mut self, event: &TokenEvent) {
        match event.source {
            Source::Small => self.small_tokens += 1,
            Source::Large { read, .. } => {
                self.large_tokens += 1;
                self.large_read += read as u64;
            }
        }
        self.degraded_tokens += u64::from(event.degraded);
    }

    /// All tokens.
    pub fn tokens(&self) -> u64 {
        self.small_tokens + self.large_tokens
    }

    /// Share of the large model's tokens; 0 when there are none at all.
    pub fn large_share(&self) -> f64 {
        if self.tokens() == 0 { 0.0 } else { self.large_tokens as f64 / self.tokens() as f64 }
    }

    /// Mean parameters a token as published figures have it: a token counts the model that chose it,
    /// `(N_s P_s + N_l P_l) / N`. In the unit of `small` and `large`.
    pub fn exclusive_parameters(&self, small: f64, large: f64) -> f64 {
        let share = self.large_share();
        (1.0 - share) * small + share * large
    }

    /// Mean parameters a token that really run: `P_s + r P_l + P_router`; the small model and the router see every token.
    pub fn additive_parameters(&self, small: f64, large: f64, router: f64) -> f64 {
        small + self.large_share() * large + router
    }

    /// Both of them, for models of these sizes.
    pub fn mean_parameters(&self, sizes: &Sizes) -> MeanParameters {
        let Sizes { small, large, router } = *sizes;
        MeanParameters {
            exclusive: self.exclusive_parameters(small, large),
            additive: self.additive_parameters(small, large, router),
        }
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            small_tokens: self.small_tokens + other.small_tokens,
            large_tokens: self.large_tokens + other.large_tokens,
            large_read: self.large_read + other.large_read,
            degraded_tokens: self.degraded_tokens + other.degraded_tokens,
        }
    }
}

/// Activated parameters, in billions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sizes {
    /// Of the small model.
    pub small: f64,
    /// Of the large model.
    pub large: f64,
    /// Of the router; 0 without one.
    pub router: f64,
}

/// Mean activated parameters a token, in billions, counted both ways.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MeanParameters {
    /// [`Usage::exclusive_parameters`]: the model that chose a token.
    pub exclusive: f64,
    /// [`Usage::additive_parameters`]: what ran.
    pub additive: f64,
}

/// What the calls of a large model on a server have cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Calls that were made, those made again included.
    pub calls: u64,
    /// Of these, calls made again after one that failed.
    pub retries: u64,
    /// Of these, calls that read ahead.
    pub warm_calls: u64,
    /// Tokens asked for that were not given, all retries spent.
    pub failures: u64,
    /// Bytes of the requests' bodies.
    pub bytes_up: u64,
    /// Bytes of the replies' bodies.
    pub bytes_down: u64,
    /// Tokens that the server had been sent before, over the calls whose replies say how many of them it still had.
    pub sent_before: u64,
    /// Tokens that it still had.
    pub cached: u64,
}

impl Traffic {
    /// Share of the tokens sent before that the server still had; `None` when its replies do not say.
    pub fn cached_ratio(&self) -> Option<f64> {
        (self.sent_before > 0).then(|| self.cached as f64 / self.sent_before as f64)
    }
}
