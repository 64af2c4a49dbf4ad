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
    #[error("groups of {group} values do not divide the head's {head_dim} channels; choose a divisor of {head_dim}")]
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
    /// Keys or values that are no numbers.
    #[error("layer {layer}: keys or values are not finite; the model or its dtype is at fault")]
    NonFiniteInput {
        /// The layer, from 0.
        layer: usize,
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
    /// libtorch.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}
