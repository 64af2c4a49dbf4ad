//! A calibration: sensitivity sample by sample, then the search layer by layer.
//!
//! The model is left as it is; scales are applied by [`crate::apply`]. After each sample and each layer what was found is put
//! down in the output folder, so that an interrupted or killed run goes on where it was and ends with the same bytes as an
//! unbroken one. Hidden states are not kept there: they are computed again, which costs one pass over the layers that are
//! done, a fortieth of the search.

use std::path::Path;

use nics_base::artefact::Lock;
use nics_base::interrupt::Interrupt;
use nics_core::models::{Decoder, Model};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::artefact::{Origin, Scales};
use crate::batch::{CalibBatch, Seating};
use crate::fold::fold;
use crate::layer::LayerWeights;
use crate::memory::Needs;
use crate::operators::{Names, check_groups, operators};
use crate::progress::Sums;
use crate::run;
use crate::search::{Chunk, LayerSearch, OpScale, SearchConfig, Weighing};
use crate::sensitivity::{Ratios, Sensitivity, measure, weighing};
use crate::{Error, Result};

/// What errors on modalities other than answers weigh.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceMode {
    /// Their sensitivity, relative to that of answers.
    #[default]
    Auto,
    /// Every position counts alike, whatever it holds.
    Off,
    /// The same weight in every layer.
    Fixed(f64),
}

/// The settings of a calibration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CalibConfig {
    /// The search.
    pub search: SearchConfig,
    /// What errors weigh.
    pub balance: BalanceMode,
}

impl CalibConfig {
    /// # Errors
    /// The field that is out of range.
    pub fn check(&self) -> Result<()> {
        self.search.check()?;
        match self.balance {
            BalanceMode::Fixed(r) if !(r.is_finite() && r >= 0.0) => {
                Err(Error::Setting { field: "balance", found: r.to_string(), expected: "a number from 0 on" })
            }
            _ => Ok(()),
        }
    }
}

/// How a calibration runs, which does not change what it finds beyond rounding.
pub struct Running<'a> {
    /// Folder for its progress; none is kept without one.
    pub out: Option<&'a Path>,
    /// Samples that run together at most.
    pub chunk: Option<usize>,
    /// Bytes beside the model's weights and the data.
    pub max_memory: Option<u64>,
    /// Asked for between steps.
    pub interrupt: &'a Interrupt,
    /// Told where the run is.
    pub progress: &'a mut dyn FnMut(Progress),
}

/// A stage, and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Which.
    pub stage: Stage,
    /// Samples or layers done.
    pub done: usize,
    /// Of how many.
    pub total: usize,
}

/// A stage of a calibration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The backward passes, sample by sample.
    Sensitivity,
    /// The search, layer by layer.
    Search,
}

/// Held by the run that writes.
const LOCK: &str = ".calibration.lock";

/// Searches the scales of a decoder on a batch. With an output folder a run that finds its own progress there goes on, and
/// both files of the scales are written there.
///
/// # Errors
/// Groups that do not divide a layer and limits that cannot be kept, before anything runs; values that are not finite;
/// progress of another run; a stop that was asked for.
pub fn calibrate(
    decoder: &mut Decoder,
    names: &Names,
    batch: &CalibBatch,
    config: &CalibConfig,
    origin: &Origin,
    running: &mut Running,
) -> Result<Scales> {
    config.check()?;
    let dims = decoder.dims().clone();
    check_groups(&dims, names, &config.search.spec)?;
    let hidden = batch.embeds().size()[2];
    if hidden != dims.hidden {
        return Err(Error::Input(format!("embeddings of width {hidden}, the model's are {}", dims.hidden)));
    }
    let balance = balanced(batch, config.balance)?;
    let needs = Needs::of(&dims, batch, config.search.distort, balance == BalanceMode::Auto);
    let all = running.chunk.map_or(batch.samples() as u64, |c| (c as u64).clamp(1, batch.samples() as u64));
    let together = needs.fit(running.max_memory, all)? as i64;
    let data_hash = batch.hash()?;
    // How samples are cut changes sums in their last bits, so that progress belongs to one cut.
    let identity = nics_base::hash::value(&(config, names, origin, &data_hash, together))?;
    let _lock = running.out.map(|out| Lock::take(out.join(LOCK))).transpose()?;
    let mut sums = Sums::load(running.out, &identity)?;
    let _no_grad = tch::no_grad_guard();
    let seating = Seating::of(decoder, batch)?;
    let mut run = Run { decoder, names, batch, config, seating, together, running };
    let (sensitivity, ratios) = match balance {
        BalanceMode::Auto => {
            let sensitivity = sensitivity_of(run.decoder, batch, &run.seating, &mut sums, run.running)?;
            let ratios = sensitivity.ratios()?;
            (Some(sensitivity), ratios)
        }
        BalanceMode::Fixed(r) => (None, fixed(batch, dims.layers, r)?),
        BalanceMode::Off => (None, Vec::new()),
    };
    let weighings = (0..dims.layers).map(|l| match balance {
        BalanceMode::Off => Ok(Weighing::default()),
        _ => weighing(batch, &ratios, l),
    });
    let weighings = weighings.collect::<Result<Vec<_>>>()?;
    let layers = run.search(&mut sums, &weighings)?;
    let names = names.clone();
    let scales = Scales { names, config: *config, layers, sensitivity, ratios, data_hash, imported: None };
    if let Some(out) = run.running.out {
        scales.write(out, origin)?;
    }
    Ok(scales)
}

