//! `r2r study`: what nano pairs show.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use nics_base::{row, study};
use nics_core::cli::{DeviceArgs, ShardArg, seeded};
use nics_core::tch::Device;
use r2r::labels::pipeline::LabelSet;
use r2r::study::{
    About, Estimate, Inputs, Kind, LIMITS, Measures, Models, Study as Settings, evaluate, figures,
    write_queries,
};

/// Studies nano pairs: labels, routers, every policy and baseline on problems that no model was trained on.
#[derive(Args)]
pub struct Study {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write the problems as queries for `r2r label`, and the synonyms for its rule
    Queries(Queries),
    /// Measure every policy and baseline of a pair: points.jsonl; resumable
    Evaluate(Evaluate),
    /// Make result rows out of the points of all pairs
    Report(Report),
}

/// What the steps of one pair share.
#[derive(Args)]
struct PairArgs {
    /// The study's settings (TOML)
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// Folder of the pair: small, middle and large
    #[arg(long, value_name = "FOLDER")]
    pair: PathBuf,
    /// Seed of problems, routers and draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Where the result goes
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    run_on: DeviceArgs,
}

impl PairArgs {
    fn open(&self) -> Result<(Settings, Models)> {
        self.run_on.set_threads()?;
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        Ok((Settings::read(&self.settings)?, Models::load(&self.pair, Device::Cpu)?))
    }
}

/// Writes the problems of a pair as queries for `r2r label`: train.jsonl and validation.jsonl; and synonyms.toml, the table
/// for its rule.
#[derive(Args)]
struct Queries {
    #[command(flatten)]
    pair: PairArgs,
}

/// Measures every policy and baseline of a pair: OUT/points.jsonl. With --shard the shard's part alone, in a file of its own:
/// merge them (cargo xtask merge). An interrupted run goes on where it stopped.
#[derive(Args)]
struct Evaluate {
    #[command(flatten)]
    pair: PairArgs,
    /// Folder of the validation problems' labels, with all logits
    #[arg(long, value_name = "FOLDER")]
    labels: PathBuf,
    /// A router: r2r, mismatch, logits-only, hidden-only, no-token or no-logits; each once
    #[arg(long = "router", value_name = "KIND=FOLDER", value_parser = router, required = true)]
    routers: Vec<(Kind, PathBuf)>,
    #[command(flatten)]
    shard: ShardArg,
}

/// Makes result rows out of the points of all pairs.
///
/// Prints what the study shows and what it does not. With --check it fails unless R2R is ahead of entropy and of chance by
/// 30 points of accuracy at its own share, and reaches 90 % of the large model's accuracy with at most 0.6 of the share
/// that entropy needs.
#[derive(Args)]
struct Report {
    /// The study's settings (TOML)
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// A pair: SEED=FOLDER of its points; once for each
    #[arg(long = "points", value_name = "SEED=FOLDER", value_parser = seeded, required = true)]
    points: Vec<(u64, PathBuf)>,
    /// Folder of one of the pairs, for the sizes of its models
    #[arg(long, value_name = "FOLDER")]
    pair: PathBuf,
    /// Folder of the R2R router of that pair, for its size
    #[arg(long, value_name = "FOLDER")]
    router: PathBuf,
    /// The preset that rows name
    #[arg(long, value_name = "NAME", default_value = "")]
    preset: String,
    /// File of the rows
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// Fail unless the claims hold
    #[arg(long)]
    check: bool,
}

fn router(text: &str) -> Result<(Kind, PathBuf), String> {
    let (word, folder) = text.split_once('=').ok_or("expected KIND=FOLDER")?;
    let known = Kind::ALL.map(Kind::word).join(", ");
    let kind = Kind::ALL.into_iter().find(|k| k.word() == word);
    Ok((kind.ok_or_else(|| format!("`{word}` is no router of the study; there are {known}"))?, folder.into()))
}

impl Study {
    pub fn run(self, quiet: bool) -> Result<()> {
        match self.command {
            Command::Queries(command) => command.run(),
            Command::Evaluate(command) => command.run(quiet),
            Command::Report(command) => command.run(),
        }
    }
}

impl Queries {
    fn run(&self) -> Result<()> {
        let (study, models) = self.pair.open()?;
        Ok(write_queries(&study, &models.task, self.pair.seed, &self.pair.out)?)
    }
}

impl Evaluate {
    fn run(&self, quiet: bool) -> Result<()> {
        for kind in Kind::ALL {
            if self.routers.iter().filter(|(k, _)| *k == kind).count() != 1 {
                anyhow::bail!("--router {}=FOLDER has to be given once", kind.word());
            }
        }
        let (study, models) = self.pair.open()?;
        let measures = Measures::of(&LabelSet::open(std::slice::from_ref(&self.labels))?, &models)?;
        let mut routers = Vec::new();
        for (kind, folder) in &self.routers {
            let (router, card) = kind.load(folder, &models)?;
            routers.push((*kind, router, card));
        }
        let PairArgs { seed, out, .. } = &self.pair;
        let inputs = Inputs { models: &models, study: &study, measures: &measures, routers, seed: *seed };
        self.shard.measure(out, quiet, |output| Ok(evaluate(inputs, output)?))
    }
}

impl Report {
    fn run(&self) -> Result<()> {
        let study = Settings::read(&self.settings)?;
        let seeds = study::read(&self.points)?;
        let models = Models::load(&self.pair, Device::Cpu)?;
        let (router, _) = Kind::R2r.load(&self.router, &models)?;
        let router = router.parameters()?.iter().map(|(_, p)| p.numel()).sum::<usize>();
        let [small, middle, large] = models.parameters;
        let name = models.task.ring().name();
        let about = About {
            preset: self.preset.clone(),
            model: "r2r-nano".into(),
            dataset: format!("{name}/test"),
            parameters: [small, middle, large, router].map(|n| n as f64),
        };
        let (rows, claims) = figures(&study, &about, &seeds)?;
        row::write(&self.out, &rows)?;
        let show = |e: &Estimate| format!("{:.3} ({:.3} to {:.3})", e.value, e.interval[0], e.interval[1]);
        println!("at R2R's own share its accuracy is ahead of");
        println!("  entropy by {}", show(&claims.over_entropy));
        println!("  chance  by {}", show(&claims.over_random));
        println!(
            "90 % of the large model's accuracy: R2R needs {} of entropy's share",
            show(&claims.share_ratio)
        );
        println!("{LIMITS}");
        if self.check {
            claims.check()?;
        }
        Ok(())
    }
}
