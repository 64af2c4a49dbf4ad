//! The search for one layer's scales.
//!
//! A candidate for weights alone is `Ŵ = Q(W·diag(s))·diag(1/s)` on the input as it is. With activations `x / s` goes in, and
//! the operator's linear layers round weights by row and inputs by token. The rest of the module stays float. All operators
//! are searched against the original layer.
//!
//! With `distort`, candidates see what the layers before have become: the target is the float output of float inputs, a
//! candidate runs on inputs from the quantized path, and so does the statistic. Before the first operator these inputs come
//! from the original layer, before the others from one with the scales found so far folded in and all its linear layers
//! rounded.

use nics_core::models::decoder::DecoderLayer;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::batch::Seats;
use crate::candidates::{
    Over, Statistic, candidates, column_magnitude, exponent, magnitude, weighed_magnitude,
};
use crate::fold::{fold, scaled_columns};
use crate::layer::{LayerWeights, Parts, Weights, projection};
use crate::loss::{Balance, LossKind, Losses, Piece, best};
use crate::operators::{Branch, Names, Operator, operators};
use crate::quantize::QuantSpec;
use crate::run::{self, Taps};
use crate::{Error, Result};

/// How scales are searched.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SearchConfig {
    /// How the model will be quantized.
    pub spec: QuantSpec,
    /// The norm of errors.
    pub loss: LossKind,
    /// Exponents that are tried.
    pub grid: usize,
    /// What candidates are made from.
    pub statistic: Statistic,
    /// Which positions that is measured over.
    #[serde(default)]
    pub over: Over,
    /// Whether candidates see what the layers before have become.
    pub distort: bool,
}

impl SearchConfig {
    /// The published search: mean absolute error, 20 exponents, no distortion.
    pub fn new(spec: QuantSpec) -> Self {
        Self {
            spec,
            loss: LossKind::Mae,
            grid: crate::candidates::GRID,
            statistic: Statistic::Activation,
            over: Over::All,
            distort: false,
        }
    }

    /// Candidates of one operator.
    pub fn candidates(&self) -> usize {
        self.grid * self.over.each().len()
    }

    /// # Errors
    /// The field that is out of range.
    pub fn check(&self) -> Result<()> {
        self.spec.check()?;
        if (1..=1000).contains(&self.grid) {
            return Ok(());
        }
        let found = self.grid.to_string();
        Err(Error::Setting { field: "grid", found, expected: "a number of exponents from 1 to 1000" })
    }
}

/// The scales of one operator.
#[derive(Debug)]
pub struct OpScale {
    /// What they are folded into, by its name in the checkpoint.
    pub previous: String,
    /// The linear layers that are multiplied.
    pub linears: Vec<String>,
    /// The exponent; not a number for scales that were not searched here.
    pub exponent: f64,
    /// Float32 `[in]`.
    pub scales: Tensor,
    /// Mean magnitude of each input channel that the candidate was made from, float32 `[in]`.
    pub statistic: Tensor,
    /// Loss of each candidate: of each exponent, and with [`Over::Union`] of each once more.
    pub losses: Vec<f64>,
    /// By how much, relative to the least loss, the next one is above it; not a number for scales that were not searched here.
    pub margin: f64,
}

impl Clone for OpScale {
    fn clone(&self) -> Self {
        Self {
            previous: self.previous.clone(),
            linears: self.linears.clone(),
            exponent: self.exponent,
            scales: self.scales.shallow_clone(),
            statistic: self.statistic.shallow_clone(),
            losses: self.losses.clone(),
            margin: self.margin,
        }
    }
}

/// One operator's candidates over one layer's weights.
#[derive(Debug)]
pub struct Candidates<'a> {
    op: Operator,
    spec: QuantSpec,
    scales: Vec<Tensor>,
    weights: &'a LayerWeights,
}

impl<'a> Candidates<'a> {
    /// The candidates of an operator whose input has this mean magnitude, `[in]`.
    pub fn new(
        op: Operator,
        weights: &'a LayerWeights,
        config: &SearchConfig,
        magnitude: &Tensor,
    ) -> Result<Self> {
        Self::of_each(op, weights, config, std::slice::from_ref(magnitude))
    }

