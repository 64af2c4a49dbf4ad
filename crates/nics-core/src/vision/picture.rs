//! Images from files, bytes and data URLs.
//!
//! As transformers' `load_image`: the orientation that a camera noted is applied, and what remains is RGB. Transparency is
//! dropped, not blended: a transparent pixel shows the colour that it has beneath. 16-bit channels keep their high byte.

use std::io::Cursor;
use std::path::Path;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, RgbImage};

use super::VisionError;

/// The most pixels that are decoded, and that an image is enlarged to.
pub const MAX_PIXELS: u64 = 178_956_970;
/// The longest edge that is decoded, in pixels.
pub const MAX_EDGE: u32 = (1 << 16) - 1;
/// The most bytes that a file or a data URL may have.
const MAX_BYTES: u64 = 256 << 20;

/// The image in a file.
///
/// # Errors
/// A file that cannot be read, that is no image, or that has more than [`MAX_PIXELS`].
pub fn open(path: impl AsRef<Path>) -> Result<RgbImage, VisionError> {
    let path = path.as_ref();
    let unreadable = |source| VisionError::Read { path: path.to_owned(), source };
    let refused = |reason: String| VisionError::Decode { what: path.display().to_string(), reason };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        // A pipe would block.
        return Err(refused("it is no regular file".into()));
    }
    let size = metadata.len();
    if size > MAX_BYTES {
        return Err(refused(format!("it has {size} bytes, more than the {MAX_BYTES} that are read")));
    }
    decode_named(&std::fs::read(path).map_err(unreadable)?, &path.display().to_string())
}

/// The image in the bytes of a file.
///
/// # Errors
/// As [`open`].
pub fn decode(bytes: &[u8]) -> Result<RgbImage, VisionError> {
    decode_named(bytes, "the image")
}

/// The image in a data URL, `data:image/png;base64,…`, as OpenAI's API carries it.
///
/// # Errors
/// A text that is no such URL, and as [`open`].
pub fn from_data_url(url: &str) -> Result<RgbImage, VisionError> {
    // The padding is often left away.
    const FORGIVING: GeneralPurpose = GeneralPurpose::new(
        &alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let refused = |reason: String| VisionError::DataUrl { reason };
    let start: String = url.chars().take(24).collect();
    let rest = url.strip_prefix("data:").ok_or_else(|| refused(format!("`{start}…` is no data URL")))?;
    let (head, body) = rest.split_once(',').ok_or_else(|| refused(format!("`{start}…` has no comma")))?;
    let mut parts = head.split(';');
    let kind = parts.next().unwrap_or_default();
    if !kind.starts_with("image/") {
        return Err(refused(format!("the data URL is of type `{kind}`")));
    }
    if !parts.any(|part| part == "base64") {
        return Err(refused("the data URL is not in base64".into()));
    }
    if body.len() as u64 > MAX_BYTES {
        return Err(refused(format!("the data URL has more than {MAX_BYTES} characters")));
    }
    let body: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let bytes = FORGIVING.decode(body).map_err(|e| refused(format!("the data URL is damaged ({e})")))?;
    decode_named(&bytes, "the image of the data URL")
}

/// Refuses a size beyond [`MAX_PIXELS`] or [`MAX_EDGE`].
pub(super) fn check_size(what: &str, width: u32, height: u32) -> Result<(), VisionError> {
    if u64::from(width) * u64::from(height) > MAX_PIXELS || width.max(height) > MAX_EDGE {
        let (what, max, max_edge) = (what.to_owned(), MAX_PIXELS, MAX_EDGE);
        return Err(VisionError::TooLarge { what, width, height, max, max_edge });
    }
    Ok(())
}

fn decode_named(bytes: &[u8], what: &str) -> Result<RgbImage, VisionError> {
    let failed =
        |e: &dyn std::fmt::Display| VisionError::Decode { what: what.to_owned(), reason: e.to_string() };
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| failed(&e))?;
    let mut decoder = reader.into_decoder().map_err(|e| failed(&e))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(VisionError::Empty { what: what.to_owned() });
    }
    check_size(what, width, height)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| failed(&e))?;
    image.apply_orientation(orientation);
    Ok(flatten(image))
}

/// RGB of 8 bits: the alpha channel is left out, 16-bit channels lose their low byte.
fn flatten(image: DynamicImage) -> RgbImage {
    let (width, height) = (image.width(), image.height());
    let high = |values: Vec<u16>, channels: usize| -> Vec<u8> {
        values
            .chunks_exact(channels)
            .flat_map(|p| if channels < 3 { [p[0]; 3] } else { [p[0], p[1], p[2]] })
            .map(|v| (v >> 8) as u8)
            .collect()
    };
    let pixels = match image {
        DynamicImage::ImageLuma16(i) => high(i.into_raw(), 1),
        DynamicImage::ImageLumaA16(i) => high(i.into_raw(), 2),
        DynamicImage::ImageRgb16(i) => high(i.into_raw(), 3),
        DynamicImage::ImageRgba16(i) => high(i.into_raw(), 4),
        other => return other.into_rgb8(),
    };
    RgbImage::from_raw(width, height, pixels).unwrap_or_else(|| RgbImage::new(width, height))
}
