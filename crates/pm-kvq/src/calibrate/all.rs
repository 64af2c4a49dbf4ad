//! Every stage of a calibration: one pass over the samples for sensitivity and largest keys, the widths from them, and one
//! pass for the key scales.
//!
//! After each sample the sums are put down in the output folder, so that an interrupted or killed run goes on where it was
//! and ends with the same bytes as an unbroken one.

use std::path::Path;

use nics_base::artefact::Lock;
use nics_base::interrupt::Interrupt;
use nics_core::checkpoint::{TensorPath, note, save_file};
use nics_core::models::Model;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::artefact::{
    ALLOCATION, Files, MAX_KEYS, Origin, REP_SCALES, SENSITIVITY, ScalesNote, Widths, write_allocation,
    write_max_keys, write_scales, write_sensitivity,
};
use super::max_keys::{MaxKeys, MaxMode, largest, merge};
use super::samples::{Samples, stretch};
use super::search::{Found, Outputs, Search};
use super::sensitivity::{GradOrder, Sensitivity, by_width, measure};
use crate::allocate::{allocate, unit};
use crate::{Bits, Error, Result};

/// The file with the sums of an unfinished run; it stays, so that a finished run is not repeated either.
pub const PROGRESS: &str = "progress.safetensors";
/// Held by the run that writes.
const LOCK: &str = ".calibration.lock";
const NOTE: &str = "progress";

/// What a calibration is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The length that positions are stretched to; that of the samples when absent.
    pub effective_len: Option<usize>,
    /// Channels that share a scale.
    pub group: i64,
    /// Which gradients errors are weighed with.
    pub grad_order: GradOrder,
    /// How the largest keys are taken.
    pub max_mode: MaxMode,
    /// Widths that a layer may end at.
    pub choices: Vec<Bits>,
    /// Bytes of the codes of all layers.
    pub budget: u64,
    /// Tokens that the budget is for.
    pub max_len: usize,
}

/// A stage, and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Which.
    pub stage: Stage,
    /// Samples done.
    pub done: usize,
    /// Samples in all.
    pub total: usize,
}

/// A pass over the samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Sensitivity and largest keys.
    Sensitivity,
    /// Key scales.
    Scales,
}

/// What comes out, also in the files of the folder.
#[derive(Debug)]
pub struct Calibrated {
    /// The sensitivity.
    pub sensitivity: Sensitivity,
    /// The widths.
    pub widths: Widths,
    /// The largest keys.
    pub max_keys: MaxKeys,
    /// Exponents and scales.
    pub found: Found,
}

/// Where a run stands.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Position {
    /// Of settings, samples and model.
    identity: String,
    stage: Stage,
    done: usize,
}

/// The sums so far.
struct Sums {
    position: Position,
    tensors: Vec<(String, Tensor)>,
}

impl Sums {
    fn load(path: &Path, identity: &str) -> Result<Self> {
        let fresh = Position { identity: identity.to_owned(), stage: Stage::Sensitivity, done: 0 };
        if !path.exists() {
            return Ok(Self { position: fresh, tensors: Vec::new() });
        }
        let wrong = |reason: String| Error::Artefact { path: path.to_owned(), reason };
        let json = note(path, NOTE).map_err(nics_core::Error::from)?;
        let json = json.ok_or_else(|| wrong("not written by a calibration; delete it".into()))?;
        let position: Position = serde_json::from_str(&json).map_err(|e| wrong(e.to_string()))?;
        if position.identity != identity {
            return Err(wrong(
                "it is of a run with other settings, samples or another model; take another folder, or delete it to \
                 start again"
                    .into(),
            ));
        }
        let file = TensorPath::from_file(path).map_err(nics_core::Error::from)?;
        let names = file.unread();
        let tensors = names.into_iter().map(|name| {
            let t = file.stored(&name).map_err(nics_core::Error::from)?;
            Ok((name, t))
        });
        Ok(Self { position, tensors: tensors.collect::<Result<_>>()? })
    }

    fn save(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_string(&self.position).map_err(|source| nics_base::Error::Json {
            what: "the progress of a calibration".into(),
            source,
        })?;
        let tensors = self.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone()));
        Ok(save_file(path, tensors, &[(NOTE, &json)]).map_err(nics_core::Error::from)?)
    }

    fn get(&self, name: &str) -> Option<Tensor> {
        self.tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t.shallow_clone())
    }

    fn set(&mut self, name: &str, t: Tensor) {
        self.tensors.retain(|(n, _)| n != name);
        self.tensors.push((name.to_owned(), t));
    }

    fn add(&mut self, name: &str, t: Tensor) -> Result<()> {
        let sum = match self.get(name) {
            None => t,
            Some(sum) if sum.size() == t.size() && sum.kind() == t.kind() => sum.f_add(&t)?,
            Some(sum) => {
                return Err(Error::Input(format!(
                    "the sums so far of {name} are {:?}, this model's are {:?}",
                    sum.size(),
                    t.size()
                )));
            }
        };
        self.set(name, sum);
        Ok(())
    }

    fn need(&self, name: &str) -> Result<Tensor> {
        self.get(name).ok_or_else(|| Error::Input(format!("the progress so far lacks {name}")))
    }
}

