//! `mbq import`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use mbq::artefact::{REPORT, SCALES};
use mbq::{QuantSpec, official};
use nics_core::cli::ModelArgs;

use super::opened::Opened;

/// Makes scales of a `.pt` file that the official code saved: scales.safetensors and scales.json, as `mbq calibrate` writes them.
///
/// Nothing of the file is run: it is refused unless it holds names and tensors alone. Every name and size is held against the
/// model. Which model the scales were searched on, and for which width, the file does not say; give those that were used.
#[derive(Args)]
pub struct Import {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// What the scales were searched for: w3g128, w4g128, w4a8, …
    #[arg(long, value_name = "SPEC")]
    quant: QuantSpec,
    /// Folder of the artefacts; it must not exist
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

impl Import {
    pub fn run(self) -> Result<()> {
        if self.out.symlink_metadata().is_ok() {
            bail!("{} is there already; choose a folder that does not exist", self.out.display());
        }
        let mut opened = Opened::open(&self.model)?;
        let scales = official::read(&self.file, opened.model.decoder_mut(), &opened.names, self.quant)?;
        std::fs::create_dir_all(&self.out)?;
        scales.write(&self.out, &opened.origin)?;
        println!(
            "scales of {} operators in {} layers, for {}",
            scales.layers.iter().flatten().count(),
            scales.layers.len(),
            self.quant
        );
        println!("{}", self.out.join(SCALES).display());
        println!("{}", self.out.join(REPORT).display());
        Ok(())
    }
}
