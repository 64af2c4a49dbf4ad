//! What the method is compared with: the rivals of the paper and the formats that users pick today, as caches of the core's
//! seam.
//!
//! | method | what it stores, and when |
//! |---|---|
//! | [`Rtn`] | every row by itself, before or after it attends; with [`Format`] also what llama.cpp and vLLM do |
//! | [`Kivi`] | keys per channel over blocks of tokens, values per token |
//! | [`Mikv`] | all but the tokens that get most attention, keys balanced against queries |
//! | [`RotateKv`] | keys in a rotated and ordered basis before rotary rotation |
//! | [`Residual`], [`FrozenFp8`] | the quantized caches of transformers |
//!
//! All of them are one cache, [`Simulated`], which counts the bytes that each format takes; [`Baseline`] makes them by name.

mod cache;
pub mod everyday;
mod format;
mod hadamard;
mod kivi;
mod mikv;
mod named;
mod rotatekv;
mod rows;
mod rtn;
mod transformers;

pub use cache::{Arrived, Method, Simulated};
pub use everyday::Block;
pub use format::{Coder, Coders, Format, HALF};
pub use hadamard::Hadamard;
pub use kivi::Kivi;
pub use mikv::Mikv;
pub use named::Baseline;
pub use rotatekv::{RotateKv, channel_orders};
pub use rows::Rows;
pub use rtn::{Rtn, When};
pub use transformers::{FrozenFp8, Residual};
