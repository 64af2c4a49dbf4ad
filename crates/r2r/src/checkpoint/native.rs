//! Our own format: a folder with `router.safetensors` and `router.json`.

use std::collections::HashMap;
use std::path::Path;

use nics_base::artefact::AtomicDir;
use nics_base::hash;
use nics_core::checkpoint::TensorPath;
use nics_core::tokenizer::Tokenizer;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::router::{Architecture, InitArgs, Router, RouterConfig, Storage, quantize};
use crate::{Error, Result};

/// The file with the tensors.
pub const WEIGHTS_FILE: &str = "router.safetensors";
/// The file with everything else.
pub const CARD_FILE: &str = "router.json";
/// The version of the format.
const FORMAT: u32 = 1;
/// Longest card that is read.
const MAX_CARD: u64 = 4 << 20;

/// The threshold and the features that a router reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommonArgs {
    /// The large model is asked where the router's probability reaches this.
    pub threshold: f64,
    /// Names of the features, for the reader's sake: `hidden_states`, `token`, `logits`.
    #[serde(default)]
    pub input_type: Vec<String>,
}

/// What the labels were that a router was trained on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LabelStatistics {
    /// Rows trained on.
    pub train: u64,
    /// Rows validated on.
    pub validation: u64,
    /// Divergent ones of the rows trained on.
    pub divergent: u64,
    /// Rows trained on where the models differ.
    pub mismatch: u64,
}

/// A point of the validation curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Threshold.
    pub threshold: f64,
    /// Share of the divergent rows that reach it.
    pub recall: f64,
    /// Share of all rows that reach it.
    pub positive_rate: f64,
}

/// Everything about a router that is not a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// Version of the format.
    pub format_version: u32,
    /// Type of the router.
    pub model_type: Architecture,
    /// Its arguments.
    pub init_args: InitArgs,
    /// Threshold and features.
    pub common_args: CommonArgs,
    /// What training noted.
    #[serde(default)]
    pub model_specific_args: Map<String, Value>,
    /// The small model, a hub id or a folder's name.
    #[serde(default)]
    pub slm: Option<String>,
    /// The large model.
    #[serde(default)]
    pub llm: Option<String>,
    /// [`tokenizer_hash`] of the small model's tokenizer.
    #[serde(default)]
    pub tokenizer_hash: Option<String>,
    /// What it was trained on.
    #[serde(default)]
    pub labels: Option<LabelStatistics>,
    /// Threshold against recall and positive rate on the validation rows.
    #[serde(default)]
    pub validation_curve: Vec<CurvePoint>,
    /// How the matrices are kept in `router.safetensors`: float32, bfloat16, or 8-bit integers with a scale for each output
    /// (`NAME.weight` and `NAME.weight_scale`).
    #[serde(default)]
    pub storage: Storage,
    /// BLAKE3 of `router.safetensors`; filled in when the router is saved.
    #[serde(default)]
    pub weights_hash: String,
}

impl Card {
    /// A card with what a router cannot do without.
    pub fn new(config: &RouterConfig, common: CommonArgs) -> Self {
        Self {
            format_version: FORMAT,
            model_type: config.architecture,
            init_args: config.args.clone(),
            common_args: common,
            model_specific_args: Map::new(),
            slm: None,
            llm: None,
            tokenizer_hash: None,
            labels: None,
            validation_curve: Vec::new(),
            storage: Storage::F32,
            weights_hash: String::new(),
        }
    }

    /// Type and arguments.
    pub fn config(&self) -> RouterConfig {
        RouterConfig { architecture: self.model_type, args: self.init_args.clone() }
    }

    /// Holds the card's tokenizer against a model's; a card without a hash knows none and agrees.
    ///
    /// # Errors
    /// [`Error::TokenizerMismatch`].
    pub fn check_tokenizer(&self, model: &str, tokenizer: &Tokenizer) -> Result<()> {
        let Some(router) = &self.tokenizer_hash else { return Ok(()) };
        let found = tokenizer_hash(tokenizer);
        if *router == found {
            return Ok(());
        }
        Err(Error::TokenizerMismatch { router: router.clone(), model: model.to_owned(), found })
    }
}

