//! Files of every kind against what Pillow reads from them, and resizing by every filter.

use nics_core::golden::Golden;
use nics_core::vision::resize::{Filter, resize};
use nics_core::vision::{RgbImage, VisionError, picture};
use tch::Tensor;

use super::kit::root;

fn golden() -> Golden {
    Golden::at(root().join("pictures"))
}

fn image(t: &Tensor) -> RgbImage {
    let (height, width, _) = t.size3().unwrap();
    let bytes: Vec<u8> = Vec::try_from(t.contiguous().flatten(0, -1)).unwrap();
    RgbImage::from_raw(width as u32, height as u32, bytes).unwrap()
}

#[test]
fn files_of_every_kind() {
    let mut seen = 0;
    for (name, expected) in golden().tensors("expected.safetensors").unwrap() {
        if name.starts_with("resize.") {
            continue;
        }
        let (found, expected) =
            (picture::open(root().join("pictures").join(&name)).unwrap(), image(&expected));
        assert_eq!(found.dimensions(), expected.dimensions(), "{name}");
        let off = found.as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
        // Decoders of JPEG round differently.
        let allowed = if name.contains(".jpg") { 3 } else { 0 };
        assert!(off <= Some(allowed), "{name}: off by {off:?}");
        seen += 1;
    }
    assert!(seen > 10, "{seen} files");
}

#[test]
fn every_filter_resizes_to_the_bit() {
    let original = picture::open(root().join("pictures/rgb.png")).unwrap();
    let mut seen = 0;
    for (name, expected) in golden().tensors("expected.safetensors").unwrap() {
        let Some(rest) = name.strip_prefix("resize.") else { continue };
        let filter = Filter::try_from(rest.split('.').next().unwrap().parse::<u64>().unwrap()).unwrap();
        let expected = image(&expected);
        let (width, height) = expected.dimensions();
        assert!(resize(&original, width, height, filter).unwrap() == expected, "{name}: {filter:?}");
        seen += 1;
    }
    assert_eq!(seen, 30);
}

#[test]
fn sizes_have_bounds() {
    let line = RgbImage::new(2, 60_000);
    let e = resize(&line, 16_384, 16_384, Filter::Bicubic).unwrap_err();
    assert!(matches!(e, VisionError::TooLarge { .. }), "{e}");
    // A PNG that claims a size which no memory holds.
    let mut bytes = std::fs::read(root().join("pictures/rgb.png")).unwrap();
    bytes[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    assert!(picture::decode(&bytes).is_err());
}