/// Calibrates a model on some samples and writes all artefacts into `out`. A run that finds its own progress there goes on.
///
/// # Errors
/// What any stage refuses; progress of other settings; a second run in the same folder; a stop that was asked for.
pub fn calibrate(
    model: &mut dyn Model,
    samples: &Samples,
    settings: &Settings,
    origin: &Origin,
    out: &Path,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(Progress),
) -> Result<Calibrated> {
    let identity = nics_base::hash::value(&(settings, samples.hash(), samples.seq_len(), origin))?;
    let files = Files::at(out);
    let path = files.path(PROGRESS);
    let _lock = Lock::take(files.path(LOCK))?;
    let mut sums = Sums::load(&path, &identity)?;
    let seq_len = samples.seq_len();
    let step = stretch(seq_len, settings.effective_len)?;
    let total = samples.len();

    let mut run = Run { path: &path, interrupt, progress, total };
    run.pass(Stage::Sensitivity, &mut sums, |sums, i| {
        let one = measure(model, &samples.ids()[i], step, settings.group, settings.grad_order)?;
        let mut keys = match sums.get("max_keys") {
            None => Vec::new(),
            Some(stacked) => stacked.f_unbind(0)?,
        };
        merge(&mut keys, one.keys.iter().map(|k| largest(k, settings.max_mode)).collect::<Result<_>>()?)?;
        sums.set("max_keys", Tensor::f_stack(&keys, 0)?);
        sums.add("sensitivity.k", one.k)?;
        sums.add("sensitivity.v", one.v)
    })?;
    let bits = by_width(&sums.need("sensitivity.k")?, &sums.need("sensitivity.v")?, total)?;
    let effective_len = seq_len * step;
    let sensitivity = Sensitivity {
        group: settings.group,
        seq_len,
        effective_len,
        samples: total,
        grad_order: settings.grad_order,
        bits,
    };
    let layers = sums.need("max_keys")?.f_to_kind(Kind::Float)?.f_unbind(0)?;
    let max_keys = MaxKeys { layers, mode: settings.max_mode, seq_len, effective_len, samples: total };
    let dims = model.dims().clone();
    let unit = unit(dims.kv_heads as usize, dims.head_dim as usize, settings.max_len);
    let allocation = allocate(&sensitivity.totals(), &settings.choices, unit, settings.budget as f64)?;
    let choices = settings.choices.clone();
    let widths = Widths { allocation, choices, budget: settings.budget, max_len: settings.max_len };
    write_sensitivity(&files.path(SENSITIVITY), origin, &sensitivity)?;
    write_allocation(&files.path(ALLOCATION), origin, &widths)?;
    write_max_keys(&files.path(MAX_KEYS), origin, &max_keys)?;

    let search = Search {
        max_keys: &max_keys.layers,
        widths: &widths.allocation.widths,
        group: settings.group,
        effective_len: settings.effective_len,
    };
    search.check(&dims)?;
    let outputs = Outputs::of(model)?;
    run.pass(Stage::Scales, &mut sums, |sums, i| {
        sums.add("losses", search.losses(model, &outputs, &samples.ids()[i])?)
    })?;
    let found = search.choose(&sums.need("losses")?)?;
    let about =
        ScalesNote { alphas: found.alphas.clone(), bits: widths.allocation.widths.clone(), samples: total };
    write_scales(&files.path(REP_SCALES), origin, &found.scales, &about)?;
    Ok(Calibrated { sensitivity, widths, max_keys, found })
}

/// What every pass needs.
struct Run<'a> {
    path: &'a Path,
    interrupt: &'a Interrupt,
    progress: &'a mut dyn FnMut(Progress),
    total: usize,
}

impl Run<'_> {
    /// The samples that are left of a stage.
    fn pass(
        &mut self,
        stage: Stage,
        sums: &mut Sums,
        mut sample: impl FnMut(&mut Sums, usize) -> Result<()>,
    ) -> Result<()> {
        if sums.position.stage > stage {
            return Ok(());
        }
        if sums.position.stage < stage {
            (sums.position.stage, sums.position.done) = (stage, 0);
        }
        loop {
            let done = sums.position.done;
            (self.progress)(Progress { stage, done, total: self.total });
            if done >= self.total {
                return Ok(());
            }
            self.interrupt.check()?;
            sample(sums, done)?;
            sums.position.done += 1;
            sums.save(self.path)?;
        }
    }
}
