//! `mbq prepare-data`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use mbq::data::coco::Several;
use mbq::data::prepare::{Wanted, prepare};
use mbq::prompt::Prompter;
use nics_base::artefact::write_atomic;
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::at_least_one;

/// Makes the list that `mbq calibrate --in-order` reads, from captions as they are published.
///
/// Files are lists of ShareGPT4V and LLaVA (JSON or JSON Lines) and COCO's annotation files (captions_*.json, instances_*.json).
/// Items are filtered, put into the order of the seed and looked at until there are enough; every image is decoded. Beside the
/// list stands a report of what was taken and what was left out, and why.
#[derive(Args)]
pub struct PrepareData {
    /// Data; may be given several times
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Folder that image paths are relative to; default: that of the first --data
    #[arg(long, value_name = "FOLDER")]
    image_dir: Option<PathBuf>,
    /// Only items of which an image's path contains this, e.g. coco
    #[arg(long, value_name = "PART")]
    images_of: Option<String>,
    /// Leave out items of text alone
    #[arg(long)]
    images_only: bool,
    /// COCO captions: all captions of an image are the answer, one after the other; default: the first
    #[arg(long)]
    all_captions: bool,
    /// Items to take; default: all that can be used
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    samples: Option<usize>,
    /// Seed of the order; 42 is that of the published calibrations
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Count positions of each modality as this model reads the items: a folder or a hub id; its weights are not loaded
    #[arg(long, value_name = "FOLDER|ID")]
    model: Option<String>,
    /// Leave out items that take more positions than this; needs --model
    #[arg(long, value_name = "POSITIONS", value_parser = at_least_one, requires = "model")]
    max_len: Option<usize>,
    /// The list; the report is beside it, as NAME.report.json
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
}

impl PrepareData {
    pub fn run(self, quiet: bool) -> Result<()> {
        let report_path = self.out.with_extension("report.json");
        let own = self.data[0].parent().unwrap_or(Path::new("")).to_owned();
        let images = self.image_dir.as_deref().unwrap_or(&own);
        if !images.as_os_str().is_empty() && !images.is_dir() {
            bail!("--image-dir {}: there is no such folder", images.display());
        }
        let prompter = match &self.model {
            Some(model) => Some(Prompter::open(&Checkpoint::open(model)?)?),
            None => None,
        };
        let wanted = Wanted {
            files: &self.data,
            images,
            part: self.images_of.as_deref(),
            images_only: self.images_only,
            several: if self.all_captions { Several::All } else { Several::First },
            samples: self.samples,
            seed: self.seed,
            prompter: prompter.as_ref(),
            longest: self.max_len.unwrap_or(usize::MAX),
        };
        let mut bar: Option<Progress> = None;
        let mut progress = |done: usize, total: usize| {
            let new = || if quiet { Progress::hidden() } else { Progress::new(total as u64, "items taken") };
            bar.get_or_insert_with(new).set(done as u64);
        };
        let (taken, report) = prepare(&wanted, &Interrupt::install()?, &mut progress)?;
        if let Some(bar) = &bar {
            bar.finish();
        }
        // The report first: a list that is there has one.
        write_atomic(&report_path, serde_json::to_string_pretty(&report)? + "\n")?;
        let lines: Vec<String> = taken.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        write_atomic(&self.out, format!("[\n{}\n]\n", lines.join(",\n")))?;
        println!(
            "{} of {} items taken, {} of text alone, {} with several images",
            report.taken, report.items, report.text_alone, report.several_images
        );
        for d in &report.dropped {
            println!("{} {}, e.g. {}", d.items, d.reason.words(), d.examples[0]);
        }
        for (name, p) in report.positions.iter().flatten() {
            let mean = p.sum as f64 / report.taken as f64;
            println!(
                "positions of {name}: {} in all, {mean:.1} an item ({} to {}), in {} items",
                p.sum, p.least, p.most, p.items
            );
        }
        if self.samples.is_some_and(|n| report.taken < n) {
            eprintln!("warning: fewer than {} items can be used", self.samples.unwrap_or(0));
        }
        println!("{}", report_path.display());
        println!("{}", self.out.display());
        Ok(())
    }
}
