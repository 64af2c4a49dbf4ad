//! Checkpoints in the Hugging Face layout: `config.json`, `model.safetensors` or shards with their index, and the files
//! beside them. Weights are mapped into memory and converted as they are read.
//!
//! Nothing in a checkpoint is trusted: sizes are bounded, headers and indices are held against the files, names stay
//! inside the folder, and every way in which a checkpoint can be wrong is a [`CheckpointError`] of its own.
//!
//! ```no_run,standalone_crate
//! use nics_core::checkpoint::Checkpoint;
//! # fn main() -> Result<(), nics_core::checkpoint::CheckpointError> {
//! let checkpoint = Checkpoint::open("path/to/checkpoint")?;
//! let root = checkpoint.root(tch::Device::Cpu, tch::Kind::Float);
//! let norm = root.at("model.norm").tensor("weight", &[128])?;
//! # Ok(()) }
//! ```

mod error;
mod files;
mod hash;
mod header;
mod index;
mod loading;
mod origin;
mod path;
mod save;
mod source;
pub mod torch_file;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nics_base::hub::{Hub, Source};
pub use safetensors::Dtype;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use error::CheckpointError;
pub use origin::Origin;
pub use path::{TensorPath, Transform};
pub use save::{DEFAULT_SHARD_BYTES, note, save, save_file};

pub(crate) use files::{read_bounded, read_object};

use files::WeightFiles;
use index::Index;
use loading::Loading;

use crate::seam::ProjectionSource;

/// Longest JSON configuration that is read.
pub(crate) const MAX_CONFIG: u64 = 4 << 20;

/// The field of config.json about quantized weights.
const QUANTIZED: &str = "quantization_config";

/// A checkpoint in the Hugging Face layout, mapped into memory.
///
/// Opening reads the configuration, the index and the headers; weights are touched when they are asked for. Clones share them.
#[derive(Clone)]
pub struct Checkpoint {
    name: String,
    place: Place,
    dir: PathBuf,
    config_path: PathBuf,
    config: Map<String, Value>,
    weights: Arc<WeightFiles>,
    projections: Option<Arc<dyn ProjectionSource>>,
}

impl Checkpoint {
    /// Opens a folder, or a model of the hub by its id `org/name[@revision]`, as the environment describes the hub.
    pub fn open(source: &str) -> Result<Self, CheckpointError> {
        Self::open_source(Hub::from_env().resolve_model(source)?)
    }

    /// Opens a model that was resolved by the caller's own [`Hub`].
    pub fn open_source(source: Source) -> Result<Self, CheckpointError> {
        if let Some(folder) = source.as_folder() {
            return Self::open_dir(folder);
        }
        let name = source.name();
        Self::open_place(Place::Hub(source), name)
    }