    /// The candidates of several statistics, one grid behind the other.
    pub fn of_each(
        op: Operator,
        weights: &'a LayerWeights,
        config: &SearchConfig,
        magnitudes: &[Tensor],
    ) -> Result<Self> {
        let columns = match config.statistic {
            Statistic::Activation => None,
            Statistic::Duo => {
                let all: Vec<&Tensor> =
                    op.linears.iter().map(|r| Ok(&weights.linear(*r)?.weight)).collect::<Result<_>>()?;
                let group = if config.spec.act_bits.is_some() { -1 } else { config.spec.group };
                Some(column_magnitude(&all, group)?)
            }
        };
        let mut scales = Vec::with_capacity(config.candidates());
        for magnitude in magnitudes {
            scales.extend(candidates(magnitude, columns.as_ref(), config.grid)?);
        }
        Ok(Self { op, spec: config.spec, scales, weights })
    }

    /// The scales of a candidate.
    pub fn scales(&self, k: usize) -> &Tensor {
        &self.scales[k]
    }

    /// What the module gives with a candidate's scales on an input `x`, `[rows, in]`. `layer` holds the original weights.
    pub fn output(&self, k: usize, layer: &mut DecoderLayer, seats: &Seats, x: &Tensor) -> Result<Tensor> {
        let s = &self.scales[k];
        let mut linears = Vec::with_capacity(self.op.linears.len());
        for role in self.op.linears {
            let linear = self.weights.linear(*role)?;
            let mut weight = self.spec.weight(&scaled_columns(&linear.weight, s)?)?;
            if self.spec.act_bits.is_none() {
                weight = weight.f_div(s)?;
            }
            let bias = linear.bias.as_ref().map(Tensor::shallow_clone);
            linears.push((*role, projection(Weights { weight, bias }, self.spec.act_bits)));
        }
        let scaled;
        let x = if self.spec.act_bits.is_some() {
            scaled = x.f_div(s)?;
            &scaled
        } else {
            x
        };
        Parts::linears(linears).within(layer, |layer| run::module(layer, seats, self.op.tap, x))
    }

    /// Adds the losses of all candidates on one piece of the samples.
    pub fn judge(
        &self,
        losses: &mut Losses,
        piece: &Piece,
        layer: &mut DecoderLayer,
        seats: &Seats,
        x: &Tensor,
    ) -> Result<()> {
        for k in 0..self.scales.len() {
            let output = self.output(k, layer, seats, x)?;
            losses.add(k, piece, &output)?;
        }
        Ok(())
    }
}

/// Samples of a batch that run together.
#[derive(Debug)]
pub struct Chunk {
    /// First sample.
    pub from: i64,
    /// One past the last.
    pub to: i64,
    /// Where they sit.
    pub seats: Seats,
    /// The layer's input on the float path, `[rows, hidden]`.
    pub float: Tensor,
    /// The layer's input after the layers before it were quantized; only with distortion.
    pub rounded: Option<Tensor>,
}

/// What a layer computes on a chunk: on the float path, and on the one that candidates run on when that is another.
struct Recorded {
    float: Taps,
    rounded: Option<Taps>,
}

impl Recorded {
    /// An operator's input for its candidates.
    fn input(&self, op: &Operator) -> &Tensor {
        self.rounded.as_ref().unwrap_or(&self.float).input(op.tap)
    }

    /// What an operator's output should be.
    fn target(&self, op: &Operator) -> &Tensor {
        match op.branch {
            Branch::Attention => &self.float.attention,
            Branch::Mlp => &self.float.mlp,
        }
    }
}

/// The mean magnitude of one operator's input. Samples may come in pieces, whose means are weighed in float64; of one piece
/// over all positions it is [`magnitude`] to the bit.
#[derive(Default)]
struct Magnitude {
    /// Over all positions: means, and how many rows each is over.
    pieces: Vec<(Tensor, i64)>,
    /// Over those that are compared: weighed sums, and the weights.
    weighed: Vec<(Tensor, f64)>,
}

