//! From points to figures: divergence and accuracy over all models, and methods beside each other on the same answers.
//!
//! Intervals are percentile bootstraps (Efron, 1979) over models and over the problems of each, drawn alike for everything
//! that is compared: they are for models like these.

use nics_base::ci::{Drawn, Draws, Estimate, Grouped};
use nics_base::row::Row;
use nics_datasets::symbol_grid::SIDE;

use super::variants::{BLIND, FLOAT, MBQ, RTN, condition};
use super::{Claims, Point, Study, Variant, variants};
use crate::{Error, Result};

/// Samples of a bootstrap.
const RESAMPLES: usize = 2000;
const DIVERGENCE: &str = "divergence from the float model";
const EXACT: &str = "answers without a mistake";
const SYMBOLS: &str = "symbols right";

/// What holds for every row of a report.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// As rows name it.
    pub preset: String,
    /// The models.
    pub model: String,
}

/// How much one method diverges beside another: the ratio of their mean divergences, below 1 where the first is better.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The condition.
    pub condition: String,
    /// The width.
    pub quant: String,
    /// The first method.
    pub method: String,
    /// The other.
    pub over: String,
    /// The ratio.
    pub ratio: Estimate,
    /// In how many models the first diverges less.
    pub wins: usize,
    /// Of how many.
    pub models: usize,
    /// Whether it is claimed.
    pub claimed: bool,
}

/// What the study shows about methods beside each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparisons(pub Vec<Comparison>);

impl Comparisons {
    /// Whether every claim holds: the whole interval of its ratio is below 1.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first that does not.
    pub fn check(&self) -> Result<()> {
        for c in self.0.iter().filter(|c| c.claimed) {
            let [low, high] = c.ratio.interval;
            if high.is_nan() || high >= 1.0 {
                return Err(Error::Input(format!(
                    "{}, {}: the divergence of {} over that of {} is {:.3} ({low:.3} to {high:.3}), claimed to be below 1",
                    c.condition, c.quant, c.method, c.over, c.ratio.value
                )));
            }
        }
        Ok(())
    }
}

/// Makes rows.
struct Maker<'a> {
    about: &'a About,
    study: &'a Study,
    seeds: &'a [(u64, Vec<Point>)],
    draws: Draws,
    rows: Vec<Row>,
}

/// The rows of a report, and the comparisons of the method with every other.
///
/// # Errors
/// Models that were measured at different points, or not at all.
pub fn figures(
    study: &Study,
    claims: &Claims,
    about: &About,
    seeds: &[(u64, Vec<Point>)],
) -> Result<(Vec<Row>, Comparisons)> {
    if seeds.is_empty() {
        return Err(Error::Input("there are no models".into()));
    }
    let items = vec![study.evaluation.samples; seeds.len()];
    let draws = Draws::new(&items, Drawn::GroupsAndItems, RESAMPLES, 0);
    let mut maker = Maker { about, study, seeds, draws, rows: Vec::new() };
    let all = variants(study)?;
    for variant in &all {
        maker.measured(variant)?;
    }
    let comparisons = maker.comparisons(&all, claims)?;
    Ok((maker.rows, comparisons))
}

