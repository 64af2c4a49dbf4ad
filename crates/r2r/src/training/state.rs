//! `state.safetensors`: all that a run needs to go on, in one file that is replaced at once.
//!
//! Tensors `param/NAME`, `m/NAME`, `v/NAME`, `best/NAME`; numbers as float64 tensors, which keep their last bit; settings
//! and counts as JSON in the bytes of `meta`.

use std::collections::BTreeMap;
use std::path::Path;

use nics_core::checkpoint::TensorPath;
use nics_core::train::AdamW;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::{Epoch, Rows, TrainingConfig};
use crate::router::Router;
use crate::{Error, Result};

/// The name of the state in a run's folder.
pub const STATE_FILE: &str = "state.safetensors";

/// Numbers of an epoch in the file.
const COLUMNS: usize = 6;

/// Where a run stands.
#[derive(Debug, Clone, Default)]
pub(super) struct Position {
    /// Epochs that ended.
    pub epochs: Vec<Epoch>,
    /// Steps done of the epoch that has not.
    pub step: usize,
    /// Sum of their losses.
    pub loss: f64,
}

impl Position {
    /// The epoch with the lowest validation loss, the first of equals, counted from 1; 0 when there is none.
    pub fn best_epoch(&self) -> usize {
        let mut best = 0;
        for (i, epoch) in self.epochs.iter().enumerate() {
            if best == 0 || epoch.validation_loss < self.epochs[best - 1].validation_loss {
                best = i + 1;
            }
        }
        best
    }

    pub fn finished(&self, config: &TrainingConfig) -> bool {
        let ended = self.epochs.len();
        ended >= config.epochs || ended - self.best_epoch() >= config.patience
    }
}

/// A run's weights, optimiser and position.
#[derive(Debug)]
pub(super) struct State {
    pub optimizer: AdamW,
    pub position: Position,
    /// The best epoch's weights, in the optimiser's order; the first ones before any epoch has ended.
    best: Vec<Tensor>,
    identity: Value,
}

/// What the file says beside tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    format: u32,
    step: usize,
    updates: BTreeMap<String, u64>,
    identity: Value,
}

const FORMAT: u32 = 1;

/// What makes a run what it is: a state is taken up by an equal one alone.
pub(super) fn identity(
    router: &Router,
    config: &TrainingConfig,
    train: &Rows,
    validation: &Rows,
) -> Result<Value> {
    let labels = |rows: &Rows| -> Result<String> {
        let labels = Vec::<f32>::try_from(&rows.divergent)?;
        Ok(nics_base::hash::bytes(labels.iter().map(|l| u8::from(*l > 0.5)).collect::<Vec<u8>>()))
    };
    let mut config = json!(config);
    // How often a run saves decides nothing of its result.
    config.as_object_mut().map(|fields| fields.remove("save_every"));
    let value = json!({
        "router": router.config().architecture.name(),
        "init_args": router.config().args,
        "training": config,
        "train_labels": labels(train)?,
        "validation_labels": labels(validation)?,
    });
    // As it comes back from a file: numbers may lose their last bit on the way, and then do on both sides.
    let wrong = |source| nics_base::Error::Json { what: "the settings of a run".into(), source };
    Ok(serde_json::from_str(&value.to_string()).map_err(wrong)?)
}

impl State {
    /// The state in `dir`, or the beginning.
    pub fn open(dir: Option<&Path>, optimizer: AdamW, identity: Value) -> Result<Self> {
        let best = optimizer.params().iter().map(Tensor::f_detach_copy).collect::<Result<_, _>>()?;
        let mut state = Self { optimizer, position: Position::default(), best, identity };
        if let Some(path) = dir.map(|d| d.join(STATE_FILE)).filter(|p| p.exists()) {
            state.load(&path)?;
        }
        Ok(state)
    }

    /// Takes note of an epoch, and of its weights when they are the best so far.
    pub fn end_epoch(&mut self, epoch: Epoch) -> Result<()> {
        self.position.epochs.push(epoch);
        (self.position.step, self.position.loss) = (0, 0.0);
        if self.position.best_epoch() == self.position.epochs.len() {
            copy_into(&self.best, self.optimizer.params())?;
        }
        Ok(())
    }

    /// Gives the model the best epoch's weights.
    pub fn restore_best(&self) -> Result<()> {
        copy_into(self.optimizer.params(), &self.best)
    }

