//! From logits to a token: processors in the order and with the meaning of transformers' `generate`, then a draw from a
//! generator that belongs to the sequence.
//!
//! Order: repetition penalty, temperature, top-k, top-p, min-p, softmax, draw. Everything works on float32 on the CPU,
//! one row of logits at a time.

use std::collections::HashSet;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// How a sequence's tokens are chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides the logits; 0 chooses the likeliest token instead of drawing. 0 to 100.
    pub temperature: f32,
    /// Keeps the so many likeliest tokens (ties with the last one too); 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of likeliest tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen before; 1 leaves them. Above 0.
    pub repetition_penalty: f32,
    /// Whether the penalty sees the prompt too, as generation from ids in transformers; generation from embeddings has
    /// no prompt to see.
    pub penalize_prompt: bool,
    /// Seed of the sequence's own random numbers.
    pub seed: u64,
    /// Log-probabilities of the so many likeliest tokens with each token; `None` gives none.
    pub logprobs: Option<usize>,
}

impl Default for Sampling {
    /// Greedy, no penalty.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            penalize_prompt: true,
            seed: 0,
            logprobs: None,
        }
    }
}

impl Sampling {
    /// How a generation_config.json has tokens drawn, with transformers' defaults.
    pub fn from_generation_config(generation: &Value) -> Self {
        let number = |key: &str, default: f32| generation[key].as_f64().map_or(default, |v| v as f32);
        let repetition_penalty = number("repetition_penalty", 1.0);
        if !generation["do_sample"].as_bool().unwrap_or(false) {
            return Self { repetition_penalty, ..Self::default() };
        }
        Self {
            temperature: number("temperature", 1.0),
            top_k: generation["top_k"].as_u64().unwrap_or(0) as usize,
            top_p: number("top_p", 1.0),
            min_p: number("min_p", 0.0),
            repetition_penalty,
            ..Self::default()
        }
    }

    /// Whether every value is in its range.
    ///
    /// # Errors
    /// `Error::Input` naming the value and its range.
    pub fn validate(&self) -> Result<()> {
        let ranges = [
            ("temperature", self.temperature, 0.0..=100.0),
            ("top_p", self.top_p, f32::MIN_POSITIVE..=1.0),
            ("min_p", self.min_p, 0.0..=1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-3..=1e3),
        ];
        for (name, found, range) in ranges {
            if !range.contains(&found) {
                return Err(Error::Input(format!(
                    "{name} is {found}, expected {} to {}",
                    if name == "top_p" { "above 0".into() } else { range.start().to_string() },
                    range.end()
                )));
            }
        }
        Ok(())
    }

    /// Applies the processors to one row of logits. `seen` are the ids that the penalty concerns.
    pub fn process(&self, logits: &mut [f32], seen: &HashSet<u32>) {
        repetition_penalty(logits, seen, self.repetition_penalty);
        if self.temperature > 0.0 {
            temperature(logits, self.temperature);
            top_k(logits, self.top_k);
            top_p(logits, self.top_p);
            min_p(logits, self.min_p);
        }
    }
}

