//! From points to figures: accuracy against the large model's share over all seeds, and what follows from the curves.
//!
//! Intervals are percentile bootstraps (Efron, 1979) over the problems of each seed, drawn alike for everything that is
//! compared. They say how sure the figures are for these pairs; how much pairs differ shows in the rows of each seed.

use nics_base::row::Row;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::evaluate::{LARGE, MIDDLE, ORACLE, SMALL, sampled};
use super::{Kind, Point, Study};
use crate::{Error, Result};

/// Share of the large model's accuracy at which shares are compared.
const MOST: f64 = 0.9;
/// Samples of a bootstrap.
const RESAMPLES: usize = 500;
const SHARE: &str = "large-model share of tokens";

/// What holds for every row of a report.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// As rows name it.
    pub preset: String,
    /// The pairs.
    pub model: String,
    /// The task and its split.
    pub dataset: String,
    /// Parameters of small, middle and large model and of the router.
    pub parameters: [f64; 4],
}

/// A figure with its interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Its 95 % interval.
    pub interval: [f64; 2],
}

/// What routing is said to be worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Claims {
    /// Accuracy above entropy's at R2R's share, 0 to 1.
    pub over_entropy: Estimate,
    /// Accuracy above chance's at R2R's share, 0 to 1.
    pub over_random: Estimate,
    /// R2R's share over entropy's, both where 90 % of the large model's accuracy is reached.
    pub share_ratio: Estimate,
}

impl Claims {
    /// Whether the claims of the method's nano experiment hold: 30 points over either, and at most 0.6 of the share.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first that does not.
    pub fn check(&self) -> Result<()> {
        for (name, found) in
            [("accuracy over entropy", self.over_entropy), ("accuracy over random", self.over_random)]
        {
            if found.value.is_nan() || found.value < 0.3 {
                return Err(Error::setting(name, format!("{:.3}", found.value), "at least 0.3"));
            }
        }
        let ratio = self.share_ratio.value;
        if ratio.is_nan() || ratio > 0.6 {
            return Err(Error::setting("share over entropy's share", format!("{ratio:.3}"), "at most 0.6"));
        }
        Ok(())
    }
}

/// A point of every seed, as numbers.
struct Pooled {
    variant: String,
    rate: Option<f64>,
    seeds: Vec<Numbers>,
    seconds: f64,
    identical: Option<usize>,
}

struct Numbers {
    hits: Vec<f64>,
    large: Vec<f64>,
    tokens: Vec<f64>,
}

/// How often each problem of each seed counts.
type Weights = Vec<Vec<f64>>;

impl Pooled {
    /// Accuracy and share: means over the seeds.
    fn at(&self, weights: &Weights) -> [f64; 2] {
        let n = self.seeds.len() as f64;
        let mut sums = [0.0; 2];
        for (numbers, weights) in self.seeds.iter().zip(weights) {
            let sum = |values: &[f64]| values.iter().zip(weights).map(|(v, w)| v * w).sum::<f64>();
            sums[0] += sum(&numbers.hits) / weights.iter().sum::<f64>().max(1.0);
            sums[1] += sum(&numbers.large) / sum(&numbers.tokens).max(1.0);
        }
        sums.map(|s| s / n)
    }

    fn problems(&self) -> u64 {
        self.seeds.iter().map(|s| s.hits.len() as u64).sum()
    }
}

/// The points of several seeds side by side.
struct Pool {
    all: Vec<Pooled>,
}

impl Pool {
    fn new(seeds: &[Vec<Point>]) -> Result<Self> {
        let first = seeds.first().ok_or_else(|| Error::Input("there are no seeds".into()))?;
        let mut all = Vec::new();
        for point in first {
            let mut same = Vec::new();
            for points in seeds {
                let found = points.iter().find(|p| p.key() == point.key());
                same.push(found.ok_or_else(|| {
                    Error::Input(format!("{} at {:?} is missing for a seed", point.variant, point.rate))
                })?);
            }
            let numbers = |p: &&Point| {
                let numbers = |v: &[u32]| v.iter().map(|&n| f64::from(n)).collect();
                Numbers { hits: p.hits(), large: numbers(&p.large), tokens: numbers(&p.tokens) }
            };
            all.push(Pooled {
                variant: point.variant.clone(),
                rate: point.rate,
                seeds: same.iter().map(numbers).collect(),
                seconds: same.iter().map(|p| p.seconds).sum(),
                identical: same.iter().map(|p| p.identical).sum(),
            });
        }
        Ok(Self { all })
    }

