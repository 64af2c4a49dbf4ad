//! Methods that quantize a decoder, behind one trait: plain rounding, AWQ, GPTQ, SmoothQuant, MBQ.

use nics_core::models::{Decoder, Model};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::apply::{Rounded, fold_scales, put_codes, round, summary};
use crate::artefact::{Origin, Scales};
use crate::batch::{CalibBatch, Seating};
use crate::calibrate::{BalanceMode, CalibConfig, Progress, Running, Stage, calibrate};
use crate::candidates::Statistic;
use crate::clip::{ClipConfig, clip_range, clipped};
use crate::gptq::{GptqConfig, Hessian, gptq};
use crate::layer::{LayerWeights, Role, Weights};
use crate::loss::LossKind;
use crate::memory::Needs;
use crate::operators::{Names, Tap, check_groups};
use crate::quantize::QuantSpec;
use crate::search::SearchConfig;
use crate::smooth::{largest, smooth};
use crate::{Error, Result, run};

/// What a method leaves beside the quantized decoder.
#[derive(Debug)]
pub struct Quantized {
    /// What was rounded, and its integers.
    pub rounded: Rounded,
    /// The scales that were folded, of a method that searches some.
    pub scales: Option<Scales>,
}

/// What a method quantizes with.
pub struct Task<'a> {
    /// How the checkpoint names its layers.
    pub names: &'a Names,
    /// Samples; plain rounding takes none.
    pub batch: Option<&'a CalibBatch>,
    /// The model that the decoder is.
    pub origin: &'a Origin,
    /// How the calibration runs.
    pub running: Running<'a>,
}

impl<'a> Task<'a> {
    fn batch(&self, method: &str) -> Result<&'a CalibBatch> {
        self.batch.ok_or_else(|| Error::NoData(format!("{method} needs samples to calibrate with")))
    }
}

/// A way to quantize the language model of a checkpoint.
pub trait Method {
    /// Its name on a command line.
    fn name(&self) -> &'static str;

    /// How it rounds.
    fn spec(&self) -> QuantSpec;

    /// Quantizes a decoder in place.
    ///
    /// # Errors
    /// Groups that do not divide a layer, samples that are missing or not fit, values that are not finite. The decoder may
    /// then be half quantized.
    fn quantize(&self, decoder: &mut Decoder, task: Task) -> Result<Quantized>;
}

/// Rounding to nearest, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rtn {
    /// How.
    pub spec: QuantSpec,
}

impl Method for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn spec(&self) -> QuantSpec {
        self.spec
    }

    fn quantize(&self, decoder: &mut Decoder, task: Task) -> Result<Quantized> {
        Ok(Quantized { rounded: round(decoder, task.names, &self.spec)?, scales: None })
    }
}

/// Modality-balanced quantization.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mbq {
    /// Search and balance.
    pub config: CalibConfig,
    /// Clipping behind the search; the published method has none.
    #[serde(default)]
    pub clip: Option<ClipConfig>,
}

impl Mbq {
    /// The published settings: mean absolute error, balanced by sensitivity.
    pub fn new(spec: QuantSpec) -> Self {
        let config = CalibConfig { search: SearchConfig::new(spec), balance: BalanceMode::Auto };
        Self { config, clip: None }
    }
}

impl Method for Mbq {
    fn name(&self) -> &'static str {
        "mbq"
    }

    fn spec(&self) -> QuantSpec {
        self.config.search.spec
    }

    fn quantize(&self, decoder: &mut Decoder, mut task: Task) -> Result<Quantized> {
        let batch = task.batch("mbq")?;
        check_clip(self.clip.as_ref(), &self.spec())?;
        let together = together(decoder, batch, &task.running)?;
        let scales = calibrate(decoder, task.names, batch, &self.config, task.origin, &mut task.running)?;
        fold_scales(decoder, task.names, &scales.layers)?;
        if let Some(clip) = &self.clip {
            clip_layers(decoder, batch, &self.spec(), clip, together)?;
        }
        let rounded = round(decoder, task.names, &self.spec())?;
        Ok(Quantized { rounded, scales: Some(scales) })
    }
}

/// Activation-aware weight quantization (Lin et al., 2023): the same search, blind to modalities and by squared error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Awq {
    /// How weights are rounded.
    pub spec: QuantSpec,
    /// What candidates are made from; AutoAWQ's is [`Statistic::Duo`].
    pub statistic: Statistic,
    /// Clipping behind the search; none as MBQ's authors compared it.
    pub clip: Option<ClipConfig>,
}