/// Each distinct id once: negative scores are multiplied, others divided (Keskar et al., 2019).
#[allow(clippy::implicit_hasher)] // One set of ids, the sampler's own.
pub fn repetition_penalty(logits: &mut [f32], seen: &HashSet<u32>, penalty: f32) {
    if (penalty - 1.0).abs() < f32::EPSILON {
        return;
    }
    for &id in seen {
        if let Some(score) = logits.get_mut(id as usize) {
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
    }
}

/// Divides by the temperature.
pub fn temperature(logits: &mut [f32], temperature: f32) {
    for x in logits {
        *x /= temperature;
    }
}

/// Keeps the `k` likeliest tokens, and those that tie with the last of them; the others become -inf. 0 keeps all.
pub fn top_k(logits: &mut [f32], k: usize) {
    if k == 0 || k >= logits.len() {
        return;
    }
    let mut sorted = logits.to_vec();
    let (_, &mut threshold, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    logits.iter_mut().filter(|x| **x < threshold).for_each(|x| *x = f32::NEG_INFINITY);
}

/// Keeps the smallest set of likeliest tokens whose probability reaches `p`, at least one (Holtzman et al., 2020).
pub fn top_p(logits: &mut [f32], p: f32) {
    if p >= 1.0 {
        return;
    }
    let probabilities = softmax(logits);
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&i| probabilities[i as usize] > 0.0).collect();
    let by_probability =
        |a: &u32, b: &u32| probabilities[*b as usize].total_cmp(&probabilities[*a as usize]).then(a.cmp(b));
    // Of equal probabilities the higher id stays, as torch's ascending sort has it.
    // The kept set is small as a rule: sort a growing head instead of the whole vocabulary.
    let mut head = 256.min(order.len());
    let kept = loop {
        if head < order.len() {
            order.select_nth_unstable_by(head, by_probability);
        }
        order[..head].sort_unstable_by(by_probability);
        let mut mass = 0.0f64;
        let reached = order[..head].iter().position(|&i| {
            mass += f64::from(probabilities[i as usize]);
            mass >= f64::from(p)
        });
        match reached {
            Some(last) => break last + 1,
            None if head == order.len() => break head,
            None => head = (head * 8).min(order.len()),
        }
    };
    let mut keep = vec![false; logits.len()];
    for &i in &order[..kept] {
        keep[i as usize] = true;
    }
    logits.iter_mut().zip(keep).filter(|(_, keep)| !keep).for_each(|(x, _)| *x = f32::NEG_INFINITY);
}

/// Keeps tokens with at least `p` times the probability of the likeliest (Nguyen et al., 2024).
pub fn min_p(logits: &mut [f32], p: f32) {
    if p <= 0.0 {
        return;
    }
    let probabilities = softmax(logits);
    let threshold = p * probabilities.iter().copied().fold(0.0, f32::max);
    logits
        .iter_mut()
        .zip(probabilities)
        .filter(|(_, probability)| *probability < threshold)
        .for_each(|(x, _)| *x = f32::NEG_INFINITY);
}

/// Probabilities of a row of logits; -inf gives 0.
pub fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut out: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = out.iter().map(|&x| f64::from(x)).sum();
    for x in &mut out {
        *x = (f64::from(*x) / sum) as f32;
    }
    out
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the model, before any processor; `None` unless asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with theirs, likeliest first; empty unless asked for.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    params: Sampling,
    rng: ChaCha8Rng,
    seen: HashSet<u32>,
}

impl Sampler {
    /// A sampler for a sequence that starts with `prompt` (empty when it starts from embeddings).
    pub fn new(params: Sampling, prompt: &[u32]) -> Result<Self> {
        params.validate()?;
        let seen = if params.penalize_prompt { prompt.iter().copied().collect() } else { HashSet::new() };
        Ok(Self { rng: ChaCha8Rng::seed_from_u64(params.seed), params, seen })
    }

    /// Chooses the next token from the logits of the last position; they are overwritten.
    ///
    /// # Errors
    /// `Error::NotFinite` when a logit is NaN or +inf, or all are -inf.
    pub fn choose(&mut self, logits: &mut [f32]) -> Result<Choice> {
        let bad = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY);
        if let Some(i) = bad {
            return Err(Error::NotFinite {
                what: "logits".into(),
                detail: format!("token {i} has {}", logits[i]),
            });
        }
        if logits.iter().all(|x| *x == f32::NEG_INFINITY) {
            return Err(Error::NotFinite { what: "logits".into(), detail: "every token has -inf".into() });
        }
        let raw = self.params.logprobs.map(|n| (n, log_softmax(logits)));
        self.params.process(logits, &self.seen);
        let token = if self.params.temperature > 0.0 {
            draw(&softmax(logits), self.rng.random())
        } else {
            argmax(logits)
        };
        self.seen.insert(token);
        let (logprob, top) = match raw {
            None => (None, Vec::new()),
            Some((n, logprobs)) => (Some(logprobs[token as usize]), likeliest(&logprobs, n)),
        };
        Ok(Choice { token, logprob, top })
    }
}

/// Index of the largest value, the first of equals.
pub fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best as u32
}

/// Log-probabilities of a row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    let shift = max + sum.ln() as f32;
    logits.iter().map(|x| x - shift).collect()
}

