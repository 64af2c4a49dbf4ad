//! Resizing as Pillow does it, to the bit: separable filters in 8-bit fixed point, first along rows, then along columns,
//! with 8-bit values between the passes.
//!
//! Of an axis of `n` samples brought to `m`, output `x` is a weighted sum of the inputs around `(x + ½) n/m`. A smaller
//! output widens the filter by `n/m`, so that no input is passed over. Weights are normalised in double precision and
//! rounded to 22 bits.

use image::RgbImage;
use serde::Deserialize;

use super::VisionError;
use super::picture::check_size;

/// The filters of Pillow's `Resampling`, by the numbers that preprocessor_config.json writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u64")]
pub enum Filter {
    /// 1: a sinc of three lobes.
    Lanczos,
    /// 2: a triangle.
    Bilinear,
    /// 3: Keys' cubic with `a = -½`.
    Bicubic,
    /// 4: the plain mean.
    Box,
    /// 5: Hamming's window.
    Hamming,
}

impl TryFrom<u64> for Filter {
    type Error = String;

    fn try_from(number: u64) -> Result<Self, String> {
        Ok(match number {
            1 => Self::Lanczos,
            2 => Self::Bilinear,
            3 => Self::Bicubic,
            4 => Self::Box,
            5 => Self::Hamming,
            other => {
                return Err(format!(
                    "resample {other} is not known: expected 1 (lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 \
                     (hamming)"
                ));
            }
        })
    }
}

impl Filter {
    /// Half the width of the filter at a scale of one.
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Bicubic => 2.0,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Box => 0.5,
        }
    }

    fn at(self, x: f64) -> f64 {
        let sinc = |x: f64| {
            if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) }
        };
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Bilinear if x.abs() < 1.0 => 1.0 - x.abs(),
            Self::Bicubic => {
                const A: f64 = -0.5;
                let x = x.abs();
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
            Self::Box if x > -0.5 && x <= 0.5 => 1.0,
            Self::Hamming => {
                let x = x.abs();
                if x >= 1.0 { 0.0 } else { sinc(x) * (0.54 + 0.46 * (x * std::f64::consts::PI).cos()) }
            }
            _ => 0.0,
        }
    }
}

/// Bits behind the point of a weight: what 32 bits leave beside 8-bit values and two bits of overshoot.
const PRECISION: u32 = 32 - 8 - 2;

/// The weights of one output sample: the first input and one weight for each from there on.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// The weights of every output sample of an axis of `from` samples brought to `to`.
fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    (0..to)
        .map(|x| {
            let centre = (x as f64 + 0.5) * scale;
            // Truncation towards zero, as a C cast does.
            let first = ((centre - support + 0.5) as i64).max(0) as usize;
            let last = ((centre + support + 0.5) as i64).min(from as i64) as usize;
            let raw: Vec<f64> =
                (first..last).map(|j| filter.at((j as f64 - centre + 0.5) * (1.0 / filter_scale))).collect();
            let sum: f64 = raw.iter().sum();
            let weights = raw
                .into_iter()
                .map(|w| {
                    let w = if sum == 0.0 { w } else { w * (1.0 / sum) } * f64::from(1 << PRECISION);
                    (if w < 0.0 { w - 0.5 } else { w + 0.5 }) as i32
                })
                .collect();
            Taps { first, weights }
        })
        .collect()
}

/// The 8-bit value of a sum of weights times values.
fn clip(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Half a unit, so that the shift rounds.
const HALF: i32 = 1 << (PRECISION - 1);

/// The image at `width` x `height`, in pixels.
///
/// # Errors
/// An image or a target without a pixel, or one of more than [`MAX_PIXELS`](super::picture::MAX_PIXELS).
pub fn resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> Result<RgbImage, VisionError> {
    let (from_width, from_height) = image.dimensions();
    if [from_width, from_height, width, height].contains(&0) {
        return Err(VisionError::Empty {
            what: format!("resizing {from_width}x{from_height} to {width}x{height}"),
        });
    }
    // Between the passes, too.
    check_size("the resized image", width, height.max(from_height))?;
    let mut pixels = image.as_raw().clone();
    if width != from_width {
        pixels = along_rows(&pixels, from_width as usize, &taps(from_width as usize, width as usize, filter));
    }
    if height != from_height {
        pixels = along_columns(&pixels, width as usize, &taps(from_height as usize, height as usize, filter));
    }
    RgbImage::from_raw(width, height, pixels)
        .ok_or_else(|| VisionError::Empty { what: format!("resizing to {width}x{height}") })
}

fn along_rows(pixels: &[u8], width: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = Vec::with_capacity(pixels.len() / width * taps.len());
    for row in pixels.chunks_exact(width * 3) {
        for tap in taps {
            let mut sums = [HALF; 3];
            for (pixel, &weight) in row[tap.first * 3..].chunks_exact(3).zip(&tap.weights) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(value) * weight;
                }
            }
            out.extend(sums.map(clip));
        }
    }
    out
}

fn along_columns(pixels: &[u8], width: usize, taps: &[Taps]) -> Vec<u8> {
    let stride = width * 3;
    let mut out = Vec::with_capacity(stride * taps.len());
    let mut sums = vec![0i32; stride];
    for tap in taps {
        sums.fill(HALF);
        for (row, &weight) in pixels[tap.first * stride..].chunks_exact(stride).zip(&tap.weights) {
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += i32::from(value) * weight;
            }
        }
        out.extend(sums.iter().map(|&sum| clip(sum)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_stay_inside() {
        for filter in [Filter::Lanczos, Filter::Bilinear, Filter::Bicubic, Filter::Box, Filter::Hamming] {
            for (from, to) in [(1, 7), (7, 1), (5, 5), (40, 28), (20, 28), (384, 27)] {
                for tap in taps(from, to, filter) {
                    assert!(tap.first + tap.weights.len() <= from);
                    let sum: i32 = tap.weights.iter().sum();
                    assert!(
                        (sum - (1 << PRECISION)).abs() <= tap.weights.len() as i32,
                        "{filter:?} {from} {to}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_plain_image_stays_plain() {
        let plain = RgbImage::from_pixel(13, 9, image::Rgb([3, 200, 255]));
        let out = resize(&plain, 29, 4, Filter::Bicubic).unwrap();
        assert!(out.pixels().all(|p| p.0 == [3, 200, 255]));
        assert!(resize(&plain, 0, 4, Filter::Bicubic).is_err());
    }
}
