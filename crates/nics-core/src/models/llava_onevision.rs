//! LLaVA-OneVision (Li et al., 2024), beside transformers' `modeling_llava_onevision.py`: SigLIP's tower and LLaVA's
//! projector.
//!
//! An image alone in its prompt is seen whole and in tiles of an enlarged copy: the tiles' features are put together to
//! one map, the margin of the enlargement is cut off, a map that is too large is shrunk, and every row of it ends in
//! `image_newline`. A video's frames are halved in both directions, and one `image_newline` ends it.
//!
//! The checkpoints that the authors published themselves, LLaVA-Video's among them (`LlavaQwenForCausalLM`), are read too:
//! their configuration says how frames are halved and where newlines stand, and one placeholder stands for images and
//! videos.

mod maps;

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use maps::margins;
pub use maps::{Anyres, Newlines, Pooling};

use super::llava::{self, LlavaVision, NAMES};
use super::multimodal::{Positions, Vision, Vlm, text_config};
use super::vit::TowerConfig;
use super::{Decoder, DecoderConfig, ProjectionVisitor, siglip};
use crate::checkpoint::TensorPath;
use crate::nn::Activation;
use crate::vision::{CLIP_MEAN, CLIP_STD, Layout, Prepared, TokenKind, VisionError, senseless};
use crate::{Error, Result};

#[derive(Deserialize)]
struct Raw {
    image_grid_pinpoints: Option<Vec<[u32; 2]>>,
    vision_aspect_ratio: Option<String>,
}

/// What LLaVA-OneVision is built from.
#[derive(Debug, Clone)]
pub struct Config {
    /// What it shares with LLaVA-1.5.
    pub llava: llava::Config,
    /// The tower.
    pub vision: TowerConfig,
    /// Stands for an image.
    pub image_token: u32,
    /// Stands for a video.
    pub video_token: u32,
    /// Resolutions (height, width) to which an image may be enlarged.
    pub image_grid_pinpoints: Vec<[u32; 2]>,
    /// A map of features is shrunk to so many pictures.
    pub max_pictures: usize,
    /// How the maps of a video's frames are halved.
    pub pooling: Pooling,
    /// Where newlines stand in a video.
    pub newlines: Newlines,
    /// Mean and deviation of a channel, where preprocessor_config.json does not say them.
    pub normal: ([f64; 3], [f64; 3]),
}

/// The fields of the authors' own configurations.
#[derive(Deserialize)]
struct Original {
    mm_vision_tower: Option<String>,
    mm_vision_select_layer: Option<i64>,
    mm_projector_type: Option<String>,
    mm_spatial_pool_mode: Option<String>,
    mm_spatial_pool_stride: Option<i64>,
    mm_newline_position: Option<String>,
    image_aspect_ratio: Option<String>,
    image_grid_pinpoints: Option<Value>,
    image_token_index: Option<u32>,
}

/// The tower that all of the authors' checkpoints have.
fn so400m() -> Map<String, Value> {
    let fields = [
        ("hidden_size", 1152),
        ("intermediate_size", 4304),
        ("num_hidden_layers", 27),
        ("num_attention_heads", 16),
        ("image_size", 384),
        ("patch_size", 14),
    ];
    fields.into_iter().map(|(field, n)| (field.to_owned(), n.into())).collect()
}

/// Resolutions in multiples of `edge`, from a text like `(1x1),...,(6x6)`.
fn pinpoints_of(text: &str, edge: u32) -> Option<Vec<[u32; 2]>> {
    let pair = |text: &str| -> Option<[u32; 2]> {
        let (a, b) = text.trim().trim_matches(['(', ')']).split_once('x')?;
        Some([a.trim().parse().ok()?, b.trim().parse().ok()?])
    };
    let (first, last) = (pair(text.split(',').next()?)?, pair(text.rsplit(',').next()?)?);
    let sane = (0..2).all(|i| (1..=last[i]).contains(&first[i]) && last[i] <= 64);
    sane.then(|| {
        (first[0]..=last[0]).flat_map(|a| (first[1]..=last[1]).map(move |b| [a * edge, b * edge])).collect()
    })
}