fn likeliest(logprobs: &[f32], n: usize) -> Vec<(u32, f32)> {
    let n = n.min(logprobs.len());
    let mut order: Vec<u32> = (0..logprobs.len() as u32).collect();
    let by = |a: &u32, b: &u32| logprobs[*b as usize].total_cmp(&logprobs[*a as usize]).then(a.cmp(b));
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, by);
    }
    order.truncate(n);
    order.sort_unstable_by(by);
    order.into_iter().map(|i| (i, logprobs[i as usize])).collect()
}

/// The token at `u` (in [0, 1)) of the cumulated probabilities.
fn draw(probabilities: &[f32], u: f64) -> u32 {
    let total: f64 = probabilities.iter().map(|&p| f64::from(p)).sum();
    let (mut left, mut last) = (u * total, 0);
    for (i, &p) in probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        left -= f64::from(p);
        last = i;
        if left < 0.0 {
            break;
        }
    }
    last as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_penalty_counts_an_id_once_and_follows_the_sign() {
        let mut logits = [2.0, -2.0, 1.0];
        repetition_penalty(&mut logits, &HashSet::from([0, 1, 9]), 2.0);
        assert_eq!(logits.map(f32::to_bits), [1.0f32, -4.0, 1.0].map(f32::to_bits));
    }

    #[test]
    fn senseless_values_are_refused_by_name() {
        for (name, params) in [
            ("temperature", Sampling { temperature: 999_999.0, ..Sampling::default() }),
            ("temperature", Sampling { temperature: f32::NAN, ..Sampling::default() }),
            ("top_p", Sampling { top_p: -1.0, ..Sampling::default() }),
            ("min_p", Sampling { min_p: 2.0, ..Sampling::default() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..Sampling::default() }),
        ] {
            let error = params.validate().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
        Sampling::default().validate().unwrap();
    }

    #[test]
    fn a_seed_repeats_its_draws_and_another_does_not() {
        let draws = |seed| {
            let params = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            let mut sampler = Sampler::new(params, &[]).unwrap();
            (0..32).map(|_| sampler.choose(&mut [0.0; 50]).unwrap().token).collect::<Vec<_>>()
        };
        assert_eq!(draws(7), draws(7));
        assert_ne!(draws(7), draws(8));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let params = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        let mut sampler = Sampler::new(params, &[]).unwrap();
        let n = 4000;
        let ones = (0..n)
            .filter(|_| sampler.choose(&mut [0.0, 3.0f32.ln(), f32::NEG_INFINITY]).unwrap().token == 1)
            .count();
        // 5 standard deviations of a binomial with p = 3/4.
        assert!((ones as f64 / f64::from(n) - 0.75).abs() < 0.035, "{ones}");
    }

    #[test]
    fn values_that_are_not_finite_are_an_error() {
        let mut sampler = Sampler::new(Sampling::default(), &[]).unwrap();
        assert!(sampler.choose(&mut [0.0, f32::NAN]).unwrap_err().to_string().contains("token 1"));
        assert!(sampler.choose(&mut [f32::NEG_INFINITY; 3]).is_err());
    }

    proptest! {
        #[test]
        fn top_p_keeps_the_smallest_sufficient_set(
            logits in prop::collection::vec(-8.0f32..8.0, 1..600), p in 0.01f32..0.999,
        ) {
            let probabilities = softmax(&logits);
            let mut cut = logits.clone();
            top_p(&mut cut, p);
            let kept: Vec<f32> =
                cut.iter().zip(&probabilities).filter(|(x, _)| x.is_finite()).map(|(_, p)| *p).collect();
            let mass: f64 = kept.iter().map(|&p| f64::from(p)).sum();
            let least = kept.iter().copied().fold(f32::INFINITY, f32::min);
            prop_assert!(mass >= f64::from(p) - 1e-5);
            prop_assert!(mass - f64::from(least) < f64::from(p) + 1e-5);
            let dropped = cut.iter().zip(&probabilities).filter(|(x, _)| !x.is_finite()).map(|(_, p)| *p);
            prop_assert!(dropped.fold(0.0, f32::max) <= least);
        }

        #[test]
        fn top_k_keeps_k_distinct_values(mut logits in prop::collection::vec(-8.0f32..8.0, 1..100), k in 1usize..120) {
            logits.sort_by(f32::total_cmp);
            logits.dedup();
            let mut cut = logits.clone();
            top_k(&mut cut, k);
            prop_assert_eq!(cut.iter().filter(|x| x.is_finite()).count(), k.min(logits.len()));
        }
    }
}
