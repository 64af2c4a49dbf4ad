//! InternVL2 (Chen et al., 2024): an image in up to a dozen tiles of the tower's size, in the arrangement nearest to its
//! proportions, and whole behind them, as `dynamic_preprocess` of its model card.
//!
//! A prompt has the context token once for each image and once for each frame of a video, between the `<img>` and
//! `</img>` that its template writes.

use serde_json::{Map, Value};
use tch::Tensor;

use crate::Result;
use crate::models::internvl2;
use crate::vision::config::{Pixels, PreprocessorConfig};
use crate::vision::pixels::{crop, planes};
use crate::vision::resize::{Filter, resize};
use crate::vision::{Layout, Media, Placeholders, Prepared, RgbImage, TokenKind};

/// What stands for a part of an image.
pub(super) const CONTEXT: &str = "<IMG_CONTEXT>";

/// Means and deviations of ImageNet.
const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

/// Prepares images and videos for InternVL2.
#[derive(Debug)]
pub struct InternVlProcessor {
    /// Edge of a tile, in pixels.
    edge: u32,
    tiles: (u32, u32),
    thumbnail: bool,
    /// Tokens of a tile.
    tokens: usize,
    pixels: Pixels,
    /// The id that stands for images and videos.
    pub placeholders: Placeholders,
}

impl InternVlProcessor {
    pub(super) fn new(
        json: &Map<String, Value>,
        preprocessor: &PreprocessorConfig,
        context: u32,
    ) -> Result<Self> {
        let config = internvl2::Config::parse(json)?;
        let mut pixels = preprocessor.pixels(MEAN, STD);
        // The reference divides by 255 where transformers multiplies; the file says nothing of it.
        pixels.divide = pixels.rescale && preprocessor.rescale_factor.is_none();
        Ok(Self {
            edge: config.vision.image_size as u32,
            tiles: config.tiles,
            thumbnail: config.thumbnail,
            tokens: config.tokens() as usize,
            pixels,
            placeholders: Placeholders { image: context, video: Some(context) },
        })
    }

    /// At most so many tiles of an image, at least 1.
    pub(super) fn with_most_tiles(self, most: u32) -> Self {
        let most = most.max(1);
        Self { tiles: (self.tiles.0.min(most), most), ..self }
    }

    pub(super) fn prepare(&self, media: &Media) -> Result<Prepared> {
        let frames = media.frames()?;
        let edge = self.edge;
        let pictures: Vec<RgbImage> = match media.kind() {
            TokenKind::Video => {
                frames.iter().map(|f| resize(f, edge, edge, Filter::Bicubic)).collect::<Result<_, _>>()?
            }
            _ => self.tiled(&frames[0])?,
        };
        let mut values = Vec::new();
        for picture in &pictures {
            planes(picture, &self.pixels, &mut values);
        }
        let n = pictures.len();
        let pixels =
            Tensor::f_from_slice(&values)?.f_view([n as i64, 3, i64::from(edge), i64::from(edge)])?;
        let parts = if media.kind() == TokenKind::Video { n } else { 1 };
        let (kind, layout) = (media.kind(), Layout::Frames(n));
        Ok(Prepared { kind, pixels, layout, tokens: n * self.tokens, parts })
    }

    /// The tiles row by row, then the whole where there are several.
    fn tiled(&self, image: &RgbImage) -> Result<Vec<RgbImage>> {
        let edge = self.edge;
        let (columns, rows) = arrangement(image.width(), image.height(), self.tiles, edge);
        let enlarged = resize(image, columns * edge, rows * edge, Filter::Bicubic)?;
        let mut pictures = Vec::new();
        for row in 0..rows {
            for column in 0..columns {
                let (left, top) = (i64::from(column * edge), i64::from(row * edge));
                pictures.push(crop(&enlarged, left, top, edge, edge));
            }
        }
        if self.thumbnail && pictures.len() > 1 {
            pictures.push(resize(image, edge, edge, Filter::Bicubic)?);
        }
        Ok(pictures)
    }
}

/// Columns and rows of tiles: of the arrangements with so many tiles the one whose proportion is nearest to the image's.
/// Among equals a larger one is taken when the image has more than half of its pixels.
fn arrangement(width: u32, height: u32, (fewest, most): (u32, u32), edge: u32) -> (u32, u32) {
    let mut all: Vec<(u32, u32)> =
        (1..=most).flat_map(|columns| (1..=most).map(move |rows| (columns, rows))).collect();
    all.retain(|(columns, rows)| (fewest..=most).contains(&(columns * rows)));
    all.sort_by_key(|&(columns, rows)| (columns * rows, columns));
    let proportion = f64::from(width) / f64::from(height);
    let area = f64::from(width) * f64::from(height);
    let (mut best, mut nearest) = ((1, 1), f64::INFINITY);
    for (columns, rows) in all {
        let distance = (proportion - f64::from(columns) / f64::from(rows)).abs();
        let fills = || area > 0.5 * f64::from(edge).powi(2) * f64::from(columns * rows);
        // Exact equality is meant: the same proportion in more tiles.
        #[allow(clippy::float_cmp)]
        if distance < nearest || distance == nearest && fills() {
            (best, nearest) = ((columns, rows), distance);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::arrangement;

    #[test]
    fn arrangements_follow_proportion_and_size() {
        assert_eq!(arrangement(448, 448, (1, 12), 448), (1, 1));
        assert_eq!(arrangement(1000, 1000, (1, 12), 448), (3, 3));
        assert_eq!(arrangement(800, 400, (1, 12), 448), (2, 1));
        assert_eq!(arrangement(2000, 1000, (1, 12), 448), (4, 2));
        assert_eq!(arrangement(100, 3000, (1, 12), 448), (1, 12));
        assert_eq!(arrangement(3000, 10, (1, 1), 448), (1, 1));
    }
}
