//! LLaVA-OneVision (Li et al., 2024): a single image whole and in enlarged tiles ("any resolution"), several images each
//! as a square, videos frame by frame, as transformers' `LlavaOnevisionProcessor`.

use serde_json::{Map, Value};
use tch::Tensor;

use crate::Result;
use crate::models::llava_onevision::{self, Anyres, Newlines, Pooling};
use crate::vision::config::{Pixels, PreprocessorConfig, Size};
use crate::vision::pixels::{crop, on_ground, planes, square};
use crate::vision::resize::{Filter, resize};
use crate::vision::{Layout, Media, Placeholders, Prepared, RgbImage, TokenKind, VisionError};

/// Prepares images and videos for LLaVA-OneVision.
#[derive(Debug)]
pub struct OneVisionProcessor {
    resizes: bool,
    /// Height and width of a picture; a tile is a square of the height.
    size: (u32, u32),
    pinpoints: Vec<[u32; 2]>,
    filter: Filter,
    pixels: Pixels,
    anyres: Anyres,
    pooling: Pooling,
    newlines: Newlines,
    /// The ids that stand for images and videos.
    pub placeholders: Placeholders,
}

impl OneVisionProcessor {
    pub(super) fn new(json: &Map<String, Value>, preprocessor: &PreprocessorConfig) -> Result<Self> {
        let config = llava_onevision::Config::parse(json)?;
        let side = u32::try_from(config.vision.image_size).unwrap_or(0);
        Ok(Self {
            resizes: preprocessor.do_resize.unwrap_or(true),
            size: preprocessor.size.unwrap_or(Size::Edge(side)).edges("size")?,
            pinpoints: preprocessor
                .image_grid_pinpoints
                .clone()
                .unwrap_or_else(|| config.image_grid_pinpoints.clone()),
            filter: preprocessor.resample.unwrap_or(Filter::Bicubic),
            pixels: preprocessor.pixels(config.normal.0, config.normal.1),
            anyres: config.anyres(),
            placeholders: Placeholders { image: config.image_token, video: Some(config.video_token) },
            pooling: config.pooling,
            newlines: config.newlines,
        })
    }

    pub(super) fn prepare(&self, media: &[Media]) -> Result<Vec<Prepared>> {
        let images = media.iter().filter(|m| m.kind() == TokenKind::Image).count();
        media
            .iter()
            .map(|one| {
                let frames = one.frames()?;
                match one {
                    Media::Image(image) if images == 1 => self.tiles(image),
                    Media::Image(image) => {
                        let colour = self.pixels.mean.map(|m| (m * 255.0) as u8);
                        self.frames(&[square(image, colour)?], TokenKind::Image)
                    }
                    Media::Video { .. } => self.frames(frames, TokenKind::Video),
                }
            })
            .collect()
    }

    /// Tokens of an image of this size that is alone in its prompt, before it is decoded.
    ///
    /// # Errors
    /// An image without a pixel.
    pub fn image_tokens(&self, height: u32, width: u32) -> Result<usize> {
        if height == 0 || width == 0 {
            return Err(VisionError::Empty { what: format!("an image of {width}x{height}") }.into());
        }
        let [best_height, best_width] = best_resolution([height, width], &self.pinpoints)?;
        let (rows, columns) = ((best_height / self.size.0) as usize, (best_width / self.size.0) as usize);
        Ok(self.anyres.image_tokens(rows, columns, [height as usize, width as usize]))
    }

    /// An image alone in its prompt: whole, then in tiles.
    fn tiles(&self, image: &RgbImage) -> Result<Prepared> {
        let (width, height) = image.dimensions();
        let [best_height, best_width] = best_resolution([height, width], &self.pinpoints)?;
        let (inner_height, inner_width) = inside([height, width], [best_height, best_width]);
        let enlarged = resize(image, inner_width, inner_height, self.filter)?;
        let margin = |n: u32, m: u32| i64::from((n - m) / 2);
        let (left, top) = (margin(best_width, inner_width), margin(best_height, inner_height));
        let enlarged = on_ground(&enlarged, left, top, best_width, best_height, [0; 3]);

        let tile = self.size.0;
        let (rows, columns) = (best_height.div_ceil(tile), best_width.div_ceil(tile));
        let mut pictures = vec![resize(image, self.size.1, self.size.0, self.filter)?];
        for row in 0..rows {
            for column in 0..columns {
                let (left, top) = (column * tile, row * tile);
                let (w, h) = (tile.min(best_width - left), tile.min(best_height - top));
                pictures.push(crop(&enlarged, i64::from(left), i64::from(top), w, h));
            }
        }
        let (rows, columns) = ((best_height / tile) as usize, (best_width / tile) as usize);
        let original = [height as usize, width as usize];
        let tokens = self.anyres.image_tokens(rows, columns, original);
        let layout = Layout::Tiles { rows, columns, original };
        self.stacked(&pictures, TokenKind::Image, layout, tokens)
    }

    fn frames(&self, frames: &[RgbImage], kind: TokenKind) -> Result<Prepared> {
        let tokens = match kind {
            TokenKind::Video => self.newlines.tokens(frames.len(), self.pooling.half(self.anyres.side)),
            _ => self.anyres.side.pow(2) + 1,
        };
        self.stacked(frames, kind, Layout::Frames(frames.len()), tokens)
    }

    fn stacked(
        &self,
        pictures: &[RgbImage],
        kind: TokenKind,
        layout: Layout,
        tokens: usize,
    ) -> Result<Prepared> {
        let (height, width) = self.size;
        let mut values = Vec::new();
        for picture in pictures {
            if self.resizes {
                planes(&resize(picture, width, height, self.filter)?, &self.pixels, &mut values);
            } else {
                planes(picture, &self.pixels, &mut values);
            }
        }
        let shape = [pictures.len() as i64, 3, i64::from(height), i64::from(width)];
        let pixels = Tensor::f_from_slice(&values)?.f_view(shape)?;
        Ok(Prepared { kind, pixels, layout, tokens, parts: 1 })
    }
}

/// Of some resolutions (height, width) the one that keeps most pixels of an image, and of those the smallest.
fn best_resolution(original: [u32; 2], pinpoints: &[[u32; 2]]) -> Result<[u32; 2]> {
    let [height, width] = original.map(f64::from);
    let mut best: Option<([u32; 2], u64, u64)> = None;
    for &[h, w] in pinpoints {
        let scale = (f64::from(w) / width).min(f64::from(h) / height);
        let scaled = (width * scale) as u64 * (height * scale) as u64;
        let kept = scaled.min(u64::from(original[0]) * u64::from(original[1]));
        let wasted = (u64::from(h) * u64::from(w)).saturating_sub(kept);
        if best.is_none_or(|(_, k, wa)| kept > k || kept == k && wasted < wa) {
            best = Some(([h, w], kept, wasted));
        }
    }
    best.map(|(size, ..)| size)
        .ok_or_else(|| crate::vision::senseless("image_grid_pinpoints", "is empty, expected resolutions"))
}

/// Height and width of an image enlarged or shrunk until it touches the edges of `target`.
fn inside([height, width]: [u32; 2], [target_height, target_width]: [u32; 2]) -> (u32, u32) {
    let scale_width = f64::from(target_width) / f64::from(width);
    let scale_height = f64::from(target_height) / f64::from(height);
    if scale_width < scale_height {
        (((f64::from(height) * scale_width).ceil() as u32).min(target_height), target_width)
    } else {
        (target_height, ((f64::from(width) * scale_height).ceil() as u32).min(target_width))
    }
}
