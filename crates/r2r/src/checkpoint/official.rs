//! The official checkpoint, `default_router.pt`: a zip archive with a pickled dictionary
//! `{model_type, init_args, common_args, model_specific_args, state_dict}`.

use std::collections::HashMap;
use std::path::Path;

use nics_core::checkpoint::TensorPath;
use nics_core::checkpoint::torch_file::{TensorRef, TorchFile, Tree};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::{Card, CommonArgs, Refusal};
use crate::router::{Architecture, Router, RouterConfig, Storage};
use crate::{Error, Result};

/// An official checkpoint, read whole.
#[derive(Debug)]
pub struct Official {
    /// Type and arguments of the router.
    pub config: RouterConfig,
    /// Threshold and the features that the router reads.
    pub common: CommonArgs,
    /// What training noted beside them, e.g. the epoch.
    pub specific: Map<String, Value>,
    /// The state dict, float32 (and int64 where it was so).
    pub tensors: HashMap<String, Tensor>,
}

impl Official {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason for anything that a router's checkpoint does not have, [`Error::Setting`] for
    /// arguments that make no router.
    pub fn open(path: &Path) -> Result<Self> {
        let refused = |refusal| Error::Refused { path: path.to_owned(), refusal };
        let mut file = TorchFile::open(path).map_err(|e| match e {
            nics_core::Error::Refused { refusal, .. } => refused(refusal),
            other => Error::Core(other),
        })?;
        let raw = Raw::parse(file.value().clone()).map_err(refused)?;
        let architecture = Architecture::from_name(&raw.model_type)?;
        let config = RouterConfig::from_json(architecture, &raw.init_args)?;
        let read = file.tensors(&raw.tensors).map_err(refused)?;
        let mut tensors = HashMap::new();
        for ((name, _), tensor) in raw.tensors.into_iter().zip(read) {
            let tensor = if tensor.kind() == Kind::Int64 { tensor } else { tensor.f_to_kind(Kind::Float)? };
            tensors.insert(name, tensor);
        }
        Ok(Self { config, common: raw.common, specific: raw.specific, tensors })
    }

    /// The router; `embedding` is the small model's table, for routers that read tokens.
    pub fn router(&self, embedding: Option<&Tensor>, storage: Storage, device: Device) -> Result<Router> {
        let tensors = self.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
        let at = TensorPath::from_tensors(tensors).to(device, Kind::Float);
        Router::load(self.config.clone(), &at, embedding, storage)
    }

    /// What our own format keeps of it beside the tensors.
    pub fn card(&self) -> Card {
        let mut card = Card::new(&self.config, self.common.clone());
        card.model_specific_args.clone_from(&self.specific);
        card.slm.clone_from(&self.config.args.pretrained_model_name);
        card
    }
}

/// The dictionary, checked for its fields.
struct Raw {
    model_type: String,
    init_args: Map<String, Value>,
    common: CommonArgs,
    specific: Map<String, Value>,
    tensors: Vec<(String, TensorRef)>,
}

impl Raw {
    fn parse(tree: Tree) -> Result<Self, Refusal> {
        let Tree::Dict(fields) = tree else { return Err(field("(the whole)", &tree, "a dictionary")) };
        let (mut model_type, mut init_args, mut common, mut specific, mut tensors) =
            (None, None, None, None, None);
        for (name, value) in fields {
            match name.as_str() {
                "model_type" => match value {
                    Tree::Text(text) => model_type = Some(text),
                    other => return Err(field(&name, &other, "a text")),
                },
                "init_args" => init_args = Some(object(&name, &value)?),
                "common_args" => common = Some(common_args(object(&name, &value)?)?),
                "model_specific_args" => {
                    specific = match value {
                        Tree::None => None,
                        value => Some(object(&name, &value)?),
                    };
                }
                "state_dict" => tensors = Some(state_dict(value)?),
                _ => return Err(Refusal::UnknownField(name.chars().take(120).collect())),
            }
        }
        let missing = |name: &str, what| field(name, &Tree::None, what);
        Ok(Self {
            model_type: model_type.ok_or_else(|| missing("model_type", "a text"))?,
            init_args: init_args.ok_or_else(|| missing("init_args", "a dictionary"))?,
            common: common.ok_or_else(|| missing("common_args", "a dictionary"))?,
            specific: specific.unwrap_or_default(),
            tensors: tensors.ok_or_else(|| missing("state_dict", "a dictionary of tensors"))?,
        })
    }
}

fn field(name: &str, found: &Tree, expected: &str) -> Refusal {
    Refusal::Field { field: name.to_owned(), found: found.what().to_owned(), expected: expected.to_owned() }
}

fn object(name: &str, value: &Tree) -> Result<Map<String, Value>, Refusal> {
    match json(name, value)? {
        Value::Object(map) => Ok(map),
        _ => Err(field(name, value, "a dictionary")),
    }
}

fn json(name: &str, value: &Tree) -> Result<Value, Refusal> {
    Ok(match value {
        Tree::None => Value::Null,
        Tree::Bool(b) => Value::from(*b),
        Tree::Int(n) => Value::from(*n),
        Tree::Float(x) if x.is_finite() => Value::from(*x),
        Tree::Float(x) => {
            let (field, expected) = (name.to_owned(), "a finite number".to_owned());
            return Err(Refusal::Field { field, found: x.to_string(), expected });
        }
        Tree::Text(text) => Value::from(text.as_str()),
        Tree::List(items) => items.iter().map(|v| json(name, v)).collect::<Result<_, _>>()?,
        Tree::Dict(items) => {
            let entry = |(k, v): &(String, Tree)| Ok((k.clone(), json(&format!("{name}.{k}"), v)?));
            Value::Object(items.iter().map(entry).collect::<Result<_, Refusal>>()?)
        }
        Tree::Tensor(_) => return Err(field(name, value, "a plain value")),
    })
}

fn common_args(map: Map<String, Value>) -> Result<CommonArgs, Refusal> {
    let common: CommonArgs =
        serde_path_to_error::deserialize(Value::Object(map)).map_err(|e| Refusal::Field {
            field: format!("common_args.{}", e.path()),
            found: e.inner().to_string(),
            expected: "threshold and input_type".into(),
        })?;
    if !(0.0..=1.0).contains(&common.threshold) {
        return Err(Refusal::Field {
            field: "common_args.threshold".into(),
            found: common.threshold.to_string(),
            expected: "a number from 0 to 1".into(),
        });
    }
    Ok(common)
}

fn state_dict(value: Tree) -> Result<Vec<(String, TensorRef)>, Refusal> {
    let Tree::Dict(items) = value else { return Err(field("state_dict", &value, "a dictionary of tensors")) };
    let entry = |(name, value): (String, Tree)| match value {
        Tree::Tensor(tensor) => Ok((name, tensor)),
        other => Err(field(&format!("state_dict.{name}"), &other, "a tensor")),
    };
    items.into_iter().map(entry).collect()
}
