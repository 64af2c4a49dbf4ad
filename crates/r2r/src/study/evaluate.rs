//! Every policy and baseline on the test problems of one seed.
//!
//! The work is a list of tasks: sweeps of policies ([`super::sweeps`]) and everything else ([`super::rivals`]).

use std::collections::HashSet;
use std::path::PathBuf;

use nics_base::study::{Output, Points};
use nics_datasets::ring::RingProblem;
use nics_datasets::word_problems::Split;

use super::point::marks;
use super::queries::{Part, problems};
use super::rivals::Rival;
use super::settings::Study;
use super::{Kind, Measures, Models, Point};
use crate::checkpoint::Card;
use crate::nano::RingTask;
use crate::router::Router;
use crate::{Error, Result};

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

/// A run over the test problems.
pub(super) struct Bench<'a> {
    pub models: &'a Models,
    pub study: &'a Study,
    pub problems: Vec<RingProblem>,
    pub prompts: Vec<Vec<u32>>,
    pub seed: u64,
}

/// Measures everything that has not been measured: `dir/points.jsonl`, or a shard's own file, to be merged into that.
///
/// # Errors
/// A test problem that was trained on, an interrupt, what a model refuses.
pub fn evaluate(inputs: Inputs, output: Output) -> Result<(PathBuf, Vec<Point>)> {
    let Inputs { models, study, measures, routers, seed } = inputs;
    let routed: Vec<&str> = routers.iter().map(|(_, _, card)| card.weights_hash.as_str()).collect();
    let hash = nics_base::hash::value(&(study, seed, &models.weights, routed))?;
    output.measure(&hash, |store: &mut Store| {
        let bench = Bench::new(models, study, seed)?;
        let sweeps = bench.sweeps(measures, routers)?;
        let rivals = Rival::all(study);
        for task in store.tasks(sweeps.len() + rivals.len()) {
            if let Some(sweep) = sweeps.get(task) {
                store.begin(task, &sweep.variant)?;
                bench.sweep(sweep, store)?;
            } else if let Some(rival) = rivals.get(task - sweeps.len()) {
                store.begin(task, &rival.name())?;
                bench.rival(rival, store)?;
            }
        }
        Ok(())
    })
}

/// The points of a run.
pub(super) type Store<'a> = Points<'a, Point>;

/// Whether this has been measured.
pub(super) fn has(store: &Store, variant: &str, rate: Option<f64>) -> bool {
    store.any(|p| p.key() == (variant.to_owned(), rate.map(f64::to_bits)))
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
        let problems: Vec<RingProblem> =
            task.ring().problems(Split::Test, first, study.evaluation.problems).collect();
        check_unseen(task, study, seed, &problems)?;
        let prompts = problems.iter().map(|p| task.encode(&p.prompt())).collect::<Result<_>>()?;
        Ok(Self { models, study, problems, prompts, seed })
    }

    /// Which responses are right.
    pub fn marks(&self, responses: impl Iterator<Item = Vec<u32>>) -> String {
        marks(self.problems.iter().zip(responses).map(|(p, r)| self.models.task.is_right(p, &r)))
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
        seen.extend(ring.problems(split, study.labels.seed + seed, n).map(|p| p.question));
    }
    let is_test = |p: &RingProblem| ring.split(&p.operands, &p.operators) == Split::Test;
    match test.iter().find(|p| seen.contains(&p.question) || !is_test(p)) {
        Some(p) => Err(Error::Input(format!("test problem {} ({}) has been trained on", p.id, p.question))),
        None => Ok(()),
    }
}
