//! Qwen2-VL and Qwen2.5-VL: images brought to whole tokens within a range of pixels and cut into patches, videos two
//! frames to a patch, as transformers' `Qwen2VLImageProcessor` and, for the sizes of videos, `qwen_vl_utils`.

use serde_json::{Map, Value};
use tch::Tensor;

use crate::Result;
use crate::models::{qwen_vit, qwen2_5_vl, qwen2_vl};
use crate::vision::config::{CLIP_MEAN, CLIP_STD, Pixels, PreprocessorConfig, Size, senseless};
use crate::vision::picture::MAX_PIXELS;
use crate::vision::pixels::planes;
use crate::vision::resize::{Filter, resize};
use crate::vision::{Layout, Media, Placeholders, Prepared, VisionError};

/// An image longer than so many times its width is refused.
const MAX_RATIO: u32 = 200;
/// Tokens of a frame of a video: the fewest and the most.
const FRAME_TOKENS: (u64, u64) = (128, 768);
/// Tokens of all patches in time of a video together, before the tenth that is left to the text.
const VIDEO_TOKENS: u64 = 128_000;

/// Prepares images and videos for Qwen2-VL and Qwen2.5-VL.
#[derive(Debug)]
pub struct QwenProcessor {
    resizes: bool,
    /// Pixels of an image: the fewest and the most.
    range: (u64, u64),
    patch: usize,
    temporal: usize,
    merge: usize,
    filter: Filter,
    pixels: Pixels,
    /// The ids that stand for images and videos.
    pub placeholders: Placeholders,
}

impl QwenProcessor {
    /// `newer` is Qwen2.5-VL.
    pub(super) fn new(
        json: &Map<String, Value>,
        preprocessor: &PreprocessorConfig,
        newer: bool,
    ) -> Result<Self> {
        let (vision, image, video) = if newer {
            let config = qwen2_5_vl::Config::parse(json)?;
            (config.vision, config.image_token, config.video_token)
        } else {
            let config = qwen2_vl::Config::parse(json)?;
            (config.vision, config.image_token, config.video_token)
        };
        let sizes = [
            ("patch_size", preprocessor.patch_size, vision.patch),
            ("temporal_patch_size", preprocessor.temporal_patch_size, vision.temporal),
            ("merge_size", preprocessor.merge_size, vision.merge),
        ];
        for (field, own, model) in sizes {
            if let Some(own) = own.filter(|&own| i64::from(own) != model) {
                return Err(senseless(
                    field,
                    format!("is {own} in preprocessor_config.json and {model} in config.json"),
                ));
            }
        }
        let (mut fewest, mut most) = (56 * 56, 28 * 28 * 1280);
        if let Some(Size::Range { shortest_edge, longest_edge }) = preprocessor.size {
            (fewest, most) = (shortest_edge, longest_edge);
        }
        let range = (preprocessor.min_pixels.unwrap_or(fewest), preprocessor.max_pixels.unwrap_or(most));
        if range.0 == 0 || range.0 > range.1 || range.0 > MAX_PIXELS {
            let most = range.1.min(MAX_PIXELS);
            return Err(senseless(
                "min_pixels",
                format!("is {}, expected a number between 1 and {most} (max_pixels)", range.0),
            ));
        }
        Ok(Self {
            resizes: preprocessor.do_resize.unwrap_or(true),
            range,
            patch: vision.patch as usize,
            temporal: vision.temporal as usize,
            merge: vision.merge as usize,
            filter: preprocessor.resample.unwrap_or(Filter::Bicubic),
            pixels: preprocessor.pixels(CLIP_MEAN, CLIP_STD),
            placeholders: Placeholders { image, video: Some(video) },
        })
    }

