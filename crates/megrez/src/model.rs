//! Which checkpoints are Megrez, and their decoder.

use nics_core::checkpoint::Checkpoint;
use nics_core::models::{self, Decoder};
use nics_core::{Error, Result};
use tch::{Device, Kind};

/// The decoder of a Megrez checkpoint: Megrez-3B-Instruct (`LlamaForCausalLM`), or the language model of Megrez-3B-Omni
/// (`MegrezO`, tensors under `llm.`).
///
/// # Errors
/// `UnsupportedArchitecture` for anything else, the mixture-of-experts successor Megrez2 included; and what is wrong
/// with the checkpoint.
pub fn load_decoder(checkpoint: &Checkpoint, device: Device, kind: Kind) -> Result<Decoder> {
    match checkpoint.architecture()? {
        "LlamaForCausalLM" => models::load(checkpoint, device, kind),
        "MegrezO" => {
            let path = checkpoint.dir().join("config.json");
            let config = models::llama::config(checkpoint.config_json()).map_err(|e| e.in_file(&path))?;
            models::load_at(config, &checkpoint.root(device, kind).at("llm"))
        }
        other => Err(Error::UnsupportedArchitecture {
            found: other.to_owned(),
            known: "LlamaForCausalLM (Megrez-3B-Instruct) and MegrezO (the language model of Megrez-3B-Omni); the \
                    mixture-of-experts Megrez2 is another model"
                .into(),
        }),
    }
}
