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
//!
//! ```no_run,standalone_crate
//! use nics_core::cache::DenseCache;
//! use nics_core::checkpoint::Checkpoint;
//! use nics_core::generate::{Generator, Prompt, Request, collect};
//! use nics_core::models::load_vlm;
//! use nics_core::vision::{Media, Processor, picture};
//! use tch::{Device, Kind};
//! # fn main() -> nics_core::Result<()> {
//! let checkpoint = Checkpoint::open("Qwen/Qwen2-VL-2B-Instruct")?;
//! let (processor, model) =
//!     (Processor::open(&checkpoint)?, load_vlm(&checkpoint, Device::Cpu, Kind::BFloat16)?);
//! // The chat template's rendering, with one placeholder where the image is to be.
//! let ids: Vec<u32> = vec![151652, 151655, 151653, 74785, 419, 2168, 13];
//! let image = Media::Image(picture::open("photo.jpg")?);
//! let prompt = model.embed_prompt(&processor.prompt(&ids, &[image])?)?;
//! let request = Request { prompt: Prompt::Embedded(prompt), ..Request::greedy(Vec::new(), 64, &[151645]) };
//! let mut cache = DenseCache::new();
//! let tokens = collect(&mut Generator::new(&model, &mut cache), [request], 1)?;
//! # Ok(()) }
//! ```

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
