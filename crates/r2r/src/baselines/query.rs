//! Routing of whole queries: before anything is written, a query goes to the small or to the large model.
//!
//! Routers of RouteLLM (Ong et al., 2024), on one vector of each query: the small model's hidden states over the prompt,
//! pooled ([`pooled_states`]), in place of an embedding service.
//!
//! - [`Matrix`]: `sigma(d(large) - d(small))`, `d(m) = w . (v_m * (W q + b))`.
//! - [`Head`]: a logistic or MLP head, the part of RouteLLM's BERT classifier.
//! - [`Similarity`]: Bradley-Terry on the comparisons known, each weighted by `g^(1 + S)` with `S` the cosine similarity to
//!   the query over its largest.
//!
//! Each gives the probability that the large model wins. A threshold that sends a wanted share of queries to the large
//! model comes from [`threshold_for_share`].

use std::sync::Arc;

use nics_core::cache::NoCache;
use nics_core::checkpoint::TensorPath;
use nics_core::models::{Model, NewTokens, read};
use nics_core::seam::SeqId;
use nics_core::train::{AdamW, AdamWOptions};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor};

use crate::{Error, Result};

/// Queries that are read at once.
const CHUNK: usize = 64;

/// How the models compare on a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Comparison {
    /// The large model alone is right.
    Large,
    /// Both are right, or both are wrong.
    Tie,
    /// The small model alone is right.
    Small,
}

impl Comparison {
    /// Of two answers.
    pub fn of(small_is_right: bool, large_is_right: bool) -> Self {
        match (small_is_right, large_is_right) {
            (false, true) => Self::Large,
            (true, false) => Self::Small,
            _ => Self::Tie,
        }
    }

    /// 1 where the large model is worth its price; a tie is not.
    fn target(self) -> f32 {
        if self == Self::Large { 1.0 } else { 0.0 }
    }

    /// What a comparison counts for the large model in Bradley-Terry, where a tie is half a win.
    fn win(self) -> f64 {
        match self {
            Self::Large => 1.0,
            Self::Tie => 0.5,
            Self::Small => 0.0,
        }
    }
}

/// Queries as vectors, float32 `[queries, width]`: the mean of a model's hidden states after the final norm over the
/// prompt, beside the last one.
///
/// # Errors
/// [`Error::EmptyPrompt`], ids that the model does not have.
pub fn pooled_states(model: &dyn Model, prompts: &[Vec<u32>]) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    if let Some(at) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::EmptyPrompt { seq: at as u64 });
    }
    if prompts.is_empty() {
        return Err(Error::Input("there are no queries".into()));
    }
    let mut pooled = Vec::with_capacity(prompts.len());
    for chunk in prompts.chunks(CHUNK) {
        let new: Vec<NewTokens> =
            chunk.iter().enumerate().map(|(i, p)| (SeqId(i as u64), 0, p.as_slice())).collect();
        let hidden = read(model, &mut NoCache::new(), &new)?;
        let hidden = hidden.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?;
        let mut from = 0;
        for len in chunk.iter().map(|prompt| prompt.len() as i64) {
            let own = hidden.f_narrow(0, from, len)?;
            let mean = own.f_mean_dim(0i64, false, Kind::Float)?;
            pooled.push(Tensor::f_cat(&[mean, own.f_get(len - 1)?], 0)?);
            from += len;
        }
    }
    Ok(Tensor::f_stack(&pooled, 0)?)
}

/// Gives each query the probability that the large model wins.
pub trait QueryRouter {
    /// Its name in results.
    fn name(&self) -> &'static str;

    /// Probabilities of `queries`, `[queries, width]`.
    fn scores(&self, queries: &Tensor) -> Result<Vec<f32>>;
}

/// How a router with weights is trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QueryTraining {
    /// Learning rate. Default 3e-3.
    pub lr: f64,
    /// Decoupled weight decay of matrices. Default 1e-2.
    pub weight_decay: f64,
    /// Steps, each over all queries. Default 300.
    pub steps: usize,
    /// Seed of the initial weights. Default 0.
    pub seed: u64,
}

impl Default for QueryTraining {
    fn default() -> Self {
        Self { lr: 3e-3, weight_decay: 1e-2, steps: 300, seed: 0 }
    }
}

