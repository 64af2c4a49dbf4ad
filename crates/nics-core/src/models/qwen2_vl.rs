//! Qwen2-VL (Wang et al., 2024), beside transformers' `modeling_qwen2_vl.py`: images of any size, as patches that attend
//! within their moment in time and are merged four to a token; a Qwen2 decoder whose rotary embeddings turn in time,
//! height and width.
//!
//! What the tower shares with that of [`super::qwen2_5_vl`] is in [`super::qwen_vit`].

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::multimodal::{Positions, Vision, Vlm, text_config};
use super::qwen_vit::{
    Block, EPS, PatchEmbed, PatchMerger, VisionAttention, VisionConfig, because, grid_of, rope_of,
    visit_parameters, visit_projections,
};
use super::vit::linear;
use super::{Decoder, DecoderConfig, ProjectionVisitor};
use crate::checkpoint::TensorPath;
use crate::nn::{Activation, LayerNorm};
use crate::seam::Projection;
use crate::vision::{Prepared, object, senseless};
use crate::{Error, Result};

/// Other names under which the tensors are found: what transformers holds in memory and saves from version 5 on.
pub(super) const NAMES: &[(&str, &str)] =
    &[("model.", "model.language_model."), ("visual.", "model.visual.")];

/// The fields of config.json that both generations share.
#[derive(Debug, Clone, Deserialize)]
struct Raw {
    image_token_id: Option<u32>,
    video_token_id: Option<u32>,
}

/// The fields of `vision_config`, of which each generation reads its own.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct RawVision {
    pub depth: Option<usize>,
    pub embed_dim: Option<i64>,
    pub hidden_size: Option<i64>,
    pub out_hidden_size: Option<i64>,
    pub intermediate_size: Option<i64>,
    pub num_heads: Option<i64>,
    pub mlp_ratio: Option<f64>,
    // Two names of one thing; a file may have both.
    pub in_channels: Option<i64>,
    pub in_chans: Option<i64>,
    pub patch_size: Option<i64>,
    pub temporal_patch_size: Option<i64>,
    pub spatial_merge_size: Option<i64>,
    pub hidden_act: Option<String>,
    pub window_size: Option<i64>,
    pub fullatt_block_indexes: Option<Vec<usize>>,
    pub tokens_per_second: Option<f64>,
}

impl RawVision {
    /// What both generations read alike, around the widths of the residual stream, the MLP and the language model.
    pub(super) fn config(&self, [hidden, intermediate, out]: [i64; 3], act: &str) -> Result<VisionConfig> {
        let act = self.hidden_act.as_deref().unwrap_or(act);
        Ok(VisionConfig {
            depth: self.depth.unwrap_or(32),
            hidden,
            intermediate,
            out,
            heads: self.num_heads.unwrap_or(16),
            patch: self.patch_size.unwrap_or(14),
            temporal: self.temporal_patch_size.unwrap_or(2),
            merge: self.spatial_merge_size.unwrap_or(2),
            activation: Activation::parse("vision_config.hidden_act", act)?,
        })
    }
}

/// What Qwen2-VL is built from.
#[derive(Debug, Clone)]
pub struct Config {
    /// The language model.
    pub text: DecoderConfig,
    /// The tower.
    pub vision: VisionConfig,
    /// Stands for an image.
    pub image_token: u32,
    /// Stands for a video.
    pub video_token: u32,
}

/// The language model, the ids and the fields of the tower.
pub(super) fn parts(json: &Map<String, Value>) -> Result<(DecoderConfig, [u32; 2], RawVision)> {
    // The hub's files have the language model's fields at the top.
    let text = if json.contains_key("text_config") {
        text_config(json, "text_config", "qwen2_vl_text")?
    } else {
        super::config_of_type("qwen2_vl", json)?
    };
    let raw: Raw = parsed(json, "")?;
    let vision: RawVision = parsed(object(json, "vision_config")?, "vision_config.")?;
    if vision.in_channels.or(vision.in_chans).is_some_and(|n| n != 3) {
        return Err(senseless("vision_config.in_channels", "is not 3: images are RGB"));
    }
    let tokens = [raw.image_token_id.unwrap_or(151_655), raw.video_token_id.unwrap_or(151_656)];
    Ok((text, tokens, vision))
}

fn parsed<T: serde::de::DeserializeOwned>(json: &Map<String, Value>, at: &str) -> Result<T> {
    serde_path_to_error::deserialize(Value::Object(json.clone()))
        .map_err(|e| Error::Config(format!("`{at}{}`: {}", e.path(), e.inner())))
}

