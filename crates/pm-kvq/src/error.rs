//! What can go wrong in this crate, one variant for each thing that a caller could act on differently.

use crate::Bits;

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in quantization, caching, calibration and allocation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A width that no code is stored in.
    #[error("a width of {0} bits; expected 2, 4, 8 or 16")]
    Width(u32),
    /// Groups do not fill the last axis.
    #[error(
        "groups of {group} values do not divide the head's {head_dim} channels; choose a divisor of {head_dim}"
    )]
    GroupMismatch {
        /// Channels of a head.
        head_dim: i64,
        /// Values that share a scale.
        group: i64,
    },
    /// A setting is missing or senseless.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// Its name, e.g. `window`.
        field: String,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The budget of a layer is used up and its width cannot be halved again.
    #[error("layer {layer}: the budget is full at {tokens} tokens of {} bits; raise the budget or allow a lower width", bits.get())]
    CacheExhausted {
        /// The layer, from 0.
        layer: usize,
        /// Tokens that it keeps.
        tokens: usize,
        /// Their width.
        bits: Bits,
    },
    /// A budget that the exact tokens alone do not fit.
    #[error(
        "a budget of {given} bytes a layer does not hold its sink and window, which take {needed}; raise it or take a smaller window"
    )]
    BudgetTooSmallForWindow {
        /// Bytes of sink and window.
        needed: u64,
        /// Bytes of the budget.
        given: u64,
    },
    /// A budget that not even the narrowest widths fit.
    #[error(
        "a budget of {given:.0} bytes is infeasible: the narrowest widths take {needed:.0}; raise it or allow narrower widths"
    )]
    InfeasibleBudget {
        /// Bytes of the narrowest widths.
        needed: f64,
        /// Bytes of the budget.
        given: f64,
    },
    /// Keys or values that are no numbers.
    #[error("layer {layer}: keys or values are not finite; the model or its dtype is at fault")]
    NonFiniteInput {
        /// The layer, from 0.
        layer: usize,
    },
    /// Positions cannot be stretched by a whole factor.
    #[error(
        "the effective length {effective} is not a multiple of the samples' {len} tokens; choose {len} times a whole number"
    )]
    EffectiveLenNotMultiple {
        /// Tokens of a sample.
        len: usize,
        /// The length that its positions are stretched to.
        effective: usize,
    },
    /// No sample to calibrate with, or samples too short for a loss.
    #[error("calibration needs samples of at least 2 tokens: {0}")]
    EmptyCalibration(String),
    /// A layer sees a window of its keys alone, which the method does not cover.
    #[error(
        "layer {layer} attends over a sliding window of {window} tokens; the method covers full attention alone"
    )]
    SlidingWindowLayer {
        /// The layer, from 0.
        layer: usize,
        /// Its window, in tokens.
        window: usize,
    },
    /// Key scales of another shape than the model's heads, or out of range.
    #[error("layer {layer}: the key scales are {found}, expected {expected}")]
    ScaleShape {
        /// The layer, from 0.
        layer: usize,
        /// What there is.
        found: String,
        /// What the model asks for.
        expected: String,
    },
    /// An artefact was made from a model of another architecture.
    #[error("{}: it was calibrated on a model of another architecture ({artefact}, this one is {model}); calibrate this model", path.display())]
    ModelHashMismatch {
        /// The artefact.
        path: std::path::PathBuf,
        /// The hash that it names.
        artefact: String,
        /// That of the model.
        model: String,
    },
    /// An artefact is damaged, or not what its name says.
    #[error("{}: {reason}", path.display())]
    Artefact {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Tensors of unexpected shape or content.
    #[error("{0}")]
    Input(String),
    /// The core.
    #[error(transparent)]
    Core(#[from] nics_core::Error),
    /// Artefacts, files, interrupts.
    #[error(transparent)]
    Base(#[from] nics_base::Error),
    /// CUDA kernels.
    #[error(transparent)]
    Cuda(Box<nics_cuda::Error>),
    /// libtorch.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

/// Caches speak the core's errors.
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
