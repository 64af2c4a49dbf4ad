//! The shape of a model from its config.json alone.

use std::path::Path;

use anyhow::{Context, Result};
use nics_base::hub::Hub;
use nics_core::models::{self, DecoderConfig, ModelDims};
use nics_core::tch::{Device, Kind};
use serde_json::{Map, Value};

/// A model without its weights.
pub struct ModelShape {
    /// What the reader called it.
    pub name: String,
    pub config: DecoderConfig,
    /// The dtype that the configuration names.
    pub kind: Kind,
}

impl ModelShape {
    /// Reads a config.json: the file itself, or that of a folder or of a model on the hub.
    pub fn read(source: &str) -> Result<Self> {
        let given = Path::new(source);
        let path = if given.is_file() {
            given.to_owned()
        } else {
            Hub::from_env().resolve_model(source)?.file("config.json")?
        };
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let json: Map<String, Value> =
            serde_json::from_str(&text).with_context(|| format!("{} is no config.json", path.display()))?;
        let config = models::config(&json).map_err(|e| e.in_file(&path))?;
        Ok(Self { name: source.to_owned(), kind: models::named_kind(&json), config })
    }

    /// Its dimensions, as a cache asks for them.
    pub fn dims(&self, kind: Kind) -> ModelDims {
        self.config.dims(kind, Device::Cpu)
    }
}