impl Config {
    /// Reads a config.json of LLaVA-OneVision, transformers' or the authors' own.
    ///
    /// # Errors
    /// A field that is missing or senseless.
    pub fn parse(json: &Map<String, Value>) -> Result<Self> {
        if !json.contains_key("text_config") {
            return Self::parse_original(json);
        }
        let text: DecoderConfig = text_config(json, "text_config", "qwen2")?;
        let llava = llava::Config::with(json, text, "siglip_vision_model", -1, "full", 151_646)?;
        let raw: Raw = serde_path_to_error::deserialize(Value::Object(json.clone()))
            .map_err(|e| Error::Config(format!("`{}`: {}", e.path(), e.inner())))?;
        let ratio = raw.vision_aspect_ratio.as_deref().unwrap_or("anyres_max_9");
        let max_pictures = ratio.strip_prefix("anyres_max_").and_then(|n| n.parse().ok()).filter(|&n| n > 0);
        let max_pictures = max_pictures.ok_or_else(|| {
            senseless("vision_aspect_ratio", format!("is `{ratio}`, expected `anyres_max_` and a number"))
        })?;
        let edge = llava.vision.image_size as u32;
        let pinpoints = raw.image_grid_pinpoints.unwrap_or_else(|| {
            (1..=6).flat_map(|rows| (1..=6).map(move |columns| [rows * 384, columns * 384])).collect()
        });
        if let Some(odd) = pinpoints.iter().flatten().find(|n| **n == 0 || **n % edge != 0 || **n > 1 << 14) {
            return Err(senseless(
                "image_grid_pinpoints",
                format!("has an edge of {odd}, not a multiple of the tower's {edge} pixels"),
            ));
        }
        Ok(Self {
            vision: llava.vision.clone(),
            image_token: llava.image_token,
            video_token: llava.video_token.unwrap_or(151_647),
            image_grid_pinpoints: pinpoints,
            max_pictures,
            pooling: Pooling::Bilinear,
            newlines: Newlines::Video,
            normal: (CLIP_MEAN, CLIP_STD),
            llava,
        })
    }

    /// The authors' own configuration: the language model's fields at the top, no `vision_config`.
    fn parse_original(json: &Map<String, Value>) -> Result<Self> {
        let raw: Original = serde_path_to_error::deserialize(Value::Object(json.clone()))
            .map_err(|e| Error::Config(format!("`{}`: {}", e.path(), e.inner())))?;
        let text = super::config_of_type("qwen2", json)?;
        let projector = raw.mm_projector_type.as_deref().unwrap_or("mlp2x_gelu");
        if projector != "mlp2x_gelu" {
            return Err(senseless("mm_projector_type", format!("is `{projector}`, known is `mlp2x_gelu`")));
        }
        let vision = match (json.get("vision_config").and_then(Value::as_object), &raw.mm_vision_tower) {
            (Some(given), _) => siglip::config(given)?,
            (None, Some(name)) if name.contains("siglip-so400m-patch14-384") => siglip::config(&so400m())?,
            (None, name) => {
                let found = name.as_deref().unwrap_or("missing");
                let reason = format!("is {found}, known is google/siglip-so400m-patch14-384");
                return Err(senseless("mm_vision_tower", reason));
            }
        };
        let edge = vision.image_size as u32;
        let pinpoints = match raw.image_grid_pinpoints {
            Some(Value::String(text)) => pinpoints_of(&text, edge),
            Some(list) => serde_json::from_value(list).ok(),
            None => pinpoints_of("(1x1),(6x6)", edge),
        };
        let whole = |p: &Vec<[u32; 2]>| p.iter().flatten().all(|n| *n > 0 && *n % edge == 0 && *n <= 1 << 14);
        let pinpoints = pinpoints.filter(whole).ok_or_else(|| {
            let reason = format!("is no list of resolutions in multiples of the tower's {edge} pixels");
            senseless("image_grid_pinpoints", reason)
        })?;
        let ratio = raw.image_aspect_ratio.as_deref().unwrap_or("anyres_max_9");
        // Without a limit of its own a map is never shrunk.
        let max_pictures = match ratio.strip_prefix("anyres_max_") {
            Some(n) => n.parse().ok().filter(|n| (1..=1 << 16).contains(n)),
            None => (ratio == "anyres").then_some(1 << 16),
        };
        let max_pictures = max_pictures.ok_or_else(|| {
            let reason = format!("is `{ratio}`, expected `anyres` or `anyres_max_` and a number");
            senseless("image_aspect_ratio", reason)
        })?;
        if let Some(stride) = raw.mm_spatial_pool_stride.filter(|&stride| stride != 2) {
            return Err(senseless("mm_spatial_pool_stride", format!("is {stride}, known is 2")));
        }
        let image_token = raw.image_token_index.unwrap_or(151_646);
        let llava = llava::Config {
            text,
            vision: vision.clone(),
            image_token,
            video_token: Some(image_token),
            feature_layers: vec![raw.mm_vision_select_layer.unwrap_or(-2)],
            drops_first: false,
            projector_act: Activation::Gelu,
            projector_bias: true,
        };
        Ok(Self {
            llava,
            vision,
            image_token,
            video_token: image_token,
            image_grid_pinpoints: pinpoints,
            max_pictures,
            pooling: Pooling::parse(raw.mm_spatial_pool_mode.as_deref().unwrap_or("bilinear"))?,
            newlines: Newlines::parse(raw.mm_newline_position.as_deref().unwrap_or("one_token"))?,
            normal: ([0.5; 3], [0.5; 3]),
        })
    }

