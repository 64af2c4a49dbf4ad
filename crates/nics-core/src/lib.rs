//! The shared core of `nics` over libtorch: checkpoints, tokenizers, model families, and the seams that methods plug
//! into.
//!
//! | module | what it holds |
//! |---|---|
//! | [`device`] | device, dtype and thread choice; CUDA opened at run time |
//! | [`checkpoint`] | Hugging Face checkpoints in and out, every error naming file and key |
//! | [`tokenizer`], [`template`] | tokenizers, incremental decoding, chat templates |
//! | [`nn`] | building blocks: linear, norms, rotary tables |
//! | [`seam`] | `Projection`, `KvCache`, `LayerHook`: where methods plug in |
//! | [`cache`] | the dense ragged cache and the differentiable `NoCache` |
//! | [`models`] | the families: Llama, Qwen2, Qwen3, InternLM2; LLaVA, Qwen2-VL, InternVL2 with their towers |
//! | [`vision`] | images and videos: decoding, resizing, each family's preparation, places among the tokens |
//! | [`sampling`], [`generate`] | logits processors and step-wise ragged generation |
//! | `server` | OpenAI's API over an engine (feature `server`) |
//! | [`train`] | training loop of small models with exact resume |
//!
//! No module names a method: a method is a crate that implements a seam.

pub mod cache;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
pub mod device;
mod error;
pub mod generate;
pub mod golden;
pub mod memory;
pub mod models;
pub mod nn;
pub mod plugin;
pub mod sampling;
pub mod seam;
#[cfg(feature = "server")]
pub mod server;
pub mod template;
pub mod text;
pub mod tokenizer;
pub mod train;
pub mod vision;

pub use error::{Error, Result};
pub use nics_base as base;
pub use tch;
