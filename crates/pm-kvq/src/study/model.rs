//! The nano model of a seed, as it was trained and with outliers in its keys, and what is calibrated on it.

use std::fmt;
use std::path::{Path, PathBuf};

use nics_base::interrupt::Interrupt;
use nics_core::checkpoint::Checkpoint;
use nics_core::models::{self, Decoder, Model};
use nics_datasets::adding_ring::{LINES, TOKENS, Task, problems};
use nics_datasets::word_problems::Split;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::Study;
use crate::calibrate::artefact::{Files, REP_SCALES, SENSITIVITY, read_scales, read_sensitivity};
use crate::calibrate::{
    GradOrder, MaxMode, Origin, Progress, Samples, Scales, Sensitivity, Settings, calibrate, fold,
};
use crate::{Bits, Result, allocate};

/// Which weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// As trained.
    Plain,
    /// With outliers in the keys; the model's function is the same.
    Outliers,
}

impl Weights {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Plain, Self::Outliers];

    /// The name of its folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Outliers => "outliers",
        }
    }
}

/// What the largest keys of a calibration are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// Short samples at their own positions.
    Short,
    /// Short samples whose positions are stretched to those of whole texts: the method's own.
    Stretched,
    /// Whole texts.
    Whole,
    /// Short samples, the radius of each rotary pair.
    Hypot,
}

impl Basis {
    /// All.
    pub const ALL: [Self; 4] = [Self::Short, Self::Stretched, Self::Whole, Self::Hypot];

    /// The name of its folder.
    pub fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Stretched => "stretched",
            Self::Whole => "whole",
            Self::Hypot => "hypot",
        }
    }
}

impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The width at which key scales are searched.
pub const SCALES_AT: Bits = Bits::B4;

/// A model of a seed.
pub struct Subject {
    /// The model, in float32.
    pub model: Decoder,
    /// What it was read from.
    pub origin: Origin,
    /// Which weights.
    pub weights: Weights,
    /// Seed of texts.
    pub seed: u64,
}

impl Subject {
    /// Loads the checkpoint in `dir`.
    ///
    /// # Errors
    /// A checkpoint that does not load, or an outlier pair that its heads do not have.
    pub fn load(dir: &Path, study: &Study, weights: Weights, seed: u64) -> Result<Self> {
        let checkpoint = Checkpoint::open_dir(dir).map_err(nics_core::Error::from)?;
        let mut model = models::load(&checkpoint, Device::Cpu, Kind::Float)?;
        if weights == Weights::Outliers {
            let scales = outliers(&model, study)?;
            fold(&mut model, &scales)?;
        }
        Ok(Self { model, origin: Origin::of(&checkpoint)?, weights, seed })
    }

    /// What a calibration sees.
    ///
    /// # Errors
    /// Never for settings that were read.
    pub fn samples(&self, study: &Study, tokens: usize) -> Result<Samples> {
        let calibration = &study.calibration;
        let texts = problems(Split::Train, calibration.seed + self.seed, calibration.samples);
        Samples::new(texts.map(|p| p.ids(Task::Ring, LINES)[..tokens].to_vec()).collect())
    }

    /// The folder of a calibration below `dir`.
    pub fn folder(&self, dir: &Path, basis: Basis) -> PathBuf {
        dir.join(self.weights.name()).join(basis.name())
    }

    /// Calibrates into folders below `dir`: sensitivity, widths, largest keys and scales. Folders that are done already
    /// are left as they are.
    ///
    /// # Errors
    /// What a calibration refuses, a stop that was asked for.
    pub fn calibrate(
        &mut self,
        study: &Study,
        dir: &Path,
        interrupt: &Interrupt,
        progress: &mut dyn FnMut(Basis, Progress),
    ) -> Result<()> {
        let dims = self.model.dims().clone();
        for basis in Basis::ALL {
            let whole = basis == Basis::Whole;
            let tokens = if whole { TOKENS } else { study.calibration.tokens };
            let stretched = basis == Basis::Stretched;
            let unit = allocate::unit(dims.kv_heads as usize, dims.head_dim as usize, TOKENS);
            let settings = Settings {
                effective_len: stretched.then_some(tokens * study.calibration.stretch),
                group: study.cache.group as i64,
                grad_order: GradOrder::Aligned,
                max_mode: if basis == Basis::Hypot { MaxMode::Hypot } else { MaxMode::Rotated },
                choices: vec![SCALES_AT],
                budget: (unit * f64::from(SCALES_AT.get()) * dims.layers as f64).ceil() as u64,
                max_len: TOKENS,
            };
            let samples = self.samples(study, tokens)?;
            let (folder, origin) = (self.folder(dir, basis), self.origin.clone());
            std::fs::create_dir_all(&folder)
                .map_err(|source| nics_core::Error::Io { path: folder.clone(), source })?;
            let mut report = |p| progress(basis, p);
            calibrate(&mut self.model, &samples, &settings, &origin, &folder, interrupt, &mut report)?;
        }
        Ok(())
    }

    /// The scales of a calibration.
    ///
    /// # Errors
    /// It was not made, or of another model.
    pub fn scales(&self, dir: &Path, basis: Basis) -> Result<Scales> {
        let path = Files::at(self.folder(dir, basis)).path(REP_SCALES);
        Ok(read_scales(&path, &self.origin, self.model.dims())?.0)
    }

    /// The sensitivity of the method's own calibration.
    ///
    /// # Errors
    /// It was not made, or of another model.
    pub fn sensitivity(&self, dir: &Path) -> Result<Sensitivity> {
        let path = Files::at(self.folder(dir, Basis::Stretched)).path(SENSITIVITY);
        read_sensitivity(&path, &self.origin, self.model.dims().layers)
    }
}

/// What makes outliers when it is folded into the weights: keys of a pair are divided by `1 / factor`.
fn outliers(model: &dyn Model, study: &Study) -> Result<Scales> {
    let dims = model.dims();
    let pairs = dims.head_dim / 2;
    let (pair, factor) = (study.outliers.pair as i64, study.outliers.factor);
    if pair >= pairs {
        return Err(crate::Error::Setting {
            field: "outliers.pair".into(),
            found: pair.to_string(),
            expected: format!("below the {pairs} pairs of a head"),
        });
    }
    let one = || -> Result<Tensor> {
        let scale = Tensor::f_ones([dims.kv_heads, pairs], (Kind::Float, dims.device))?;
        let mut part = scale.f_narrow(1, pair, 1)?;
        let _ = part.f_fill_(1.0 / factor)?;
        Ok(scale)
    };
    Scales::new(&(0..dims.layers).map(|_| one()).collect::<Result<Vec<_>>>()?)
}
