//! InternVL2 (Chen et al., 2024), beside its `modeling_internvl_chat.py`: [InternViT](super::intern_vit), a pixel shuffle
//! that makes one token of four features, and a projector `mlp1`; a decoder of the InternLM2, Llama or Qwen2 line.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::intern_vit::{InternVisionModel, VisionConfig};
use super::multimodal::{Positions, Vision, Vlm};
use super::vit::linear;
use super::{Decoder, DecoderConfig, ProjectionVisitor, visit_below, visit_linears};
use crate::checkpoint::TensorPath;
use crate::nn::{Activation, LayerNorm};
use crate::seam::Projection;
use crate::vision::{Prepared, object, senseless};
use crate::{Error, Result};

#[derive(Deserialize)]
struct Raw {
    force_image_size: Option<i64>,
    downsample_ratio: Option<f64>,
    ps_version: Option<String>,
    select_layer: Option<i64>,
    dynamic_image_size: Option<bool>,
    use_thumbnail: Option<bool>,
    min_dynamic_patch: Option<u32>,
    max_dynamic_patch: Option<u32>,
}

/// What InternVL2 is built from.
#[derive(Debug, Clone)]
pub struct Config {
    /// The language model.
    pub text: DecoderConfig,
    /// The tower.
    pub vision: VisionConfig,
    /// Features along the edge of a token.
    pub shuffle: i64,
    /// Whether the shuffled map is turned back upright (`ps_version` v2).
    pub upright: bool,
    /// Tiles of an image: the fewest and the most.
    pub tiles: (u32, u32),
    /// Whether the whole image follows its tiles.
    pub thumbnail: bool,
}

impl Config {
    /// Reads a config.json of InternVL2.
    ///
    /// # Errors
    /// A field that is missing or senseless.
    pub fn parse(json: &Map<String, Value>) -> Result<Self> {
        let raw: Raw = serde_path_to_error::deserialize(Value::Object(json.clone()))
            .map_err(|e| Error::Config(format!("`{}`: {}", e.path(), e.inner())))?;
        let text = super::config(object(json, "llm_config")?).map_err(|e| match e {
            Error::Config(reason) => Error::Config(format!("`llm_config`: {reason}")),
            other => other,
        })?;
        let vision = VisionConfig::parse(object(json, "vision_config")?, raw.select_layer.unwrap_or(-1))?;
        if let Some(edge) = raw.force_image_size.filter(|&edge| edge != vision.image_size) {
            let reason = format!("is {edge}, but the tower's positions are for {} pixels", vision.image_size);
            return Err(senseless("force_image_size", reason));
        }
        let (ratio, side) = (raw.downsample_ratio.unwrap_or(0.5), vision.side());
        let shuffle = (1.0 / ratio).round();
        if !(1.0..=16.0).contains(&shuffle)
            || (shuffle * ratio - 1.0).abs() > 1e-6
            || side % shuffle as i64 != 0
        {
            let reason =
                format!("is {ratio}, expected one by a number that divides the {side} patches of an edge");
            return Err(senseless("downsample_ratio", reason));
        }
        let tiles = if raw.dynamic_image_size.unwrap_or(false) {
            (raw.min_dynamic_patch.unwrap_or(1), raw.max_dynamic_patch.unwrap_or(12))
        } else {
            (1, 1)
        };
        if tiles.0 < 1 || tiles.1 < tiles.0 || tiles.1 > 256 {
            let reason =
                format!("is {}, expected at least min_dynamic_patch {} and at most 256", tiles.1, tiles.0);
            return Err(senseless("max_dynamic_patch", reason));
        }
        Ok(Self {
            text,
            vision,
            shuffle: shuffle as i64,
            upright: raw.ps_version.as_deref() != Some("v1"),
            tiles,
            thumbnail: raw.use_thumbnail.unwrap_or(false),
        })
    }

    /// Tokens of a picture.
    pub fn tokens(&self) -> i64 {
        (self.vision.side() / self.shuffle).pow(2)
    }
}

/// InternViT with the projector.
pub struct InternVlVision {
    /// `vision_model`.
    pub vision_model: InternVisionModel,
    /// `mlp1.0`, over the features of a token.
    pub mlp1_norm: LayerNorm,
    /// `mlp1.1`, `[text hidden, hidden * shuffle²]`.
    pub mlp1_first: Box<dyn Projection>,
    /// `mlp1.3`, `[text hidden, text hidden]`.
    pub mlp1_second: Box<dyn Projection>,
    config: Config,
}

impl InternVlVision {
    /// Reads both under `root`.
    pub fn load(config: &Config, root: &TensorPath) -> Result<Self> {
        let c = &config.vision;
        let root = &root.because(format!(
            "config.json (vision_config: hidden_size {}, intermediate_size {}, num_hidden_layers {}, image_size {}, \
             patch_size {}; llm_config.hidden_size {})",
            c.hidden, c.intermediate, c.layers, c.image_size, c.patch_size, config.text.hidden
        ));
        let mlp1 = root.at("mlp1");
        let width = c.hidden * config.shuffle.pow(2);
        Ok(Self {
            vision_model: InternVisionModel::load(c, &root.at("vision_model"))?,
            mlp1_norm: LayerNorm::load(&mlp1.at(0), width, 1e-5)?,
            mlp1_first: linear(&mlp1.at(1), width, config.text.hidden)?,
            mlp1_second: linear(&mlp1.at(3), config.text.hidden, config.text.hidden)?,
            config: config.clone(),
        })
    }

    /// `shuffle * shuffle` neighbouring features side by side: `[pictures, side * side, hidden]` to
    /// `[pictures, tokens, hidden * shuffle²]`.
    fn shuffled(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, hidden) = x.size3()?;
        let n = self.config.shuffle;
        let side = self.config.vision.side();
        // Along rows, then along columns, which leaves the map lying on its side.
        let x = x.f_reshape([b, side, side / n, hidden * n])?.f_permute([0, 2, 1, 3])?;
        let mut x = x.f_reshape([b, side / n, side / n, hidden * n * n])?;
        if self.config.upright {
            x = x.f_permute([0, 2, 1, 3])?;
        }
        Ok(x.f_reshape([b, (side / n).pow(2), hidden * n * n])?)
    }
}

impl Vision for InternVlVision {
    fn encode(&self, media: &Prepared) -> Result<Tensor> {
        let x = self.mlp1_norm.forward(&self.shuffled(&self.vision_model.forward(&media.pixels)?)?)?;
        let x = self.mlp1_second.forward(&Activation::Gelu.forward(&self.mlp1_first.forward(&x)?)?)?;
        Ok(x.f_flatten(0, 1)?)
    }

    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()> {
        self.vision_model.visit_projections("vision_model.", f)?;
        f("mlp1.1", &mut self.mlp1_first)?;
        f("mlp1.3", &mut self.mlp1_second)
    }

    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        self.vision_model.visit_parameters("vision_model.", f)?;
        visit_below("mlp1.0", self.mlp1_norm.parameters(), f)?;
        visit_linears("mlp1", [("1", &mut self.mlp1_first), ("3", &mut self.mlp1_second)], f)
    }
}

pub(super) fn load(json: &Map<String, Value>, root: &TensorPath) -> Result<Vlm> {
    let config = Config::parse(json)?;
    let vision = InternVlVision::load(&config, root)?;
    let language_model = Decoder::load(config.text, &root.at("language_model"))?;
    Ok(Vlm::new(language_model, Box::new(vision), "language_model.", Positions::Sequential))
}