/// Hash of what a tokenizer makes of ids: every token's text and place. Two files that spell the same vocabulary
/// differently agree, and settings that leave ids alone do not count.
pub fn tokenizer_hash(tokenizer: &Tokenizer) -> String {
    let mut bytes = Vec::new();
    for id in 0..tokenizer.vocab_size() as u32 {
        if let Some(token) = tokenizer.token(id) {
            bytes.extend_from_slice(&id.to_le_bytes());
            bytes.extend_from_slice(&(token.len() as u64).to_le_bytes());
            bytes.extend_from_slice(token.as_bytes());
        }
    }
    hash::bytes(bytes)
}

/// Writes a router into the folder `dir`, which appears whole or not at all and replaces an older one. The frozen
/// embedding is not written. Matrices are written in the card's storage.
///
/// # Errors
/// A router that is not kept in float32: what was rounded to fewer bits is no source.
pub fn save(dir: &Path, router: &Router, card: &Card) -> Result<()> {
    if router.storage() != Storage::F32 {
        return Err(Error::setting(
            "the router's storage",
            format!("{:?}", router.storage()),
            "F32, to be saved",
        ));
    }
    let mut tensors = Vec::new();
    for (name, tensor) in router.tensors()? {
        match card.storage {
            Storage::Bf16 if is_matrix(&name, &tensor) => {
                tensors.push((name, tensor.f_to_kind(Kind::BFloat16)?));
            }
            Storage::Int8 if is_matrix(&name, &tensor) => {
                let (values, scale) = quantize(&tensor)?;
                tensors.extend([(format!("{name}{SCALE}"), scale), (name, values)]);
            }
            _ => tensors.push((name, tensor)),
        }
    }
    let bytes = tensor_bytes(&dir.join(WEIGHTS_FILE), &tensors)?;
    let mut card = card.clone();
    card.weights_hash = hash::bytes(&bytes);
    let folder = AtomicDir::create(dir)?;
    let path = folder.path().join(WEIGHTS_FILE);
    std::fs::write(&path, bytes).map_err(|source| nics_base::Error::Io { action: "write", path, source })?;
    nics_base::artefact::write_atomic(folder.path().join(CARD_FILE), card_json(&card)?)?;
    folder.commit()?;
    Ok(())
}

/// Replaces the card of a folder, e.g. for another threshold; the weights stay.
///
/// # Errors
/// A card whose hash is not that of the weights there.
pub fn save_card(dir: &Path, card: &Card) -> Result<()> {
    let weights = dir.join(WEIGHTS_FILE);
    let found = hash::file(&weights)?;
    if found != card.weights_hash {
        let reason = format!("its hash is {found}, the card says {}", card.weights_hash);
        return Err(Error::Damaged { path: weights, reason });
    }
    Ok(nics_base::artefact::write_atomic(dir.join(CARD_FILE), card_json(card)?)?)
}

fn card_json(card: &Card) -> Result<String> {
    let json = serde_json::to_string_pretty(card)
        .map_err(|source| nics_base::Error::Json { what: "a router's card".into(), source })?;
    Ok(json + "\n")
}

/// Behind the name of a matrix in 8-bit integers: its scales.
const SCALE: &str = "_scale";

/// Whether a tensor is the matrix of a linear layer.
fn is_matrix(name: &str, tensor: &Tensor) -> bool {
    name.ends_with(".weight") && tensor.dim() == 2
}

