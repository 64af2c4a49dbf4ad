//! Weights to train from.

use std::sync::Arc;

use nics_core::checkpoint::{CheckpointError, TensorPath};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use super::{Architecture, Router, RouterConfig, Storage};
use crate::{Error, Result};

impl Router {
    /// A router to be trained, float32: inside the backbone normal weights of deviation `sqrt(2 / in)` and zero biases (He
    /// et al., 2015), before it torch's default for linear layers, uniform within `1 / sqrt(in)`.
    ///
    /// `embedding` is the small model's table (`[vocab, hidden]`), for routers that read tokens; `lm_head` its head
    /// (`[vocab, hidden]`), of which [`Architecture::HiddenLmHead`] trains a copy. Weights follow from `seed` and their
    /// names alone.
    pub fn random(
        config: RouterConfig,
        embedding: Option<&Tensor>,
        lm_head: Option<&Tensor>,
        seed: u64,
        device: Device,
    ) -> Result<Self> {
        config.validate()?;
        if config.architecture == Architecture::HiddenLmHead {
            return Self::with_head(config, lm_head, seed, device);
        }
        let at = source(&config, 0, seed, device);
        Self::load(config, &at, embedding, Storage::F32)
    }

    /// A router with a copy of the small model's head: made without it first, to be read from memory.
    fn with_head(config: RouterConfig, lm_head: Option<&Tensor>, seed: u64, device: Device) -> Result<Self> {
        let hidden = config.args.hidden_states_size.unwrap_or(0);
        let (vocab, width) = lm_head
            .ok_or_else(|| {
                Error::Input("this router trains a copy of the small model's head: give it".into())
            })?
            .size2()?;
        if width != hidden {
            return Err(Error::HiddenSizeMismatch { router: hidden, slm: width });
        }
        let kept = config.args.topk.unwrap_or(vocab);
        let at = source(&config, vocab, seed, device);
        let mut tensors = std::collections::HashMap::new();
        if let Some(head) = lm_head {
            tensors.insert("lm_head.weight".to_owned(), head.f_detach()?.f_to_kind(Kind::Float)?);
        }
        let first = config.args.hidden_dims[0];
        let shapes = [("lm_head.bias", vec![vocab]), ("post_lm_projection.weight", vec![first, kept])];
        for (name, shape) in shapes.into_iter().chain([("post_lm_projection.bias", vec![first])]) {
            tensors.insert(name.to_owned(), at.tensor(name, &shape)?);
        }
        if config.args.normalize_input {
            for name in ["layer_norm.weight", "layer_norm.bias"] {
                tensors.insert(name.to_owned(), at.tensor(name, &[hidden])?);
            }
        }
        // The backbone of a router over hidden states alone has the same names and shapes.
        let plain = RouterConfig { architecture: Architecture::Hidden, args: config.args.clone() };
        let plain = Self::load(plain.clone(), &source(&plain, 0, seed, device), None, Storage::F32)?;
        tensors.extend(plain.tensors()?.into_iter().filter(|(name, _)| name.starts_with("backbone.")));
        Self::load(config, &TensorPath::from_tensors(tensors).to(device, Kind::Float), None, Storage::F32)
    }
}

/// A place where every tensor of a router is found, initialised.
fn source(config: &RouterConfig, vocab: i64, seed: u64, device: Device) -> TensorPath {
    let (kind, args) = (config.architecture, &config.args);
    let (h, k) = (args.hidden_states_size.unwrap_or(0), args.logits_size.unwrap_or(0));
    let combined = match kind {
        Architecture::HiddenTokenLogits => 3 * h,
        _ => 2 * h,
    };
    let post = args.topk.unwrap_or(vocab);
    let initialise = move |name: &str, t: Tensor| -> Result<Tensor, CheckpointError> {
        let (layer, leaf) = name.rsplit_once('.').unwrap_or(("", name));
        let input = match layer {
            "logits_projection" => k,
            "combined_projection" => combined,
            "hidden_states_projection" | "lm_head" => h,
            "post_lm_projection" => post,
            _ => 0,
        };
        let refuse =
            |e: tch::TchError| CheckpointError::Transform { key: name.to_owned(), reason: e.to_string() };
        let shape = t.size();
        let made = if input > 0 {
            uniform(seed, name, &shape, (input as f64).powf(-0.5))
        } else if leaf == "position_embedding" {
            super::backbone::sinusoids(shape[0], shape[1])
        } else if layer == "backbone.output_layer.0" && leaf == "weight" {
            // A norm, though its name does not say so.
            t.f_ones_like()
        } else if shape.len() == 2 {
            t.f_mul_scalar((2.0 / shape[1] as f64).sqrt())
        } else {
            Ok(t)
        };
        made.and_then(|t| t.f_to_device(device)).map_err(refuse)
    };
    TensorPath::random(seed, 1.0, device, Kind::Float).with_transform(Arc::new(initialise))
}

/// Uniform within `bound`, from seed and name.
fn uniform(seed: u64, name: &str, shape: &[i64], bound: f64) -> Result<Tensor, tch::TchError> {
    let hash = nics_base::hash::bytes(format!("{seed} {name}"));
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from_str_radix(&hash[..16], 16).unwrap_or(seed));
    let n: i64 = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| ((rng.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect();
    Tensor::f_from_slice(&values)?.f_reshape(shape)
}