impl Maker<'_> {
    /// The points of a variant, one a model.
    fn points(&self, condition: &str, quant: &str, method: &str) -> Result<Vec<&Point>> {
        let of = |(seed, points): &'_ (u64, Vec<Point>)| -> Result<usize> {
            let place = points.iter().position(|p| p.key() == (condition, quant, method));
            let lacks = || format!("{condition}, {quant}: {method} is missing for seed {seed}");
            let place = place.ok_or_else(|| Error::Input(lacks()))?;
            let n = self.study.evaluation.samples;
            if points[place].kl.len() != n || points[place].right.len() != n {
                return Err(Error::Input(format!(
                    "{condition}, {quant}: {method} has {} problems for seed {seed}, the settings say {n}",
                    points[place].kl.len()
                )));
            }
            Ok(place)
        };
        self.seeds.iter().map(|seed| Ok(&seed.1[of(seed)?])).collect()
    }

    fn row(&self, condition: &str, method: &str) -> Row {
        Row {
            method: "mbq".into(),
            variant: method.to_owned(),
            preset: self.about.preset.clone(),
            model: self.about.model.clone(),
            dataset: format!("symbol-grid/test, {condition}"),
            device: "cpu".into(),
            dtype: "float32".into(),
            ..Row::default()
        }
    }

    /// The figures of a variant, and its divergence in each model.
    fn measured(&mut self, variant: &Variant) -> Result<()> {
        let condition = condition(self.study, variant).name.clone();
        let quant = variant.quant();
        let points = self.points(&condition, &quant, variant.name)?;
        let seconds: f64 = points.iter().map(|p| p.seconds).sum();
        let weights: Vec<&Vec<[f64; 2]>> =
            points.iter().map(|p| &p.ratios).filter(|r| !r.is_empty()).collect();
        let all = [
            (DIVERGENCE, "nats", kl(&points)),
            (EXACT, "", shares(&points, |n| f64::from(u8::from(usize::from(n) == SIDE)))),
            (SYMBOLS, "", shares(&points, |n| f64::from(n) / SIDE as f64)),
        ];
        let mut rows = Vec::new();
        for (metric, unit, values) in &all {
            if variant.spec.is_none() && *metric == DIVERGENCE {
                continue;
            }
            let at = if variant.spec.is_none() { String::new() } else { format!(", {quant}") };
            let estimate = self.draws.estimate(|w| w.mean(values));
            let whole = Row {
                metric: format!("{metric}{at}"),
                value: estimate.value,
                unit: (*unit).into(),
                ci: Some(estimate.interval),
                higher_is_better: *metric != DIVERGENCE,
                n: Some(values.iter().map(|v| v.len() as u64).sum()),
                wall_s: (*metric == DIVERGENCE).then_some(seconds),
                ..self.row(&condition, variant.name)
            };
            rows.push(whole);
            for ((seed, _), values) in self.seeds.iter().zip(values).filter(|_| *metric != SYMBOLS) {
                rows.push(Row {
                    metric: format!("{metric}{at}, by model"),
                    value: values.iter().sum::<f64>() / values.len().max(1) as f64,
                    unit: (*unit).into(),
                    higher_is_better: *metric != DIVERGENCE,
                    n: Some(values.len() as u64),
                    seed: Some(*seed),
                    ..self.row(&condition, variant.name)
                });
            }
        }
        // What was measured does not depend on how errors are rounded: once is enough.
        if variant.name == MBQ
            && variants(self.study)?.iter().find(|v| v.name == MBQ && v.condition == variant.condition)
                == Some(variant)
        {
            let layers = weights.iter().map(|r| r.len()).min().unwrap_or(0);
            for l in 0..layers {
                for (b, branch) in ["attention", "MLP"].into_iter().enumerate() {
                    let mean = weights.iter().map(|r| r[l][b]).sum::<f64>() / weights.len() as f64;
                    rows.push(Row {
                        metric: format!("weight of errors on pictures, {branch}"),
                        value: mean,
                        x: Some(l as f64),
                        x_label: Some("layer".into()),
                        ..self.row(&condition, variant.name)
                    });
                }
            }
        }
        self.rows.extend(rows);
        Ok(())
    }

    /// The method beside every other at its width, the other searches beside the one that knows no modalities, and claims.
    fn comparisons(&mut self, all: &[Variant], claims: &Claims) -> Result<Comparisons> {
        let mut pairs: Vec<(String, String, String, String, bool)> = Vec::new();
        let mut put = |condition: &str, quant: &str, method: &str, over: &str, claimed: bool| {
            let key = (condition.to_owned(), quant.to_owned(), method.to_owned(), over.to_owned());
            match pairs.iter_mut().find(|p| (&p.0, &p.1, &p.2, &p.3) == (&key.0, &key.1, &key.2, &key.3)) {
                Some(pair) => pair.4 |= claimed,
                None => pairs.push((key.0, key.1, key.2, key.3, claimed)),
            }
        };
        for v in all.iter().filter(|v| v.name != FLOAT) {
            let (condition, quant) = (&condition(self.study, v).name, v.quant());
            if v.name != MBQ {
                put(condition, &quant, MBQ, v.name, false);
            }
            if ![MBQ, BLIND, RTN].contains(&v.name) {
                put(condition, &quant, v.name, BLIND, false);
            }
        }
        for c in &claims.claim {
            put(&c.condition, &c.quant, &c.method, &c.over, true);
        }
        let mut found = Vec::with_capacity(pairs.len());
        for (condition, quant, method, over, claimed) in pairs {
            let a = kl(&self.points(&condition, &quant, &method)?);
            let b = kl(&self.points(&condition, &quant, &over)?);
            let ratio = self.draws.estimate(|w| w.mean(&a) / w.mean(&b));
            let sum = |values: &Vec<f64>| values.iter().sum::<f64>();
            let wins = a.iter().zip(&b).filter(|(a, b)| sum(a) < sum(b)).count();
            let models = self.seeds.len();
            self.rows.push(Row {
                metric: format!("divergence over that of another method, {quant}"),
                value: ratio.value,
                ci: Some(ratio.interval),
                n: Some(models as u64),
                ..self.row(&condition, &format!("{method} over {over}"))
            });
            found.push(Comparison { condition, quant, method, over, ratio, wins, models, claimed });
        }
        Ok(Comparisons(found))
    }
}

fn kl(points: &[&Point]) -> Grouped {
    points.iter().map(|p| p.kl.iter().map(|v| f64::from(*v)).collect()).collect()
}

fn shares(points: &[&Point], of: impl Fn(u8) -> f64) -> Grouped {
    points.iter().map(|p| p.right.iter().map(|n| of(*n)).collect()).collect()
}
