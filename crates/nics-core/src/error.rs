//! The one error type that the core's operations return.

use crate::checkpoint::CheckpointError;
use crate::checkpoint::torch_file::Refusal;
use crate::template::TemplateError;
use crate::tokenizer::TokenizerError;
use crate::vision::VisionError;

/// Result of the core's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in the core: one variant for each thing that a caller could act on differently.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A checkpoint is missing, incomplete, damaged or of another architecture.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A file of `torch.save` that is damaged, or asks for more than values and tensors.
    #[error("{}: refused: {refusal}", path.display())]
    Refused {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        refusal: Refusal,
    },
    /// A tokenizer is missing, damaged or asked for what it cannot do.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A chat template is malformed or refuses the conversation.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// An image, a video or their place in a prompt is not what a model can see.
    #[error(transparent)]
    Vision(#[from] VisionError),
    /// A caller handed over something that the operation does not take: shape, range or combination.
    #[error("{0}")]
    Input(String),
    /// A field of a request is missing, out of range or not supported; the message names it too.
    #[error("{message}")]
    Field {
        /// Its name.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// A prompt and what may follow it do not fit the model's context or the cache.
    #[error(
        "{need} tokens are needed but {what} holds {max}: shorten the prompt or ask for fewer new tokens"
    )]
    ContextOverflow {
        /// Tokens that the request needs.
        need: usize,
        /// Tokens that there is room for.
        max: usize,
        /// What is too small, e.g. `the model's context`.
        what: &'static str,
    },
    /// A field of a configuration is missing or senseless.
    #[error("{0}")]
    Config(String),
    /// The checkpoint is of a family that nobody here reads.
    #[error("architecture `{found}` is not supported; known are {known}")]
    UnsupportedArchitecture {
        /// What the checkpoint names.
        found: String,
        /// What there is code for.
        known: String,
    },
    /// Another error, with the file that it is about.
    #[error("{}: {error}", path.display())]
    InFile {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        error: Box<Error>,
    },
    /// A device was asked for that is not there.
    #[error("{0}")]
    Device(String),
    /// Values that are not finite where finite ones are needed.
    #[error("{what} has values that are not finite ({detail}); the checkpoint or its dtype is at fault")]
    NotFinite {
        /// The tensor or step concerned.
        what: String,
        /// What was found.
        detail: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    // Not `transparent`, which hides the inner error from whoever looks through the causes for an exit code.
    /// Files, shards, logs, the hub; an interrupt among them.
    #[error("{0}")]
    Base(#[from] nics_base::Error),
    /// Training.
    #[error("{0}")]
    Train(#[source] Box<crate::train::TrainError>),
    /// libtorch refused an operation; past the validated boundary this is a defect of ours.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
}

impl From<crate::train::TrainError> for Error {
    fn from(e: crate::train::TrainError) -> Self {
        Self::Train(Box::new(e))
    }
}

impl Error {
    /// A refused input, from any displayable reason.
    pub fn input(reason: impl std::fmt::Display) -> Self {
        Self::Input(reason.to_string())
    }

    /// The same error with the file that it is about.
    #[must_use]
    pub fn in_file(self, path: &std::path::Path) -> Self {
        Self::InFile { path: path.to_owned(), error: Box::new(self) }
    }
}

/// libtorch's messages carry a C++ stack trace after their first line.
fn first_line(e: &tch::TchError) -> String {
    e.to_string().lines().next().unwrap_or_default().to_owned()
}
