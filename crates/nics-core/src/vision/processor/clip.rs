//! LLaVA-1.5 (Liu et al., 2023): the shorter edge to the tower's size, then the middle cut out, as transformers'
//! `CLIPImageProcessor`; with `do_pad` first a square on the mean colour, as `LlavaImageProcessor`.

use serde_json::{Map, Value};
use tch::Tensor;

use crate::Result;
use crate::models::llava;
use crate::vision::config::{CLIP_MEAN, CLIP_STD, Pixels, PreprocessorConfig, Size, senseless};
use crate::vision::pixels::{crop, planes, square};
use crate::vision::resize::{Filter, resize};
use crate::vision::{Layout, Media, Placeholders, Prepared, RgbImage, TokenKind, VisionError};

/// Prepares images for LLaVA-1.5.
#[derive(Debug)]
pub struct ClipProcessor {
    size: Option<Size>,
    crop: Option<(u32, u32)>,
    pad: bool,
    filter: Filter,
    pixels: Pixels,
    /// Height and width that the tower takes.
    tower: (u32, u32),
    tokens: usize,
    /// The ids that stand for images.
    pub placeholders: Placeholders,
}

impl ClipProcessor {
    pub(super) fn new(json: &Map<String, Value>, preprocessor: &PreprocessorConfig) -> Result<Self> {
        let config = llava::Config::parse(json)?;
        let side = u32::try_from(config.vision.image_size).unwrap_or(0);
        let siglip = preprocessor.image_processor_type.as_deref().is_some_and(|t| t.starts_with("Siglip"));
        let (mean, std) = if siglip { ([0.5; 3], [0.5; 3]) } else { (CLIP_MEAN, CLIP_STD) };
        let crops = preprocessor.do_center_crop.unwrap_or(!siglip);
        let crop = preprocessor.crop_size.unwrap_or(Size::Edge(side)).edges("crop_size")?;
        Ok(Self {
            size: preprocessor
                .do_resize
                .unwrap_or(true)
                .then(|| preprocessor.size.unwrap_or(Size::Shortest { shortest_edge: side })),
            crop: crops.then_some(crop),
            pad: preprocessor.do_pad.unwrap_or(false),
            filter: preprocessor.resample.unwrap_or(Filter::Bicubic),
            pixels: preprocessor.pixels(mean, std),
            tower: (side, side),
            tokens: config.tokens() as usize,
            placeholders: Placeholders { image: config.image_token, video: None },
        })
    }

    pub(super) fn prepare(&self, media: &Media) -> Result<Prepared> {
        let Media::Image(_) = media else { return Err(VisionError::Unseen { kind: "video" }.into()) };
        let image = self.picture(&media.frames()?[0])?;
        if (image.height(), image.width()) != self.tower {
            let (height, width) = self.tower;
            return Err(senseless(
                "size",
                format!(
                    "makes an image of {}x{}, but the tower takes {width}x{height}",
                    image.width(),
                    image.height()
                ),
            ));
        }
        let mut values = Vec::new();
        planes(&image, &self.pixels, &mut values);
        let (height, width) = (i64::from(image.height()), i64::from(image.width()));
        let pixels = Tensor::f_from_slice(&values)?.f_view([1, 3, height, width])?;
        let (kind, layout) = (TokenKind::Image, Layout::Frames(1));
        Ok(Prepared { kind, pixels, layout, tokens: self.tokens, parts: 1 })
    }

    fn picture(&self, image: &RgbImage) -> Result<RgbImage> {
        let mut image = if self.pad {
            square(image, self.pixels.mean.map(|m| (m * 255.0) as u8))?
        } else {
            image.clone()
        };
        if let Some(size) = self.size {
            let (height, width) = match size {
                Size::Shortest { shortest_edge } | Size::Edge(shortest_edge) => {
                    shortest(image.height(), image.width(), shortest_edge)
                }
                other => other.edges("size")?,
            };
            image = resize(&image, width, height, self.filter)?;
        }
        if let Some((height, width)) = self.crop {
            // Where the image is smaller, black is around it, the larger half above and to the left.
            let start = |have: u32, want: u32| {
                if have >= want {
                    i64::from((have - want) / 2)
                } else {
                    -i64::from((want - have).div_ceil(2))
                }
            };
            let (left, top) = (start(image.width(), width), start(image.height(), height));
            image = crop(&image, left, top, width, height);
        }
        Ok(image)
    }
}

/// Height and width with the shorter edge at `edge`, the longer one in proportion, rounded down.
fn shortest(height: u32, width: u32, edge: u32) -> (u32, u32) {
    let (short, long) = (height.min(width), height.max(width));
    // In whole numbers, divided once, as the reference does.
    let long = (u64::from(edge) * u64::from(long)) as f64 / f64::from(short);
    let long = (long as u32).max(edge);
    if width <= height { (long, edge) } else { (edge, long) }
}
