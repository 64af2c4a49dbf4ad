//! Routers in files: the official `.pt` ([`Official`]) and our own folder ([`save`], [`load`]).
//!
//! Our own format is `router.safetensors`, with the tensor names of official checkpoints, and `router.json`
//! ([`Card`]), which holds everything else with the hash of the tensors.

mod archive;
mod native;
mod official;
mod pickle;
mod refusal;
mod tree;

pub(crate) use native::tensor_bytes;
pub use native::{
    CARD_FILE, Card, CommonArgs, CurvePoint, LabelStatistics, WEIGHTS_FILE, load, save, tokenizer_hash,
};
pub use official::Official;
pub use refusal::Refusal;