impl Awq {
    /// As MBQ's authors compared it.
    pub fn new(spec: QuantSpec) -> Self {
        Self { spec, statistic: Statistic::Activation, clip: None }
    }

    /// As AutoAWQ has it: duo scaling and clipping.
    pub fn full(spec: QuantSpec) -> Self {
        Self { spec, statistic: Statistic::Duo, clip: Some(ClipConfig::default()) }
    }
}

impl Method for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn spec(&self) -> QuantSpec {
        self.spec
    }

    fn quantize(&self, decoder: &mut Decoder, mut task: Task) -> Result<Quantized> {
        let batch = task.batch("awq")?;
        check_clip(self.clip.as_ref(), &self.spec)?;
        let mut search = SearchConfig::new(self.spec);
        (search.loss, search.statistic) = (LossKind::Mse, self.statistic);
        let config = CalibConfig { search, balance: BalanceMode::Off };
        let together = together(decoder, batch, &task.running)?;
        let scales = calibrate(decoder, task.names, batch, &config, task.origin, &mut task.running)?;
        fold_scales(decoder, task.names, &scales.layers)?;
        if let Some(clip) = &self.clip {
            clip_layers(decoder, batch, &self.spec, clip, together)?;
        }
        let rounded = round(decoder, task.names, &self.spec)?;
        Ok(Quantized { rounded, scales: Some(scales) })
    }
}

/// # Errors
/// Clipping where activations are rounded too.
fn check_clip(clip: Option<&ClipConfig>, spec: &QuantSpec) -> Result<()> {
    if clip.is_some() && spec.act_bits.is_some() {
        return Err(Error::Setting {
            field: "clip",
            found: "set with rounded activations".into(),
            expected: "weights alone to be rounded",
        });
    }
    Ok(())
}

/// Samples that run together.
fn together(decoder: &Decoder, batch: &CalibBatch, running: &Running) -> Result<i64> {
    let needs = Needs::of(decoder.dims(), batch, false, false);
    let all = batch.samples();
    let asked = running.chunk.map_or(all, |c| (c as i64).clamp(1, all));
    Ok(needs.fit(running.max_memory, asked as u64)? as i64)
}

/// Clips the weights of a decoder whose scales are folded, all but queries and keys, on inputs of the float path.
fn clip_layers(
    decoder: &mut Decoder,
    batch: &CalibBatch,
    spec: &QuantSpec,
    config: &ClipConfig,
    together: i64,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let (seating, kind) = (Seating::of(decoder, batch)?, decoder.dims().kind);
    let (samples, positions) = (batch.samples(), batch.positions());
    let stride = (samples * positions / config.tokens).max(1);
    let mut x = batch.embeds().f_flatten(0, 1)?;
    for layer in &mut decoder.layers {
        let mut weights = LayerWeights::of(layer)?;
        let mut parts = weights.parts(Kind::Float)?;
        let mut inputs: [Vec<Tensor>; 4] = [const { Vec::new() }; 4];
        x = parts.within(layer, |layer| {
            let mut outputs = Vec::new();
            let mut from = 0;
            while from < samples {
                let to = (from + together).min(samples);
                let rows = x.f_narrow(0, from * positions, (to - from) * positions)?;
                let taps = run::layer(layer, &seating.seats(from, to)?, &rows)?;
                // Every stride-th token of all samples, wherever they are cut.
                let first = (stride - from * positions % stride) % stride;
                for tap in Tap::ALL {
                    inputs[tap as usize].push(taps.input(tap).f_slice(0, first, None, stride)?);
                }
                outputs.push(taps.output);
                from = to;
            }
            Ok(Tensor::f_cat(&outputs, 0)?)
        })?;
        for (role, linear) in weights.linears_mut() {
            if matches!(role, Role::Q | Role::K | Role::Qkv) {
                continue;
            }
            let input = Tensor::f_cat(&inputs[tap_of(role) as usize], 0)?;
            let range = clip_range(&linear.weight, &input, spec, config)?;
            linear.weight = clipped(&linear.weight, &range)?;
        }
        weights.parts(kind)?.swap(layer)?;
    }
    Ok(())
}

