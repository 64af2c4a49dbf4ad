//! From 8-bit pixels to the numbers that a tower takes: cutting, filling up, rescaling and normalising.

use image::RgbImage;
use image::imageops;

use super::VisionError;
use super::config::Pixels;
use super::picture::check_size;

/// The rectangle of `width` x `height` at `left`, `top`, which may reach beyond the image: black is there.
pub fn crop(image: &RgbImage, left: i64, top: i64, width: u32, height: u32) -> RgbImage {
    on_ground(image, -left, -top, width, height, [0; 3])
}

/// The image laid at `left`, `top` on a ground of `width` x `height` of one colour; what reaches beyond is cut off.
pub fn on_ground(
    image: &RgbImage,
    left: i64,
    top: i64,
    width: u32,
    height: u32,
    colour: [u8; 3],
) -> RgbImage {
    let mut ground = RgbImage::from_pixel(width, height, image::Rgb(colour));
    imageops::replace(&mut ground, image, left, top);
    ground
}

/// The image in the middle of a square of one colour.
///
/// # Errors
/// A square of more than [`MAX_PIXELS`](super::picture::MAX_PIXELS).
pub fn square(image: &RgbImage, colour: [u8; 3]) -> Result<RgbImage, VisionError> {
    let (width, height) = image.dimensions();
    let side = width.max(height);
    check_size("the image filled up to a square", side, side)?;
    let middle = |n: u32| i64::from((side - n) / 2);
    Ok(on_ground(image, middle(width), middle(height), side, side, colour))
}

/// Adds the image's planes `[3, height, width]` to `out`, rescaled and normalised.
///
/// In the precisions of transformers' processors: the product with the factor in double, the rest in float32.
pub fn planes(image: &RgbImage, pixels: &Pixels, out: &mut Vec<f32>) {
    let raw = image.as_raw();
    out.reserve(raw.len());
    for channel in 0..3 {
        let table = table(pixels, channel);
        out.extend(raw.iter().skip(channel).step_by(3).map(|&v| table[usize::from(v)]));
    }
}

/// What each 8-bit value of a channel becomes.
fn table(pixels: &Pixels, channel: usize) -> [f32; 256] {
    let (mean, std) = (pixels.mean[channel] as f32, pixels.std[channel] as f32);
    std::array::from_fn(|v| {
        let rescaled = match (pixels.rescale, pixels.divide) {
            (true, true) => v as f32 / 255.0,
            (true, false) => (v as f64 * pixels.factor) as f32,
            (false, _) => v as f32,
        };
        if pixels.normalize { (rescaled - mean) / std } else { rescaled }
    })
}
