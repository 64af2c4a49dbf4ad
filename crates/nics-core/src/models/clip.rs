//! CLIP's vision tower (Radford et al., 2021), beside transformers' `modeling_clip.py`: [`super::vit`] with a class token
//! and a norm before the first layer.

use serde_json::{Map, Value};

use super::vit::{TowerConfig, TowerFamily};
use crate::Result;
use crate::nn::Activation;

/// Reads a `vision_config` of type `clip_vision_model`; absent fields are transformers' defaults.
pub fn config(json: &Map<String, Value>) -> Result<TowerConfig> {
    TowerConfig::parse(
        json,
        &TowerConfig {
            hidden: 768,
            intermediate: 3072,
            layers: 12,
            heads: 12,
            image_size: 224,
            patch_size: 32,
            eps: 1e-5,
            activation: Activation::QuickGelu,
            family: TowerFamily { class_token: true, patch_bias: false },
        },
    )
}