impl QueryTraining {
    fn validate(&self) -> Result<()> {
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(Error::setting("lr", self.lr, "a number above 0"));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return Err(Error::setting("weight_decay", self.weight_decay, "0 or a positive number"));
        }
        if self.steps == 0 { Err(Error::setting("steps", 0, "at least 1")) } else { Ok(()) }
    }
}

/// Queries with unit scale: what a router learns from and is asked with.
#[derive(Debug)]
struct Scale {
    mean: Tensor,
    deviation: Tensor,
}

impl Scale {
    fn of(queries: &Tensor) -> Result<Self> {
        let mean = queries.f_mean_dim(0i64, true, Kind::Float)?;
        let deviation =
            (queries - &mean).f_square()?.f_mean_dim(0i64, true, Kind::Float)?.f_sqrt()?.f_clamp_min(1e-6)?;
        Ok(Self { mean, deviation })
    }

    fn apply(&self, queries: &Tensor) -> Result<Tensor> {
        let width = self.mean.size()[1];
        match queries.size2() {
            Ok((_, found)) if found == width => Ok(queries.f_sub(&self.mean)?.f_div(&self.deviation)?),
            _ => {
                let found = queries.size();
                Err(Error::Input(format!("queries have shape {found:?}, expected [queries, {width}]")))
            }
        }
    }
}

fn check(queries: &Tensor, known: &[Comparison]) -> Result<i64> {
    let (rows, width) = queries.size2().map_err(|_| {
        Error::Input(format!("queries have shape {:?}, expected [queries, width]", queries.size()))
    })?;
    if rows as usize != known.len() || rows == 0 {
        return Err(Error::Input(format!("{rows} queries for {} comparisons", known.len())));
    }
    if !queries.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite() {
        return Err(Error::NonFiniteFeatures { what: "the queries' vectors" });
    }
    Ok(width)
}

fn both_kinds(known: &[Comparison]) -> Result<()> {
    let (positive, total) = (known.iter().filter(|c| **c == Comparison::Large).count(), known.len());
    if positive == 0 || positive == total { Err(Error::NoPositiveLabels { positive, total }) } else { Ok(()) }
}

/// Minimises binary cross entropy of `logits` over all queries.
fn fit(
    parameters: &[(&str, &Tensor)],
    known: &[Comparison],
    training: &QueryTraining,
    logits: &dyn Fn() -> Result<Tensor>,
) -> Result<()> {
    let named = parameters.iter().map(|(name, p)| ((*name).to_owned(), p.set_requires_grad(true))).collect();
    let options = AdamWOptions { betas: [0.9, 0.999], eps: 1e-8, weight_decay: training.weight_decay };
    let mut optimizer = AdamW::new(named, options)?;
    let targets = Tensor::f_from_slice(&known.iter().map(|c| c.target()).collect::<Vec<f32>>())?;
    for _ in 0..training.steps {
        let loss = logits()?.f_binary_cross_entropy_with_logits(
            &targets,
            None::<&Tensor>,
            None::<&Tensor>,
            Reduction::Mean,
        )?;
        let grads = Tensor::f_run_backward(&[&loss], optimizer.params(), false, false)?;
        let grads: Vec<Option<Tensor>> = grads.into_iter().map(|g| g.defined().then_some(g)).collect();
        optimizer.step(&grads, training.lr)?;
    }
    for (_, p) in parameters {
        let _ = p.set_requires_grad(false);
    }
    Ok(())
}

/// Weights of deviation `1 / sqrt(in)` from a seed and their names.
fn initial(seed: u64) -> TensorPath {
    TensorPath::random(seed, 1.0, Device::Cpu, Kind::Float).with_transform(Arc::new(|_: &str, t: Tensor| {
        let shape = t.size();
        Ok(if let [_, input] = shape[..] { t * (input as f64).powf(-0.5) } else { t })
    }))
}

fn probabilities(logits: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::try_from(logits.f_sigmoid()?)?)
}

