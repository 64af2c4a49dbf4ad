//! The flags of calibration data, and the batch that they describe.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use mbq::batch::CalibBatch;
use mbq::data::captions::{read, with_images_of};
use mbq::data::collate::Side;
use mbq::data::conversation::{Embedded, Numbering, Reader, batched, batched_as, joined};
use mbq::data::format::{Format, blocks};
use mbq::data::order::{picks, shuffled};
use mbq::language::Language;
use mbq::prompt::Prompter;
use nics_base::progress::Progress;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::at_least_one;
use nics_core::models::Model;
use nics_core::tokenizer::Tokenizer;
use serde::Deserialize;

/// Tokens of a text between two samples, and of a block of texts.
const TEXT: usize = 512;

/// What to calibrate on.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// Captions: a JSON list or JSON Lines of {"image": PATH or list, "conversations": [{"from": "human" or "gpt", "value"}]}
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Folder that image paths are relative to; default: that of --data
    #[arg(long, value_name = "FOLDER")]
    image_dir: Option<PathBuf>,
    /// Only items of which an image's path contains this, e.g. coco
    #[arg(long, value_name = "PART")]
    images_of: Option<String>,
    /// Texts, JSON Lines with `text`: in place of --data, or between its samples with --format interleave
    #[arg(long, value_name = "FILE")]
    pub texts: Option<PathBuf>,
    /// How samples are put together: plain, few-shot or interleave
    #[arg(long, value_name = "FORMAT", default_value_t = Format::Plain)]
    format: Format,
    /// Samples
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    samples: usize,
    /// The most positions of a sample; default: the model's context
    #[arg(long, value_name = "POSITIONS", value_parser = at_least_one)]
    max_len: Option<usize>,
    /// Seed of the order of samples; 42 picks those of the published calibrations
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// How positions are numbered: one after the other, as in published calibrations, or in time, height and width where the model
    /// places images so (Qwen2-VL)
    #[arg(long, value_enum, default_value_t = Positions::Sequential)]
    positions: Positions,
    /// Take the items of --data as they stand, as `mbq prepare-data` has put them, rather than in the seed's order
    #[arg(long)]
    in_order: bool,
}

/// How positions are numbered.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Positions {
    /// One after the other, padding included
    Sequential,
    /// As the model does
    Multimodal,
}

impl From<Positions> for Numbering {
    fn from(p: Positions) -> Self {
        match p {
            Positions::Sequential => Self::Sequential,
            Positions::Multimodal => Self::Multimodal,
        }
    }
}

#[derive(Deserialize)]
struct Text {
    text: String,
}

impl DataArgs {
    /// The samples, embedded.
    pub fn batch(&self, checkpoint: &Checkpoint, model: &Language, quiet: bool) -> Result<CalibBatch> {
        let Some(data) = &self.data else {
            return self.texts_alone(&Tokenizer::from_checkpoint(checkpoint)?, model);
        };
        let prompter = Prompter::open(checkpoint)?;
        let own = data.parent().unwrap_or(Path::new("")).to_owned();
        let reader = Reader {
            prompter: &prompter,
            images: self.image_dir.as_deref().unwrap_or(&own),
            longest: self.max_len.unwrap_or(model.decoder().dims().context),
        };
        let mut items = read(data)?;
        if let Some(part) = &self.images_of {
            items = with_images_of(items, part);
            if items.is_empty() {
                bail!("{}: no item has an image whose path contains {part:?}", data.display());
            }
        }
        let order = if self.in_order {
            (0..items.len()).cycle().take(self.samples).collect()
        } else {
            picks(items.len(), self.samples, self.seed)
        };
        let bar = if quiet { Progress::hidden() } else { Progress::new(order.len() as u64, "samples read") };
        let mut samples = Vec::with_capacity(order.len());
        for i in order {
            samples.push(reader.read(data, &items[i], model)?);
            bar.inc(1);
        }
        bar.finish();
        let texts = if self.format == Format::Interleave {
            self.between(&prompter.tokenizer, model)?
        } else {
            Vec::new()
        };
        Ok(batched_as(&joined(&samples, self.format, &texts)?, reader.side(), self.positions.into())?)
    }

    fn documents(&self, path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Vec<i64>>> {
        let all: Vec<Text> = nics_base::jsonl::read(path)?;
        let order = shuffled(all.len(), self.seed);
        let mut ids = Vec::new();
        for i in order {
            let of = tokenizer.encode_ordinary(all[i].text.trim())?;
            ids.push(of.into_iter().map(i64::from).collect());
        }
        Ok(ids)
    }

    /// Beginnings of long texts.
    fn between(&self, tokenizer: &Tokenizer, model: &Language) -> Result<Vec<Embedded>> {
        let Some(path) = &self.texts else { bail!("--format interleave needs --texts") };
        let long = self.documents(path, tokenizer)?.into_iter().filter(|d| d.len() > TEXT);
        long.take(self.samples).map(|d| Ok(Embedded::text(model, &d[..TEXT])?)).collect()
    }

    /// Blocks of short texts.
    fn texts_alone(&self, tokenizer: &Tokenizer, model: &Language) -> Result<CalibBatch> {
        let Some(path) = &self.texts else { bail!("nothing to calibrate on: give --data or --texts") };
        let mut short: Vec<Vec<i64>> = self.documents(path, tokenizer)?;
        short.retain(|d| d.len() <= TEXT);
        short.truncate(self.samples);
        let blocks = blocks(&short, TEXT);
        if blocks.is_empty() {
            let n: usize = short.iter().map(Vec::len).sum();
            bail!("{}: its texts make {n} tokens, a block takes {TEXT}", path.display());
        }
        let samples: Vec<Embedded> =
            blocks.iter().map(|b| Embedded::text(model, b)).collect::<mbq::Result<_>>()?;
        Ok(batched(&samples, Side::Right)?)
    }
}

/// How many positions each modality has, for the one who waits.
pub fn report(batch: &CalibBatch) -> Result<()> {
    let counts = batch.counts()?;
    let counts: Vec<String> = counts.iter().map(|(name, n)| format!("{n} {name}")).collect();
    println!("{} samples of {} positions: {}", batch.samples(), batch.positions(), counts.join(", "));
    Ok(())
}
