//! What can go wrong in this crate, one variant for each thing that a caller could act on differently.

use std::path::PathBuf;

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in quantization, calibration, data preparation and export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is missing or senseless.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// Its name, e.g. `bits`.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Groups do not fill the input of a layer.
    #[error(
        "groups of {group} weights do not divide the {input} inputs of {name}; choose a divisor of {input}, or -1 for one group a row"
    )]
    GroupDoesNotDivide {
        /// The layer.
        name: String,
        /// Weights that share a scale.
        group: i64,
        /// Inputs of the layer.
        input: i64,
    },
    /// Values that are no numbers.
    #[error(
        "layer {layer}, sample {sample}: {tensor} has values that are not finite; leave the sample out, or load the model in another dtype"
    )]
    NonFinite {
        /// The layer, from 0.
        layer: usize,
        /// What is not finite.
        tensor: String,
        /// The sample, from 0.
        sample: usize,
    },
    /// Every candidate of an operator has a loss that is no number.
    #[error("layer {layer}: no scale of {operator} has a loss that is a number; look at the model's weights")]
    NoCandidate {
        /// The layer, from 0.
        layer: usize,
        /// The first linear layer of the operator.
        operator: String,
    },
    /// A modality was asked for that no sample has.
    #[error(
        "no sample has a position of modality `{0}`; give samples that have, or calibrate with balance off"
    )]
    EmptyModality(String),
    /// No sample has an answer.
    #[error(
        "the labels of all {samples} samples are ignored, so that there is no loss to balance with; give samples with answers, or calibrate with balance off"
    )]
    AllLabelsIgnored {
        /// How many there are.
        samples: usize,
    },
    /// An item of a data file is not what it should be.
    #[error("{}, line {line}: {reason}", path.display())]
    DataItemInvalid {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// There is nothing to calibrate with.
    #[error("{0}")]
    NoData(String),
    /// Scales were searched for another model, other data or other settings.
    #[error("{}: its {what} is {found}, expected {expected}; calibrate again, into another folder", path.display())]
    ScaleModelMismatch {
        /// The artefact.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What the artefact says.
        found: String,
        /// What is asked for.
        expected: String,
    },
    /// An artefact is damaged, or not what its name says.
    #[error("{}: {reason}", path.display())]
    Artefact {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A `quantization_config` that asks for something that is not read here.
    #[error("{}: `quantization_config`: {field} is {found}, expected {expected}", path.display())]
    Quantization {
        /// The config.json.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What is read.
        expected: String,
    },
    /// A quantized layer whose tensors do not fit each other, or the model.
    #[error("{layer} in {}: {reason}", dir.display())]
    BadPackedFile {
        /// The checkpoint.
        dir: PathBuf,
        /// The layer.
        layer: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A memory limit that not even one sample at a time fits.
    #[error(
        "a limit of {limit} bytes does not hold a calibration that takes {needed} one sample at a time; raise --max-memory, or take fewer or shorter samples"
    )]
    OutOfMemoryBudget {
        /// Bytes that are allowed.
        limit: u64,
        /// Bytes that the smallest step takes.
        needed: u64,
    },
    /// Scales, masks or tensors that do not fit each other.
    #[error("{0}")]
    Input(String),
    /// The core.
    #[error(transparent)]
    Core(#[from] nics_core::Error),
    /// Benchmarks.
    #[error(transparent)]
    Data(#[from] nics_datasets::DatasetError),
    /// Artefacts, files, interrupts.
    #[error(transparent)]
    Base(#[from] nics_base::Error),
    /// libtorch.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

impl From<nics_core::checkpoint::CheckpointError> for Error {
    fn from(e: nics_core::checkpoint::CheckpointError) -> Self {
        Self::Core(e.into())
    }
}

/// Plug-ins and projections speak the core's errors.
impl From<Error> for nics_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Core(e) => e,
            Error::Base(e) => Self::Base(e),
            Error::Torch(e) => Self::Torch(e),
            e => Self::input(e),
        }
    }
}
