//! Qwen2.5-VL (Bai et al., 2025), beside transformers' `modeling_qwen2_5_vl.py`.
//!
//! Differs from Qwen2-VL in the tower: root-mean-square norms, a gated MLP, and attention within windows of the picture in
//! all blocks but a few, for which the tokens are brought into the order of their windows and back behind the merger. In
//! time, positions count seconds.

use serde_json::{Map, Value};
use tch::Tensor;

use super::multimodal::{Positions, Vision, Vlm};
use super::qwen_vit::{
    Block, EPS, PatchEmbed, PatchMerger, VisionAttention, VisionConfig, because, grid_of, rope_of,
    visit_parameters, visit_projections,
};
use super::qwen2_vl::{NAMES, parts};
use super::vit::linear;
use super::{Decoder, DecoderConfig, ProjectionVisitor};
use crate::Result;
use crate::checkpoint::TensorPath;
use crate::nn::{Activation, RmsNorm};
use crate::seam::Projection;
use crate::vision::{Prepared, senseless};

/// What Qwen2.5-VL is built from.
#[derive(Debug, Clone)]
pub struct Config {
    /// The language model.
    pub text: DecoderConfig,
    /// The tower.
    pub vision: VisionConfig,
    /// Edge of a window, in tokens.
    pub window: usize,
    /// Blocks that attend within the whole picture.
    pub full_blocks: Vec<usize>,
    /// Positions in time for each second of a video.
    pub tokens_per_second: f64,
    /// Stands for an image.
    pub image_token: u32,
    /// Stands for a video.
    pub video_token: u32,
}

impl Config {
    /// Reads a config.json of Qwen2.5-VL.
    ///
    /// # Errors
    /// A field that is missing or senseless.
    pub fn parse(json: &Map<String, Value>) -> Result<Self> {
        let (text, [image_token, video_token], raw) = parts(json)?;
        let widths = [
            raw.hidden_size.unwrap_or(1280),
            raw.intermediate_size.unwrap_or(3420),
            raw.out_hidden_size.unwrap_or(3584),
        ];
        let vision = raw.config(widths, "silu")?.checked(&text)?;
        let size = raw.window_size.unwrap_or(112);
        let window = size / vision.merge / vision.patch;
        if window < 1 {
            return Err(senseless(
                "vision_config.window_size",
                format!("is {size}, less than a token's edge"),
            ));
        }
        let tokens_per_second = raw.tokens_per_second.unwrap_or(4.0);
        if !(tokens_per_second.is_finite() && tokens_per_second >= 0.0) {
            let reason = format!("is {tokens_per_second}, expected a number that is not negative");
            return Err(senseless("vision_config.tokens_per_second", reason));
        }
        let full_blocks = raw.fullatt_block_indexes.unwrap_or_else(|| vec![7, 15, 23, 31]);
        let window = window as usize;
        Ok(Self { text, vision, window, full_blocks, tokens_per_second, image_token, video_token })
    }
}

/// One block: attention and gated MLP, each behind a norm and added to the residual.
pub struct VisionBlock {
    /// Before attention.
    pub norm1: RmsNorm,
    /// Attention.
    pub attn: VisionAttention,
    /// Before the MLP.
    pub norm2: RmsNorm,
    /// `mlp.gate_proj`, `[intermediate, hidden]`.
    pub gate_proj: Box<dyn Projection>,
    /// `mlp.up_proj`, `[intermediate, hidden]`.
    pub up_proj: Box<dyn Projection>,
    /// `mlp.down_proj`, `[hidden, intermediate]`.
    pub down_proj: Box<dyn Projection>,
}

/// The tower with its merger (`Qwen2_5_VisionTransformerPretrainedModel`).
pub struct Qwen25VlVision {
    /// `patch_embed`.
    pub patch_embed: PatchEmbed,
    /// `blocks`.
    pub blocks: Vec<VisionBlock>,
    /// `merger`.
    pub merger: PatchMerger,
    config: VisionConfig,
    window: usize,
    full_blocks: Vec<usize>,
}