    /// Replaces the state in `dir`, where there is one.
    pub fn save(&self, dir: Option<&Path>) -> Result<()> {
        let Some(dir) = dir else { return Ok(()) };
        let names = self.optimizer.names();
        let moments = self.optimizer.moments();
        let meta = Meta {
            format: FORMAT,
            step: self.position.step,
            updates: names.iter().cloned().zip(moments.iter().map(|m| m.updates)).collect(),
            identity: self.identity.clone(),
        };
        let wrong = |source| nics_base::Error::Json { what: "the position of a run".into(), source };
        let meta = serde_json::to_vec(&meta).map_err(wrong)?;
        let mut tensors = vec![
            ("meta".to_owned(), Tensor::f_from_slice(&meta)?),
            ("loss".to_owned(), Tensor::f_from_slice(&[self.position.loss])?),
            (
                "epochs".to_owned(),
                Tensor::f_from_slice(&self.position.epochs.iter().flat_map(numbers).collect::<Vec<f64>>())?,
            ),
        ];
        for (i, name) in names.iter().enumerate() {
            tensors.push((format!("param/{name}"), self.optimizer.params()[i].f_detach()?));
            tensors.push((format!("m/{name}"), moments[i].m.shallow_clone()));
            tensors.push((format!("v/{name}"), moments[i].v.shallow_clone()));
            tensors.push((format!("best/{name}"), self.best[i].shallow_clone()));
        }
        let path = dir.join(STATE_FILE);
        let bytes = crate::checkpoint::tensor_bytes(&path, &tensors)?;
        Ok(nics_base::artefact::write_atomic(&path, bytes)?)
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let damaged = |reason: String| Error::Damaged { path: path.to_owned(), reason };
        let file = TensorPath::from_file(path)?;
        let meta: Vec<u8> = Vec::try_from(file.stored("meta")?)?;
        let meta: Meta = serde_json::from_slice(&meta).map_err(|e| damaged(format!("its position: {e}")))?;
        if meta.format != FORMAT {
            return Err(damaged(format!(
                "format {} where {FORMAT} is expected; delete it to start again",
                meta.format
            )));
        }
        if meta.identity != self.identity {
            let differs = self.identity.as_object().and_then(|own| {
                own.iter()
                    .find(|(key, value)| meta.identity.get(key.as_str()) != Some(value))
                    .map(|(key, _)| key.clone())
            });
            return Err(damaged(format!(
                "it belongs to a run with another `{}`; choose another folder, or delete it to start again",
                differs.unwrap_or_else(|| "identity".into())
            )));
        }
        let epochs: Vec<f64> = Vec::try_from(file.stored("epochs")?)?;
        let loss: Vec<f64> = Vec::try_from(file.stored("loss")?)?;
        let whole = epochs.len().is_multiple_of(COLUMNS) && loss.len() == 1;
        if !whole {
            return Err(damaged("its losses are cut; delete it to start again".into()));
        }
        // Everything is looked up before anything is overwritten.
        let names = self.optimizer.names().to_vec();
        let all = |kind: &str| -> Result<Vec<Tensor>> {
            let find = |(name, p): (&String, &Tensor)| Ok(file.tensor(&format!("{kind}/{name}"), &p.size())?);
            names.iter().zip(self.optimizer.params()).map(find).collect()
        };
        let (params, m, v, best) = (all("param")?, all("m")?, all("v")?, all("best")?);
        copy_into(self.optimizer.params(), &params)?;
        copy_into(&self.best, &best)?;
        for (i, moments) in self.optimizer.moments_mut().iter_mut().enumerate() {
            moments.m.f_copy_(&m[i])?;
            moments.v.f_copy_(&v[i])?;
            moments.updates = meta.updates.get(&names[i]).copied().unwrap_or(0);
        }
        let epochs = epochs.chunks_exact(COLUMNS).map(epoch).collect();
        self.position = Position { epochs, step: meta.step, loss: loss[0] };
        Ok(())
    }
}

fn numbers(e: &Epoch) -> [f64; COLUMNS] {
    [e.train_loss, e.validation_loss, e.accuracy, e.recall, e.f1, e.positive_rate]
}

fn epoch(n: &[f64]) -> Epoch {
    Epoch {
        train_loss: n[0],
        validation_loss: n[1],
        accuracy: n[2],
        recall: n[3],
        f1: n[4],
        positive_rate: n[5],
    }
}

/// Overwrites tensors in place, so that a model that shares their storage sees it.
fn copy_into(into: &[Tensor], from: &[Tensor]) -> Result<()> {
    let _guard = tch::no_grad_guard();
    for (into, from) in into.iter().zip(from) {
        debug_assert!(matches!(from.kind(), Kind::Float));
        into.shallow_clone().f_copy_(from)?;
    }
    Ok(())
}
