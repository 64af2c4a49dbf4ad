//! Nano models: what is embedded is what its cards say, training is resumable, and the study in miniature.

mod models;
mod study;

use std::path::{Path, PathBuf};

fn embedded(seed: u64) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../datasets/nano/mbq-nano/seed-{seed}"))
}
