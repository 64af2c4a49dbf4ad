//! A decoder trained from nothing: how its weights begin, and how it is stored.

use std::path::Path;
use std::sync::Arc;

use nics_base::artefact::write_atomic;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::Summary;
use crate::checkpoint::{DEFAULT_SHARD_BYTES, TensorPath, save};
use crate::models::{self, Decoder, Model};
use crate::{Error, Result};

/// File of a checkpoint's folder that tells how it was trained.
pub const TRAINING_FILE: &str = "training.json";

/// Parameters with their names.
type Named = Vec<(String, Tensor)>;

/// The decoder of a config.json with weights drawn from the seed, float32, and its parameters, which ask for gradients.
/// Matrices have deviation `1 / sqrt(in)`, what ends a residual branch is smaller by `sqrt(2 layers)` (Radford et al.,
/// 2019), the embedding has the deviation `embedding_std`.
///
/// # Errors
/// A configuration that is not read here.
pub fn from_scratch(
    config: &Value,
    embedding_std: f64,
    seed: u64,
    device: Device,
) -> Result<(Decoder, Named)> {
    let Value::Object(fields) = config else { return Err(Error::Input("config is no object".into())) };
    let config = models::config(fields)?;
    let shrink = 1.0 / (2.0 * config.layers as f64).sqrt();
    let drawn = move |name: &str, t: Tensor| {
        let shape = t.size();
        let [_, input] = shape[..] else { return Ok(t) };
        if name.ends_with("embed_tokens.weight") {
            return Ok(t * embedding_std);
        }
        let ends_branch = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let scale = (input as f64).powf(-0.5) * if ends_branch { shrink } else { 1.0 };
        Ok(t * scale)
    };
    let at = TensorPath::random(seed, 1.0, device, Kind::Float).with_transform(Arc::new(drawn));
    let mut decoder = Decoder::load(config, &at)?;
    let mut parameters = Vec::new();
    decoder.visit_parameters(&mut |name, tensor| {
        *tensor = tensor.f_detach()?.f_set_requires_grad(true)?;
        parameters.push((name.to_owned(), tensor.shallow_clone()));
        Ok(())
    })?;
    Ok((decoder, parameters))
}

/// Writes the weights in bfloat16 with config.json, tokenizer files (`files`: names and contents) and what was trained
/// ([`TRAINING_FILE`]) into `dir`; the decoder goes on with what is stored. Gives the number of parameters.
///
/// # Errors
/// A folder that cannot be written.
pub fn store(
    decoder: &mut Decoder,
    dir: &Path,
    config: &Value,
    files: &[(&str, Value)],
    identity: &Value,
    summary: &Summary,
) -> Result<usize> {
    let (mut tensors, mut parameters) = (Vec::new(), 0);
    decoder.visit_parameters(&mut |name, tensor| {
        parameters += tensor.numel();
        let stored = tensor.f_detach()?.f_to_kind(Kind::BFloat16)?;
        // What is measured is what is stored.
        *tensor = stored.f_to_kind(Kind::Float)?;
        tensors.push((name.to_owned(), stored));
        Ok(())
    })?;
    save(dir, tensors, config, DEFAULT_SHARD_BYTES)?;
    let training = json!({
        "identity": identity,
        "steps": summary.steps,
        "target_tokens": summary.tokens,
        "last": summary.last.as_ref().map(|row| json!({ "step": row.step, "loss": row.loss })),
        "validation": summary.eval,
    });
    for (name, value) in files.iter().map(|(name, value)| (*name, value)).chain([(TRAINING_FILE, &training)])
    {
        write_atomic(dir.join(name), format!("{value:#}\n"))?;
    }
    Ok(parameters)
}

/// Whether a folder holds what a training of this identity [stores](store).
///
/// # Errors
/// [`Error::Input`] for a damaged [`TRAINING_FILE`].
pub fn is_stored(folder: &Path, identity: &Value) -> Result<bool> {
    let path = folder.join(TRAINING_FILE);
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(false) };
    let damaged = |e: serde_json::Error| Error::Input(format!("{}: {e}", path.display()));
    let known: Value = serde_json::from_str(&text).map_err(damaged)?;
    // As it comes back from a file: numbers may lose their last bit on the way.
    let expected: Value = serde_json::from_str(&identity.to_string()).map_err(damaged)?;
    Ok(known["identity"] == expected)
}
