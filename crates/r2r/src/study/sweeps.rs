//! Policies over sweeps of their thresholds.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use nics_core::sampling::Sampling;

use super::evaluate::{Bench, LARGE, SMALL, Store, has, sampled};
use super::routers::threshold_at;
use super::{Kind, Measures, Point};
use crate::Result;
use crate::checkpoint::Card;
use crate::decode::{Decoder, LocalLarge, Request, Source, TokenEvent, collect};
use crate::nano::RESPONSE_TOKENS;
use crate::policy::{
    AlwaysLarge, AlwaysSmall, DuoRolling, Entropy, Immediate, Momentum, Neural, NeuralRolling, Policy,
    Random, Rolling, Settings, SharedRouter,
};
use crate::router::Router;
use crate::sampling::SmallSampling;

/// How each point of a sweep sets its threshold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    rate: Option<f64>,
    settings: Settings,
}

/// A policy over a sweep.
pub(super) struct Sweep {
    pub variant: String,
    settings: Vec<Setting>,
    temperature: f64,
    make: Box<dyn Fn() -> Result<Box<dyn Policy>>>,
}

impl Bench<'_> {
    /// Every policy with its thresholds.
    pub fn sweeps(&self, measures: &Measures, routers: Vec<(Kind, Router, Card)>) -> Result<Vec<Sweep>> {
        let evaluation = &self.study.evaluation;
        let (fine, coarse) = (evaluation.rates.as_slice(), evaluation.coarse_rates.as_slice());
        let at = |values: &[f32], rates: &[f64]| -> Result<Vec<Setting>> {
            let setting = |&rate: &f64| {
                let settings =
                    Settings { threshold: Some(threshold_at(values, rate)?), ..Settings::default() };
                Ok(Setting { rate: Some(rate), settings })
            };
            rates.iter().map(setting).collect()
        };
        let alone = || vec![Setting { rate: None, settings: Settings::default() }];
        let shares = |rates: &[f64]| -> Vec<Setting> {
            let setting = |&rate: &f64| Setting {
                rate: Some(rate),
                settings: Settings { target: Some(rate), ..Settings::default() },
            };
            rates.iter().map(setting).collect()
        };
        let seed = self.seed;
        let mut sweeps = vec![
            sweep(SMALL, alone(), || Ok(Box::new(AlwaysSmall))),
            sweep(LARGE, alone(), || Ok(Box::new(AlwaysLarge))),
        ];
        for (kind, router, card) in routers {
            let probabilities = measures.probabilities(&router)?;
            let router: SharedRouter = Arc::new(Mutex::new(router));
            let rates = if matches!(kind, Kind::R2r | Kind::Mismatch) { fine } else { coarse };
            let mut settings = at(&probabilities, rates)?;
            let threshold = Some(card.common_args.threshold);
            settings.push(Setting { rate: None, settings: Settings { threshold, ..Settings::default() } });
            let neural = router.clone();
            sweeps
                .push(sweep(kind.name(), settings, move || Ok(Box::new(Neural::new(neural.clone(), 0.5)?))));
            if kind == Kind::R2r {
                let rolling = router.clone();
                sweeps.push(sweep("neural rolling", at(&probabilities, coarse)?, move || {
                    Ok(Box::new(NeuralRolling::new(rolling.clone(), 0.5, 3)?))
                }));
                let mut settings = at(&probabilities, coarse)?;
                settings
                    .push(Setting { rate: None, settings: Settings { threshold, ..Settings::default() } });
                let sampled = router.clone();
                let make =
                    move || -> Result<Box<dyn Policy>> { Ok(Box::new(Neural::new(sampled.clone(), 0.5)?)) };
                sweeps.push(sweep("R2R", settings, make).sampling(evaluation.temperature));
            }
        }
        let (entropy, aleatoric) = (measures.entropy(), measures.aleatoric());
        // What counts as sure in rolling: below the validation rows' median.
        let sure = threshold_at(entropy, 0.5)?;
        sweeps.extend([
            sweep("entropy", at(entropy, fine)?, || Ok(Box::new(Entropy::new(Entropy::DEFAULT)?))),
            sweep("random", shares(fine), move || Ok(Box::new(Random::new(0.5, seed)?))),
            sweep("momentum", at(aleatoric, coarse)?, || Ok(Box::new(Momentum::new(0.0, 0.7, 0.3, 0.7)?))),
            sweep("rolling", at(aleatoric, coarse)?, move || Ok(Box::new(Rolling::new(0.0, sure, 3)?))),
            sweep("duo rolling", at(aleatoric, coarse)?, || Ok(Box::new(DuoRolling::new(0.0, 3)?))),
            sweep("entropy", at(entropy, coarse)?, || Ok(Box::new(Entropy::new(Entropy::DEFAULT)?)))
                .sampling(evaluation.temperature),
            sweep(SMALL, alone(), || Ok(Box::new(AlwaysSmall))).sampling(evaluation.temperature),
            sweep(LARGE, alone(), || Ok(Box::new(AlwaysLarge))).sampling(evaluation.temperature),
        ]);
        // Its thresholds are several and no sequence's own, so each point has a policy to itself.
        for &rate in coarse {
            let threshold = threshold_at(aleatoric, rate)?;
            let setting = Setting { rate: Some(rate), settings: Settings::default() };
            let make = move || -> Result<Box<dyn Policy>> {
                Ok(Box::new(Immediate { aleatoric: Some(threshold), ..Immediate::default() }))
            };
            sweeps.push(sweep("immediate", vec![setting], make));
        }
        Ok(sweeps)
    }

    /// Writes a sweep's missing points, all of them together.
    pub fn sweep(&self, sweep: &Sweep, store: &mut Store) -> Result<()> {
        let missing: Vec<&Setting> =
            sweep.settings.iter().filter(|s| !has(store, &sweep.variant, s.rate)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let requests = missing.iter().flat_map(|setting| {
            self.prompts.iter().enumerate().map(|(i, prompt)| {
                let seed = self.seed.wrapping_mul(1_000_003).wrapping_add(i as u64);
                let mut request = Request::greedy(prompt.clone(), RESPONSE_TOKENS, &[self.models.task.eos()]);
                request.small = SmallSampling { temperature: sweep.temperature, ..request.small };
                request.large =
                    Sampling { temperature: sweep.temperature as f32, seed: seed ^ 0x5eed, ..request.large };
                request.seed = seed;
                request.settings = setting.settings;
                request
            })
        });
        let begun = Instant::now();
        let large = Box::new(LocalLarge::new(&self.models.large));
        let mut decoder = Decoder::new(&self.models.small, large, (sweep.make)()?);
        let events = collect(&mut decoder, requests, self.study.evaluation.batch)?;
        // Points of a sweep are written together, so each is given its part of the time.
        let seconds = begun.elapsed().as_secs_f64() / missing.len() as f64;
        for (setting, events) in missing.iter().zip(events.chunks(self.prompts.len())) {
            store.add(self.point(&sweep.variant, setting, events, seconds))?;
        }
        Ok(())
    }

    fn point(&self, variant: &str, setting: &Setting, events: &[Vec<TokenEvent>], seconds: f64) -> Point {
        let is_large = |e: &TokenEvent| matches!(e.source, Source::Large { .. });
        let read = |e: &TokenEvent| if let Source::Large { read, .. } = e.source { read as u64 } else { 0 };
        let tokens = |events: &[TokenEvent]| events.iter().map(|e| e.token).collect::<Vec<u32>>();
        Point {
            variant: variant.to_owned(),
            rate: setting.rate,
            threshold: setting.settings.threshold,
            right: self.marks(events.iter().map(|events| tokens(events))),
            large: events.iter().map(|e| e.iter().filter(|e| is_large(e)).count() as u32).collect(),
            tokens: events.iter().map(|e| e.len() as u32).collect(),
            large_read: events.iter().flatten().map(read).sum(),
            identical: None,
            seconds,
        }
    }
}

fn sweep(
    variant: &str,
    settings: Vec<Setting>,
    make: impl Fn() -> Result<Box<dyn Policy>> + 'static,
) -> Sweep {
    Sweep { variant: variant.to_owned(), settings, temperature: 0.0, make: Box::new(make) }
}

impl Sweep {
    /// The same with both models sampling.
    fn sampling(mut self, temperature: f64) -> Self {
        self.variant = sampled(&self.variant, temperature);
        self.temperature = temperature;
        self
    }
}