impl Qwen25VlVision {
    /// Reads the tower under `at`, usually `visual`.
    pub fn load(config: &Config, at: &TensorPath) -> Result<Self> {
        let c = &config.vision;
        let at = &at.because(because(c));
        let blocks = (0..c.depth)
            .map(|l| {
                let at = at.at("blocks").at(l);
                Ok(VisionBlock {
                    norm1: RmsNorm::load(&at.at("norm1"), c.hidden, EPS)?,
                    attn: VisionAttention::load(&at.at("attn"), c)?,
                    norm2: RmsNorm::load(&at.at("norm2"), c.hidden, EPS)?,
                    gate_proj: linear(&at.at("mlp.gate_proj"), c.hidden, c.intermediate)?,
                    up_proj: linear(&at.at("mlp.up_proj"), c.hidden, c.intermediate)?,
                    down_proj: linear(&at.at("mlp.down_proj"), c.intermediate, c.hidden)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            patch_embed: PatchEmbed::load(&at.at("patch_embed"), c)?,
            blocks,
            merger: PatchMerger::load(&at.at("merger"), c, true)?,
            window: config.window,
            full_blocks: config.full_blocks.clone(),
            config: config.vision.clone(),
        })
    }
}

/// The tokens of a grid `[t, h, w]` of tokens in the order of their windows of `window * window`, row by row of windows,
/// ragged at the borders and never across time; and the tokens of each window.
fn windows([t, h, w]: [usize; 3], window: usize) -> (Vec<i64>, Vec<i64>) {
    let (mut order, mut lens) = (Vec::with_capacity(t * h * w), Vec::new());
    for frame in 0..t {
        for top in (0..h).step_by(window) {
            for left in (0..w).step_by(window) {
                let (bottom, right) = ((top + window).min(h), (left + window).min(w));
                lens.push(((bottom - top) * (right - left)) as i64);
                for y in top..bottom {
                    order.extend((left..right).map(|x| ((frame * h + y) * w + x) as i64));
                }
            }
        }
    }
    (order, lens)
}

impl Vision for Qwen25VlVision {
    fn encode(&self, media: &Prepared) -> Result<Tensor> {
        let c = &self.config;
        let [t, h, w] = grid_of(media, c)?;
        let (merge, unit) = (c.merge as usize, c.merge * c.merge);
        let (order, lens) = windows([t, h / merge, w / merge], self.window);
        let mut x = self.patch_embed.forward(&media.pixels)?;
        let patches: Vec<i64> =
            order.iter().flat_map(|&token| (token * unit)..(token * unit + unit)).collect();
        let patches = Tensor::f_from_slice(&patches)?.f_to_device(x.device())?;
        let rope = rope_of([t, h, w], c, x.device())?.select(&patches)?;
        x = x.f_index_select(0, &patches)?;
        let windows: Vec<i64> = lens.iter().map(|n| n * unit).collect();
        let whole = vec![(h * w) as i64; t];
        for (l, block) in self.blocks.iter().enumerate() {
            let segments = if self.full_blocks.contains(&l) { &whole } else { &windows };
            x = x.f_add(&block.attn.forward(&block.norm1.forward(&x)?, &rope, segments)?)?;
            x = x.f_add(&block.mlp(&block.norm2.forward(&x)?, c.activation)?)?;
        }
        let tokens = self.merger.forward(&x)?;
        let mut back = vec![0i64; order.len()];
        for (at, &token) in order.iter().enumerate() {
            back[token as usize] = at as i64;
        }
        Ok(tokens.f_index_select(0, &Tensor::f_from_slice(&back)?.f_to_device(tokens.device())?)?)
    }

    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()> {
        visit_projections(&mut self.blocks, &mut self.merger, f)
    }

    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        visit_parameters(&mut self.patch_embed, &mut self.blocks, &mut self.merger, f)
    }
}

impl VisionBlock {
    fn mlp(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let both = self.gate_proj.forward_many(&[&*self.up_proj], x)?;
        let [gate, up] = both.as_slice() else {
            return Err(crate::Error::input("forward_many gave another number of results than projections"));
        };
        self.down_proj.forward(&activation.forward(gate)?.f_mul(up)?)
    }
}

impl Block for VisionBlock {
    fn norms(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("norm1.weight", &mut self.norm1.weight), ("norm2.weight", &mut self.norm2.weight)]
    }

    fn projections(&mut self) -> Vec<(&'static str, &mut Box<dyn Projection>)> {
        vec![
            ("attn.qkv", &mut self.attn.qkv),
            ("attn.proj", &mut self.attn.proj),
            ("mlp.gate_proj", &mut self.gate_proj),
            ("mlp.up_proj", &mut self.up_proj),
            ("mlp.down_proj", &mut self.down_proj),
        ]
    }
}

pub(super) fn load(json: &Map<String, Value>, root: &TensorPath) -> Result<Vlm> {
    let config = Config::parse(json)?;
    let root = &root.renamed(NAMES);
    let merge = config.vision.merge as usize;
    let positions = Positions::Mrope { merge, per_second: Some(config.tokens_per_second) };
    let vision = Qwen25VlVision::load(&config, &root.at("visual"))?;
    let language_model = Decoder::load(config.text, root)?;
    Ok(Vlm::new(language_model, Box::new(vision), "", positions))
}
