//! What models see: images in, pixels out, and their tokens among those of the text.
//!
//! | step | here |
//! |---|---|
//! | a file, bytes or a data URL to RGB | [`picture`] |
//! | resizing as Pillow does it | [`resize`] |
//! | a family's crops, tiles or patches | [`Processor`] |
//! | frames of a video to look at | [`frames`] |
//! | placeholders among the ids | [`Placeholders`], [`MediaPrompt`] |
//!
//! The towers that take the pixels are in [`crate::models`]; [`crate::models::load_vlm`] loads them with their language
//! model.

mod config;
mod error;
pub mod frames;
mod media;
pub mod picture;
mod pixels;
mod processor;
pub mod resize;

pub use config::{CLIP_MEAN, CLIP_STD, Pixels, PreprocessorConfig, Size};
pub(crate) use config::{object, senseless};
pub use error::VisionError;
pub use image::RgbImage;
pub use media::{Layout, Media, MediaPrompt, Placed, Placeholders, Prepared, TokenKind};
pub use processor::{
    ClipProcessor, InternVlProcessor, OneVisionProcessor, Processor, QwenProcessor, patches, smart_resize,
    video_range,
};