    fn of<'a>(&'a self, variant: &'a str) -> impl Iterator<Item = &'a Pooled> {
        self.all.iter().filter(move |p| p.variant == variant)
    }

    /// The point whose threshold is no part of a sweep.
    fn chosen(&self, variant: &str) -> Result<&Pooled> {
        self.all
            .iter()
            .find(|p| p.variant == variant && p.rate.is_none())
            .ok_or_else(|| Error::Input(format!("{variant} has not been measured")))
    }

    /// A variant's sweep from the small model to the large one: shares with accuracies, by share.
    fn curve(&self, variant: &str, weights: &Weights) -> Result<Vec<[f64; 2]>> {
        let mut curve: Vec<[f64; 2]> =
            vec![[0.0, self.chosen(SMALL)?.at(weights)[0]], [1.0, self.chosen(LARGE)?.at(weights)[0]]];
        curve.extend(self.of(variant).filter(|p| p.rate.is_some()).map(|p| {
            let [accuracy, share] = p.at(weights);
            [share, accuracy]
        }));
        curve.sort_by(|a, b| a[0].total_cmp(&b[0]));
        Ok(curve)
    }

    /// Every problem once.
    fn whole(&self) -> Weights {
        self.all.first().map_or_else(Vec::new, |p| p.seeds.iter().map(|s| vec![1.0; s.hits.len()]).collect())
    }

    fn resample(&self, rng: &mut ChaCha8Rng) -> Weights {
        let mut weights = self.whole();
        for seed in &mut weights {
            let n = seed.len();
            seed.fill(0.0);
            for _ in 0..n {
                seed[rng.random_range(0..n as u64) as usize] += 1.0;
            }
        }
        weights
    }

    /// Values with their intervals; a value that a sample has not (not a number) is left out of its interval.
    fn estimate(&self, values: impl Fn(&Weights) -> Result<Vec<f64>>) -> Result<Vec<Estimate>> {
        let whole = values(&self.whole())?;
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut samples: Vec<Vec<f64>> = whole.iter().map(|_| Vec::with_capacity(RESAMPLES)).collect();
        for _ in 0..RESAMPLES {
            for (samples, value) in samples.iter_mut().zip(values(&self.resample(&mut rng))?) {
                samples.push(value);
            }
        }
        let interval = |mut samples: Vec<f64>, value: f64| {
            samples.retain(|v| v.is_finite());
            samples.sort_by(f64::total_cmp);
            let at = |q: f64| samples.get((q * (samples.len().max(1) - 1) as f64).round() as usize).copied();
            [at(0.025).unwrap_or(value), at(0.975).unwrap_or(value)]
        };
        Ok(whole
            .iter()
            .zip(samples)
            .map(|(&value, samples)| Estimate { value, interval: interval(samples, value) })
            .collect())
    }

    /// The claims' three figures.
    fn claims(&self, weights: &Weights) -> Result<[f64; 3]> {
        let [accuracy, share] = self.chosen(Kind::R2r.name())?.at(weights);
        let (entropy, random) = (self.curve("entropy", weights)?, self.curve("random", weights)?);
        let enough = MOST * self.chosen(LARGE)?.at(weights)[0];
        let needs = |curve: &[[f64; 2]]| share_for(curve, enough);
        let ratio = needs(&self.curve(Kind::R2r.name(), weights)?) / needs(&entropy);
        Ok([accuracy - accuracy_at(&entropy, share), accuracy - accuracy_at(&random, share), ratio])
    }
}

/// Between the two points around a share.
fn accuracy_at(curve: &[[f64; 2]], share: f64) -> f64 {
    for pair in curve.windows(2) {
        let ([a, low], [b, high]) = (pair[0], pair[1]);
        if share <= b {
            let along = if b > a { ((share - a) / (b - a)).clamp(0.0, 1.0) } else { 1.0 };
            return low + along * (high - low);
        }
    }
    curve.last().map_or(f64::NAN, |p| p[1])
}

/// The least share at which a curve reaches an accuracy; not a number where it never does.
fn share_for(curve: &[[f64; 2]], accuracy: f64) -> f64 {
    if curve.first().is_some_and(|p| p[1] >= accuracy) {
        return curve[0][0];
    }
    for pair in curve.windows(2) {
        let ([a, low], [b, high]) = (pair[0], pair[1]);
        if high >= accuracy {
            return a + (accuracy - low) / (high - low) * (b - a);
        }
    }
    f64::NAN
}

