//! Every policy and baseline on the test problems of one seed.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nics_base::interrupt::Interrupt;
use nics_base::jsonl::JsonlLog;
use nics_core::models::Model;
use nics_core::sampling::Sampling;
use nics_datasets::ring::RingProblem;
use nics_datasets::word_problems::Split;
use tch::Tensor;

use super::oracle::path;
use super::point::marks;
use super::queries::{Part, problems};
use super::routers::{Measures, threshold_at};
use super::settings::Study;
use super::{Kind, Models, POINTS_FILE, Point};
use crate::baselines::query::{
    Comparison, Head, Matrix, QueryRouter, Similarity, pooled_states, threshold_for_share,
};
use crate::baselines::speculative::{self, Speculative, SpeculativeUsage};
use crate::checkpoint::Card;
use crate::decode::{Decoder, LocalLarge, Request, Source, TokenEvent, collect};
use crate::nano::{RESPONSE_TOKENS, RingTask};
use crate::policy::{
    AlwaysLarge, AlwaysSmall, DuoRolling, Entropy, Immediate, Momentum, Neural, NeuralRolling, Policy,
    Random, Rolling, Settings, SharedRouter,
};
use crate::router::Router;
use crate::sampling::SmallSampling;
use crate::{Error, Result};

/// Hears of points done and to do, and what is next.
pub type Report<'a> = &'a mut dyn FnMut(usize, usize, &str);

/// How each point of a sweep sets its threshold.
#[derive(Debug, Clone, Copy)]
struct Setting {
    rate: Option<f64>,
    settings: Settings,
}

/// A policy over a sweep.
struct Sweep {
    variant: String,
    settings: Vec<Setting>,
    temperature: f64,
    make: Box<dyn Fn() -> Result<Box<dyn Policy>>>,
}

/// A run over the test problems.
struct Bench<'a> {
    models: &'a Models,
    study: &'a Study,
    problems: Vec<RingProblem>,
    prompts: Vec<Vec<u32>>,
    seed: u64,
}

/// What an evaluation works with.
pub struct Inputs<'a> {
    /// The pair.
    pub models: &'a Models,
    /// The settings.
    pub study: &'a Study,
    /// What policies look at, on the labels of the validation split.
    pub measures: &'a Measures,
    /// The routers, each with its card.
    pub routers: Vec<(Kind, Router, Card)>,
    /// Seed of problems and draws.
    pub seed: u64,
}

/// Measures everything that is not in `dir/points.jsonl` yet, point by point.
///
/// # Errors
/// A test problem that was trained on, an interrupt, what a model refuses.
pub fn evaluate(inputs: Inputs, dir: &Path, interrupt: &Interrupt, report: Report) -> Result<Vec<Point>> {
    let Inputs { models, study, measures, routers, seed } = inputs;
    let (log, points) = JsonlLog::<Point>::open(dir.join(POINTS_FILE))?;
    let bench = Bench::new(models, study, seed)?;
    let sweeps = bench.sweeps(measures, routers)?;
    let mut store = Store { log, points, all: 0, interrupt, report };
    store.all = sweeps.iter().map(|s| s.settings.len()).sum::<usize>()
        + 2
        + study.evaluation.drafts.len()
        + 4 * study.evaluation.coarse_rates.len();
    for sweep in &sweeps {
        bench.sweep(sweep, &mut store)?;
    }
    bench.middle(&mut store)?;
    bench.speculative(&mut store)?;
    bench.oracle(&mut store)?;
    bench.query_routers(&mut store)?;
    store.log.sync()?;
    Ok(store.points)
}

struct Store<'a> {
    log: JsonlLog<Point>,
    points: Vec<Point>,
    all: usize,
    interrupt: &'a Interrupt,
    report: Report<'a>,
}

impl Store<'_> {
    fn has(&self, variant: &str, rate: Option<f64>) -> bool {
        self.points.iter().any(|p| p.key() == (variant.to_owned(), rate.map(f64::to_bits)))
    }

    fn begin(&mut self, what: &str) -> Result<()> {
        self.interrupt.check()?;
        (self.report)(self.points.len(), self.all, what);
        Ok(())
    }

    fn add(&mut self, point: Point) -> Result<()> {
        self.log.append(&point)?;
        self.points.push(point);
        (self.report)(self.points.len(), self.all, "");
        Ok(())
    }

    fn find(&self, variant: &str) -> Result<&Point> {
        self.points
            .iter()
            .find(|p| p.variant == variant)
            .ok_or_else(|| Error::Input(format!("{variant} has not been measured")))
    }
}

/// The large model by itself, as results name it.
pub(super) const LARGE: &str = "large model";
/// The small model by itself.
pub(super) const SMALL: &str = "small model";
/// The middle model by itself.
pub(super) const MIDDLE: &str = "middle model";
/// The judge's path.
pub(super) const ORACLE: &str = "oracle path";

