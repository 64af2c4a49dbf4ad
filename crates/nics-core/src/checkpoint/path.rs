//! A place in a checkpoint from which a model reads its tensors.

use std::collections::HashMap;
use std::fmt::{self, Display};
use std::sync::{Arc, Mutex};

use tch::{Device, Kind, Tensor};

use super::CheckpointError;
use super::files::WeightFiles;
use super::loading::Loading;
use super::source::{Origin, Source};
use crate::seam::ProjectionSource;

/// A change to every tensor on its way from a [`TensorPath`] to the model; gets the full name and the tensor, and keeps
/// the shape. A refusal is a [`CheckpointError::Transform`].
pub type Transform = dyn Fn(&str, Tensor) -> Result<Tensor, CheckpointError> + Send + Sync;

/// A place in a checkpoint, e.g. `model.layers.0.mlp`, from which tensors are read; cheap to clone.
///
/// Behind it stand files ([`Checkpoint::root`](super::Checkpoint::root)), a seeded initialiser
/// ([`random`](Self::random)) or tensors in memory ([`from_tensors`](Self::from_tensors)): a model's `load` does not tell
/// them apart.
#[derive(Clone)]
pub struct TensorPath {
    source: Arc<Source>,
    path: String,
    device: Device,
    kind: Kind,
    because: Arc<str>,
    transform: Option<Arc<Transform>>,
    renames: &'static [(&'static str, &'static str)],
    projections: Option<Arc<dyn ProjectionSource>>,
    loading: Option<Arc<Loading>>,
}

impl TensorPath {
    pub(super) fn files(files: Arc<WeightFiles>, folder: String, device: Device, kind: Kind) -> Self {
        Self::new(Origin::Files(files, folder), device, kind)
    }

    /// A source in which every name exists: tensors drawn from `(seed, full name)`, so independent of the order in which
    /// they are read.
    ///
    /// Scales of norms (`weight` under a name with `norm` or `ln`) are ones, `bias` is zeros, everything else is normal
    /// with deviation `std`.
    pub fn random(seed: u64, std: f64, device: Device, kind: Kind) -> Self {
        Self::new(Origin::Random { seed, std }, device, kind)
    }

    /// A source of tensors in memory, read as float32 on the CPU unless [`to`](Self::to) says otherwise.
    ///
    /// What is read is a copy: training it does not change the source.
    pub fn from_tensors(tensors: HashMap<String, Tensor>) -> Self {
        Self::new(Origin::Memory(Mutex::new(tensors)), Device::Cpu, Kind::Float)
    }

    /// The tensors of one safetensors file that belongs to no checkpoint, read as float32 on the CPU unless
    /// [`to`](Self::to) says otherwise.
    pub fn from_file(path: &std::path::Path) -> Result<Self, CheckpointError> {
        let files = WeightFiles::open(&[path.to_owned()])?;
        let folder = path.parent().unwrap_or(path).display().to_string();
        Ok(Self::files(Arc::new(files), folder, Device::Cpu, Kind::Float))
    }

    fn new(origin: Origin, device: Device, kind: Kind) -> Self {
        let source = Source::new(origin);
        Self {
            source,
            path: String::new(),
            device,
            kind,
            because: "".into(),
            transform: None,
            renames: &[],
            projections: None,
            loading: None,
        }
    }

    /// The place `name` under this one; parts are joined with `.` and an empty name is this place.
    pub fn at(&self, name: impl Display) -> Self {
        Self { path: self.full(&name.to_string()), ..self.clone() }
    }

    /// The same place read onto another device and as another dtype.
    pub fn to(&self, device: Device, kind: Kind) -> Self {
        Self { device, kind, ..self.clone() }
    }

    /// The same place with a reason that errors about missing tensors and wrong shapes give, e.g.
    /// `config.json (hidden_size 896, intermediate_size 5632)`.
    pub fn because(&self, reason: impl Display) -> Self {
        Self { because: reason.to_string().into(), ..self.clone() }
    }

    /// The same place with `transform` applied to each tensor that is read, after those that are already there.
    pub fn with_transform(&self, transform: Arc<Transform>) -> Self {
        let transform: Arc<Transform> = match self.transform.clone() {
            None => transform,
            Some(first) => Arc::new(move |name, t| transform(name, first(name, t)?)),
        };
        Self { transform: Some(transform), ..self.clone() }
    }

    /// The same place for files whose tensors may have other names. A name that is not there is looked for with the
    /// first prefix of a pair replaced by the second, pair by pair in order; messages keep the model's own name.
    pub fn renamed(&self, renames: &'static [(&'static str, &'static str)]) -> Self {
        Self { renames, ..self.clone() }
    }

    /// The same place with linear layers that `source` makes, where it does.
    pub fn with_projections(&self, source: Arc<dyn ProjectionSource>) -> Self {
        Self { projections: Some(source), ..self.clone() }
    }

    /// The same place, which tells of every tensor that is read.
    pub(super) fn watched(self, loading: Loading) -> Self {
        Self { loading: Some(Arc::new(loading)), ..self }
    }

