//! Routers in files: the official `.pt` ([`Official`], [`export`]) and our own folder ([`save`], [`load`]).
//!
//! Our own format is `router.safetensors`, with the tensor names of official checkpoints, and `router.json`
//! ([`Card`]), which holds everything else with the hash of the tensors.

mod export;
mod native;
mod official;

pub use export::export;
pub(crate) use native::tensor_bytes;
pub use native::{
    CARD_FILE, Card, CommonArgs, CurvePoint, LabelStatistics, WEIGHTS_FILE, load, read_card, save, save_card,
    tokenizer_hash,
};
pub use nics_core::checkpoint::torch_file::Refusal;
pub use official::Official;