/// Matrix factorisation: each model is a vector, and so is a query.
#[derive(Debug)]
pub struct Matrix {
    scale: Scale,
    /// `[dim, width]` and `[dim]`.
    project: [Tensor; 2],
    /// Small and large model, `[2, dim]`.
    models: Tensor,
    /// `[1, dim]`.
    weigh: Tensor,
}

impl Matrix {
    /// Learns from `queries` (`[queries, width]`) and how the models compared on them, in `dim` dimensions.
    ///
    /// # Errors
    /// [`Error::NoPositiveLabels`] unless the large model won some and not all.
    pub fn train(queries: &Tensor, known: &[Comparison], dim: i64, training: &QueryTraining) -> Result<Self> {
        let width = check(queries, known)?;
        both_kinds(known)?;
        training.validate()?;
        if dim < 1 {
            return Err(Error::setting("the matrix router's dimensions", dim, "at least 1"));
        }
        let at = initial(training.seed);
        let scale = Scale::of(queries)?;
        let matrix = Self {
            scale,
            project: [at.tensor("project.weight", &[dim, width])?, at.tensor("project.bias", &[dim])?],
            models: at.tensor("models.weight", &[2, dim])?,
            weigh: at.tensor("weigh.weight", &[1, dim])?,
        };
        let scaled = matrix.scale.apply(queries)?;
        let parameters = [
            ("project.weight", &matrix.project[0]),
            ("project.bias", &matrix.project[1]),
            ("models", &matrix.models),
            ("weigh", &matrix.weigh),
        ];
        fit(&parameters, known, training, &|| matrix.logits(&scaled))?;
        Ok(matrix)
    }

    /// `d(large) - d(small)` of scaled queries, `[queries]`.
    fn logits(&self, queries: &Tensor) -> Result<Tensor> {
        let projected = queries.f_linear(&self.project[0], Some(&self.project[1]))?;
        let difference = self.models.f_get(1)?.f_sub(&self.models.f_get(0)?)?;
        Ok((projected * difference).f_linear(&self.weigh, None::<&Tensor>)?.f_squeeze_dim(1)?)
    }
}

impl QueryRouter for Matrix {
    fn name(&self) -> &'static str {
        "query: matrix factorisation"
    }

    fn scores(&self, queries: &Tensor) -> Result<Vec<f32>> {
        let _guard = tch::no_grad_guard();
        probabilities(&self.logits(&self.scale.apply(queries)?)?)
    }
}

/// A logistic head, or an MLP of one hidden layer.
#[derive(Debug)]
pub struct Head {
    scale: Scale,
    /// `[hidden, width]` and `[hidden]`; none in a logistic head.
    inner: Option<[Tensor; 2]>,
    /// `[1, hidden or width]` and `[1]`.
    outer: [Tensor; 2],
}

impl Head {
    /// Learns from `queries` (`[queries, width]`) and how the models compared on them; `hidden` is the MLP's width, 0 a
    /// logistic head.
    ///
    /// # Errors
    /// [`Error::NoPositiveLabels`] unless the large model won some and not all.
    pub fn train(
        queries: &Tensor,
        known: &[Comparison],
        hidden: i64,
        training: &QueryTraining,
    ) -> Result<Self> {
        let width = check(queries, known)?;
        both_kinds(known)?;
        training.validate()?;
        let at = initial(training.seed);
        let inner = (hidden > 0)
            .then(|| {
                Ok::<_, Error>([
                    at.tensor("inner.weight", &[hidden, width])?,
                    at.tensor("inner.bias", &[hidden])?,
                ])
            })
            .transpose()?;
        let last = if hidden > 0 { hidden } else { width };
        let outer = [at.tensor("outer.weight", &[1, last])?, at.tensor("outer.bias", &[1])?];
        let head = Self { scale: Scale::of(queries)?, inner, outer };
        let scaled = head.scale.apply(queries)?;
        let mut parameters = vec![("outer.weight", &head.outer[0]), ("outer.bias", &head.outer[1])];
        if let Some([weight, bias]) = &head.inner {
            parameters.extend([("inner.weight", weight), ("inner.bias", bias)]);
        }
        fit(&parameters, known, training, &|| head.logits(&scaled))?;
        Ok(head)
    }

