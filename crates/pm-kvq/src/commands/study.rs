//! `pm-kvq study`: what nano models show.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use nics_base::interrupt::Interrupt;
use nics_base::progress::Progress;
use nics_base::{row, study};
use nics_core::cli::{DeviceArgs, ShardArg, seeded};
use pm_kvq::study::{About, Inputs, LIMITS, Study as Settings, Subject, Weights, evaluate, figures};

/// Studies nano models: calibration, and the same texts through every cache.
#[derive(Args)]
pub struct Study {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Calibrate a model, as trained and with outliers in its keys; resumable
    Calibrate(Calibrate),
    /// Write the same texts through every cache: points.jsonl; resumable
    Evaluate(Evaluate),
    /// Make result rows out of the points of all models
    Report(Report),
}

/// What the steps of one model share.
#[derive(Args)]
struct ModelArgs {
    /// The study's settings (TOML)
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// Folder of the model
    #[arg(long, short, value_name = "FOLDER")]
    model: PathBuf,
    /// Seed of texts
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Where the result goes
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    run_on: DeviceArgs,
}

impl ModelArgs {
    fn open(&self) -> Result<(Settings, [Subject; 2])> {
        self.run_on.set_threads()?;
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        let study = Settings::read(&self.settings)?;
        let load = |weights| Subject::load(&self.model, &study, weights, self.seed);
        let subjects = [load(Weights::Plain)?, load(Weights::Outliers)?];
        Ok((study, subjects))
    }
}

/// Calibrates a model into OUT/plain and OUT/outliers: sensitivity, widths, largest keys and scales, each from short
/// samples, from short samples with stretched positions, from whole texts, and from radii of rotary pairs. An interrupted
/// run goes on where it stopped.
#[derive(Args)]
struct Calibrate {
    #[command(flatten)]
    model: ModelArgs,
}

/// Writes the same texts of the test split through every cache: OUT/points.jsonl. With --shard the shard's part alone, in a
/// file of its own: merge them (cargo xtask merge). An interrupted run goes on where it stopped.
#[derive(Args)]
struct Evaluate {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder of `study calibrate`
    #[arg(long, value_name = "FOLDER")]
    calibration: PathBuf,
    #[command(flatten)]
    shard: ShardArg,
}

/// Makes result rows out of the points of all models.
///
/// Prints what the study shows and what it does not. With --check it fails unless PM-KVQ is ahead of RTN and KIVI at equal
/// peak budget on the ring, and shrinking page by page is at least as good as halving whole layers.
#[derive(Args)]
struct Report {
    /// The study's settings (TOML)
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// A model: SEED=FOLDER of its points; once for each
    #[arg(long = "points", value_name = "SEED=FOLDER", value_parser = seeded, required = true)]
    points: Vec<(u64, PathBuf)>,
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

impl Study {
    pub fn run(self, quiet: bool) -> Result<()> {
        match self.command {
            Command::Calibrate(command) => command.run(quiet),
            Command::Evaluate(command) => command.run(quiet),
            Command::Report(command) => command.run(),
        }
    }
}

impl Calibrate {
    fn run(&self, quiet: bool) -> Result<()> {
        let (study, mut subjects) = self.model.open()?;
        let interrupt = Interrupt::install()?;
        let samples = study.calibration.samples as u64;
        let bar = if quiet { Progress::hidden() } else { Progress::new(samples, "calibrate") };
        for subject in &mut subjects {
            let weights = subject.weights.name();
            subject.calibrate(&study, &self.model.out, &interrupt, &mut |basis, p| {
                bar.set(p.done as u64);
                bar.label(format!("{weights}, {basis}"));
            })?;
        }
        bar.finish();
        eprintln!("{}: calibrated", self.model.out.display());
        Ok(())
    }
}

impl Evaluate {
    fn run(&self, quiet: bool) -> Result<()> {
        let (study, subjects) = self.model.open()?;
        let ModelArgs { seed, out, .. } = &self.model;
        let calibration: &Path = &self.calibration;
        let inputs = Inputs { subjects: &subjects, study: &study, calibration, seed: *seed };
        self.shard.measure(out, quiet, |output| Ok(evaluate(&inputs, output)?))
    }
}

impl Report {
    fn run(&self) -> Result<()> {
        let study = Settings::read(&self.settings)?;
        let seeds = study::read(&self.points)?;
        let about = About { preset: self.preset.clone(), model: "pm-kvq-nano".into() };
        let (rows, claims) = figures(&study, &about, &seeds)?;
        row::write(&self.out, &rows)?;
        for difference in &claims.differences {
            let (name, e) = (&difference.name, &difference.estimate);
            println!("{name}: {:+.3} ({:+.3} to {:+.3})", e.value, e.interval[0], e.interval[1]);
        }
        println!("{LIMITS}");
        if self.check {
            claims.check()?;
        }
        Ok(())
    }
}