impl Magnitude {
    fn add(&mut self, over: Over, x: &Tensor, chunk: &Chunk, balance: &Balance) -> Result<()> {
        let weights = balance.weights(chunk.from, chunk.to)?;
        for one in over.each() {
            match (one, &weights) {
                (Over::Balanced, Some(weights)) => self.weighed.push(weighed_magnitude(x, weights)?),
                // Nothing is balanced, and all positions are there already.
                (Over::Balanced, None) if over == Over::Union => {}
                _ => self.pieces.push((magnitude(x)?, x.size()[0])),
            }
        }
        Ok(())
    }

    /// One for each statistic that was asked for.
    fn means(&self, over: Over) -> Result<Vec<Tensor>> {
        let each = over.each().iter().map(|over| match over {
            Over::Balanced if !self.weighed.is_empty() => self.balanced(),
            _ => self.mean(),
        });
        each.collect()
    }

    fn balanced(&self) -> Result<Tensor> {
        let weights: f64 = self.weighed.iter().map(|(_, w)| w).sum();
        let mut sum = self.weighed[0].0.shallow_clone();
        for (piece, _) in &self.weighed[1..] {
            sum = sum.f_add(piece)?;
        }
        Ok(sum.f_div_scalar(weights)?.f_to_kind(Kind::Float)?)
    }

    fn mean(&self) -> Result<Tensor> {
        match self.pieces.as_slice() {
            [] => Err(Error::NoData("there is no sample to search with".into())),
            [(one, _)] => Ok(one.shallow_clone()),
            [(first, _), ..] => {
                let mut sum = first.f_to_kind(Kind::Double)?.f_zeros_like()?;
                let mut rows = 0;
                for (mean, n) in &self.pieces {
                    sum = sum.f_add(&mean.f_to_kind(Kind::Double)?.f_mul_scalar(*n)?)?;
                    rows += n;
                }
                Ok(sum.f_div_scalar(rows)?.f_to_kind(Kind::Float)?)
            }
        }
    }
}

/// What weighs the errors of each branch.
#[derive(Debug, Default)]
pub struct Weighing {
    /// Attention.
    pub attention: Balance,
    /// MLP.
    pub mlp: Balance,
}

impl Weighing {
    /// Of a branch.
    pub fn of(&self, branch: Branch) -> &Balance {
        match branch {
            Branch::Attention => &self.attention,
            Branch::Mlp => &self.mlp,
        }
    }
}

/// A layer to be searched.
#[derive(Debug)]
pub struct LayerSearch<'a> {
    /// Its number.
    pub layer: usize,
    /// Its float32 weights, which the layer holds while it is searched.
    pub weights: &'a LayerWeights,
    /// How its checkpoint calls it.
    pub names: &'a Names,
    /// How.
    pub config: &'a SearchConfig,
    /// What weighs its errors.
    pub weighing: &'a Weighing,
}

/// What comes out of a layer's search.
#[derive(Debug)]
pub struct LayerFound {
    /// The scales of its operators, in their order.
    pub ops: Vec<OpScale>,
    /// Output of the layer on the float path, chunk by chunk, `[rows, hidden]`.
    pub outputs: Vec<Tensor>,
}