    /// What makes linear layers in place of their dense weights.
    pub fn projections(&self) -> Option<&dyn ProjectionSource> {
        self.projections.as_deref()
    }

    /// The tensor `name` under this place, of the given shape, as [`kind`](Self::kind) on [`device`](Self::device).
    ///
    /// bfloat16, float16, float32 and float64 are converted into each other. The result owns its memory.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, CheckpointError> {
        self.tensor_as(name, shape, self.kind)
    }

    /// As [`tensor`](Self::tensor), with a dtype of its own. Integer dtypes are read from integer tensors only.
    pub fn tensor_as(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor, CheckpointError> {
        let key = self.stored_name(name);
        self.source.mark(&key);
        if let Some(found) = self.source.shape(&key)
            && found != shape
        {
            return Err(self.wrong_shape(key, found, shape));
        }
        let Some(mut tensor) = self.source.read(&key, shape, kind, self.device)? else {
            return Err(self.missing(key));
        };
        self.tell(&key);
        if let Some(transform) = &self.transform {
            tensor = transform(&key, tensor)?;
            if tensor.size() != shape {
                let reason = format!("it made shape {:?} of {shape:?}", tensor.size());
                return Err(CheckpointError::Transform { key, reason });
            }
        }
        crate::nn::memory::settle_in_huge_pages(&tensor);
        Ok(tensor)
    }

    /// The tensor `name` under this place with the shape and dtype in which it is stored, on [`device`](Self::device).
    ///
    /// For formats that describe themselves (packed weights, fixtures): neither transforms nor the check for values that
    /// are not finite apply. The random initialiser stores nothing.
    pub fn stored(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let key = self.stored_name(name);
        self.source.mark(&key);
        let tensor = self.source.read_stored(&key, self.device)?;
        self.tell(&key);
        tensor.ok_or_else(|| self.missing(key))
    }

    /// Tells that a tensor has been read.
    fn tell(&self, key: &str) {
        if let (Some(loading), Origin::Files(files, _)) = (&self.loading, &self.source.origin)
            && let Some(entry) = files.entry(key)
        {
            loading.read((entry.end - entry.begin) as u64);
        }
    }

    /// Whether there is a tensor `name` under this place; the random initialiser has every tensor.
    pub fn has(&self, name: &str) -> bool {
        matches!(self.source.origin, Origin::Random { .. }) || self.shape(name).is_some()
    }

    /// The shape of the tensor `name` under this place; the random initialiser has any shape and returns `None`.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.source.shape(&self.stored_name(name))
    }

    /// Names under this place that nobody asked for, so that a model can refuse or report what it does not know.
    ///
    /// `rotary_emb.inv_freq`, a table that old releases of transformers saved, never counts.
    pub fn unread(&self) -> Vec<String> {
        let under = |name: &str| {
            self.path.is_empty()
                || name
                    .strip_prefix(self.path.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let table = |name: &str| name.ends_with("rotary_emb.inv_freq");
        let mut names = self.source.names();
        names.retain(|name| under(name) && !table(name) && !self.source.is_marked(name));
        names
    }

    /// Counts the tensor `name` under this place as read: the model knows it and does without.
    pub fn skip(&self, name: &str) {
        self.source.mark(&self.stored_name(name));
    }

    /// The full name of this place; empty for the root.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where tensors are put.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The dtype that [`tensor`](Self::tensor) gives.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The name under which the files have the tensor `name` of this place; its full name when they have it under none.
    pub fn stored_name(&self, name: &str) -> String {
        let full = self.full(name);
        if self.renames.is_empty() || self.source.shape(&full).is_some() {
            return full;
        }
        let renamed = self
            .renames
            .iter()
            .filter_map(|(own, theirs)| full.strip_prefix(own).map(|rest| format!("{theirs}{rest}")));
        renamed.into_iter().find(|name| self.source.shape(name).is_some()).unwrap_or(full)
    }

    fn full(&self, name: &str) -> String {
        match (self.path.is_empty(), name.is_empty()) {
            (true, _) => name.to_owned(),
            (_, true) => self.path.clone(),
            _ => format!("{}.{name}", self.path),
        }
    }

    fn missing(&self, key: String) -> CheckpointError {
        let nearest = match &self.source.origin {
            Origin::Files(files, _) => files.nearest(&key).unwrap_or_default().to_owned(),
            _ => String::new(),
        };
        let origin = self.source.place(&key);
        CheckpointError::MissingTensor { origin, key, because: self.because.to_string(), nearest }
    }

    fn wrong_shape(&self, key: String, found: Vec<i64>, expected: &[i64]) -> CheckpointError {
        let origin = self.source.place(&key);
        let because = self.because.to_string();
        CheckpointError::WrongShape { key, origin, found: found.into(), expected: expected.into(), because }
    }
}

impl fmt::Debug for TensorPath {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("TensorPath")
            .field("path", &self.path)
            .field("device", &self.device)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}
