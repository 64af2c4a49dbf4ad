//! What every nics crate shares and needs no tensors: artefacts, result rows, reports, shards, hub access,
//! command-line pieces.
//!
//! | module | what it gives |
//! |---|---|
//! | [`artefact`] | files and folders that appear whole or not at all |
//! | [`hash`] | content hashes of files, folders and values |
//! | [`jsonl`] | append-only JSON Lines that survive `kill -9` |
//! | [`shard`] | `--shard i/n`, shard file names, merging |
//! | [`exit`] | exit codes and the errors that ask for one |
//! | [`settings`] | settings in TOML files |
//! | [`study`] | the points of a study: measured in shards, resumable |
//! | [`row`], [`ci`], [`report`] | result rows, their confidence intervals, Markdown and HTML from rows alone |
//! | [`interrupt`] | a flag that SIGINT and SIGTERM set |
//! | [`sandbox`] | other people's programs under limits on time, memory, files and network |
//! | [`hub`] | Hugging Face hub ids to local folders |
//! | `progress`, `cli` | bars, flag groups and the edge of `main` (feature `cli`) |
//!
//! This crate never depends on libtorch: `xtask` and servers without a model build on it.

pub mod artefact;
pub mod ci;
mod error;
pub mod exit;
pub mod hash;
pub mod hub;
pub mod interrupt;
pub mod jsonl;
pub mod report;
pub mod row;
pub mod sandbox;
pub mod settings;
pub mod shard;
pub mod size;
pub mod spread;
pub mod study;

#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
pub mod progress;

pub use error::{Error, Result};