impl<'a> Bench<'a> {
    fn new(models: &'a Models, study: &'a Study, seed: u64) -> Result<Self> {
        let task = &models.task;
        let first = study.evaluation.seed + seed;
        let problems: Vec<RingProblem> = (0..study.evaluation.problems as u64)
            .map(|i| task.ring().problem(Split::Test, first, i))
            .collect();
        check_unseen(task, study, seed, &problems)?;
        let prompts = problems.iter().map(|p| task.encode(&p.prompt())).collect::<Result<_>>()?;
        Ok(Self { models, study, problems, prompts, seed })
    }

    /// Every policy with its thresholds.
    fn sweeps(&self, measures: &Measures, routers: Vec<(Kind, Router, Card)>) -> Result<Vec<Sweep>> {
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
            sweep("immediate", at(aleatoric, coarse)?, || Ok(Box::new(Immediate::default()))),
            sweep("momentum", at(aleatoric, coarse)?, || Ok(Box::new(Momentum::new(0.0, 0.7, 0.3, 0.7)?))),
            sweep("rolling", at(aleatoric, coarse)?, move || Ok(Box::new(Rolling::new(0.0, sure, 3)?))),
            sweep("duo rolling", at(aleatoric, coarse)?, || Ok(Box::new(DuoRolling::new(0.0, 3)?))),
            sweep("entropy", at(entropy, coarse)?, || Ok(Box::new(Entropy::new(Entropy::DEFAULT)?)))
                .sampling(evaluation.temperature),
            sweep(SMALL, alone(), || Ok(Box::new(AlwaysSmall))).sampling(evaluation.temperature),
            sweep(LARGE, alone(), || Ok(Box::new(AlwaysLarge))).sampling(evaluation.temperature),
        ]);
        Ok(sweeps)
    }

    /// Writes a sweep's missing points, all of them together.
    fn sweep(&self, sweep: &Sweep, store: &mut Store) -> Result<()> {
        let missing: Vec<&Setting> =
            sweep.settings.iter().filter(|s| !store.has(&sweep.variant, s.rate)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        store.begin(&sweep.variant)?;
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

    fn marks(&self, responses: impl Iterator<Item = Vec<u32>>) -> String {
        marks(self.problems.iter().zip(responses).map(|(p, r)| self.models.task.is_right(p, &r)))
    }

    /// A model by itself: response to each prompt.
    fn alone(&self, model: &dyn Model, prompts: &[Vec<u32>]) -> Result<Vec<Vec<u32>>> {
        let eos = [self.models.task.eos()];
        let requests =
            prompts.iter().map(|p| nics_core::generate::Request::greedy(p.clone(), RESPONSE_TOKENS, &eos));
        let mut cache = nics_core::cache::DenseCache::new();
        let mut generator = nics_core::generate::Generator::new(model, &mut cache);
        Ok(nics_core::generate::collect(&mut generator, requests, self.study.evaluation.batch)?)
    }

    fn middle(&self, store: &mut Store) -> Result<()> {
        if store.has(MIDDLE, None) {
            return Ok(());
        }
        store.begin(MIDDLE)?;
        let begun = Instant::now();
        let responses = self.alone(&self.models.middle, &self.prompts)?;
        store.add(Point {
            variant: MIDDLE.into(),
            rate: None,
            threshold: None,
            right: self.marks(responses.iter().cloned()),
            large: vec![0; responses.len()],
            tokens: responses.iter().map(|r| r.len() as u32).collect(),
            large_read: 0,
            identical: None,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    fn speculative(&self, store: &mut Store) -> Result<()> {
        let name = |draft: usize| format!("speculative decoding (vanilla), draft {draft}");
        let missing: Vec<usize> =
            self.study.evaluation.drafts.iter().copied().filter(|d| !store.has(&name(*d), None)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let expected = self.alone(&self.models.large, &self.prompts)?;
        for draft in missing {
            store.begin(&name(draft))?;
            let requests: Vec<speculative::Request> = self
                .prompts
                .iter()
                .map(|prompt| speculative::Request {
                    prompt: prompt.clone(),
                    max_new_tokens: RESPONSE_TOKENS,
                    eos: vec![self.models.task.eos()],
                    sampling: Sampling::default(),
                })
                .collect();
            let begun = Instant::now();
            let mut decoder = Speculative::new(&self.models.small, &self.models.large, draft)?;
            let replies = decoder.generate(&requests, self.study.evaluation.batch)?;
            let seconds = begun.elapsed().as_secs_f64();
            let usage = replies.iter().fold(SpeculativeUsage::default(), |sum, r| sum.and(r.usage));
            store.add(Point {
                variant: name(draft),
                rate: None,
                threshold: None,
                right: self.marks(replies.iter().map(|r| r.tokens.clone())),
                large: replies.iter().map(|r| r.usage.calls as u32).collect(),
                tokens: replies.iter().map(|r| r.tokens.len() as u32).collect(),
                large_read: usage.large_read,
                identical: Some(replies.iter().zip(&expected).filter(|(r, e)| r.tokens == **e).count()),
                seconds,
            })?;
        }
        Ok(())
    }

    fn oracle(&self, store: &mut Store) -> Result<()> {
        if store.has(ORACLE, None) {
            return Ok(());
        }
        store.begin(ORACLE)?;
        let begun = Instant::now();
        let paths = path(self.models, &self.prompts, RESPONSE_TOKENS, self.study.evaluation.batch)?;
        store.add(Point {
            variant: ORACLE.into(),
            rate: None,
            threshold: None,
            right: self.marks(paths.iter().map(|path| path.iter().map(|t| t.token).collect())),
            large: paths.iter().map(|path| path.iter().filter(|t| t.large).count() as u32).collect(),
            tokens: paths.iter().map(|path| path.len() as u32).collect(),
            // The large model reads everything, the branches aside.
            large_read: paths.iter().map(|path| path.len() as u64).sum(),
            identical: None,
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    fn query_routers(&self, store: &mut Store) -> Result<()> {
        let settings = &self.study.query;
        let rates = &self.study.evaluation.coarse_rates;
        let names = ["matrix factorisation", "logistic head", "MLP head", "similarity-weighted"];
        if names.iter().all(|n| rates.iter().all(|r| store.has(&format!("query: {n}"), Some(*r)))) {
            return Ok(());
        }
        store.begin("query routers")?;
        let task = &self.models.task;
        let prompts = |split, n: usize| {
            let problems: Vec<RingProblem> = (0..n as u64)
                .map(|i| task.ring().problem(split, self.study.labels.seed + self.seed, i))
                .collect();
            let prompts = problems.iter().map(|p| task.encode(&p.prompt())).collect::<Result<Vec<_>>>()?;
            Ok::<_, Error>((problems, prompts))
        };
        let (problems, train) = prompts(Split::Train, settings.train)?;
        let (_, validation) = prompts(Split::Validation, settings.validation)?;
        let right = |model: &dyn Model| -> Result<Vec<bool>> {
            let responses = self.alone(model, &train)?;
            Ok(problems.iter().zip(&responses).map(|(p, r)| task.is_right(p, r)).collect())
        };
        let (small, large) = (right(&self.models.small)?, right(&self.models.large)?);
        let known: Vec<Comparison> = small.iter().zip(&large).map(|(s, l)| Comparison::of(*s, *l)).collect();
        let states = |prompts: &[Vec<u32>]| pooled_states(&self.models.small, prompts);
        let (train, validation, test): (Tensor, Tensor, Tensor) =
            (states(&train)?, states(&validation)?, states(&self.prompts)?);
        let mut training = settings.training;
        training.seed += self.seed;
        let routers: Vec<Box<dyn QueryRouter>> = vec![
            Box::new(Matrix::train(&train, &known, settings.dimensions, &training)?),
            Box::new(Head::train(&train, &known, 0, &training)?),
            Box::new(Head::train(&train, &known, settings.hidden, &training)?),
            Box::new(Similarity::new(&train, &known, Similarity::GAMMA)?),
        ];
        let (small, large) = (store.find(SMALL)?.clone(), store.find(LARGE)?.clone());
        for router in routers {
            let (on_validation, scores) = (router.scores(&validation)?, router.scores(&test)?);
            for &rate in rates {
                if store.has(router.name(), Some(rate)) {
                    continue;
                }
                let threshold = threshold_for_share(&on_validation, rate)?;
                let sent: Vec<bool> = scores.iter().map(|s| *s >= threshold).collect();
                let of = |i: usize| if sent[i] { &large } else { &small };
                let all = 0..sent.len();
                store.add(Point {
                    variant: router.name().into(),
                    rate: Some(rate),
                    threshold: Some(f64::from(threshold)).filter(|t| t.is_finite()),
                    right: marks(all.clone().map(|i| of(i).right.as_bytes()[i] == b'1')),
                    large: all.clone().map(|i| if sent[i] { large.tokens[i] } else { 0 }).collect(),
                    tokens: all.clone().map(|i| of(i).tokens[i]).collect(),
                    large_read: all
                        .filter(|i| sent[*i])
                        .map(|i| (self.prompts[i].len() as u64) + u64::from(large.tokens[i]) - 1)
                        .sum(),
                    identical: None,
                    seconds: 0.0,
                })?;
            }
        }
        Ok(())
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

/// The name of a variant whose models sample.
pub(super) fn sampled(variant: &str, temperature: f64) -> String {
    format!("{variant}, T={temperature}")
}

/// No test problem is among those that labels or query routers are made of.
fn check_unseen(task: &RingTask, study: &Study, seed: u64, test: &[RingProblem]) -> Result<()> {
    let mut seen: HashSet<String> = HashSet::new();
    for part in [Part::Train, Part::Validation] {
        seen.extend(problems(study, task, part, seed).into_iter().map(|p| p.question));
    }
    let ring = task.ring();
    for (split, n) in [(Split::Train, study.query.train), (Split::Validation, study.query.validation)] {
        let ids = 0..n as u64;
        seen.extend(ids.map(|i| ring.problem(split, study.labels.seed + seed, i).question));
    }
    let is_test = |p: &RingProblem| ring.split(&p.operands, &p.operators) == Split::Test;
    match test.iter().find(|p| seen.contains(&p.question) || !is_test(p)) {
        Some(p) => Err(Error::Input(format!("test problem {} ({}) has been trained on", p.id, p.question))),
        None => Ok(()),
    }
}
