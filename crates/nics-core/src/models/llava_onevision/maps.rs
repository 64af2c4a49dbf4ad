//! The arithmetic of LLaVA's maps of features: how large that of an image in tiles is, how those of frames are halved, where
//! newlines stand among them.

use tch::Tensor;

use crate::Result;
use crate::vision::{VisionError, senseless};

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
    pub(super) fn shrunk(self, [height, width]: [usize; 2]) -> Option<[usize; 2]> {
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
}

/// Rows and columns of the margins above and left of an image in the map of its tiles (those below and right are the
/// same): the side in which the image is relatively shorter was filled up.
pub(super) fn margins([height, width]: [usize; 2], original: [usize; 2]) -> [usize; 2] {
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
    pub(super) fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "bilinear" => Self::Bilinear,
            "average" => Self::Average,
            "max" => Self::Max,
            other => {
                let reason = format!("is `{other}`, expected `bilinear`, `average` or `max`");
                return Err(senseless("mm_spatial_pool_mode", reason));
            }
        })
    }

    /// Edge of a map of this edge after halving.
    pub fn half(self, side: usize) -> usize {
        if self == Self::Bilinear { side.div_ceil(2) } else { side / 2 }
    }

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
                let half = self.half(side as usize) as i64;
                maps.f_upsample_bilinear2d([half, half], false, None, None)?
            }
            Self::Average => maps.f_avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None)?,
            Self::Max => maps.f_max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false)?,
        };
        Ok(maps.f_permute([0, 2, 3, 1])?.f_flatten(1, 2)?)
    }
}

impl Newlines {
    pub(super) fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "grid" => Self::Grid,
            "frame" => Self::Frame,
            "one_token" => Self::Video,
            "no_token" => Self::None,
            other => {
                let reason = format!("is `{other}`, expected `grid`, `frame`, `one_token` or `no_token`");
                return Err(senseless("mm_newline_position", reason));
            }
        })
    }

    /// Tokens of a video whose frames are maps of `side * side`.
    pub fn tokens(self, frames: usize, side: usize) -> usize {
        match self {
            Self::Grid => frames * side * (side + 1),
            Self::Frame => frames * (side * side + 1),
            Self::Video => frames * side * side + 1,
            Self::None => frames * side * side,
        }
    }

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