/// What a linear layer sees.
fn tap_of(role: Role) -> Tap {
    match role {
        Role::Q | Role::K | Role::V | Role::Qkv => Tap::Attention,
        Role::O => Tap::Output,
        Role::Gate | Role::Up => Tap::Mlp,
        Role::Down => Tap::Down,
    }
}

/// GPTQ, layer by layer: each sees what the rounded layers before it give.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Gptq {
    /// How.
    pub config: GptqConfig,
}

impl Method for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn spec(&self) -> QuantSpec {
        QuantSpec::weights(self.config.bits, self.config.group)
    }

    fn quantize(&self, decoder: &mut Decoder, task: Task) -> Result<Quantized> {
        let (batch, spec) = (task.batch("gptq")?, self.spec());
        check_groups(decoder.dims(), task.names, &spec)?;
        let _no_grad = tch::no_grad_guard();
        let (seating, kind) = (Seating::of(decoder, batch)?, decoder.dims().kind);
        let (samples, total) = (batch.samples(), decoder.layers.len());
        let mut states: Vec<Tensor> =
            (0..samples).map(|i| batch.embeds().f_get(i)).collect::<Result<_, _>>()?;
        let mut codes = Vec::with_capacity(total);
        let running = task.running;
        for (l, layer) in decoder.layers.iter_mut().enumerate() {
            (running.progress)(Progress { stage: Stage::Search, done: l, total });
            running.interrupt.check()?;
            let mut weights = LayerWeights::of(layer)?;
            let mut hessians: Vec<Option<Hessian>> = Tap::ALL.iter().map(|_| None).collect();
            weights.parts(Kind::Float)?.within(layer, |layer| {
                for (i, x) in states.iter().enumerate() {
                    let i = i as i64;
                    let here = batch.attention().f_get(i)?.f_nonzero()?.f_squeeze_dim(1)?;
                    let taps = run::layer(layer, &seating.seats(i, i + 1)?, x)?;
                    for (tap, hessian) in Tap::ALL.into_iter().zip(&mut hessians) {
                        let x = taps.input(tap).f_index_select(0, &here)?;
                        let new = match hessian.take() {
                            Some(h) => h,
                            None => Hessian::new(x.size()[1], x.device())?,
                        };
                        hessian.insert(new).add(&x, 1.0)?;
                    }
                }
                Ok(())
            })?;
            let one = |(role, w): &(Role, Weights)| {
                let hessian = hessians[tap_of(*role) as usize].as_ref();
                let hessian = hessian.ok_or_else(|| Error::NoData("gptq needs a sample".into()))?;
                Ok((*role, gptq(&w.weight, hessian.matrix(), &self.config)?))
            };
            let all: Vec<_> = weights.linears().iter().map(one).collect::<Result<_>>()?;
            put_codes(&mut weights, &all)?;
            weights.parts(Kind::Float)?.within(layer, |layer| {
                for (i, x) in states.iter_mut().enumerate() {
                    let i = i as i64;
                    *x = run::layer(layer, &seating.seats(i, i + 1)?, x)?.output;
                }
                Ok(())
            })?;
            weights.parts(kind)?.swap(layer)?;
            codes.push(all);
        }
        (running.progress)(Progress { stage: Stage::Search, done: total, total });
        Ok(Quantized { rounded: Rounded { summary: summary(decoder, &spec)?, codes }, scales: None })
    }
}

/// SmoothQuant.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SmoothQuant {
    /// How weights and activations are rounded afterwards.
    pub spec: QuantSpec,
    /// How much of the difficulty goes from activations to weights, 0 to 1.
    pub alpha: f64,
}

impl SmoothQuant {
    /// Half of it.
    pub fn new(spec: QuantSpec) -> Self {
        Self { spec, alpha: 0.5 }
    }
}

impl Method for SmoothQuant {
    fn name(&self) -> &'static str {
        "smoothquant"
    }

    fn spec(&self) -> QuantSpec {
        self.spec
    }

    fn quantize(&self, decoder: &mut Decoder, task: Task) -> Result<Quantized> {
        check_groups(decoder.dims(), task.names, &self.spec)?;
        let most = largest(decoder, task.batch("smoothquant")?)?;
        smooth(decoder, task.names, &most, self.alpha)?;
        Ok(Quantized { rounded: round(decoder, task.names, &self.spec)?, scales: None })
    }
}
