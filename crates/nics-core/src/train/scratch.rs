//! A model trained from nothing: how its weights begin, and how it is stored.

use std::path::Path;
use std::sync::Arc;

use nics_base::artefact::write_atomic;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::Summary;
use crate::checkpoint::{DEFAULT_SHARD_BYTES, TensorPath, save};
use crate::models::{self, Decoder, Model, Vlm};
use crate::{Error, Result};

/// File of a checkpoint's folder that tells how it was trained.
pub const TRAINING_FILE: &str = "training.json";

/// Parameters with their names.
pub type Named = Vec<(String, Tensor)>;

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
    let config = models::config(fields(config)?)?;
    let at = drawn(config.layers, embedding_std, seed, device);
    let mut decoder = Decoder::load(config, &at)?;
    let parameters = trained(&mut decoder, &[])?;
    Ok((decoder, parameters))
}

/// As [`from_scratch`], of a model that sees; embeddings of places in its tower begin as those of tokens. Parameters whose
/// names begin with one of `frozen` stay as they are drawn: they are not among those that are returned.
///
/// # Errors
/// A configuration that is not read here; something frozen that the model does not have.
pub fn vlm_from_scratch(
    config: &Value,
    embedding_std: f64,
    frozen: &[String],
    seed: u64,
    device: Device,
) -> Result<(Vlm, Named)> {
    let fields = fields(config)?;
    let layers = fields.get("text_config").unwrap_or(config).get("num_hidden_layers").and_then(Value::as_u64);
    let at = drawn(layers.unwrap_or(1).max(1) as usize, embedding_std, seed, device);
    let mut vlm = models::load_vlm_at(fields, &at)?;
    let parameters = trained(&mut vlm, frozen)?;
    Ok((vlm, parameters))
}

fn fields(config: &Value) -> Result<&Map<String, Value>> {
    config.as_object().ok_or_else(|| Error::Input("config is no object".into()))
}

/// Where a model of so many layers finds its first weights.
fn drawn(layers: usize, embedding_std: f64, seed: u64, device: Device) -> TensorPath {
    let shrink = 1.0 / (2.0 * layers as f64).sqrt();
    let drawn = move |name: &str, t: Tensor| {
        let shape = t.size();
        let [_, input @ ..] = &shape[..] else { return Ok(t) };
        if input.is_empty() {
            return Ok(t);
        }
        let ends = |names: &[&str]| names.iter().any(|n| name.ends_with(n));
        if ends(&["embed_tokens.weight", "position_embedding.weight"]) {
            return Ok(t * embedding_std);
        }
        let ends_branch = ends(&["o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight"]);
        let scale =
            (input.iter().product::<i64>() as f64).powf(-0.5) * if ends_branch { shrink } else { 1.0 };
        Ok(t * scale)
    };
    TensorPath::random(seed, 1.0, device, Kind::Float).with_transform(Arc::new(drawn))
}

/// The parameters that are not frozen, which ask for gradients from now on.
fn trained(model: &mut dyn Model, frozen: &[String]) -> Result<Named> {
    let mut parameters = Vec::new();
    let mut met = vec![false; frozen.len()];
    model.visit_parameters(&mut |name, tensor| {
        if let Some(i) = frozen.iter().position(|prefix| name.starts_with(prefix)) {
            met[i] = true;
            return Ok(());
        }
        *tensor = tensor.f_detach()?.f_set_requires_grad(true)?;
        parameters.push((name.to_owned(), tensor.shallow_clone()));
        Ok(())
    })?;
    match met.iter().position(|met| !met) {
        Some(i) => {
            Err(Error::Input(format!("no parameter begins with {:?}, which is to be frozen", frozen[i])))
        }
        None => Ok(parameters),
    }
}

/// Writes the weights in bfloat16 with config.json, tokenizer files (`files`: names and contents) and what was trained
/// ([`TRAINING_FILE`]) into `dir`; the model goes on with what is stored. Gives the number of parameters.
///
/// # Errors
/// A folder that cannot be written.
pub fn store(
    model: &mut dyn Model,
    dir: &Path,
    config: &Value,
    files: &[(&str, Value)],
    identity: &Value,
    summary: &Summary,
) -> Result<usize> {
    let (mut tensors, mut parameters) = (Vec::new(), 0);
    model.visit_parameters(&mut |name, tensor| {
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