impl Config {
    /// Reads a config.json of Qwen2-VL.
    ///
    /// # Errors
    /// A field that is missing or senseless.
    pub fn parse(json: &Map<String, Value>) -> Result<Self> {
        let (text, [image_token, video_token], raw) = parts(json)?;
        let hidden = raw.embed_dim.unwrap_or(1280);
        let intermediate = (hidden as f64 * raw.mlp_ratio.unwrap_or(4.0)) as i64;
        // Here `hidden_size` is what the merger gives out.
        let out = raw.hidden_size.unwrap_or(3584);
        let vision = raw.config([hidden, intermediate, out], "quick_gelu")?.checked(&text)?;
        Ok(Self { text, vision, image_token, video_token })
    }
}

/// One block: attention and MLP, each behind a norm and added to the residual.
pub struct VisionBlock {
    /// Before attention.
    pub norm1: LayerNorm,
    /// Attention.
    pub attn: VisionAttention,
    /// Before the MLP.
    pub norm2: LayerNorm,
    /// `mlp.fc1`, `[intermediate, hidden]`.
    pub fc1: Box<dyn Projection>,
    /// `mlp.fc2`, `[hidden, intermediate]`.
    pub fc2: Box<dyn Projection>,
}

/// The tower with its merger (`Qwen2VisionTransformerPretrainedModel`).
pub struct Qwen2VlVision {
    /// `patch_embed`.
    pub patch_embed: PatchEmbed,
    /// `blocks`.
    pub blocks: Vec<VisionBlock>,
    /// `merger`.
    pub merger: PatchMerger,
    config: VisionConfig,
}

impl Qwen2VlVision {
    /// Reads the tower under `at`, usually `visual`.
    pub fn load(config: VisionConfig, at: &TensorPath) -> Result<Self> {
        let c = &config;
        let at = &at.because(because(c));
        let blocks = (0..c.depth)
            .map(|l| {
                let at = at.at("blocks").at(l);
                Ok(VisionBlock {
                    norm1: LayerNorm::load(&at.at("norm1"), c.hidden, EPS)?,
                    attn: VisionAttention::load(&at.at("attn"), c)?,
                    norm2: LayerNorm::load(&at.at("norm2"), c.hidden, EPS)?,
                    fc1: linear(&at.at("mlp.fc1"), c.hidden, c.intermediate)?,
                    fc2: linear(&at.at("mlp.fc2"), c.intermediate, c.hidden)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            patch_embed: PatchEmbed::load(&at.at("patch_embed"), c)?,
            blocks,
            merger: PatchMerger::load(&at.at("merger"), c, false)?,
            config,
        })
    }
}

impl Vision for Qwen2VlVision {
    fn encode(&self, media: &Prepared) -> Result<Tensor> {
        let c = &self.config;
        let grid = grid_of(media, c)?;
        let mut x = self.patch_embed.forward(&media.pixels)?;
        let rope = rope_of(grid, c, x.device())?;
        let segments = vec![(grid[1] * grid[2]) as i64; grid[0]];
        for block in &self.blocks {
            x = x.f_add(&block.attn.forward(&block.norm1.forward(&x)?, &rope, &segments)?)?;
            let inner = block.fc1.forward(&block.norm2.forward(&x)?)?;
            x = x.f_add(&block.fc2.forward(&c.activation.forward(&inner)?)?)?;
        }
        self.merger.forward(&x)
    }

    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()> {
        visit_projections(&mut self.blocks, &mut self.merger, f)
    }

    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        visit_parameters(&mut self.patch_embed, &mut self.blocks, &mut self.merger, f)
    }
}

impl Block for VisionBlock {
    fn norms(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        let (norm1, norm2) = (&mut self.norm1, &mut self.norm2);
        vec![
            ("norm1.weight", &mut norm1.weight),
            ("norm1.bias", &mut norm1.bias),
            ("norm2.weight", &mut norm2.weight),
            ("norm2.bias", &mut norm2.bias),
        ]
    }

    fn projections(&mut self) -> Vec<(&'static str, &mut Box<dyn Projection>)> {
        vec![
            ("attn.qkv", &mut self.attn.qkv),
            ("attn.proj", &mut self.attn.proj),
            ("mlp.fc1", &mut self.fc1),
            ("mlp.fc2", &mut self.fc2),
        ]
    }
}

pub(super) fn load(json: &Map<String, Value>, root: &TensorPath) -> Result<Vlm> {
    let config = Config::parse(json)?;
    let root = &root.renamed(NAMES);
    let positions = Positions::Mrope { merge: config.vision.merge as usize, per_second: None };
    let vision = Qwen2VlVision::load(config.vision, &root.at("visual"))?;
    let language_model = Decoder::load(config.text, root)?;
    Ok(Vlm::new(language_model, Box::new(vision), "", positions))
}
