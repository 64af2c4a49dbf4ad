//! The small model's token: the reference implementation's filters, of which top-p is stricter than the usual one.
//!
//! Order: temperature, top-k, top-p, draw. Top-p keeps tokens whose cumulated probability, their own included, is at most
//! `p`, and always the likeliest; the usual nucleus keeps the token that crosses `p` too. The large model samples with
//! [`nics_core::sampling`].

use nics_core::sampling::{Sampling, argmax, softmax};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the small model's token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SmallSampling {
    /// Divides the logits; at most 1e-5 takes the likeliest token.
    pub temperature: f64,
    /// Keeps the so many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps tokens up to this cumulated probability; 1 keeps all.
    pub top_p: f64,
}

impl Default for SmallSampling {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0 }
    }
}

impl From<&Sampling> for SmallSampling {
    /// What one set of settings for both models means for the small one, which has neither penalties nor `min_p`.
    fn from(sampling: &Sampling) -> Self {
        Self {
            temperature: f64::from(sampling.temperature),
            top_k: sampling.top_k,
            top_p: f64::from(sampling.top_p),
        }
    }
}

/// Below this a temperature is none.
const GREEDY: f64 = 1e-5;

impl SmallSampling {
    /// Whether every value is in its range.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=100.0).contains(&self.temperature) {
            return Err(Error::setting("temperature", self.temperature, "0 to 100"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::setting("top_p", self.top_p, "above 0, at most 1"));
        }
        Ok(())
    }

    /// Whether the likeliest token is taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= GREEDY
    }

    /// The probabilities after all filters, in the order of the vocabulary.
    pub fn probabilities(&self, logits: &[f32]) -> Vec<f32> {
        if self.is_greedy() {
            let mut one = vec![0.0; logits.len()];
            one[argmax(logits) as usize] = 1.0;
            return one;
        }
        let scaled: Vec<f32> = logits.iter().map(|x| (f64::from(*x) / self.temperature) as f32).collect();
        let mut p = softmax(&scaled);
        let filtered = (self.top_k > 0 && self.top_k < p.len()) || self.top_p < 1.0;
        if !filtered {
            return p;
        }
        let mut order: Vec<usize> = (0..p.len()).collect();
        // Of equal probabilities the higher id comes first, as torch's sort has it.
        order.sort_unstable_by(|&a, &b| p[b].total_cmp(&p[a]).then(b.cmp(&a)));
        if self.top_k > 0 {
            order.drain(self.top_k.min(order.len())..).for_each(|i| p[i] = 0.0);
            normalise(&mut p);
        }
        if self.top_p < 1.0 {
            let mut mass = 0.0f32;
            for (rank, &i) in order.iter().enumerate() {
                mass += p[i];
                if rank > 0 && f64::from(mass) > self.top_p {
                    p[i] = 0.0;
                }
            }
            normalise(&mut p);
        }
        p
    }

    /// A token.
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn choose(&self, logits: &[f32], rng: &mut ChaCha8Rng) -> Result<u32> {
        if logits.is_empty() || logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return Err(Error::NonFiniteFeatures { what: "the small model's logits" });
        }
        if self.is_greedy() {
            return Ok(argmax(logits));
        }
        let p = self.probabilities(logits);
        let total: f64 = p.iter().map(|&p| f64::from(p)).sum();
        let (mut left, mut last) = (rng.random::<f64>() * total, 0);
        for (i, &p) in p.iter().enumerate().filter(|(_, p)| **p > 0.0) {
            left -= f64::from(p);
            last = i;
            if left < 0.0 {
                break;
            }
        }
        Ok(last as u32)
    }
}

fn normalise(p: &mut [f32]) {
    let sum: f64 = p.iter().map(|&p| f64::from(p)).sum();
    for p in p {
        *p = (f64::from(*p) / sum) as f32;
    }
}