/// The tensors of a file in 8-bit integers, in float32.
fn widened(path: &Path, device: Device) -> Result<TensorPath> {
    let at = TensorPath::from_file(path)?;
    let mut tensors = HashMap::new();
    for name in at.unread() {
        let stored = at.stored(&name)?;
        if stored.kind() == Kind::Int8 {
            let scale = at.stored(&format!("{name}{SCALE}"))?;
            tensors.insert(name, stored.f_to_kind(Kind::Float)?.f_mul(&scale.f_unsqueeze(1)?)?);
        } else if !name.ends_with(SCALE) {
            tensors.insert(name, stored);
        }
    }
    Ok(TensorPath::from_tensors(tensors).to(device, Kind::Float))
}

/// Reads the card of a folder that [`save`] wrote, without its weights.
///
/// # Errors
/// [`Error::Damaged`] for a card that does not parse or of another version, [`Error::ThresholdOutOfRange`].
pub fn read_card(dir: &Path) -> Result<Card> {
    let path = dir.join(CARD_FILE);
    let io = |source| Error::Core(nics_core::Error::Io { path: path.clone(), source });
    let damaged = |reason: String| Error::Damaged { path: path.clone(), reason };
    let size = path.metadata().map_err(io)?.len();
    if size > MAX_CARD {
        return Err(damaged(format!("it takes {size} bytes, more than the {MAX_CARD} that are read")));
    }
    let text = std::fs::read_to_string(&path).map_err(io)?;
    let json: Value = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    let version = json.get("format_version").and_then(Value::as_u64);
    if version != Some(u64::from(FORMAT)) {
        let found = version.map_or_else(|| "absent".to_owned(), |v| v.to_string());
        return Err(damaged(format!("format_version is {found}, this release reads {FORMAT}")));
    }
    let card: Card = serde_path_to_error::deserialize(json)
        .map_err(|e| damaged(format!("{}: {}", e.path(), e.inner())))?;
    let threshold = card.common_args.threshold;
    if !(0.0..=1.0).contains(&threshold) {
        return Err(Error::ThresholdOutOfRange { found: threshold });
    }
    Ok(card)
}

/// The bytes of a safetensors file; `path` is for messages alone.
pub(crate) fn tensor_bytes(path: &Path, tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let wrong = |reason: String| Error::Input(format!("cannot write {}: {reason}", path.display()));
    let mut blobs = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let dtype = match tensor.kind() {
            Kind::Float => Dtype::F32,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Int8 => Dtype::I8,
            Kind::Double => Dtype::F64,
            Kind::Int64 => Dtype::I64,
            Kind::Uint8 => Dtype::U8,
            other => return Err(wrong(format!("tensor {name} is {other:?}"))),
        };
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
        blobs.push((name.as_str(), dtype, shape, bytes));
    }
    let views = blobs
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| wrong(e.to_string()))?;
            Ok((*name, view))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| wrong(e.to_string()))
}

/// Reads a router from a folder that [`save`] wrote. `embedding` is the small model's table, for routers that read
/// tokens.
///
/// # Errors
/// [`Error::Damaged`] for a card that does not parse, another version, or tensors whose hash is not the card's; those of
/// [`Router::load`].
pub fn load(
    dir: &Path,
    embedding: Option<&Tensor>,
    storage: Storage,
    device: Device,
) -> Result<(Router, Card)> {
    let card = read_card(dir)?;
    let damaged = |path: &Path, reason: String| Error::Damaged { path: path.to_owned(), reason };
    let weights = dir.join(WEIGHTS_FILE);
    let found = hash::file(&weights)?;
    if found != card.weights_hash {
        let expected = &card.weights_hash;
        return Err(damaged(
            &weights,
            format!("its hash is {found}, {CARD_FILE} says {expected}: copy both files again"),
        ));
    }
    let at = match card.storage {
        Storage::Int8 => widened(&weights, device)?,
        Storage::F32 | Storage::Bf16 => TensorPath::from_file(&weights)?.to(device, Kind::Float),
    };
    let router = Router::load(card.config(), &at, embedding, storage)?;
    Ok((router, card))
}
