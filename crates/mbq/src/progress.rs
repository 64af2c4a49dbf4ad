//! What an unfinished calibration has found so far, in one file that is replaced after each step.

use std::path::{Path, PathBuf};

use nics_core::checkpoint::{TensorPath, note, save_file};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::operators::{Names, Operator};
use crate::search::OpScale;
use crate::{Error, Result, candidates, loss};

/// The file; it stays, so that a finished run is not repeated either.
pub const PROGRESS: &str = "progress.safetensors";
const NOTE: &str = "progress";

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Of settings, data, model and the way that samples are cut.
    identity: String,
    /// Samples whose gradients were measured, and how many of them have an answer.
    pub samples: usize,
    pub answered: usize,
    /// Layers that were searched, by the number of their operators.
    layers: Vec<usize>,
}

/// What was found so far. Numbers are kept in tensors, to the bit.
pub(crate) struct Sums {
    path: Option<PathBuf>,
    pub position: Position,
    tensors: Vec<(String, Tensor)>,
}

const GRADIENTS: &str = "gradients";

impl Sums {
    /// The progress in a folder, or none yet.
    ///
    /// # Errors
    /// A file of another run, or a damaged one.
    pub fn load(out: Option<&Path>, identity: &str) -> Result<Self> {
        let path = out.map(|out| out.join(PROGRESS));
        let fresh = Position { identity: identity.to_owned(), samples: 0, answered: 0, layers: Vec::new() };
        let Some(file) = path.as_deref().filter(|p| p.exists()) else {
            return Ok(Self { path, position: fresh, tensors: Vec::new() });
        };
        let wrong = |reason: String| Error::Artefact { path: file.to_owned(), reason };
        let json =
            note(file, NOTE)?.ok_or_else(|| wrong("not written by a calibration; delete it".into()))?;
        let position: Position = serde_json::from_str(&json).map_err(|e| wrong(e.to_string()))?;
        if position.identity != identity {
            return Err(wrong(
                "it is of a run with other settings, data or another model; take another folder, or delete it to start \
                 again"
                    .into(),
            ));
        }
        let root = TensorPath::from_file(file)?;
        let tensors = root.unread().into_iter().map(|name| Ok((name.clone(), root.stored(&name)?)));
        let tensors = tensors.collect::<Result<_>>()?;
        Ok(Self { path, position, tensors })
    }

    /// Replaces the file.
    pub fn save(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let json = serde_json::to_string(&self.position).map_err(|source| nics_base::Error::Json {
            what: "the progress of a calibration".into(),
            source,
        })?;
        let tensors = self.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone()));
        Ok(save_file(path, tensors, &[(NOTE, &json)])?)
    }

    fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t)
    }

    /// Sums of the gradients of each modality.
    pub fn gradients(&self) -> Option<&Tensor> {
        self.get(GRADIENTS)
    }

    /// Adds one sample's gradients.
    pub fn add_gradients(&mut self, one: Tensor) -> Result<()> {
        match self.tensors.iter_mut().find(|(n, _)| n == GRADIENTS) {
            None => self.tensors.push((GRADIENTS.to_owned(), one)),
            Some((_, sum)) => *sum = sum.f_add(&one)?,
        }
        Ok(())
    }

    /// Puts down the scales of the next layer.
    pub fn put_layer(&mut self, ops: &[OpScale]) -> Result<()> {
        let l = self.position.layers.len();
        for (n, op) in ops.iter().enumerate() {
            let mut put = |what: &str, t: Tensor| self.tensors.push((format!("layers.{l}.{n}.{what}"), t));
            put("scales", op.scales.shallow_clone());
            put("statistic", op.statistic.shallow_clone());
            put("losses", Tensor::f_from_slice(&op.losses)?);
        }
        self.position.layers.push(ops.len());
        Ok(())
    }

    /// The scales of a layer, when it was searched.
    /// `grid` is the number of exponents.
    pub fn layer(
        &self,
        l: usize,
        names: &Names,
        ops: &[Operator],
        grid: usize,
    ) -> Result<Option<Vec<OpScale>>> {
        let Some(&n) = self.position.layers.get(l) else { return Ok(None) };
        if n != ops.len() {
            return Err(Error::Input(format!(
                "the progress has {n} operators in layer {l}, the model has {}",
                ops.len()
            )));
        }
        let mut found = Vec::with_capacity(n);
        for (n, op) in ops.iter().enumerate() {
            let need = |what: &str| {
                let name = format!("layers.{l}.{n}.{what}");
                self.get(&name)
                    .map(Tensor::shallow_clone)
                    .ok_or_else(|| Error::Input(format!("the progress lacks {name}")))
            };
            let losses = Vec::<f64>::try_from(need("losses")?.f_to_kind(Kind::Double)?)?;
            let (k, margin) = loss::best(&losses).ok_or_else(|| {
                Error::Input(format!("the progress has no loss of layer {l} that is a number"))
            })?;
            found.push(OpScale {
                previous: names.previous(l, op),
                linears: names.linears(l, op),
                exponent: candidates::exponent(k % grid.max(1), grid.max(1)),
                scales: need("scales")?,
                statistic: need("statistic")?,
                losses,
                margin,
            });
        }
        Ok(Some(found))
    }
}
