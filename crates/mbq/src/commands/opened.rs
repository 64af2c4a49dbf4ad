//! Models of the commands: to be quantized, or to be run as they are.

use anyhow::{Result, bail};
use clap::Args;
use mbq::artefact::Origin;
use mbq::language::Language;
use mbq::operators::Names;
use mbq::packed::{self, Act};
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::ModelArgs;
use nics_core::models;
use serde_json::Value;

/// `--act`.
#[derive(Debug, Clone, Copy, Args)]
pub struct ActArg {
    /// How inputs of packed layers are rounded: 8 or 16 bits, or dense (not at all, slow); default: as the checkpoint says, else 16
    #[arg(long, value_name = "BITS")]
    pub act: Option<Act>,
}

/// A checkpoint to be run: what of it is quantized stays as it is stored.
pub struct Runnable {
    pub checkpoint: Checkpoint,
    /// Of a quantized checkpoint.
    pub stored: Option<packed::Opened>,
}

impl Runnable {
    /// # Errors
    /// `--act` for a checkpoint without packed layers, and what [`packed::open`] refuses.
    pub fn open(model: &str, act: ActArg) -> Result<Self> {
        let checkpoint = Checkpoint::open(model)?;
        if checkpoint.is_quantized() {
            let stored = packed::Opened::open(checkpoint, act.act)?;
            return Ok(Self { checkpoint: stored.checkpoint.clone(), stored: Some(stored) });
        }
        if let Some(act) = act.act {
            bail!(
                "--act {act} is about packed layers, and {} has none; `mbq pack` makes them",
                checkpoint.name()
            );
        }
        Ok(Self { checkpoint, stored: None })
    }
}

/// What was loaded.
pub struct Opened {
    pub checkpoint: Checkpoint,
    /// What of it is quantized.
    pub stored: Option<packed::Opened>,
    pub model: Language,
    pub names: Names,
    pub origin: Origin,
}

impl Opened {
    /// A model to be quantized.
    ///
    /// # Errors
    /// One that is quantized already.
    pub fn open(args: &ModelArgs) -> Result<Self> {
        let checkpoint = Checkpoint::open(&args.model)?;
        if let Some(config) = checkpoint.quantization_config() {
            bail!(already(&checkpoint, config));
        }
        Self::load(Runnable { checkpoint, stored: None }, args)
    }

    /// A model to be run.
    pub fn load(Runnable { checkpoint, stored }: Runnable, args: &ModelArgs) -> Result<Self> {
        args.set_threads()?;
        let device = args.run_on.device.open()?;
        let kind = args.run_on.dtype.resolve(models::stored_kind(&checkpoint));
        let mut model = Language::load(&checkpoint, device, kind)?;
        let names = model.names()?;
        let origin = Origin::of(&checkpoint)?;
        Ok(Self { checkpoint, stored, model, names, origin })
    }
}

/// Why a quantized checkpoint is not quantized again.
fn already(checkpoint: &Checkpoint, config: &Value) -> String {
    let method = config["quant_method"].as_str().unwrap_or("of an unnamed method");
    let source = match config["source"]["model"].as_str() {
        Some(model) => format!(" ({model})"),
        None => String::new(),
    };
    format!(
        "{}: the weights are quantized ({method}), and scales and roundings are made of a model whose weights are not: give the \
         one that it comes from{source}; `mbq eval` and `mbq generate` take a quantized model as it is",
        checkpoint.name()
    )
}