    fn logits(&self, queries: &Tensor) -> Result<Tensor> {
        let inner = match &self.inner {
            Some([weight, bias]) => queries.f_linear(weight, Some(bias))?.f_gelu("none")?,
            None => queries.shallow_clone(),
        };
        Ok(inner.f_linear(&self.outer[0], Some(&self.outer[1]))?.f_squeeze_dim(1)?)
    }
}

impl QueryRouter for Head {
    fn name(&self) -> &'static str {
        if self.inner.is_some() { "query: MLP head" } else { "query: logistic head" }
    }

    fn scores(&self, queries: &Tensor) -> Result<Vec<f32>> {
        let _guard = tch::no_grad_guard();
        probabilities(&self.logits(&self.scale.apply(queries)?)?)
    }
}

/// Similarity-weighted Bradley-Terry over the comparisons known.
///
/// With two models the weighted maximum-likelihood fit has a closed form: the probability that the large one wins is the
/// weighted share of its wins.
#[derive(Debug)]
pub struct Similarity {
    scale: Scale,
    /// Known queries, rows of length 1, `[known, width]`.
    known: Tensor,
    wins: Tensor,
    gamma: f64,
}

impl Similarity {
    /// The paper's base of the weights.
    pub const GAMMA: f64 = 10.0;

    /// Over `queries` (`[queries, width]`) and how the models compared on them.
    pub fn new(queries: &Tensor, known: &[Comparison], gamma: f64) -> Result<Self> {
        check(queries, known)?;
        if !(gamma.is_finite() && gamma >= 1.0) {
            return Err(Error::setting("gamma", gamma, "1 or more"));
        }
        let scale = Scale::of(queries)?;
        let rows = unit(&scale.apply(queries)?)?;
        let wins = Tensor::f_from_slice(&known.iter().map(|c| c.win()).collect::<Vec<f64>>())?;
        Ok(Self { scale, known: rows, wins, gamma })
    }
}

/// Rows of length 1.
fn unit(rows: &Tensor) -> Result<Tensor> {
    let length = rows.f_square()?.f_sum_dim_intlist(1i64, true, Kind::Float)?.f_sqrt()?;
    Ok(rows.f_div(&length.f_clamp_min(1e-12)?)?)
}

impl QueryRouter for Similarity {
    fn name(&self) -> &'static str {
        "query: similarity-weighted"
    }

    fn scores(&self, queries: &Tensor) -> Result<Vec<f32>> {
        let _guard = tch::no_grad_guard();
        let cosine = unit(&self.scale.apply(queries)?)?.f_matmul(&self.known.f_transpose(0, 1)?)?;
        // Of a query that nothing resembles no similarity stands out.
        let largest = cosine.f_amax([1i64].as_slice(), true)?.f_clamp_min(1e-6)?;
        let exponent = cosine.f_div(&largest)?.f_to_kind(Kind::Double)?.f_add_scalar(1.0)?;
        let weights = exponent.f_mul_scalar(self.gamma.ln())?.f_exp()?;
        let won = weights.f_matmul(&self.wins)?;
        let share = won.f_div(&weights.f_sum_dim_intlist(1i64, false, Kind::Double)?)?;
        Ok(Vec::try_from(share.f_to_kind(Kind::Float)?)?)
    }
}

