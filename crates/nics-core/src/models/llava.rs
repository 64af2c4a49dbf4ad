//! LLaVA-1.5 (Liu et al., 2023), beside transformers' `modeling_llava.py`: CLIP's tower, of whose features the projector
//! makes tokens of the language model.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::multimodal::{Positions, Vision, Vlm, text_config};
use super::vit::{Tower, TowerConfig};
use super::{Decoder, DecoderConfig, ProjectionVisitor, clip, siglip, visit_linears};
use crate::checkpoint::TensorPath;
use crate::nn::{Activation, projection};
use crate::seam::Projection;
use crate::vision::{Prepared, object, senseless};
use crate::{Error, Result};

/// Other names under which LLaVA's tensors are found: what transformers holds in memory and what it saves from version 5
/// on, and the original files.
pub(super) const NAMES: &[(&str, &str)] = &[
    ("language_model.model.", "model.language_model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
];

/// A number or a list of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Layers {
    One(i64),
    Several(Vec<i64>),
}

#[derive(Deserialize)]
struct Raw {
    // Two names of each; a file may have both.
    image_token_index: Option<u32>,
    image_token_id: Option<u32>,
    video_token_index: Option<u32>,
    video_token_id: Option<u32>,
    vision_feature_layer: Option<Layers>,
    vision_feature_select_strategy: Option<String>,
    projector_hidden_act: Option<String>,
    multimodal_projector_bias: Option<bool>,
}

/// What LLaVA is built from.
#[derive(Debug, Clone)]
pub struct Config {
    /// The language model.
    pub text: DecoderConfig,
    /// The tower.
    pub vision: TowerConfig,
    /// Stands for an image.
    pub image_token: u32,
    /// Stands for a video (LLaVA-OneVision).
    pub video_token: Option<u32>,
    /// Layers of the tower whose residual streams are the features, as transformers counts them.
    pub feature_layers: Vec<i64>,
    /// Whether the first token of the tower, its class token, is left out.
    pub drops_first: bool,
    /// Between the projector's layers.
    pub projector_act: Activation,
    /// Whether the projector's layers have biases.
    pub projector_bias: bool,
}

impl Config {
    /// Reads a config.json of LLaVA-1.5.
    ///
    /// # Errors
    /// A field that is missing or senseless.
    pub fn parse(json: &Map<String, Value>) -> Result<Self> {
        let text = text_config(json, "text_config", "llama")?;
        Self::with(json, text, "clip_vision_model", -2, "default", 32_000)
    }

    pub(super) fn with(
        json: &Map<String, Value>,
        text: DecoderConfig,
        tower: &str,
        layer: i64,
        strategy: &str,
        image_token: u32,
    ) -> Result<Self> {
        let raw: Raw = serde_path_to_error::deserialize(Value::Object(json.clone()))
            .map_err(|e| Error::Config(format!("`{}`: {}", e.path(), e.inner())))?;
        let vision = object(json, "vision_config")?;
        let vision = match vision.get("model_type").and_then(Value::as_str).unwrap_or(tower) {
            "clip_vision_model" => clip::config(vision)?,
            "siglip_vision_model" => siglip::config(vision)?,
            other => {
                return Err(senseless(
                    "vision_config.model_type",
                    format!("is `{other}`, known are clip_vision_model and siglip_vision_model"),
                ));
            }
        };
        let drops_first = match raw.vision_feature_select_strategy.as_deref().unwrap_or(strategy) {
            "default" => true,
            "full" => false,
            other => {
                return Err(senseless(
                    "vision_feature_select_strategy",
                    format!("is `{other}`, expected `default` or `full`"),
                ));
            }
        };
        Ok(Self {
            text,
            vision,
            image_token: raw.image_token_index.or(raw.image_token_id).unwrap_or(image_token),
            video_token: raw.video_token_index.or(raw.video_token_id),
            feature_layers: match raw.vision_feature_layer {
                None => vec![layer],
                Some(Layers::One(one)) => vec![one],
                Some(Layers::Several(all)) => all,
            },
            drops_first,
            projector_act: Activation::parse(
                "projector_hidden_act",
                raw.projector_hidden_act.as_deref().unwrap_or("gelu"),
            )?,
            projector_bias: raw.multimodal_projector_bias.unwrap_or(true),
        })
    }

    /// Tokens of a picture.
    pub fn tokens(&self) -> i64 {
        self.vision.side().pow(2) + i64::from(self.vision.family.class_token) - i64::from(self.drops_first)
    }
}

/// `linear_2(activation(linear_1(x)))` (`LlavaMultiModalProjector`).
pub struct MultiModalProjector {
    /// `[text hidden, vision hidden * feature layers]`.
    pub linear_1: Box<dyn Projection>,
    /// `[text hidden, text hidden]`.
    pub linear_2: Box<dyn Projection>,
    activation: Activation,
}

/// Tower and projector.
pub struct LlavaVision {
    /// `vision_tower.vision_model`.
    pub tower: Tower,
    /// `multi_modal_projector`.
    pub projector: MultiModalProjector,
    drops_first: bool,
}

impl LlavaVision {
    /// Reads both under `root`.
    pub fn load(c: &Config, root: &TensorPath) -> Result<Self> {
        let tower = Tower::load(&c.vision, &c.feature_layers, &root.at("vision_tower.vision_model"))?;
        let at = root.at("multi_modal_projector").because(format!(
            "config.json (vision_config.hidden_size {}, text_config.hidden_size {})",
            c.vision.hidden, c.text.hidden
        ));
        let linear = |name: &str, input| projection(&at.at(name), input, c.text.hidden, c.projector_bias);
        let projector = MultiModalProjector {
            linear_1: linear("linear_1", c.vision.hidden * c.feature_layers.len() as i64)?,
            linear_2: linear("linear_2", c.text.hidden)?,
            activation: c.projector_act,
        };
        Ok(Self { tower, projector, drops_first: c.drops_first })
    }

    /// Features of pictures, projected: `[pictures, 3, image_size, image_size]` to `[pictures, tokens, text hidden]`.
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = self.tower.forward(pixels)?;
        if self.drops_first {
            let tokens = x.size3()?.1;
            x = x.f_narrow(1, 1, tokens - 1)?;
        }
        let inner = self.projector.linear_1.forward(&x.f_contiguous()?)?;
        self.projector.linear_2.forward(&self.projector.activation.forward(&inner)?)
    }
}

impl Vision for LlavaVision {
    fn encode(&self, media: &Prepared) -> Result<Tensor> {
        Ok(self.features(&media.pixels)?.f_flatten(0, 1)?)
    }

    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()> {
        self.tower.visit_projections("vision_tower.vision_model.", f)?;
        f("multi_modal_projector.linear_1", &mut self.projector.linear_1)?;
        f("multi_modal_projector.linear_2", &mut self.projector.linear_2)
    }

    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        self.tower.visit_parameters("vision_tower.vision_model.", f)?;
        let projector = &mut self.projector;
        let linears = [("linear_1", &mut projector.linear_1), ("linear_2", &mut projector.linear_2)];
        visit_linears("multi_modal_projector", linears, f)
    }
}

pub(super) fn load(json: &Map<String, Value>, root: &TensorPath) -> Result<Vlm> {
    let config = Config::parse(json)?;
    let root = &root.renamed(NAMES);
    let vision = LlavaVision::load(&config, root)?;
    let language_model = Decoder::load(config.text, &root.at("language_model"))?;
    Ok(Vlm::new(language_model, Box::new(vision), "language_model.", Positions::Sequential))
}