/// The sensitivity of a decoder on a batch, as [`calibrate`] measures it first. With an output folder a run that finds its own
/// progress there goes on.
///
/// # Errors
/// [`Error::AllLabelsIgnored`], a limit of memory that cannot be kept, gradients that are not finite, progress of another run, a
/// stop that was asked for.
pub fn measure_sensitivity(
    decoder: &Decoder,
    batch: &CalibBatch,
    origin: &Origin,
    running: &mut Running,
) -> Result<Sensitivity> {
    let (dims, hidden) = (decoder.dims(), batch.embeds().size()[2]);
    if hidden != dims.hidden {
        return Err(Error::Input(format!("embeddings of width {hidden}, the model's are {}", dims.hidden)));
    }
    Needs::of_sensitivity(dims, batch).fit(running.max_memory, 1)?;
    let identity = nics_base::hash::value(&("sensitivity", origin, batch.hash()?))?;
    let _lock = running.out.map(|out| Lock::take(out.join(LOCK))).transpose()?;
    let mut sums = Sums::load(running.out, &identity)?;
    let _no_grad = tch::no_grad_guard();
    let seating = Seating::of(decoder, batch)?;
    sensitivity_of(decoder, batch, &seating, &mut sums, running)
}

fn step(running: &mut Running, stage: Stage, done: usize, total: usize) -> Result<()> {
    (running.progress)(Progress { stage, done, total });
    Ok(running.interrupt.check()?)
}

/// The samples whose gradients are not in `sums` yet, one by one.
fn sensitivity_of(
    decoder: &Decoder,
    batch: &CalibBatch,
    seating: &Seating,
    sums: &mut Sums,
    running: &mut Running,
) -> Result<Sensitivity> {
    let total = batch.samples() as usize;
    let begun = sums.position.samples;
    while sums.position.samples < total {
        step(running, Stage::Sensitivity, sums.position.samples, total)?;
        let sample = sums.position.samples;
        if let Some(one) = measure(decoder, batch, seating, sample as i64)? {
            sums.position.answered += 1;
            sums.add_gradients(one)?;
        } else {
            tracing::warn!("sample {sample} has no answer and is left out of the sensitivity");
        }
        sums.position.samples += 1;
        sums.save()?;
    }
    if begun < total {
        (running.progress)(Progress { stage: Stage::Sensitivity, done: total, total });
    }
    Sensitivity::from_sums(batch, sums.gradients(), sums.position.answered)
}

/// What a batch can be balanced by: without a single position of another modality than answers there is nothing to weigh.
fn balanced(batch: &CalibBatch, asked: BalanceMode) -> Result<BalanceMode> {
    if asked == BalanceMode::Off {
        return Ok(asked);
    }
    let counts = batch.counts()?;
    if counts.iter().skip(1).all(|(_, n)| *n == 0) {
        tracing::warn!("no sample has a position of another modality than text: errors are not balanced");
        return Ok(BalanceMode::Off);
    }
    if counts[0].1 == 0 {
        return Err(Error::AllLabelsIgnored { samples: batch.samples() as usize });
    }
    for (name, _) in counts.iter().filter(|(_, n)| *n == 0) {
        tracing::warn!("no sample has a position of modality {name}: it is left out");
    }
    Ok(asked)
}

