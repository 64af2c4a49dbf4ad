//! What can be wrong with what a model is to see.

use std::path::PathBuf;

/// One variant for each thing that a caller could act on differently.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VisionError {
    /// A file that cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// Bytes that are no image, or only the beginning of one.
    #[error("{what} cannot be decoded: {reason}; expected a whole PNG, JPEG, WebP, GIF or BMP image")]
    Decode {
        /// The file, or what else it was called.
        what: String,
        /// The decoder's word.
        reason: String,
    },
    /// A text that should be a data URL and is none.
    #[error("{reason}: expected `data:image/...;base64,` and the image in base64")]
    DataUrl {
        /// What is wrong with it.
        reason: String,
    },
    /// More pixels than any model looks at.
    #[error("{what} is {width}x{height} pixels; at most {max} in all and {max_edge} along an edge are taken")]
    TooLarge {
        /// The file, or what else it was called.
        what: String,
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// The most pixels.
        max: u64,
        /// The longest edge, in pixels.
        max_edge: u32,
    },
    /// An image, a video or a target without a pixel.
    #[error("{what}: there is no pixel")]
    Empty {
        /// What was to be done.
        what: String,
    },
    /// An image that is too long for its height, or the other way round.
    #[error(
        "an image of {width}x{height} is {ratio:.0} times as long as it is wide; at most {max} times is taken"
    )]
    AspectRatio {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// Long by short side.
        ratio: f64,
        /// The most that is taken.
        max: u32,
    },
    /// Frames of one video that differ in size.
    #[error("frame {index} of the video is {found}, the first is {expected}: all frames need one size")]
    FrameSize {
        /// Which frame, from 0.
        index: usize,
        /// Width x height.
        found: String,
        /// Width x height.
        expected: String,
    },
    /// A field of preprocessor_config.json or config.json that says something senseless or not supported.
    #[error("`{field}` {reason}")]
    Field {
        /// Its name.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A prompt whose placeholders do not fit what is to be seen.
    #[error(
        "the prompt has {placeholders} {kind} placeholders (token {token}) for {media} {kind}s of {tokens} tokens in all: \
         expected {parts}, one for each to be repeated, or {tokens}"
    )]
    Placeholders {
        /// `image` or `video`.
        kind: &'static str,
        /// The placeholder's id.
        token: u32,
        /// Placeholders in the prompt.
        placeholders: usize,
        /// Images or videos given.
        media: usize,
        /// Placeholders that they need.
        parts: usize,
        /// Tokens that they take.
        tokens: usize,
    },
    /// A medium of a kind that the model does not see.
    #[error("this model sees no {kind}s")]
    Unseen {
        /// `image` or `video`.
        kind: &'static str,
    },
    /// Pixels or features of another shape than the model's.
    #[error("{what} is of shape {found:?}, expected {expected}")]
    Shape {
        /// What it is.
        what: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// What it should be.
        expected: String,
    },
}
