//! Nano models: tiny checkpoints that this project trained on a task of its own, so that a cache's errors have an effect
//! which any machine can measure.
//!
//! The task is the adding ring ([`nics_datasets::adding_ring`]): every digit is made from two digits of the line before,
//! which are read from the cache, so errors add up as in a long chain of thought; or, in its recall form, the last line has
//! to be read from the other end of the cache. Models are real Llama checkpoints (`config.json`, `model.safetensors`,
//! `tokenizer.json`, …) that transformers loads.
//!
//! A [`Recipe`] says what is trained, [`train()`] runs it and writes `seed-N` for each of its seeds, and [`write()`] lets a
//! model write texts through any cache.

mod card;
mod files;
mod recipe;
mod train;
mod write;

pub use recipe::Recipe;
pub use train::{Report, train};
pub use write::{ROWS, Texts, write};
