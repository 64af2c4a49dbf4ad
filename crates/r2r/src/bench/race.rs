//! The real loop at a forced share of large-model tokens, beside the large model alone, taking turns.

use std::time::{Duration, Instant};

use nics_core::models::Model;
use nics_core::sampling::Sampling;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::Spread;
use crate::decode::{Decoder, LargeModel, LargeRequest, LocalLarge, Request, Source};
use crate::policy::{Decision, Policy, Sequence, SharedRouter, StepView, check_rows};
use crate::router::route;
use crate::{Error, Result};

/// Tokens that every contender writes in a turn, and the turns.
#[derive(Debug, Clone, Copy)]
pub struct Race {
    /// Tokens of the prompt, which is read before the time begins.
    pub context: usize,
    /// Tokens whose time counts.
    pub tokens: usize,
    /// Turns that count.
    pub rounds: usize,
    /// Seed of the places of the large model's tokens.
    pub seed: u64,
}

/// What came out at one share.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lap {
    /// The share that was asked for.
    pub rate: f64,
    /// The share that was written.
    pub written: f64,
    /// Seconds of a token.
    pub token_s: Spread,
    /// The large model's time over it, turn by turn.
    pub speed_up: Spread,
}

/// One token of the large model in each stretch of `1/rate`, at a place that a seed chooses, so that the share is exact. The
/// router is asked for every token and paid for; its word does not count. The first token is the large model's, which reads
/// the prompt for it.
struct Forced {
    router: SharedRouter,
    rate: f64,
    rng: ChaCha8Rng,
    token: usize,
    stretch: usize,
    place: usize,
}

impl Forced {
    fn new(router: SharedRouter, rate: f64, seed: u64) -> Self {
        Self { router, rate, rng: ChaCha8Rng::seed_from_u64(seed), token: 0, stretch: 0, place: 0 }
    }

    /// Where stretch `i` begins, in tokens behind the first.
    fn begin(&self, i: usize) -> usize {
        (i as f64 / self.rate).round() as usize
    }

    fn next(&mut self) -> bool {
        let token = self.token;
        self.token += 1;
        if token == 0 {
            return true;
        }
        let token = token - 1;
        if token == self.begin(self.stretch) {
            let end = self.begin(self.stretch + 1).max(token + 1);
            self.place = self.rng.random_range(token..end);
            self.stretch += 1;
        }
        token == self.place
    }
}

impl Policy for Forced {
    fn name(&self) -> &'static str {
        "forced"
    }

    fn decide(&mut self, step: &StepView, sequences: &[Sequence]) -> Result<Vec<Decision>> {
        let router = self.router.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let scores = route(&router, step.logits, step.hidden, step.token, 0.5)?.probability;
        drop(router);
        check_rows(scores.len(), sequences)?;
        Ok(scores.into_iter().map(|score| Decision { large: self.next(), score }).collect())
    }
}

fn prompt(race: &Race, vocab: usize) -> Vec<u32> {
    (0..race.context).map(|i| ((i * 7919) % vocab) as u32).collect()
}

/// Seconds of a token of the loop, and the share of the large model's.
fn lap(
    small: &dyn Model,
    large: &dyn Model,
    router: &SharedRouter,
    race: &Race,
    rate: f64,
) -> Result<(f64, f64)> {
    let policy = Forced::new(router.clone(), rate, race.seed);
    let mut decoder = Decoder::new(small, Box::new(LocalLarge::new(large)), Box::new(policy));
    let prompt = prompt(race, decoder.vocab());
    decoder.add(Request::greedy(prompt, race.tokens + 1, &[]))?;
    let (mut start, mut tokens, mut from_large) = (None, 0usize, 0usize);
    while decoder.running() > 0 {
        let step = decoder.advance()?;
        if let Some((_, error)) = step.failed.into_iter().next() {
            return Err(error);
        }
        for event in step.tokens {
            if start.is_none() {
                start = Some(Instant::now());
                continue;
            }
            tokens += 1;
            from_large += usize::from(matches!(event.source, Source::Large { .. }));
        }
    }
    let time = start.map_or(0.0, |s| s.elapsed().as_secs_f64());
    if tokens != race.tokens {
        return Err(Error::Input(format!("{tokens} tokens were written, {} asked for", race.tokens)));
    }
    Ok((time / tokens as f64, from_large as f64 / tokens as f64))
}

/// Seconds of a token of the large model alone.
fn alone(large: &dyn Model, race: &Race) -> Result<f64> {
    let vocab = large.dims().vocab as usize;
    let mut ids = prompt(race, vocab);
    let mut model = LocalLarge::new(large);
    let sequence = Sequence(0);
    model.open(sequence, race.context + race.tokens + 1, &Sampling::default(), vocab)?;
    let (mut start, mut seen) = (Instant::now(), 0);
    for written in 0..=race.tokens {
        model.ask(&[LargeRequest { sequence, ids: &ids, seen }])?;
        seen = ids.len();
        // A long prompt takes several calls.
        let answer = loop {
            if let Some((_, answer)) = model.answers(Duration::ZERO)?.pop() {
                break answer?;
            }
        };
        ids.push(answer.token);
        if written == 0 {
            start = Instant::now();
        }
    }
    Ok(start.elapsed().as_secs_f64() / race.tokens as f64)
}

