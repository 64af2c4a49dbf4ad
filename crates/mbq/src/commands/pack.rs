//! `mbq pack` and `mbq export`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use mbq::apply::{fold_scales, round};
use mbq::artefact::Scales;
use mbq::convert::convert;
use mbq::export::{Layout, Made, export};
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::{DeviceArgs, ModelArgs};

use super::opened::Opened;

/// Writes a quantized checkpoint in our own layout (docs/mbq-format.md), from which `mbq generate` runs.
///
/// It may come from AutoAWQ, GPTQ (2, 3, 4, 8 bits) or compressed-tensors (pack-quantized); its integers stay as they are, and
/// `mbq export` gives them back to the byte. A model that is not quantized is, with --scales.
#[derive(Args)]
pub struct Pack {
    /// Checkpoint: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(value_name = "FOLDER|ID")]
    model: String,
    /// Scales of `mbq calibrate` or `mbq import`, for a model that is not quantized yet
    #[arg(long, value_name = "FOLDER")]
    scales: Option<PathBuf>,
    #[command(flatten)]
    run_on: DeviceArgs,
    /// Folder of the packed checkpoint; it must not exist
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

/// Writes a packed checkpoint in a layout that other engines load.
#[derive(Args)]
pub struct Export {
    /// Checkpoint: a folder of `mbq pack` or `mbq quantize`, or another that is quantized
    #[arg(value_name = "FOLDER|ID")]
    model: String,
    /// How weights are stored: autoawq (4 bits), gptq (2, 3, 4, 8 bits), compressed-tensors (4, 8 bits), or dense
    #[arg(long, value_name = "LAYOUT")]
    to: Layout,
    /// Folder of the exported checkpoint; it must not exist
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

impl Pack {
    pub fn run(self, quiet: bool) -> Result<()> {
        let Some(dir) = &self.scales else {
            return converted(&self.model, Layout::Packed, &self.out, quiet);
        };
        let args = ModelArgs { model: self.model.clone(), run_on: self.run_on.clone() };
        let mut opened = Opened::open(&args)?;
        let scales = Scales::read(dir, &opened.origin)?;
        let spec = scales.config.search.spec;
        fold_scales(opened.model.decoder_mut(), &opened.names, &scales.layers)?;
        let rounded = round(opened.model.decoder_mut(), &opened.names, &spec)?;
        let Opened { checkpoint, model, names, origin, .. } = &mut opened;
        let made = Made { method: "mbq".into(), source: origin.clone() };
        export(model, names, &rounded, &spec, &made, checkpoint, Layout::Packed, &self.out)?;
        let s = &rounded.summary;
        println!("{} linear layers, {} weights: {}, stored as packed", s.linears, s.weights, s.spec);
        println!("{}", self.out.display());
        Ok(())
    }
}

impl Export {
    pub fn run(self, quiet: bool) -> Result<()> {
        converted(&self.model, self.to, &self.out, quiet)
    }
}

fn converted(model: &str, to: Layout, out: &std::path::Path, quiet: bool) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let checkpoint = Checkpoint::open(model)?;
    let mut bar = None;
    let done = convert(&checkpoint, to, out, &interrupt, &mut |done, total| {
        let bar: &Progress = bar.get_or_insert_with(|| {
            if quiet { Progress::hidden() } else { Progress::new(total as u64, "layers") }
        });
        bar.set(done as u64);
        if done == total {
            bar.finish();
        }
    })?;
    println!(
        "{} linear layers, {} weights: {}, stored as {} before, as {to} now",
        done.layers, done.weights, done.spec, done.from
    );
    println!("{}", out.display());
    Ok(())
}