    /// Opens a folder.
    pub fn open_dir(dir: &Path) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::FolderMissing { path: dir.to_owned() });
        }
        let real = dir.canonicalize();
        let name = real.as_deref().unwrap_or(dir).file_name();
        let name = name.map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned());
        Self::open_place(Place::Folder(dir.to_owned()), name)
    }

    fn open_place(place: Place, name: String) -> Result<Self, CheckpointError> {
        let Some(config_path) = place.find("config.json")? else {
            return Err(CheckpointError::ConfigMissing { dir: place.label() });
        };
        let config = read_object(&config_path, "the configuration", MAX_CONFIG)?;
        let weights = Arc::new(find_weights(&place)?);
        let dir = parent(&config_path);
        Ok(Self { name, place, dir, config_path, config, weights, projections: None })
    }

    /// Opens explicit files, for layouts of other names. Files beside the configuration belong to the checkpoint.
    pub fn open_files(config: &Path, weights: &[PathBuf]) -> Result<Self, CheckpointError> {
        let config_map = read_object(config, "the configuration", MAX_CONFIG)?;
        let dir = parent(config);
        if weights.is_empty() {
            return Err(CheckpointError::NoWeights { dir });
        }
        let weights = Arc::new(WeightFiles::open(weights)?);
        let name = config.display().to_string();
        let place = Place::Folder(dir.clone());
        let config_path = config.to_owned();
        Ok(Self { name, place, dir, config_path, config: config_map, weights, projections: None })
    }

    /// Whether its config.json says that weights are quantized, at the top or in a part of the model.
    pub fn is_quantized(&self) -> bool {
        self.quantization_config().is_some()
    }

    /// What config.json says of quantized weights, at the top or in a part of the model.
    pub fn quantization_config(&self) -> Option<&Value> {
        let parts = self.config.values().filter_map(Value::as_object);
        std::iter::once(&self.config).chain(parts).find_map(|p| p.get(QUANTIZED).filter(|c| !c.is_null()))
    }

    /// The same checkpoint with linear layers that `source` makes of what is stored in place of their dense weights. Its
    /// configuration no longer says that they are quantized, since for a model they are layers like any others.
    #[must_use]
    pub fn with_projections(mut self, source: Arc<dyn ProjectionSource>) -> Self {
        self.config.shift_remove(QUANTIZED);
        for part in self.config.values_mut().filter_map(Value::as_object_mut) {
            part.shift_remove(QUANTIZED);
        }
        self.projections = Some(source);
        self
    }

    /// Whether a tensor is a part of a linear layer that is [made](Self::with_projections) of what is stored in place of its
    /// dense weight.
    pub fn is_in_projection(&self, name: &str) -> bool {
        self.projections.as_ref().is_some_and(|source| source.owns(name))
    }

    /// A short name: the hub id as given, or the folder's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder in which the files lie. Of a hub model, only those that were asked for are there.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of a file of the checkpoint, e.g. `tokenizer.json`; fetched from the hub if need be.
    pub fn file(&self, name: &str) -> Result<PathBuf, CheckpointError> {
        let missing = || CheckpointError::FileMissing { dir: self.place.label(), name: name.to_owned() };
        self.try_file(name)?.ok_or_else(missing)
    }

    /// As [`file`](Self::file), `None` when the checkpoint does not have it.
    pub fn try_file(&self, name: &str) -> Result<Option<PathBuf>, CheckpointError> {
        if !index::is_plain(name) {
            return Err(CheckpointError::FileName { dir: self.place.label(), name: name.to_owned() });
        }
        self.place.find(name)
    }

    /// `config.json` as `T`. Errors name the field, what was found and what was expected.
    pub fn config<T: DeserializeOwned>(&self) -> Result<T, CheckpointError> {
        // The map's own deserialiser would need a copy just the same.
        let value = Value::Object(self.config.clone());
        serde_path_to_error::deserialize(value).map_err(|e| self.config_error(&e))
    }

    /// `config.json` as it is.
    pub fn config_json(&self) -> &Map<String, Value> {
        &self.config
    }

    /// `architectures[0]` of the configuration, e.g. `Qwen2ForCausalLM`.
    pub fn architecture(&self) -> Result<&str, CheckpointError> {
        let path = || self.config_path.clone();
        let field = "architectures".to_owned();
        match self.config.get("architectures") {
            None | Some(Value::Null) => Err(CheckpointError::MissingField { path: path(), field }),
            Some(value) => value.get(0).and_then(Value::as_str).ok_or_else(|| CheckpointError::BadField {
                path: path(),
                field,
                detail: format!("found {value}, expected a list with the name of the model class"),
            }),
        }
    }

    /// `model_type` of the configuration, e.g. `qwen2`.
    pub fn model_type(&self) -> Option<&str> {
        self.config.get("model_type").and_then(Value::as_str)
    }

    /// `generation_config.json`, where there is one.
    pub fn generation_config(&self) -> Result<Option<Value>, CheckpointError> {
        let Some(path) = self.try_file("generation_config.json")? else { return Ok(None) };
        read_object(&path, "the generation configuration", MAX_CONFIG).map(|map| Some(Value::Object(map)))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.entries().map(|e| e.name.as_str())
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.weights.entry(name).map(|e| e.shape.as_slice())
    }

    /// The stored dtype of a tensor.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.weights.entry(name).map(|e| e.dtype)
    }

    /// Hash over the fields of the configuration that describe the architecture (64 hexadecimal digits): without
    /// quantization, dtypes, versions, token ids and what only training reads.
    pub fn arch_hash(&self) -> String {
        hash::arch_hash(&self.config)
    }

    /// Hash over names, dtypes, shapes and bytes of all tensors (64 hexadecimal digits), independent of the sharding.
    ///
    /// Reads all weights.
    pub fn weights_hash(&self) -> Result<String, CheckpointError> {
        hash::weights_hash(&self.weights)
    }

    /// The root of the tensor names, from which a model reads its weights as `kind` onto `device`.
    ///
    /// Each root keeps its own account of what was [read](TensorPath::unread).
    pub fn root(&self, device: tch::Device, kind: tch::Kind) -> TensorPath {
        let root = TensorPath::files(self.weights.clone(), self.dir.display().to_string(), device, kind);
        match &self.projections {
            None => root,
            Some(source) => root.with_projections(source.clone()),
        }
    }

    /// As [`root`](Self::root), for the loading of a whole model: binaries show on the terminal how far it is.
    pub fn loading(&self, device: tch::Device, kind: tch::Kind) -> TensorPath {
        let bytes = self.weights.entries().map(|e| (e.end - e.begin) as u64).sum();
        self.root(device, kind).watched(Loading::new(&self.name, bytes))
    }

    /// Turns a failure inside `config` into an error that names the field.
    fn config_error(&self, e: &serde_path_to_error::Error<serde_json::Error>) -> CheckpointError {
        let path = self.config_path.clone();
        let detail = e.inner().to_string();
        let at = e.path().to_string();
        let within = |field: &str| if at == "." { field.to_owned() } else { format!("{at}.{field}") };
        let missing = detail.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
        match missing {
            Some(field) => CheckpointError::MissingField { path, field: within(field) },
            None => CheckpointError::BadField { path, field: at, detail },
        }
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("name", &self.name).field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// Where the files of a checkpoint come from.
#[derive(Clone)]
enum Place {
    Folder(PathBuf),
    Hub(Source),
}

impl Place {
    /// The local path of a file, `None` when there is no such file. `name` is plain.
    fn find(&self, name: &str) -> Result<Option<PathBuf>, CheckpointError> {
        match self {
            // A broken link or a folder in the place of a file is there: what is wrong with it is said on reading.
            Self::Folder(dir) => {
                let path = dir.join(name);
                Ok(path.symlink_metadata().is_ok().then_some(path))
            }
            Self::Hub(source) => Ok(source.try_file(name)?),
        }
    }

    /// What messages call it.
    fn label(&self) -> PathBuf {
        match self {
            Self::Folder(dir) => dir.clone(),
            Self::Hub(source) => source.name().into(),
        }
    }
}

/// The folder of a file.
fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Finds and opens the weights, in the order of transformers: the single file, then the index.
fn find_weights(place: &Place) -> Result<WeightFiles, CheckpointError> {
    if let Some(single) = place.find("model.safetensors")? {
        return WeightFiles::open(&[single]);
    }
    if let Some(path) = place.find("model.safetensors.index.json")? {
        let index = Index::read(&path)?;
        return open_shards(place, &path, &index);
    }
    for pickle in ["pytorch_model.bin.index.json", "pytorch_model.bin"] {
        // A hub model's pickle would be gigabytes fetched only to be refused.
        if let Place::Folder(dir) = place
            && place.find(pickle)?.is_some()
        {
            return Err(CheckpointError::PickledWeights { path: dir.join(pickle) });
        }
    }
    Err(CheckpointError::NoWeights { dir: place.label() })
}

fn open_shards(place: &Place, index_path: &Path, index: &Index) -> Result<WeightFiles, CheckpointError> {
    let mut paths = Vec::with_capacity(index.shards.len());
    for (at, shard) in index.shards.iter().enumerate() {
        let missing = || CheckpointError::ShardMissing {
            index: index_path.to_owned(),
            shard: header::printable(shard),
            key: header::printable(index.example(at)),
        };
        paths.push(place.find(shard)?.ok_or_else(missing)?);
    }
    if paths.is_empty() {
        return Err(CheckpointError::NoWeights { dir: place.label() });
    }
    let files = WeightFiles::open(&paths)?;
    for (key, shard) in &index.keys {
        if files.path_of(key) != Some(paths[*shard].as_path()) {
            return Err(CheckpointError::KeyNotInShard {
                index: index_path.to_owned(),
                shard: index.shards[*shard].clone(),
                key: header::printable(key),
            });
        }
    }
    Ok(files)
}
