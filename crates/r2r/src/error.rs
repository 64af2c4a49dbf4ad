//! What can go wrong in this crate, one variant for each thing that a caller could act on differently.

use std::path::PathBuf;

use crate::checkpoint::Refusal;

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in routing, training and labelling.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A router of a type that is not read here.
    #[error("router type `{found}` is not known; known are {known}{note}")]
    UnknownArchitecture {
        /// What the checkpoint names.
        found: String,
        /// What there is code for.
        known: String,
        /// Why this one is left out, where there is a reason; may be empty.
        note: &'static str,
    },
    /// A setting is missing or senseless.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// Its name, e.g. `hidden_dims`.
        field: String,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// Router and small model differ in width.
    #[error(
        "the router takes hidden states of width {router}, the small model gives {slm}: it is another model's router"
    )]
    HiddenSizeMismatch {
        /// What the router takes.
        router: i64,
        /// What it was given.
        slm: i64,
    },
    /// The router asks for more logits than the vocabulary has.
    #[error(
        "the router takes the {k} largest logits, the vocabulary has {vocab}: it is another model's router"
    )]
    TopKTooLarge {
        /// Logits that the router takes.
        k: i64,
        /// Size of the vocabulary.
        vocab: i64,
    },
    /// A feature holds NaN or infinity.
    #[error("{what} has values that are not finite; the small model or its dtype is at fault")]
    NonFiniteFeatures {
        /// Which feature.
        what: &'static str,
    },
    /// A threshold that no probability can be held against.
    #[error("the threshold is {found}, expected a number from 0 to 1")]
    ThresholdOutOfRange {
        /// Its value.
        found: f64,
    },
    /// Labels of one class alone.
    #[error(
        "{positive} of {total} labels are divergent; training needs both kinds, so look at the judge's replies"
    )]
    NoPositiveLabels {
        /// Labels that say divergent.
        positive: usize,
        /// All labels.
        total: usize,
    },
    /// A router reads token embeddings and none were given.
    #[error(
        "the router reads the small model's token embeddings, which its checkpoint does not hold: give the embedding \
         table of {model}"
    )]
    MissingEmbedding {
        /// The model that the checkpoint names, or a description.
        model: String,
    },
    /// A router was made for another tokenizer.
    #[error(
        "the router was made for a tokenizer with hash {router}, {model} has {found}: tokens would not mean the same"
    )]
    TokenizerMismatch {
        /// The hash in the router's file.
        router: String,
        /// The model that it was held against.
        model: String,
        /// That model's hash.
        found: String,
    },
    /// An official checkpoint that is not what it should be.
    #[error("{}: refused: {refusal}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        refusal: Refusal,
    },
    /// A file of ours is damaged or of another version.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A sequence without a token to continue from.
    #[error("the prompt of sequence {seq} is empty: it has no token to continue from")]
    EmptyPrompt {
        /// The sequence.
        seq: u64,
    },
    /// A model's tokenizer has no token for the start or the end of thinking.
    #[error("the tokenizer has no token {token:?}, which marks the thinking part; name the model's own")]
    ThinkTokenUnknown {
        /// The token's text.
        token: String,
    },
    /// A server did not answer in time.
    #[error("{url} gave no answer within {seconds} s, in {calls} calls")]
    RemoteTimeout {
        /// The server.
        url: String,
        /// Calls made.
        calls: usize,
        /// The time that each had.
        seconds: f64,
    },
    /// A server cannot be reached, or breaks the connection.
    #[error("{url} cannot be reached, in {calls} calls: {reason}")]
    RemoteUnreachable {
        /// The server.
        url: String,
        /// Calls made.
        calls: usize,
        /// The last call's failure.
        reason: String,
    },
    /// A server says no.
    #[error("{url} refuses with status {status}, in {calls} calls: {message}")]
    RemoteRefused {
        /// The server.
        url: String,
        /// Calls made.
        calls: usize,
        /// Its status.
        status: u16,
        /// Its words.
        message: String,
    },
    /// A server's reply makes no sense.
    #[error("{url} gave a reply that makes no sense, in {calls} calls: {reason}")]
    RemoteProtocol {
        /// The server.
        url: String,
        /// Calls made.
        calls: usize,
        /// What is wrong with the last reply.
        reason: String,
    },
    /// A server's model has another tokenizer than the small model.
    #[error(
        "the model on {url} has another tokenizer than the small model: {text:?} is {theirs:?} there and {ours:?} here, so \
         tokens would not mean the same"
    )]
    RemoteTokenizer {
        /// The server.
        url: String,
        /// The probe.
        text: String,
        /// Its ids there.
        theirs: Vec<u32>,
        /// Its ids here.
        ours: Vec<u32>,
    },
    /// Labels cannot be made, or are not what they should be.
    #[error("{0}")]
    Label(#[from] crate::labels::pipeline::LabelError),
    /// A caller handed over something that the operation does not take.
    #[error("{0}")]
    Input(String),
    /// The core.
    #[error("{0}")]
    Core(#[from] nics_core::Error),
    /// Files and artefacts.
    #[error("{0}")]
    Base(#[from] nics_base::Error),
}

impl Error {
    /// A setting that makes no sense.
    pub(crate) fn setting(
        field: &str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Self {
        Self::Setting { field: field.to_owned(), found: found.to_string(), expected: expected.to_string() }
    }
}

impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        Self::Core(e.into())
    }
}

impl From<nics_core::checkpoint::CheckpointError> for Error {
    fn from(e: nics_core::checkpoint::CheckpointError) -> Self {
        Self::Core(e.into())
    }
}

impl From<nics_core::train::TrainError> for Error {
    fn from(e: nics_core::train::TrainError) -> Self {
        Self::Core(e.into())
    }
}
