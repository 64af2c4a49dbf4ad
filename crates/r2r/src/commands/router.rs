//! `r2r router`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::JsonArg;
use nics_core::tch::{Device, Kind, Tensor};
use r2r::checkpoint::{Card, Official, WEIGHTS_FILE, export, load, read_card, save};
use r2r::router::{Router as Loaded, Storage};
use serde_json::json;

use super::train::table;

/// Looks at routers and converts them.
#[derive(Args)]
pub struct Router {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what a router is
    Inspect(Inspect),
    /// Convert between official .pt files and our folders, and between storages
    Convert(Convert),
}

/// Says what a router is: an official .pt file, which is read without running it, or a folder of ours.
#[derive(Args)]
struct Inspect {
    /// The router
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Print the validation curve
    #[arg(long)]
    curve: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// How a router's matrices are kept.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum StorageArg {
    /// float32, as trained
    F32,
    /// bfloat16: half the bytes
    Bf16,
    /// 8-bit integers with a scale for each output: a quarter of the bytes
    Int8,
}

impl From<StorageArg> for Storage {
    fn from(storage: StorageArg) -> Self {
        match storage {
            StorageArg::F32 => Self::F32,
            StorageArg::Bf16 => Self::Bf16,
            StorageArg::Int8 => Self::Int8,
        }
    }
}

/// Converts an official .pt file into a folder of ours, a folder into another storage, or a folder into an official file
/// (where OUT ends in .pt). The small model's embedding table, which routers read, belongs to no format: it comes from the
/// small model when a router is used.
#[derive(Args)]
struct Convert {
    /// The router
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// What to write: a folder, or a file that ends in .pt
    #[arg(long, short, value_name = "PATH")]
    out: PathBuf,
    /// How matrices are kept in a folder
    #[arg(long, value_enum, value_name = "STORAGE", default_value = "f32")]
    storage: StorageArg,
    /// Small model; notes its tokenizer in the card, so that a router is refused beside another
    #[arg(long, short, visible_alias = "slm", value_name = "FOLDER|ID")]
    small: Option<String>,
    /// Name of the large model for the card
    #[arg(long, visible_alias = "llm", value_name = "NAME")]
    large: Option<String>,
}

/// A table of the right width, where a router reads tokens and none is given: its values do not matter for a conversion.
fn placeholder(card: &Card) -> Result<Option<Tensor>> {
    let width = card.init_args.hidden_states_size.unwrap_or(1);
    let table = Tensor::f_zeros([1, width], (Kind::Float, Device::Cpu))?;
    Ok(card.model_type.takes_token().then_some(table))
}

fn open(path: &Path) -> Result<(Loaded, Card)> {
    if path.is_dir() {
        let card = read_card(path)?;
        return Ok(load(path, placeholder(&card)?.as_ref(), Storage::F32, Device::Cpu)?);
    }
    let official = Official::open(path)?;
    let card = official.card();
    let router = official.router(placeholder(&card)?.as_ref(), Storage::F32, Device::Cpu)?;
    Ok((router, card))
}

impl Router {
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Inspect(command) => command.run(),
            Command::Convert(command) => command.run(),
        }
    }
}

impl Inspect {
    fn run(self) -> Result<()> {
        let (router, card) = open(&self.path)?;
        let parameters: usize = router.parameters()?.iter().map(|(_, t)| t.numel()).sum();
        let bytes = if self.path.is_dir() { self.path.join(WEIGHTS_FILE) } else { self.path.clone() };
        let bytes = bytes.metadata().with_context(|| format!("cannot read {}", bytes.display()))?.len();
        if self.json.json {
            let mut line = serde_json::to_value(&card)?;
            line["parameters"] = json!(parameters);
            line["bytes"] = json!(bytes);
            if !self.curve
                && let Some(fields) = line.as_object_mut()
            {
                fields.remove("validation_curve");
            }
            println!("{line}");
            return Ok(());
        }
        let args = &card.init_args;
        println!("{}", card.model_type.name());
        println!(
            "  parameters       {parameters} ({:.1} MB in the file, {:?})",
            bytes as f64 / 1e6,
            card.storage
        );
        println!("  threshold        {}", card.common_args.threshold);
        println!("  reads            {}", card.common_args.input_type.join(", "));
        if let Some(width) = args.hidden_states_size {
            println!("  hidden state     {width}");
        }
        if let Some(k) = args.logits_size {
            println!("  largest logits   {k}");
        }
        println!(
            "  blocks           {:?}, {} times wider inside, dropout {}",
            args.hidden_dims, args.expansion_factor, args.dropout_rate
        );
        for (name, value) in [
            ("small model", card.slm.as_ref()),
            ("large model", card.llm.as_ref()),
            ("tokenizer", card.tokenizer_hash.as_ref()),
        ] {
            if let Some(value) = value {
                println!("  {name:<16} {value}");
            }
        }
        if let Some(labels) = &card.labels {
            println!(
                "  labels           {} rows ({} divergent, {} mismatches), {} to validate",
                labels.train, labels.divergent, labels.mismatch, labels.validation
            );
        }
        for (name, value) in &card.model_specific_args {
            println!("  {name:<16} {value}");
        }
        if self.curve {
            for point in &card.validation_curve {
                println!(
                    "  {:.4}  recall {:.4}  rate {:.4}",
                    point.threshold, point.recall, point.positive_rate
                );
            }
        }
        Ok(())
    }
}

impl Convert {
    fn run(self) -> Result<()> {
        let (router, mut card) = open(&self.path)?;
        if let Some(name) = &self.small {
            let checkpoint = Checkpoint::open(name)?;
            let tokenizer = nics_core::tokenizer::Tokenizer::from_checkpoint(&checkpoint)?;
            let (rows, width) = table(&checkpoint)?.size2()?;
            if let Some(router) = card.config().hidden().filter(|h| *h != width) {
                return Err(r2r::Error::HiddenSizeMismatch { router, slm: width }.into());
            }
            if let Some(k) = card.config().top_k().filter(|k| *k > rows) {
                return Err(r2r::Error::TopKTooLarge { k, vocab: rows }.into());
            }
            card.check_tokenizer(checkpoint.name(), &tokenizer)?;
            card.slm = Some(checkpoint.name().to_owned());
            card.tokenizer_hash = Some(r2r::checkpoint::tokenizer_hash(&tokenizer));
        }
        if self.large.is_some() {
            card.llm.clone_from(&self.large);
        }
        if self.out.extension().is_some_and(|e| e == "pt") {
            if !matches!(self.storage, StorageArg::F32) {
                bail!("official files are in float32: leave --storage out");
            }
            export(&self.out, &router, &card)?;
        } else {
            card.storage = self.storage.into();
            save(&self.out, &router, &card)?;
        }
        eprintln!("{}", self.out.display());
        Ok(())
    }
}
