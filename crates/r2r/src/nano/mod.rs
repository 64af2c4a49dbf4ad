//! Nano pairs: a small, a middle and a large model of one vocabulary that this project trained on a task of its own, so
//! that routing has an effect which any machine can measure.
//!
//! The task is arithmetic modulo a number, worked from left to right ([`nics_datasets::ring`]). The small model writes the
//! form well and many numbers wrong; the large one is nearly always right; one wrong number spoils every later step. All
//! three are real Qwen3 checkpoints (`config.json`, `model.safetensors`, `tokenizer.json`, …) that transformers loads.
//!
//! A [`Recipe`] says what is trained; [`train()`] runs it and writes `seed-N/{small,middle,large}` for each of its seeds.

mod card;
mod files;
mod recipe;
mod task;
mod train;

pub use recipe::{ModelRecipe, Recipe, Role};
pub use task::{RESPONSE_TOKENS, RingTask};
pub use train::{Report, accuracy, train};