    pub(super) fn prepare(&self, media: &Media) -> Result<Prepared> {
        let frames = media.frames()?;
        let (width, height) = frames[0].dimensions();
        let factor = (self.patch * self.merge) as u32;
        let range = match media {
            Media::Image(_) => self.range,
            Media::Video { .. } => video_range(frames.len(), factor),
        };
        let (h, w) = if self.resizes {
            smart_resize(height, width, factor, range)?
        } else if height % factor == 0 && width % factor == 0 {
            (height, width)
        } else {
            let reason = format!("is off, but {width}x{height} pixels are no multiple of {factor}");
            return Err(senseless("do_resize", reason));
        };
        let mut values = Vec::new();
        for frame in frames {
            planes(&resize(frame, w, h, self.filter)?, &self.pixels, &mut values);
        }
        let seconds = match media {
            Media::Image(_) => 0.0,
            Media::Video { interval, .. } => interval * self.temporal as f64,
        };
        let size = (h as usize, w as usize);
        let (patches, grid) = patches(&values, size, self.patch, self.temporal, self.merge);
        let [t, h, w] = grid;
        let pixels = Tensor::f_from_slice(&patches)?.f_view([(t * h * w) as i64, -1])?;
        let tokens = t * h * w / (self.merge * self.merge);
        Ok(Prepared {
            kind: media.kind(),
            pixels,
            layout: Layout::Patches { grid, seconds },
            tokens,
            parts: 1,
        })
    }
}

/// Planes `[frames, 3, height, width]` as patches of `patch * patch` pixels of `temporal` frames: those of one token, a
/// block of `merge * merge`, behind each other, and in a patch channel by channel, frame by frame; and the grid in time,
/// height and width. The last frame is repeated where frames are too few.
pub fn patches(
    planes: &[f32],
    (height, width): (usize, usize),
    patch: usize,
    temporal: usize,
    merge: usize,
) -> (Vec<f32>, [usize; 3]) {
    let frames = planes.len() / (3 * height * width);
    let [t, h, w] = [frames.div_ceil(temporal), height / patch, width / patch];
    let mut patches = Vec::with_capacity(t * temporal * 3 * height * width);
    for moment in 0..t {
        for (y, x) in qwen_vit::cells(h, w, merge) {
            for channel in 0..3 {
                for frame in 0..temporal {
                    let frame = (moment * temporal + frame).min(frames - 1);
                    let plane = &planes[(frame * 3 + channel) * height * width..];
                    for row in y * patch..(y + 1) * patch {
                        patches.extend_from_slice(&plane[row * width + x * patch..][..patch]);
                    }
                }
            }
        }
    }
    (patches, [t, h, w])
}

/// Pixels of a frame of a video of so many frames, the fewest and the most; `factor` is the edge of a token.
pub fn video_range(frames: usize, factor: u32) -> (u64, u64) {
    let token = u64::from(factor).pow(2);
    let (fewest, most) = (FRAME_TOKENS.0 * token, FRAME_TOKENS.1 * token);
    let all = (VIDEO_TOKENS * token) as f64 * 0.9;
    // Two frames share a token.
    let share = all.floor() / frames.max(1) as f64 * 2.0;
    let most = (most as f64).min(share).max((fewest as f64 * 1.05).floor());
    (fewest, most as u64)
}

/// Height and width in multiples of `factor`, nearest to the image's, or where that is outside the range of pixels shrunk
/// or enlarged in proportion.
///
/// # Errors
/// [`VisionError::AspectRatio`] for an image more than 200 times as long as wide.
pub fn smart_resize(
    height: u32,
    width: u32,
    factor: u32,
    (fewest, most): (u64, u64),
) -> Result<(u32, u32), VisionError> {
    let (h, w, f) = (f64::from(height), f64::from(width), f64::from(factor));
    let ratio = h.max(w) / h.min(w);
    if ratio > f64::from(MAX_RATIO) {
        return Err(VisionError::AspectRatio { width, height, ratio, max: MAX_RATIO });
    }
    let (mut to_h, mut to_w) = ((h / f).round_ties_even() * f, (w / f).round_ties_even() * f);
    if to_h * to_w > most as f64 {
        let beta = (h * w / most as f64).sqrt();
        let shrunk = |n: f64| ((n / beta / f).floor() * f).max(f);
        (to_h, to_w) = (shrunk(h), shrunk(w));
    } else if to_h * to_w < fewest as f64 {
        let beta = (fewest as f64 / (h * w)).sqrt();
        let enlarged = |n: f64| (n * beta / f).ceil() * f;
        (to_h, to_w) = (enlarged(h), enlarged(w));
    }
    Ok((to_h as u32, to_w as u32))
}