/// The rows of a report, and the claims.
///
/// # Errors
/// Seeds that were measured at different points, or not at all.
pub fn figures(study: &Study, about: &About, seeds: &[(u64, Vec<Point>)]) -> Result<(Vec<Row>, Claims)> {
    let points: Vec<Vec<Point>> = seeds.iter().map(|(_, points)| points.clone()).collect();
    let pool = Pool::new(&points)?;
    let temperature = study.evaluation.temperature;
    let mut rows = Vec::new();
    let drafts: Vec<String> =
        pool.all.iter().filter(|p| p.variant.starts_with("speculative")).map(|p| p.variant.clone()).collect();
    let mut singles = vec![SMALL.to_owned(), MIDDLE.into(), LARGE.into(), ORACLE.into()];
    singles.extend(Kind::ALL.map(|k| k.name().to_owned()));
    singles.extend(drafts.clone());
    singles.extend([SMALL, LARGE, Kind::R2r.name()].map(|v| sampled(v, temperature)));
    for variant in &singles {
        single(&pool, study, about, variant, &mut rows)?;
    }
    for variant in &drafts {
        let point = pool.chosen(variant)?;
        let identical = point.identical.unwrap_or(0) as f64 / point.problems().max(1) as f64;
        rows.push(Row {
            metric: "replies equal to the large model's own".into(),
            value: identical,
            higher_is_better: true,
            n: Some(point.problems()),
            ..about.row(variant)
        });
    }
    let groups: [(&str, Vec<String>); 4] = [
        (
            "accuracy at a share",
            ["entropy", "random"]
                .map(str::to_owned)
                .into_iter()
                .chain([Kind::R2r, Kind::Mismatch].map(|k| k.name().to_owned()))
                .collect(),
        ),
        (
            "accuracy at a share, policies without training and ablations",
            ["immediate", "momentum", "rolling", "duo rolling", "neural rolling"]
                .map(str::to_owned)
                .into_iter()
                .chain(Kind::ALL[2..].iter().map(|k| k.name().to_owned()))
                .collect(),
        ),
        ("accuracy at a share, whole queries routed", query_variants(&pool)),
        (
            "accuracy at a share, both models sampling",
            [Kind::R2r.name(), "entropy"].map(|v| sampled(v, temperature)).to_vec(),
        ),
    ];
    for (metric, variants) in groups {
        for variant in variants {
            curve_rows(&pool, about, metric, &variant, &mut rows)?;
        }
    }
    for variant in [SMALL, ORACLE, LARGE] {
        let point = pool.chosen(variant)?;
        push_point(&pool, about, "accuracy at a share", point, &mut rows)?;
    }
    let claims = claim_rows(&pool, about, seeds, &mut rows)?;
    Ok((rows, claims))
}

fn query_variants(pool: &Pool) -> Vec<String> {
    let mut names: Vec<String> =
        pool.all.iter().filter(|p| p.variant.starts_with("query")).map(|p| p.variant.clone()).collect();
    names.dedup();
    names
}

impl About {
    fn row(&self, variant: &str) -> Row {
        Row {
            method: "r2r".into(),
            variant: variant.to_owned(),
            preset: self.preset.clone(),
            model: self.model.clone(),
            dataset: self.dataset.clone(),
            device: "cpu".into(),
            dtype: "float32".into(),
            ..Row::default()
        }
    }
}

/// A variant at its chosen setting: accuracy, share, parameters.
fn single(pool: &Pool, study: &Study, about: &About, variant: &str, rows: &mut Vec<Row>) -> Result<()> {
    let point = pool.chosen(variant)?;
    let estimates = pool.estimate(|weights| Ok(point.at(weights).to_vec()))?;
    let n = Some(point.problems());
    let row = || Row { n, ..about.row(variant) };
    rows.push(Row {
        metric: "accuracy".into(),
        value: estimates[0].value,
        higher_is_better: true,
        ci: Some(estimates[0].interval),
        wall_s: Some(point.seconds),
        ..row()
    });
    let share = estimates[1];
    let speculative = variant.starts_with("speculative");
    let metric = if speculative { "large-model calls a token" } else { SHARE };
    rows.push(Row { metric: metric.into(), value: share.value, ci: Some(share.interval), ..row() });
    let [small, middle, large, router] = about.parameters;
    let parameters = if variant == MIDDLE {
        [middle; 2]
    } else if variant == LARGE || variant == sampled(LARGE, study.evaluation.temperature) {
        [large; 2]
    } else if speculative {
        return Ok(());
    } else {
        let router = if variant.starts_with("R2R") || variant.starts_with("router") { router } else { 0.0 };
        [small + share.value * (large - small), small + share.value * large + router]
    };
    for (metric, value) in [
        ("parameters a token, the choosing model's alone", parameters[0]),
        ("parameters a token, all that run", parameters[1]),
    ] {
        rows.push(Row { metric: metric.into(), value, ..row() });
    }
    Ok(())
}

