//! LLaVA-OneVision (Li et al., 2024), beside transformers' `modeling_llava_onevision.py`: SigLIP's tower and LLaVA's
//! projector.
//!
//! An image alone in its prompt is seen whole and in tiles of an enlarged copy: the tiles' features are put together to
//! one map, the margin of the enlargement is cut off, a map that is too large is shrunk, and every row of it ends in
//! `image_newline`. A video's frames are halved in both directions, and one `image_newline` ends it.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::llava::{self, LlavaVision, NAMES};
use super::multimodal::{Positions, Vision, Vlm, text_config};
use super::vit::TowerConfig;
use super::{Decoder, DecoderConfig, ProjectionVisitor};
use crate::checkpoint::TensorPath;
use crate::vision::{Layout, Prepared, TokenKind, VisionError, senseless};
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
}

impl Config {
    /// Reads a config.json of LLaVA-OneVision.
    ///
    /// # Errors
    /// A field that is missing or senseless.
    pub fn parse(json: &Map<String, Value>) -> Result<Self> {
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
            llava,
        })
    }

    /// The arithmetic of its maps of features.
    pub fn anyres(&self) -> Anyres {
        Anyres { side: self.vision.side() as usize, max_pictures: self.max_pictures }
    }
}

/// The arithmetic of "any resolution": how large maps of features are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anyres {
    /// Features along an edge of a picture.
    pub side: usize,
    /// A map is shrunk to so many pictures.
    pub max_pictures: usize,
}

impl Anyres {
    /// The size to which a map is shrunk, when it is too large.
    fn shrunk(self, [height, width]: [usize; 2]) -> Option<[usize; 2]> {
        let ratio = ((height * width) as f64 / (self.max_pictures * self.side.pow(2)) as f64).sqrt();
        // Rounded down after the division, as Python's `//`.
        let divided = |n: usize| ((n as f64 / ratio).floor() as usize).max(1);
        (ratio > 1.1).then(|| [divided(height), divided(width)])
    }

    /// Tokens of an image in `rows * columns` tiles: the whole, the map, the newlines of its rows.
    pub fn image_tokens(self, rows: usize, columns: usize, original: [usize; 2]) -> usize {
        let map = [rows * self.side, columns * self.side];
        let [top, left] = margins(map, original);
        let inner = [map[0] - 2 * top, map[1] - 2 * left];
        let [height, width] = self.shrunk(inner).unwrap_or(inner);
        self.side.pow(2) + height * (width + 1)
    }

    /// Tokens of a frame of a video.
    pub fn pooled_tokens(self) -> usize {
        self.side.div_ceil(2).pow(2)
    }
}

/// Rows and columns of the margins above and left of an image in the map of its tiles (those below and right are the
/// same): the side in which the image is relatively shorter was filled up.
fn margins([height, width]: [usize; 2], original: [usize; 2]) -> [usize; 2] {
    let [original_height, original_width] = original.map(|n| n as f64);
    // As the reference: rounded at the seventh digit, then down.
    let whole = |x: f64| format!("{x:.7}").parse::<f64>().unwrap_or(x) as usize;
    if original_width / original_height > width as f64 / height as f64 {
        let inner = whole(original_height * (width as f64 / original_width));
        [height.saturating_sub(inner) / 2, 0]
    } else {
        let inner = whole(original_width * (height as f64 / original_height));
        [0, width.saturating_sub(inner) / 2]
    }
}

/// Tower, projector and the token between rows.
pub struct LlavaOnevisionVision {
    /// `vision_tower` and `multi_modal_projector`.
    pub llava: LlavaVision,
    /// `image_newline`, `[text hidden]`.
    pub image_newline: Tensor,
    anyres: Anyres,
}

impl LlavaOnevisionVision {
    /// Reads all under `root`.
    pub fn load(c: &Config, root: &TensorPath) -> Result<Self> {
        Ok(Self {
            llava: LlavaVision::load(&c.llava, root)?,
            image_newline: root.tensor("image_newline", &[c.llava.text.hidden])?,
            anyres: c.anyres(),
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

/// How the maps of frames are halved (`mm_spatial_pool_mode` of the original checkpoints).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Interpolated, an odd edge rounded up.
    Bilinear,
    /// Means of two by two, a rest left out.
    Average,
    /// Maxima of two by two, a rest left out.
    Max,
}

/// Where `image_newline` stands in a video (`mm_newline_position` of the original checkpoints).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Newlines {
    /// Behind every row of every frame.
    Grid,
    /// Behind every frame.
    Frame,
    /// Behind the video.
    Video,
    /// Nowhere.
    None,
}

impl Pooling {
    /// Halves maps in both directions: `[frames, side * side, hidden]` to `[frames, half * half, hidden]`.
    ///
    /// # Errors
    /// Maps that are no squares.
    pub fn halve(self, x: &Tensor) -> Result<Tensor> {
        let (frames, tokens, hidden) = x.size3()?;
        let side = tokens.isqrt();
        if side * side != tokens || side == 0 || self != Self::Bilinear && side < 2 {
            let (found, expected) = (x.size(), "square maps, [frames, side * side, hidden]".to_owned());
            return Err(VisionError::Shape { what: "the frames' features", found, expected }.into());
        }
        let maps = x.f_reshape([frames, side, side, hidden])?.f_permute([0, 3, 1, 2])?.f_contiguous()?;
        let maps = match self {
            Self::Bilinear => {
                let half = (side + 1) / 2;
                maps.f_upsample_bilinear2d([half, half], false, None, None)?
            }
            Self::Average => maps.f_avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None)?,
            Self::Max => maps.f_max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false)?,
        };
        Ok(maps.f_permute([0, 2, 3, 1])?.f_flatten(1, 2)?)
    }
}

impl Newlines {
    /// The tokens of a video, `[frames, side * side, hidden]` to `[tokens, hidden]`; `newline` is `[hidden]`.
    ///
    /// # Errors
    /// Maps that are no squares, where rows matter.
    pub fn place(self, x: &Tensor, newline: &Tensor) -> Result<Tensor> {
        let (frames, tokens, hidden) = x.size3()?;
        let newline = newline.f_view([1, 1, hidden])?;
        Ok(match self {
            Self::None => x.f_flatten(0, 1)?,
            Self::Video => Tensor::f_cat(&[&x.f_flatten(0, 1)?, &newline.f_squeeze_dim(0)?], 0)?,
            Self::Frame => {
                Tensor::f_cat(&[x, &newline.f_expand([frames, 1, hidden], false)?], 1)?.f_flatten(0, 1)?
            }
            Self::Grid => {
                let side = tokens.isqrt();
                if side * side != tokens {
                    let (found, expected) =
                        (x.size(), "square maps, [frames, side * side, hidden]".to_owned());
                    return Err(VisionError::Shape { what: "the frames' features", found, expected }.into());
                }
                let rows = x.f_reshape([frames * side, side, hidden])?;
                Tensor::f_cat(&[&rows, &newline.f_expand([frames * side, 1, hidden], false)?], 1)?
                    .f_flatten(0, 1)?
            }
        })
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
            (_, TokenKind::Video) => {
                Newlines::Video.place(&Pooling::Bilinear.halve(&x)?, &self.image_newline)
            }
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