/// One weight for every modality that some sample has.
fn fixed(batch: &CalibBatch, layers: usize, r: f64) -> Result<Vec<Ratios>> {
    let present = batch.counts()?.into_iter().skip(1).filter(|(_, n)| *n > 0);
    Ok(present
        .map(|(modality, _)| Ratios { modality, attention: vec![r; layers], mlp: vec![r; layers] })
        .collect())
}

struct Run<'a, 'r> {
    decoder: &'a mut Decoder,
    names: &'a Names,
    batch: &'a CalibBatch,
    config: &'a CalibConfig,
    seating: Seating,
    /// Samples of a chunk.
    together: i64,
    running: &'a mut Running<'r>,
}

impl Run<'_, '_> {
    /// Where each chunk begins and ends.
    fn chunks(&self) -> Vec<(i64, i64)> {
        let samples = self.batch.samples();
        (0..samples)
            .step_by(self.together as usize)
            .map(|from| (from, (from + self.together).min(samples)))
            .collect()
    }

    fn search(&mut self, sums: &mut Sums, weighings: &[Weighing]) -> Result<Vec<Vec<OpScale>>> {
        let chunks = self.chunks();
        let hidden = self.batch.embeds().size()[2];
        let mut float = Vec::with_capacity(chunks.len());
        for &(from, to) in &chunks {
            float.push(self.batch.embeds().f_narrow(0, from, to - from)?.f_reshape([-1, hidden])?);
        }
        let distort = self.config.search.distort;
        let mut rounded = distort.then(|| float.iter().map(Tensor::shallow_clone).collect::<Vec<_>>());
        let total = self.decoder.layers.len();
        let mut found = Vec::with_capacity(total);
        for (l, weighing) in weighings.iter().enumerate() {
            let weights = LayerWeights::of(&mut self.decoder.layers[l])?;
            let operators = operators(&weights)?;
            let ops = if let Some(ops) = sums.layer(l, self.names, &operators, self.config.search.grid)? {
                if l + 1 < total {
                    float = self.pass(l, &weights, &chunks, &float)?;
                }
                ops
            } else {
                step(self.running, Stage::Search, l, total)?;
                let (seating, float_ref, rounded_ref) = (&self.seating, &float, &rounded);
                let chunk = |n: usize| -> Result<Chunk> {
                    let (from, to) = chunks[n];
                    Ok(Chunk {
                        from,
                        to,
                        seats: seating.seats(from, to)?,
                        float: float_ref[n].shallow_clone(),
                        rounded: rounded_ref.as_ref().map(|r| r[n].shallow_clone()),
                    })
                };
                let search = LayerSearch {
                    layer: l,
                    weights: &weights,
                    names: self.names,
                    config: &self.config.search,
                    weighing,
                };
                let one = weights
                    .parts(Kind::Float)?
                    .within(&mut self.decoder.layers[l], |layer| search.run(layer, chunks.len(), &chunk))?;
                float = one.outputs;
                sums.put_layer(&one.ops)?;
                sums.save()?;
                one.ops
            };
            if let Some(states) = rounded.as_mut().filter(|_| l + 1 < total) {
                let mut folded = weights.clone();
                for (op, scale) in operators.iter().zip(&ops) {
                    fold(&mut folded, op, &scale.scales)?;
                }
                let quantized = folded.quantized(&self.config.search.spec)?;
                *states = self.pass(l, &quantized, &chunks, states)?;
            }
            found.push(ops);
        }
        (self.running.progress)(Progress { stage: Stage::Search, done: total, total });
        Ok(found)
    }

    /// Hidden states of all chunks behind a layer with these weights.
    fn pass(
        &mut self,
        l: usize,
        weights: &LayerWeights,
        chunks: &[(i64, i64)],
        states: &[Tensor],
    ) -> Result<Vec<Tensor>> {
        let seating = &self.seating;
        weights.parts(Kind::Float)?.within(&mut self.decoder.layers[l], |layer| {
            let one = |((from, to), x): (&(i64, i64), &Tensor)| {
                Ok(run::layer(layer, &seating.seats(*from, *to)?, x)?.output)
            };
            chunks.iter().zip(states).map(one).collect()
        })
    }
}
