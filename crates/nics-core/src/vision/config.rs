//! preprocessor_config.json: how a checkpoint's images are prepared.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::VisionError;
use super::resize::Filter;
use crate::checkpoint::{Checkpoint, read_object};
use crate::{Error, Result};

/// Means and deviations of CLIP's training images: transformers' default.
pub const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// See [`CLIP_MEAN`].
pub const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// The fields of preprocessor_config.json that some family reads, under transformers' names.
#[derive(Debug, Clone, Default, Deserialize)]
#[allow(missing_docs)]
pub struct PreprocessorConfig {
    pub do_resize: Option<bool>,
    pub size: Option<Size>,
    pub resample: Option<Filter>,
    pub do_center_crop: Option<bool>,
    pub crop_size: Option<Size>,
    pub do_rescale: Option<bool>,
    pub rescale_factor: Option<f64>,
    pub do_normalize: Option<bool>,
    pub image_mean: Option<[f64; 3]>,
    pub image_std: Option<[f64; 3]>,
    pub do_pad: Option<bool>,
    pub image_grid_pinpoints: Option<Vec<[u32; 2]>>,
    pub min_pixels: Option<u64>,
    pub max_pixels: Option<u64>,
    pub patch_size: Option<u32>,
    pub temporal_patch_size: Option<u32>,
    pub merge_size: Option<u32>,
    pub image_processor_type: Option<String>,
}

/// A size as transformers writes it: a number, or an object of edges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// Both edges.
    Both {
        /// In pixels.
        height: u32,
        /// In pixels.
        width: u32,
    },
    /// For Qwen's processors: numbers of pixels.
    Range {
        /// The fewest pixels.
        shortest_edge: u64,
        /// The most pixels.
        longest_edge: u64,
    },
    /// The shorter edge; the other keeps the proportion.
    Shortest {
        /// In pixels.
        shortest_edge: u32,
    },
    /// A number alone: the processor decides what it means.
    Edge(u32),
}

/// What is done with 8-bit values.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// Whether values are multiplied by `factor`.
    pub rescale: bool,
    /// Usually 1/255.
    pub factor: f64,
    /// Whether they are divided by 255 in float32 instead, which differs in the last bit.
    pub divide: bool,
    /// Whether `mean` is subtracted and `std` divided by.
    pub normalize: bool,
    /// Of each channel.
    pub mean: [f64; 3],
    /// Of each channel.
    pub std: [f64; 3],
}

impl PreprocessorConfig {
    /// Reads the file of a checkpoint; every field has a default, and so has the file.
    ///
    /// # Errors
    /// A file that cannot be read, or a field of another type.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let Some(path) = checkpoint.try_file("preprocessor_config.json")? else { return Ok(Self::default()) };
        let json = read_object(&path, "the preprocessor's configuration", crate::checkpoint::MAX_CONFIG)?;
        Self::parse(json).map_err(|e| e.in_file(&path))
    }

    /// Reads the contents of the file.
    ///
    /// # Errors
    /// A field of another type than transformers writes.
    pub fn parse(json: Map<String, Value>) -> Result<Self> {
        let config: Self = serde_path_to_error::deserialize(Value::Object(json))
            .map_err(|e| Error::Config(format!("`{}`: {}", e.path(), e.inner())))?;
        let factor = config.rescale_factor.unwrap_or(1.0);
        let std = config.image_std.unwrap_or([1.0; 3]);
        if !(factor.is_finite() && factor > 0.0) {
            return Err(senseless("rescale_factor", format!("is {factor}, expected a positive number")));
        }
        if std.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
            return Err(senseless("image_std", format!("is {std:?}, expected three positive numbers")));
        }
        Ok(config)
    }

    /// What is done with 8-bit values, given the family's mean and deviation.
    pub fn pixels(&self, mean: [f64; 3], std: [f64; 3]) -> Pixels {
        Pixels {
            rescale: self.do_rescale.unwrap_or(true),
            factor: self.rescale_factor.unwrap_or(1.0 / 255.0),
            divide: false,
            normalize: self.do_normalize.unwrap_or(true),
            mean: self.image_mean.unwrap_or(mean),
            std: self.image_std.unwrap_or(std),
        }
    }
}

impl Size {
    /// Height and width of a size that names both edges or a square.
    ///
    /// # Errors
    /// A size of another kind, or one without a pixel.
    pub fn edges(self, field: &'static str) -> Result<(u32, u32)> {
        let (height, width) = match self {
            Self::Both { height, width } => (height, width),
            Self::Edge(edge) | Self::Shortest { shortest_edge: edge } => (edge, edge),
            Self::Range { .. } => {
                return Err(senseless(field, format!("is {self:?}, expected `height` and `width`")));
            }
        };
        // Larger than any tower, and small enough for what is computed with it.
        if !(1..=1 << 14).contains(&height) || !(1..=1 << 14).contains(&width) {
            return Err(senseless(field, format!("is {height}x{width}, expected 1 to 16384 pixels an edge")));
        }
        Ok((height, width))
    }
}

/// A field that says something senseless.
pub(crate) fn senseless(field: &'static str, reason: impl Into<String>) -> Error {
    Error::Vision(VisionError::Field { field, reason: reason.into() })
}

/// An object within a configuration.
pub(crate) fn object<'a>(
    json: &'a Map<String, Value>,
    field: &'static str,
) -> Result<&'a Map<String, Value>> {
    match json.get(field) {
        Some(Value::Object(map)) => Ok(map),
        None | Some(Value::Null) => Err(senseless(field, "is missing from config.json")),
        Some(other) => Err(senseless(field, format!("is {other}, expected an object"))),
    }
}
