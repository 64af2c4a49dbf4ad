//! Nano models: tiny checkpoints that this project trained on a task of its own, so that what quantization does to a model
//! that sees can be measured on any machine.
//!
//! The task is the symbol grid ([`nics_datasets::symbol_grid`]): a picture of 36 noisy symbols becomes 36 tokens, most of
//! what they hold is nuisance, and six tokens of answer depend on six of them. Models are real LLaVA checkpoints
//! (`config.json`, `model.safetensors`, `preprocessor_config.json`, `tokenizer.json`, ...) with SigLIP's tower: every command
//! works on them as on any other.
//!
//! A [`Recipe`] says what is trained, [`train()`] runs it and writes `seed-N` for each of its seeds; [`Sheet`] is problems as
//! a model reads them.

mod card;
mod files;
mod recipe;
mod sheet;
mod train;

pub use recipe::Recipe;
pub(crate) use recipe::checked;
pub(crate) use sheet::logits;
pub use sheet::{ANSWER, POSITIONS, Sheet};
pub use train::{Report, train};