fn curve_rows(pool: &Pool, about: &About, metric: &str, variant: &str, rows: &mut Vec<Row>) -> Result<()> {
    let points: Vec<&Pooled> = pool.of(variant).filter(|p| p.rate.is_some()).collect();
    if points.is_empty() {
        return Err(Error::Input(format!("{variant} has not been measured over a sweep")));
    }
    points.into_iter().try_for_each(|point| push_point(pool, about, metric, point, rows))
}

fn push_point(pool: &Pool, about: &About, metric: &str, point: &Pooled, rows: &mut Vec<Row>) -> Result<()> {
    let estimates = pool.estimate(|weights| Ok(point.at(weights).to_vec()))?;
    rows.push(Row {
        metric: metric.into(),
        value: estimates[0].value,
        higher_is_better: true,
        n: Some(point.problems()),
        ci: Some(estimates[0].interval),
        x: Some(estimates[1].value),
        x_label: Some(SHARE.into()),
        ..about.row(&point.variant)
    });
    Ok(())
}

/// The claims over all seeds with intervals, and of each seed.
fn claim_rows(
    pool: &Pool,
    about: &About,
    seeds: &[(u64, Vec<Point>)],
    rows: &mut Vec<Row>,
) -> Result<Claims> {
    let estimates = pool.estimate(|weights| Ok(pool.claims(weights)?.to_vec()))?;
    let metrics = [
        ("accuracy gap at R2R's share", "R2R over entropy", true),
        ("accuracy gap at R2R's share", "R2R over random", true),
        ("share for 90 % of the large model's accuracy, ratio", "R2R over entropy", false),
    ];
    let problems = pool.chosen(LARGE)?.problems();
    let n = Some(problems);
    for ((metric, variant, higher_is_better), estimate) in metrics.into_iter().zip(&estimates) {
        let row = Row { metric: metric.into(), higher_is_better, ..about.row(variant) };
        rows.push(Row { value: estimate.value, ci: Some(estimate.interval), n, ..row.clone() });
    }
    for (seed, points) in seeds {
        let one = Pool::new(std::slice::from_ref(points))?;
        let values = one.claims(&one.whole())?;
        for ((metric, variant, higher_is_better), value) in metrics.into_iter().zip(values) {
            let variant = format!("{variant}, pair of seed {seed}");
            let n = Some(problems / seeds.len() as u64);
            rows.push(Row {
                metric: metric.into(),
                higher_is_better,
                value,
                n,
                seed: Some(*seed),
                ..about.row(&variant)
            });
        }
    }
    let [over_entropy, over_random, share_ratio] = [estimates[0], estimates[1], estimates[2]];
    Ok(Claims { over_entropy, over_random, share_ratio })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_read_between_their_points() {
        let curve = [[0.0, 0.2], [0.2, 0.6], [0.4, 0.5], [1.0, 1.0]];
        assert!((accuracy_at(&curve, 0.1) - 0.4).abs() < 1e-12);
        assert!((accuracy_at(&curve, 0.7) - 0.75).abs() < 1e-12);
        assert!((accuracy_at(&curve, 1.0) - 1.0).abs() < 1e-12);
        // The first time that it is reached, whatever comes later.
        assert!((share_for(&curve, 0.6) - 0.2).abs() < 1e-12);
        assert!((share_for(&curve, 0.9) - 0.88).abs() < 1e-12);
        assert!(share_for(&curve, 1.1).is_nan());
        assert_eq!(share_for(&curve, 0.1).to_bits(), 0.0f64.to_bits());
    }

    #[test]
    fn claims_fail_by_name() {
        let sure = |value: f64| Estimate { value, interval: [value, value] };
        let good = Claims { over_entropy: sure(0.5), over_random: sure(0.4), share_ratio: sure(0.5) };
        good.check().unwrap();
        let failed = |claims: Claims| claims.check().unwrap_err().to_string();
        assert!(failed(Claims { over_entropy: sure(0.29), ..good }).contains("over entropy is 0.290"));
        assert!(failed(Claims { over_random: sure(f64::NAN), ..good }).contains("over random"));
        assert!(failed(Claims { share_ratio: sure(0.61), ..good }).contains("0.610"));
        assert!(failed(Claims { share_ratio: sure(f64::NAN), ..good }).contains("share"));
    }
}
