//! `state.safetensors`: all that a run needs to go on, in one file that is replaced at once.
//!
//! Tensors `param/NAME`, `m/NAME`, `v/NAME` and, with an average of the weights, `average/NAME`; the position in the run,
//! its settings and its identity as JSON under the key `train` of the file's metadata.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::Path;

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{Result, TrainError};

/// The name of the state in a run's folder.
pub const STATE_FILE: &str = "state.safetensors";

/// The version of the layout above.
const FORMAT: u32 = 1;
const METADATA_KEY: &str = "train";

/// Where a run stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Position {
    format: u32,
    /// Steps done.
    pub step: u64,
    /// Target tokens trained on.
    pub tokens: u64,
    /// What the next row of the log already knows.
    pub window: Window,
    /// Seconds of training.
    pub seconds: f64,
    /// Updates of each parameter.
    pub updates: BTreeMap<String, u64>,
    /// The run's settings, as JSON.
    pub config: Value,
    /// What else makes the run what it is, in the caller's words.
    pub identity: Value,
}

/// Cost and tokens since the last row of the log. The cost is kept as bits: text might lose the last of them.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Window {
    loss_bits: u64,
    pub tokens: u64,
}

impl Window {
    pub fn add(&mut self, loss: f64, tokens: u64) {
        self.loss_bits = (f64::from_bits(self.loss_bits) + loss).to_bits();
        self.tokens += tokens;
    }

    /// Cost per token.
    pub fn mean(self) -> f64 {
        f64::from_bits(self.loss_bits) / self.tokens as f64
    }
}

impl Position {
    pub fn start(config: Value, identity: Value) -> Self {
        let (window, updates) = (Window::default(), BTreeMap::new());
        Self { format: FORMAT, step: 0, tokens: 0, window, seconds: 0.0, updates, config, identity }
    }
}

/// Replaces the state at `path`: a reader, and a run after `kill -9`, finds the old one or the new one.
pub(super) fn save(path: &Path, position: &Position, tensors: Vec<(String, &Tensor)>) -> Result<()> {
    let json = serde_json::to_string(position)
        .map_err(|source| nics_base::Error::Json { what: "the position of a training run".into(), source })?;
    let blobs = tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name, Blob::of(tensor)?)))
        .collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(blobs, Some(HashMap::from([(METADATA_KEY.to_owned(), json)])))
        .map_err(|e| TrainError::Input(format!("cannot write {}: {e}", path.display())))?;
    Ok(nics_base::artefact::write_atomic(path, bytes)?)
}

/// Reads the state at `path`; `None` when there is none.
pub(super) fn load(path: &Path) -> Result<Option<(Position, HashMap<String, Tensor>)>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(crate::Error::Io { path: path.to_owned(), source }.into()),
    };
    let damaged = |reason: String| TrainError::DamagedState { path: path.to_owned(), reason };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
    let json = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY));
    let json = json
        .ok_or_else(|| damaged(format!("its metadata has no {METADATA_KEY:?}: not written by training")))?;
    let position: Position = serde_json::from_str(json).map_err(|e| damaged(format!("its position: {e}")))?;
    if position.format != FORMAT {
        return Err(damaged(format!("format {} where {FORMAT} is expected", position.format)));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
    let mut tensors = HashMap::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(damaged(format!("{name} is {:?}, not F32", view.dtype())));
        }
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        tensors.insert(name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, Kind::Float)?);
    }
    Ok(Some((position, tensors)))
}

/// The first difference between two JSON values: path, what `a` has, what `b` has.
pub(super) fn difference(a: &Value, b: &Value, path: &str) -> Option<(String, String, String)> {
    let absent = || "absent".to_owned();
    let name = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => a
            .iter()
            .find_map(|(key, x)| match b.get(key) {
                Some(y) => difference(x, y, &name(key)),
                None => Some((name(key), x.to_string(), absent())),
            })
            .or_else(|| {
                let (key, y) = b.iter().find(|(key, _)| !a.contains_key(*key))?;
                Some((name(key), absent(), y.to_string()))
            }),
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            x.iter().zip(y).enumerate().find_map(|(i, (x, y))| difference(x, y, &format!("{path}[{i}]")))
        }
        _ if a == b => None,
        _ => Some((path.to_owned(), a.to_string(), b.to_string())),
    }
}

/// A float32 tensor's bytes, for the writer.
struct Blob {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Blob {
    fn of(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut bytes = vec![0; tensor.numel() * size_of::<f32>()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        Ok(Self { shape: tensor.size().iter().map(|&n| n as usize).collect(), bytes })
    }
}

impl View for Blob {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_first_difference_is_named_by_its_path() {
        let a = json!({"lr": 1.0, "betas": [0.9, 0.95], "data": {"seed": 1, "kind": "sum"}});
        let differs = |b: Value| difference(&a, &b, "").map(|(path, _, _)| path);
        assert_eq!(differs(a.clone()), None);
        assert_eq!(differs(json!({"lr": 2.0, "betas": [0.9, 0.95], "data": {"seed": 2}})).unwrap(), "lr");
        let b = json!({"lr": 1.0, "betas": [0.9, 0.99], "data": {"seed": 1, "kind": "sum"}});
        assert_eq!(difference(&a, &b, "").unwrap(), ("betas[1]".into(), "0.95".into(), "0.99".into()));
        let b = json!({"lr": 1.0, "betas": [0.9, 0.95], "data": {"seed": 1}});
        assert_eq!(difference(&a, &b, "").unwrap(), ("data.kind".into(), "\"sum\"".into(), "absent".into()));
        assert_eq!(difference(&b, &a, "").unwrap(), ("data.kind".into(), "absent".into(), "\"sum\"".into()));
    }

    #[test]
    fn a_mean_goes_on_from_its_bits() {
        let mut window = Window::default();
        window.add(0.1, 1);
        let text = serde_json::to_string(&window).unwrap();
        let mut again: Window = serde_json::from_str(&text).unwrap();
        for w in [&mut window, &mut again] {
            w.add(0.2, 2);
        }
        assert_eq!(window.mean().to_bits(), again.mean().to_bits());
        assert!((window.mean() - 0.1).abs() < 1e-12);
    }
}
