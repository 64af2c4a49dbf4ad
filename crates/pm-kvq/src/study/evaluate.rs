//! Every cache on the test texts of one seed: the list of [`variants`].

use std::path::{Path, PathBuf};
use std::time::Instant;

use nics_base::study::{Output, Points};
use nics_core::cache::DenseCache;
use nics_core::models::{Model, ModelDims};
use nics_core::seam::KvCache;
use nics_datasets::adding_ring::{AddingRing, TOKENS, problems};
use nics_datasets::word_problems::Split;
use tch::Tensor;

use super::equal::equal;
use super::{Kind, Point, Study, Subject, Variant, Weights, variants};
use crate::allocate::{allocate, unit};
use crate::baselines::{Baseline, channel_orders};
use crate::cache::{CacheConfig, PagedCache};
use crate::calibrate::Scaled;
use crate::nano::write;
use crate::{Bits, Error, Result};

/// What an evaluation works with.
pub struct Inputs<'a> {
    /// The model as trained, and with outliers.
    pub subjects: &'a [Subject; 2],
    /// The settings.
    pub study: &'a Study,
    /// Folder of the calibrations.
    pub calibration: &'a Path,
    /// Seed of the texts.
    pub seed: u64,
}

/// Measures every cache that has not been measured: `dir/points.jsonl`, or a shard's own file, to be merged into that.
///
/// # Errors
/// Calibrations that are missing, an interrupt, what a model or cache refuses.
pub fn evaluate(inputs: &Inputs, output: Output) -> Result<(PathBuf, Vec<Point>)> {
    let Inputs { subjects, study, seed, .. } = inputs;
    let hash = nics_base::hash::value(&(study, seed, &subjects[0].origin))?;
    output.measure(&hash, |points: &mut Points<Point>| {
        let first = study.evaluation.seed + seed;
        let texts: Vec<_> = problems(Split::Test, first, study.evaluation.sequences).collect();
        let all = variants(study);
        for task in points.tasks(all.len()) {
            let variant = &all[task];
            if points.any(|p| p.key() == (variant.name.as_str(), variant.weights)) {
                continue;
            }
            points.begin(task, &variant.name)?;
            let subject = &subjects[usize::from(variant.weights == Weights::Outliers)];
            let bench = Bench { subject, study, calibration: inputs.calibration, texts: &texts };
            if let Some(point) = bench.measure(variant)? {
                points.add(point)?;
            } else {
                tracing::info!("{}: no budget does it", variant.name);
            }
        }
        Ok(())
    })
}

/// A model and its texts.
struct Bench<'a> {
    subject: &'a Subject,
    study: &'a Study,
    calibration: &'a Path,
    texts: &'a [AddingRing],
}

/// A cache, and what was worked out for it.
type Made = (Box<dyn KvCache>, String);

impl Bench<'_> {
    fn dims(&self) -> &ModelDims {
        self.subject.model.dims()
    }

    /// `None` for a budget that does not exist.
    fn measure(&self, variant: &Variant) -> Result<Option<Point>> {
        let Some((mut cache, about)) = self.cache(&variant.kind)? else { return Ok(None) };
        if let Some(basis) = variant.scales {
            let scales = self.subject.scales(self.calibration, basis)?;
            cache = Box::new(Scaled::new(cache, &scales, self.dims())?);
        }
        let start = Instant::now();
        let written = write(&self.subject.model, cache.as_mut(), self.texts)?;
        Ok(Some(Point {
            variant: variant.name.clone(),
            weights: variant.weights,
            prefix: written.prefixes(self.texts),
            tokens: written.tokens(self.texts),
            recalled: written.recalled(self.texts),
            peak_bytes: written.peak_bytes(),
            mean_bytes: written.mean_bytes(),
            about,
            seconds: start.elapsed().as_secs_f64(),
        }))
    }

    fn cache(&self, kind: &Kind) -> Result<Option<Made>> {
        Ok(match kind {
            Kind::Dense => Some((Box::new(DenseCache::new()), String::new())),
            Kind::Baseline(name) => {
                let baseline: Baseline = name.parse()?;
                let orders: Vec<Tensor> = if name.starts_with("rotatekv") {
                    let samples = self.subject.samples(self.study, TOKENS)?;
                    channel_orders(&self.subject.model, &samples)?
                } else {
                    Vec::new()
                };
                Some((Box::new(baseline.cache(self.dims(), &orders)?), baseline.to_string()))
            }
            Kind::Pages(config) => Some(self.pages(config, String::new())?),
            Kind::Budget(config, widths) => Some(self.budget(config, widths)?),
            Kind::Allocated { config, choices, mean, reversed } => {
                let mut widths = self.allocated(choices, *mean)?;
                if *reversed {
                    widths.reverse();
                }
                Some(self.budget(config, &widths)?)
            }
            Kind::Equal { config, rival, average } => {
                let Some((mut cache, _)) = self.cache(rival)? else { return Ok(None) };
                // What a cache takes depends on the number of tokens alone.
                let one = &self.texts[..1];
                let written = write(&self.subject.model, cache.as_mut(), one)?;
                let bytes = if *average { written.mean_bytes() } else { written.peak_bytes() as f64 };
                match equal(self.dims(), config, bytes, *average)? {
                    Some(config) => {
                        let about = format!("{} bytes a layer", config.budgets[0]);
                        Some(self.pages(&config, about)?)
                    }
                    None => None,
                }
            }
        })
    }

    fn pages(&self, config: &CacheConfig, about: String) -> Result<Made> {
        Ok((Box::new(PagedCache::new(self.dims(), config)?), about))
    }

    /// The budget of each layer: sink and window exact, every other token of a whole text at the layer's width.
    fn budget(&self, config: &CacheConfig, widths: &[Bits]) -> Result<Made> {
        let config = CacheConfig { min_bits: widths.to_vec(), ..config.clone() };
        let exact = config.sink + config.window;
        let of = |rules: &crate::ledger::Rules| {
            let token = |bits| rules.shape.payload(bits) as u64;
            token(Bits::B16) * exact as u64 + token(rules.floor) * (TOKENS - exact) as u64
        };
        let budgets = config.rules(self.dims())?.iter().map(of).collect();
        let about: Vec<String> = widths.iter().map(|b| b.get().to_string()).collect();
        self.pages(&CacheConfig { budgets, ..config }, format!("widths {}", about.join(", ")))
    }

    /// The widths that the sensitivity chooses for a mean of so many bits.
    fn allocated(&self, choices: &[Bits], mean: f64) -> Result<Vec<Bits>> {
        let dims = self.dims();
        let unit = unit(dims.kv_heads as usize, dims.head_dim as usize, TOKENS);
        let sensitivity = self.subject.sensitivity(self.calibration)?.totals();
        let budget = unit * mean * dims.layers as f64;
        Ok(allocate(&sensitivity, choices, unit, budget)?.widths)
    }
}

/// Texts have to be there.
pub(super) fn paired<'a>(
    seeds: &'a [(u64, Vec<Point>)],
    variant: &str,
    weights: Weights,
) -> Result<Vec<&'a Point>> {
    let of = |(seed, points): &'a (u64, Vec<Point>)| {
        let found = points.iter().find(|p| p.key() == (variant, weights));
        found
            .ok_or_else(|| Error::Input(format!("{variant} ({}) is missing for seed {seed}", weights.name())))
    };
    seeds.iter().map(of).collect()
}