/// The lowest threshold at which at most `share` of the queries with these scores go to the large model (score at or above
/// it): infinity where that is none.
///
/// # Errors
/// A share outside 0 to 1, scores that are not numbers, or none at all.
pub fn threshold_for_share(scores: &[f32], share: f64) -> Result<f32> {
    if !(0.0..=1.0).contains(&share) {
        return Err(Error::setting("the share of queries for the large model", share, "0 to 1"));
    }
    if scores.is_empty() || scores.iter().any(|s| s.is_nan()) {
        return Err(Error::NonFiniteFeatures { what: "the queries' scores" });
    }
    let mut sorted = scores.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    // The share may be a rounded count.
    let most = (share * sorted.len() as f64 + 1e-9).floor() as usize;
    let fits = |t: f32| sorted.iter().filter(|s| **s >= t).count() <= most;
    Ok(sorted[..most].iter().rev().copied().find(|t| fits(*t)).unwrap_or(f32::INFINITY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Queries of width 4 on which the large model wins when the first value is high.
    fn queries(seed: u64, n: usize) -> (Tensor, Vec<Comparison>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f32> = (0..n * 4).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect();
        let known = values.chunks(4).map(|q| if q[0] > 0.2 { Comparison::Large } else { Comparison::Tie });
        let known = known.collect();
        (Tensor::from_slice(&values).reshape([n as i64, 4]), known)
    }

    /// How often a query on which the large model wins has the higher score of two.
    fn ranked(scores: &[f32], known: &[Comparison]) -> f64 {
        let of = |kind| scores.iter().zip(known).filter(move |(_, k)| **k == kind).map(|(s, _)| *s);
        let (mut right, mut all) = (0.0, 0.0);
        for a in of(Comparison::Large) {
            for b in of(Comparison::Tie) {
                right += if a > b { 1.0 } else { 0.0 };
                all += 1.0;
            }
        }
        right / all
    }

    #[test]
    fn every_router_finds_what_tells_and_is_seeded() {
        let (train, known) = queries(1, 200);
        let (test, truth) = queries(2, 200);
        let training = QueryTraining::default();
        let make = || -> Vec<Box<dyn QueryRouter>> {
            vec![
                Box::new(Matrix::train(&train, &known, 8, &training).unwrap()),
                Box::new(Head::train(&train, &known, 0, &training).unwrap()),
                Box::new(Head::train(&train, &known, 16, &training).unwrap()),
                Box::new(Similarity::new(&train, &known, Similarity::GAMMA).unwrap()),
            ]
        };
        for (router, again) in make().iter().zip(make()) {
            let scores = router.scores(&test).unwrap();
            assert_eq!(scores, again.scores(&test).unwrap(), "{}", router.name());
            assert!(scores.iter().all(|s| (0.0..=1.0).contains(s)));
            let ranked = ranked(&scores, &truth);
            assert!(ranked > 0.9, "{}: {ranked}", router.name());
        }
    }

    #[test]
    fn similarity_is_the_weighted_share_of_wins() {
        // The query is the first known one turned by nothing: similarities 1 and -1 of a largest 1.
        let known = Tensor::from_slice(&[1.0f32, 0.0, -1.0, 0.0]).reshape([2, 2]);
        let router = Similarity::new(&known, &[Comparison::Large, Comparison::Small], 10.0).unwrap();
        let score = router.scores(&Tensor::from_slice(&[1.0f32, 0.0]).reshape([1, 2])).unwrap()[0];
        assert!((score - 100.0 / 101.0).abs() < 1e-5, "{score}");
        let router = Similarity::new(&known, &[Comparison::Tie, Comparison::Tie], 10.0).unwrap();
        assert!((router.scores(&known).unwrap()[1] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn a_threshold_keeps_the_share() {
        let scores = [0.1f32, 0.4, 0.4, 0.7, 0.9];
        let sent = |share| {
            let threshold = threshold_for_share(&scores, share).unwrap();
            scores.iter().filter(|s| **s >= threshold).count()
        };
        assert_eq!([0.0, 0.2, 0.4, 0.6, 0.8, 1.0].map(sent), [0, 1, 2, 2, 4, 5]);
        assert!(threshold_for_share(&scores, 1.5).is_err());
        assert!(threshold_for_share(&[], 0.5).is_err());
    }

    #[test]
    fn what_cannot_be_learned_from_is_refused() {
        let (train, known) = queries(1, 20);
        let training = QueryTraining::default();
        let ties = vec![Comparison::Tie; 20];
        assert!(matches!(
            Head::train(&train, &ties, 0, &training),
            Err(Error::NoPositiveLabels { positive: 0, total: 20 })
        ));
        assert!(Matrix::train(&train, &known[1..], 4, &training).is_err());
        assert!(Matrix::train(&train, &known, 0, &training).is_err());
        assert!(Head::train(&train, &known, 4, &QueryTraining { lr: f64::NAN, ..training }).is_err());
        assert!(Similarity::new(&train, &known, 0.5).is_err());
        let head = Head::train(&train, &known, 0, &training).unwrap();
        assert!(head.scores(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu))).is_err());
    }
}
