//! A nano model under one condition: its weights, and embedded problems.

use std::ops::Range;
use std::path::Path;

use nics_base::interrupt::Interrupt;
use nics_core::checkpoint::Checkpoint;
use nics_core::models::{Model, Vlm};
use nics_core::train::IGNORED;
use nics_core::vision::Processor;
use nics_datasets::symbol_grid::problem;
use nics_datasets::word_problems::Split;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use super::{Condition, Study, Variant};
use crate::artefact::Origin;
use crate::batch::{CalibBatch, Modality};
use crate::calibrate::Running;
use crate::fold::fold;
use crate::language::Language;
use crate::layer::LayerWeights;
use crate::methods::{Quantized, Task};
use crate::nano::{ANSWER, Sheet, logits};
use crate::operators::{Names, operators};
use crate::{Error, Result};

/// Problems that are answered together.
const TOGETHER: i64 = 128;

/// What a model says to some problems.
pub(super) struct Said {
    /// Log probabilities of the answers' tokens, float32 `[samples, 6, vocabulary]`.
    pub log_probs: Tensor,
    /// Whether each is the likeliest, bool `[samples, 6]`.
    pub right: Tensor,
}

/// A model under a condition.
pub struct Subject {
    model: Language,
    names: Names,
    /// What it was read from.
    pub origin: Origin,
    /// The weights, to be put back behind every quantization.
    weights: Vec<LayerWeights>,
    calibration: CalibBatch,
    /// Embedded problems of the test split, `[samples, positions, hidden]`.
    problems: Tensor,
    /// Their answers, int64 `[samples, 6]`.
    answers: Tensor,
}

impl Subject {
    /// Loads the checkpoint in `dir` in float32, gives it the weights of a condition, and embeds its problems.
    ///
    /// # Errors
    /// A checkpoint that does not load, or one that does not see.
    pub fn load(dir: &Path, study: &Study, condition: &Condition, seed: u64) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let checkpoint = Checkpoint::open_dir(dir).map_err(nics_core::Error::from)?;
        let mut model = Language::load(&checkpoint, Device::Cpu, Kind::Float)?;
        let processor = Processor::open(&checkpoint)?;
        let names = model.names()?;
        rescale(&mut model, condition.log_std, seed)?;
        let weights = model.decoder_mut().layers.iter_mut().map(LayerWeights::of).collect::<Result<_>>()?;
        let sheet = |split, seed, range: Range<usize>| {
            let of = |index: usize| (problem(split, seed, index as u64), condition.nuisance);
            Sheet::new(&processor, &range.map(of).collect::<Vec<_>>())
        };
        let settings = &study.calibration;
        let calibration =
            batch(&sheet(Split::Train, settings.seed + seed, 0..settings.samples)?, model.vlm()?)?;
        let (mut problems, mut answers) = (Vec::new(), Vec::new());
        let (all, together) = (study.evaluation.samples, TOGETHER as usize);
        for from in (0..all).step_by(together) {
            let to = (from + together).min(all);
            let sheet = sheet(Split::Test, study.evaluation.seed + seed, from..to)?;
            problems.push(sheet.embed(model.vlm()?)?);
            answers.push(sheet.ids()?.f_narrow(1, ANSWER.start as i64, ANSWER.len() as i64)?);
        }
        Ok(Self {
            origin: Origin::of(&checkpoint)?,
            model,
            names,
            weights,
            calibration,
            problems: Tensor::f_cat(&problems, 0)?,
            answers: Tensor::f_cat(&answers, 0)?,
        })
    }

    /// Quantizes the model as a variant says; [`restore`](Self::restore) brings it back.
    pub(super) fn quantize(&mut self, variant: &Variant, interrupt: &Interrupt) -> Result<Option<Quantized>> {
        let Some(method) = variant.method() else { return Ok(None) };
        let mut progress = |_| {};
        let running =
            Running { out: None, chunk: None, max_memory: None, interrupt, progress: &mut progress };
        let Self { model, names, origin, calibration, .. } = self;
        let task = Task { names, batch: Some(calibration), origin, running };
        method.quantize(model.decoder_mut(), task).map(Some)
    }

    /// Puts the condition's own weights back.
    pub(super) fn restore(&mut self) -> Result<()> {
        for (layer, weights) in self.model.decoder_mut().layers.iter_mut().zip(&self.weights) {
            weights.parts(Kind::Float)?.swap(layer)?;
        }
        Ok(())
    }

    /// What the model says to the test problems.
    pub(super) fn answer(&self) -> Result<Said> {
        let _no_grad = tch::no_grad_guard();
        let mut log_probs = Vec::new();
        let samples = self.problems.size()[0];
        let mut from = 0;
        while from < samples {
            let n = TOGETHER.min(samples - from);
            let said = logits(self.model.decoder(), &self.problems.f_narrow(0, from, n)?, ANSWER)?;
            log_probs.push(said.f_log_softmax(-1, Kind::Float)?);
            from += n;
        }
        let log_probs = Tensor::f_cat(&log_probs, 0)?;
        let right = log_probs.f_argmax(-1, false)?.f_eq_tensor(&self.answers)?;
        Ok(Said { log_probs, right })
    }
}

/// Multiplies the input channels of every operator's linear layers and divides what stands before them: the model computes
/// the same. Each operator of each layer draws from a stream of its own.
fn rescale(model: &mut Language, log_std: f64, seed: u64) -> Result<()> {
    if log_std == 0.0 {
        return Ok(());
    }
    for (l, layer) in model.decoder_mut().layers.iter_mut().enumerate() {
        let mut weights = LayerWeights::of(layer)?;
        for (n, op) in operators(&weights)?.iter().enumerate() {
            let channels = weights.linear(op.linears[0])?.weight.size()[1];
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream((l * 16 + n) as u64);
            let factors: Vec<f32> =
                (0..channels).map(|_| (log_std * normal(&mut rng)).exp() as f32).collect();
            fold(&mut weights, op, &Tensor::f_from_slice(&factors)?)?;
        }
        weights.parts(Kind::Float)?.swap(layer)?;
    }
    Ok(())
}

/// A normal number (Box and Muller, 1958).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    use rand::RngExt;
    let (radius, angle): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

/// Problems as a calibration takes them: answers with their end are labels, the picture is a modality.
fn batch(sheet: &Sheet, model: &Vlm) -> Result<CalibBatch> {
    let ids = sheet.ids()?;
    let (samples, positions) = ids.size2()?;
    let labels = Tensor::f_full([samples, positions], IGNORED, (Kind::Int64, Device::Cpu))?;
    let (from, len) = (ANSWER.start as i64, ANSWER.len() as i64 + 1);
    labels.f_narrow(1, from, len)?.f_copy_(&ids.f_narrow(1, from, len)?)?;
    let attention = Tensor::f_ones([samples, positions], (Kind::Bool, Device::Cpu))?;
    let seen = Modality { name: "image".into(), mask: sheet.seen()? };
    if model.dims().device != Device::Cpu {
        return Err(Error::Input("a study runs on the CPU".into()));
    }
    CalibBatch::new(&sheet.embed(model)?, attention, labels, vec![seen])
}
