//! A model of the pair with what belongs to it.

use anyhow::Result;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::DeviceArgs;
use nics_core::device::{device_name, dtype_name};
use nics_core::models::{self, Decoder, Model};
use nics_core::template::ChatTemplate;
use nics_core::tokenizer::Tokenizer;
use r2r::labels::pipeline::Party;
use serde_json::json;

/// A loaded model.
pub struct Loaded {
    decoder: Decoder,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    identity: serde_json::Value,
    name: String,
    /// Bytes of its weights in memory.
    pub bytes: usize,
}

impl Loaded {
    /// Loads a model.
    pub fn open(name: &str, run_on: &DeviceArgs) -> Result<Self> {
        run_on.set_threads()?;
        let device = run_on.device.open()?;
        let checkpoint = Checkpoint::open(name)?;
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint)?;
        let template = ChatTemplate::from_checkpoint(&checkpoint)?;
        let mut decoder =
            models::load(&checkpoint, device, run_on.dtype.resolve(models::stored_kind(&checkpoint)))?;
        let mut bytes = 0;
        decoder.visit_parameters(&mut |_, tensor| {
            bytes += tensor.numel() * tensor.kind().elt_size_in_bytes();
            Ok(())
        })?;
        let dims = decoder.dims();
        let identity = json!({
            "arch_hash": checkpoint.arch_hash(),
            "weights_hash": checkpoint.weights_hash()?,
            "device": device_name(dims.device),
            "dtype": dtype_name(dims.kind),
        });
        Ok(Self { decoder, tokenizer, template, identity, name: checkpoint.name().to_owned(), bytes })
    }

    /// As the pipeline takes it.
    pub fn party(&self) -> Party<'_> {
        Party {
            model: &self.decoder,
            tokenizer: &self.tokenizer,
            template: self.template.as_ref(),
            eos: self.tokenizer.special_ids().eos.clone(),
            identity: self.identity.clone(),
            name: self.name.clone(),
        }
    }
}

/// The tokenizer of a model that is not loaded.
pub fn tokenizer(name: &str) -> Result<Tokenizer> {
    Ok(Tokenizer::from_checkpoint(&Checkpoint::open(name)?)?)
}