/// Runs the loop at each share, and the large model alone, in turns. `each` is called after each turn and may end the race
/// with an error. The large model's own time comes first.
///
/// # Errors
/// Settings that make no sense, and what the models or the router return.
pub fn race(
    small: &dyn Model,
    large: &dyn Model,
    router: &SharedRouter,
    rates: &[f64],
    settings: &Race,
    each: &mut dyn FnMut() -> Result<()>,
) -> Result<(Spread, Vec<Lap>)> {
    for (name, value) in [
        ("the context", settings.context),
        ("the number of tokens", settings.tokens),
        ("the number of rounds", settings.rounds),
    ] {
        if value == 0 {
            return Err(Error::setting(name, 0, "at least 1"));
        }
    }
    if let Some(rate) = rates.iter().find(|r| !(**r > 0.0 && **r <= 1.0)) {
        return Err(Error::setting("the routing rate", rate, "above 0, at most 1"));
    }
    let _guard = tch::no_grad_guard();
    let mut alone_s = Vec::new();
    let mut laps = vec![(Vec::new(), Vec::new(), 0.0); rates.len()];
    for _ in 0..settings.rounds {
        let reference = alone(large, settings)?;
        alone_s.push(reference);
        each()?;
        for (&rate, (times, ratios, written)) in rates.iter().zip(&mut laps) {
            let (time, share) = lap(small, large, router, settings, rate)?;
            times.push(time);
            ratios.push(reference / time);
            *written = share;
            each()?;
        }
    }
    let spread = |values: &[f64]| {
        Spread::of(values).ok_or_else(|| Error::setting("the number of rounds", 0, "at least 1"))
    };
    let laps = rates.iter().zip(&laps).map(|(&rate, (times, ratios, written))| {
        Ok(Lap { rate, written: *written, token_s: spread(times)?, speed_up: spread(ratios)? })
    });
    Ok((spread(&alone_s)?, laps.collect::<Result<_>>()?))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use nics_core::checkpoint::TensorPath;
    use tch::{Device, Kind};

    use super::super::{Costs, Measured, measure};
    use super::*;
    use crate::router::{Router, RouterConfig, Storage};

    fn router() -> Router {
        let mut config = RouterConfig::paper(8);
        config.args.logits_size = Some(4);
        config.args.hidden_dims = vec![8];
        let at = TensorPath::random(1, 0.02, Device::Cpu, Kind::Float);
        let embedding = tch::Tensor::zeros([32, 8], (Kind::Float, Device::Cpu));
        Router::load(config, &at, Some(&embedding), Storage::F32).unwrap()
    }

    #[test]
    fn a_forced_share_is_exact_and_its_first_token_reads_the_prompt() {
        for (rate, tokens) in [(0.05, 200), (0.125, 64), (0.25, 40), (1.0, 5), (0.3, 100)] {
            let mut forced = Forced::new(Arc::new(Mutex::new(router())), rate, 3);
            assert!(forced.next());
            let large = (0..tokens).filter(|_| forced.next()).count();
            assert_eq!(large, (rate * f64::from(tokens)).round() as usize, "rate {rate}");
        }
    }

    #[test]
    fn costs_and_laps_of_a_tiny_pair() {
        let mut slice = nics_core::models::shape("qwen3-0.6b", Some(1)).unwrap();
        let config = &mut slice.config;
        (config.hidden, config.intermediate, config.heads, config.kv_heads) = (8, 16, 2, 1);
        (config.head_dim, config.vocab) = (4, 32);
        config.rope.head_dim = 4;
        let model =
            |seed| nics_core::models::random(slice.config.clone(), Device::Cpu, Kind::Float, seed).unwrap();
        let (small, large, router) = (model(1), model(2), router());
        let mut rounds = 0;
        let what = Measured { context: 700, lengths: vec![1, 4], rounds: 3 };
        let costs: Costs = measure(&small, &large, &router, &what, &mut || {
            rounds += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!((rounds, costs.large.len()), (4, 2));
        assert!(costs.small.low > 0.0 && costs.router.low > 0.0 && costs.large_step() > 0.0);
        let wrong = Measured { lengths: vec![4, 1], ..what };
        assert!(measure(&small, &large, &router, &wrong, &mut || Ok(())).is_err());

        let settings = Race { context: 700, tokens: 8, rounds: 2, seed: 0 };
        let shared = Arc::new(Mutex::new(router));
        let (alone, laps) = race(&small, &large, &shared, &[0.25, 1.0], &settings, &mut || Ok(())).unwrap();
        assert!(alone.low > 0.0);
        assert_eq!((laps[0].written, laps[1].written), (0.25, 1.0));
        assert!(race(&small, &large, &shared, &[0.0], &settings, &mut || Ok(())).is_err());
    }
}
