//! SigLIP's vision tower (Zhai et al., 2023), beside transformers' `modeling_siglip.py`: [`super::vit`] with neither a
//! class token nor a norm before the first layer.

use serde_json::{Map, Value};

use super::vit::{TowerConfig, TowerFamily};
use crate::Result;
use crate::nn::Activation;

/// Reads a `vision_config` of type `siglip_vision_model`; absent fields are transformers' defaults.
pub fn config(json: &Map<String, Value>) -> Result<TowerConfig> {
    TowerConfig::parse(
        json,
        &TowerConfig {
            hidden: 768,
            intermediate: 3072,
            layers: 12,
            heads: 12,
            image_size: 224,
            patch_size: 16,
            eps: 1e-6,
            activation: Activation::GeluTanh,
            family: TowerFamily { class_token: false, patch_bias: true },
        },
    )
}
