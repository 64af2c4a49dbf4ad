//! The subcommands: parse, call the library, print.

pub mod allocate;
pub mod bench;
mod bench_set;
mod cache;
pub mod calibrate;
pub mod compare;
pub mod eval;
pub mod generate;
mod opened;
pub mod plan;
mod shape;
pub mod study;
pub mod train;

use std::path::Path;

use anyhow::{Context, Result, bail};
use pm_kvq::calibrate::artefact::Widths;

/// The widths in a file of `pm-kvq allocate`, where there is no model to hold its hashes against.
///
/// # Errors
/// A file that is no such file, or of another number of layers.
fn widths_of(path: &Path, layers: usize) -> Result<Widths> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let widths: Widths =
        serde_json::from_str(&text).with_context(|| format!("{} is no allocation", path.display()))?;
    let found = widths.allocation.widths.len();
    if found != layers {
        bail!("{}: widths of {found} layers, the model has {layers}", path.display());
    }
    Ok(widths)
}