    /// Tokens of a video of so many frames.
    pub fn video_tokens(&self, frames: usize) -> usize {
        self.newlines.tokens(frames, self.pooling.half(self.vision.side() as usize))
    }

    /// The arithmetic of its maps of features.
    pub fn anyres(&self) -> Anyres {
        Anyres { side: self.vision.side() as usize, max_pictures: self.max_pictures }
    }
}

/// Tower, projector and the token between rows.
pub struct LlavaOnevisionVision {
    /// `vision_tower` and `multi_modal_projector`.
    pub llava: LlavaVision,
    /// `image_newline`, `[text hidden]`.
    pub image_newline: Tensor,
    anyres: Anyres,
    pooling: Pooling,
    newlines: Newlines,
}

impl LlavaOnevisionVision {
    /// Reads all under `root`.
    pub fn load(c: &Config, root: &TensorPath) -> Result<Self> {
        Ok(Self {
            llava: LlavaVision::load(&c.llava, root)?,
            image_newline: root.tensor("image_newline", &[c.llava.text.hidden])?,
            anyres: c.anyres(),
            pooling: c.pooling,
            newlines: c.newlines,
        })
    }

    /// The whole and the map of tiles, `[1 + rows * columns, side * side, hidden]`, as tokens `[tokens, hidden]`.
    fn packed(&self, x: &Tensor, rows: usize, columns: usize, original: [usize; 2]) -> Result<Tensor> {
        let hidden = x.size3()?.2;
        let side = self.anyres.side as i64;
        let whole = x.f_get(0)?;
        let map = [rows * self.anyres.side, columns * self.anyres.side];
        let (r, c) = (rows as i64, columns as i64);
        // [tiles, side * side, hidden] -> [hidden, rows * side, columns * side]
        let tiles = x.f_narrow(0, 1, r * c)?.f_reshape([r, c, side, side, hidden])?;
        let mut maps = tiles.f_permute([4, 0, 2, 1, 3])?.f_reshape([hidden, r * side, c * side])?;
        let [top, left] = margins(map, original);
        let inner = [map[0] - 2 * top, map[1] - 2 * left];
        maps = maps.f_narrow(1, top as i64, inner[0] as i64)?.f_narrow(2, left as i64, inner[1] as i64)?;
        if let Some([height, width]) = self.anyres.shrunk(inner) {
            let size = [height as i64, width as i64];
            maps = maps.f_contiguous()?.f_unsqueeze(0)?;
            maps = maps.f_upsample_bilinear2d(size, false, None, None)?.f_squeeze_dim(0)?;
        }
        let height = maps.size3()?.1;
        let newline = self.image_newline.f_view([hidden, 1, 1])?.f_expand([hidden, height, 1], false)?;
        let maps = Tensor::f_cat(&[&maps, &newline], 2)?;
        let maps = maps.f_flatten(1, 2)?.f_transpose(0, 1)?;
        Ok(Tensor::f_cat(&[&whole, &maps], 0)?)
    }
}

impl Vision for LlavaOnevisionVision {
    fn encode(&self, media: &Prepared) -> Result<Tensor> {
        let x = self.llava.features(&media.pixels)?;
        match (&media.layout, media.kind) {
            (Layout::Tiles { rows, columns, original }, _) => {
                let expected = 1 + rows * columns;
                if x.size3()?.0 != expected as i64 {
                    let expected = format!("{expected} pictures: the whole and its tiles");
                    return Err(VisionError::Shape {
                        what: "an image's features",
                        found: x.size(),
                        expected,
                    }
                    .into());
                }
                self.packed(&x, *rows, *columns, *original)
            }
            (_, TokenKind::Video) => self.newlines.place(&self.pooling.halve(&x)?, &self.image_newline),
            _ => Newlines::Video.place(&x, &self.image_newline),
        }
    }

    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()> {
        self.llava.visit_projections(f)
    }

    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        f("image_newline", &mut self.image_newline)?;
        self.llava.visit_parameters(f)
    }
}

pub(super) fn load(json: &Map<String, Value>, root: &TensorPath) -> Result<Vlm> {
    let config = Config::parse(json)?;
    let root = &root.renamed(NAMES);
    let vision = LlavaOnevisionVision::load(&config, root)?;
    let language_model = Decoder::load(config.llava.text, &root.at("language_model"))?;
    Ok(Vlm::new(language_model, Box::new(vision), "language_model.", Positions::Sequential))
}