impl LayerSearch<'_> {
    /// The scales of every operator. `chunk` gives a chunk of the samples by its number, as often as it is asked.
    ///
    /// # Errors
    /// Activations or losses that are no numbers, groups that do not fit, or what libtorch refuses.
    pub fn run(
        &self,
        layer: &mut DecoderLayer,
        chunks: usize,
        chunk: &dyn Fn(usize) -> Result<Chunk>,
    ) -> Result<LayerFound> {
        let ops = operators(self.weights)?;
        // Without distortion the inputs of all operators are there at once.
        let stages: Vec<&[Operator]> =
            if self.config.distort { ops.chunks(1).collect() } else { vec![&ops[..]] };
        let mut found: Vec<OpScale> = Vec::with_capacity(ops.len());
        let mut outputs = Vec::new();
        let mut folded = self.weights.clone();
        for (stage, ops) in stages.into_iter().enumerate() {
            let mut rounded = match (self.config.distort, stage) {
                (false, _) => None,
                (true, 0) => Some(self.weights.parts(Kind::Float)?),
                (true, _) => Some(folded.quantized(&self.config.spec)?.parts(Kind::Float)?),
            };
            let mut magnitudes: Vec<Magnitude> = ops.iter().map(|_| Magnitude::default()).collect();
            let mut kept = None;
            for n in 0..chunks {
                let chunk = chunk(n)?;
                let recorded = record(layer, &chunk, rounded.as_mut())?;
                for (op, magnitude) in ops.iter().zip(&mut magnitudes) {
                    self.check(&chunk, op, recorded.input(op))?;
                    magnitude.add(
                        self.config.over,
                        recorded.input(op),
                        &chunk,
                        self.weighing.of(op.branch),
                    )?;
                }
                if stage == 0 {
                    outputs.push(recorded.float.output.shallow_clone());
                }
                // A single chunk need not be run again.
                kept = (chunks == 1).then_some((chunk, recorded));
            }
            let mut judged = Vec::with_capacity(ops.len());
            for (op, magnitude) in ops.iter().zip(&magnitudes) {
                let statistics = magnitude.means(self.config.over)?;
                let candidates = Candidates::of_each(*op, self.weights, self.config, &statistics)?;
                let losses =
                    Losses::new(self.config.loss, self.weighing.of(op.branch), self.config.candidates());
                judged.push((statistics, candidates, losses));
            }
            for n in 0..chunks {
                let (chunk, recorded) = if let Some(kept) = kept.take() {
                    kept
                } else {
                    let chunk = chunk(n)?;
                    let recorded = record(layer, &chunk, rounded.as_mut())?;
                    (chunk, recorded)
                };
                for (op, (_, candidates, losses)) in ops.iter().zip(&mut judged) {
                    let piece = losses.piece(chunk.from, chunk.to, recorded.target(op))?;
                    candidates.judge(losses, &piece, layer, &chunk.seats, recorded.input(op))?;
                }
            }
            for (op, (statistics, candidates, losses)) in ops.iter().zip(judged) {
                let one = self.choose(op, &statistics, &candidates, losses.finish())?;
                fold(&mut folded, op, &one.scales)?;
                found.push(one);
            }
        }
        Ok(LayerFound { ops: found, outputs })
    }

    fn choose(
        &self,
        op: &Operator,
        statistics: &[Tensor],
        candidates: &Candidates,
        losses: Vec<f64>,
    ) -> Result<OpScale> {
        let linears = self.names.linears(self.layer, op);
        let Some((k, margin)) = best(&losses) else {
            return Err(Error::NoCandidate { layer: self.layer, operator: linears[0].clone() });
        };
        Ok(OpScale {
            previous: self.names.previous(self.layer, op),
            linears,
            exponent: exponent(k % self.config.grid, self.config.grid),
            scales: candidates.scales(k).shallow_clone(),
            statistic: statistics[k / self.config.grid].shallow_clone(),
            losses,
            margin,
        })
    }

    /// # Errors
    /// [`Error::NonFinite`], naming the sample.
    fn check(&self, chunk: &Chunk, op: &Operator, x: &Tensor) -> Result<()> {
        let fine = x.f_isfinite()?.f_all_dim(1, false)?;
        if fine.f_all()?.f_int64_value(&[])? != 0 {
            return Ok(());
        }
        let row = fine.f_logical_not()?.f_nonzero()?.f_int64_value(&[0, 0])?;
        let positions = x.size()[0] / (chunk.to - chunk.from);
        Err(Error::NonFinite {
            layer: self.layer,
            tensor: format!("the input of {}", self.names.linear(self.layer, op.linears[0])),
            sample: (chunk.from + row / positions) as usize,
        })
    }
}

/// Runs a layer on a chunk.
fn record(layer: &mut DecoderLayer, chunk: &Chunk, rounded: Option<&mut Parts>) -> Result<Recorded> {
    let float = run::layer(layer, &chunk.seats, &chunk.float)?;
    let Some(parts) = rounded else { return Ok(Recorded { float, rounded: None }) };
    let x = chunk.rounded.as_ref().unwrap_or(&chunk.float);
    let taps = parts.within(layer, |layer| run::layer(layer, &chunk.seats, x))?;
    Ok(Recorded { float, rounded: Some(taps) })
}
