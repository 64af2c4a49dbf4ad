//! `mbq sensitivity`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use mbq::artefact::Origin;
use mbq::calibrate::{Running, measure_sensitivity};
use mbq::sensitivity::{Gradients, Ratios, Sensitivity};
use nics_base::artefact::write_atomic;
use nics_base::interrupt::Interrupt;
use nics_base::size::Size;
use nics_core::cli::{JsonArg, ModelArgs};
use serde::Serialize;

use super::calibrate::bar;
use super::data::{DataArgs, report};
use super::opened::Opened;

/// The file in the output folder.
const FILE: &str = "sensitivity.json";

/// Measures how much the training loss reacts to each modality, layer by layer: sensitivity.json, and a table.
///
/// What `mbq calibrate --balance auto` measures first, without a search. Interrupted or killed, it goes on where it was with the
/// same command.
#[derive(Args)]
pub struct Measure {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    data: DataArgs,
    /// Memory beside the model's weights and the embedded samples, e.g. 8GiB
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<Size>,
    #[command(flatten)]
    json: JsonArg,
    /// Folder of sensitivity.json and of what is needed to go on
    #[arg(long, short, value_name = "FOLDER")]
    out: PathBuf,
}

/// `sensitivity.json`.
#[derive(Serialize)]
struct File<'a> {
    format_version: u32,
    #[serde(flatten)]
    origin: &'a Origin,
    data_hash: String,
    /// Mean absolute gradients of branch outputs, by modality and layer.
    #[serde(flatten)]
    sensitivity: &'a Sensitivity,
    /// Those of each modality relative to those of answers.
    ratios: &'a [Ratios],
    /// The same, at least their median: what errors weigh in a calibration.
    weights: &'a [Ratios],
}

/// One layer and branch, as a line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    layer: usize,
    branch: &'static str,
    modality: &'a str,
    gradient: f64,
    ratio: Option<f64>,
    weight: Option<f64>,
}

impl Measure {
    pub fn run(self, quiet: bool) -> Result<()> {
        let opened = Opened::open(&self.model)?;
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        let interrupt = Interrupt::install()?;
        let batch = {
            let _no_grad = tch::no_grad_guard();
            self.data.batch(&opened.checkpoint, &opened.model, quiet)?
        };
        if !self.json.json {
            report(&batch)?;
        }
        let mut progress = bar(quiet);
        let mut running = Running {
            out: Some(&self.out),
            chunk: None,
            max_memory: self.max_memory.map(|s| s.0 as u64),
            interrupt: &interrupt,
            progress: &mut progress,
        };
        let found = measure_sensitivity(opened.model.decoder(), &batch, &opened.origin, &mut running)?;
        let (ratios, weights) = (found.measured()?, found.ratios()?);
        let file = File {
            format_version: 1,
            origin: &opened.origin,
            data_hash: batch.hash()?,
            sensitivity: &found,
            ratios: &ratios,
            weights: &weights,
        };
        let path = self.out.join(FILE);
        write_atomic(&path, serde_json::to_string_pretty(&file)? + "\n")?;
        for line in lines(&found, &ratios, &weights) {
            if self.json.json {
                println!("{}", serde_json::to_string(&line)?);
                continue;
            }
            let of = |r: Option<f64>| r.map_or(String::new(), |r| format!("{r:.4}"));
            println!(
                "layer {:>3}  {:<10} {:<8} gradient {:.3e}  ratio {:<8} weight {}",
                line.layer,
                line.branch,
                line.modality,
                line.gradient,
                of(line.ratio),
                of(line.weight)
            );
        }
        if self.json.json {
            return Ok(());
        }
        if found.without_answer > 0 {
            println!("{} samples have no answer and were left out", found.without_answer);
        }
        for m in found.modalities.iter().filter(|m| m.samples == 0) {
            println!("no sample has a position of modality {}", m.modality);
        }
        println!("{}", path.display());
        Ok(())
    }
}

/// By layer, branch and modality.
fn lines<'a>(found: &'a Sensitivity, ratios: &[Ratios], weights: &[Ratios]) -> Vec<Line<'a>> {
    let layers = found.modalities.first().map_or(0, |m| m.attention.len());
    let mut all = Vec::new();
    for layer in 0..layers {
        for branch in ["attention", "mlp"] {
            let gradient = |m: &Gradients| if branch == "mlp" { m.mlp[layer] } else { m.attention[layer] };
            for m in found.modalities.iter().filter(|m| m.samples > 0) {
                let of = |all: &[Ratios]| {
                    let r = all.iter().find(|r| r.modality == m.modality)?;
                    Some(if branch == "mlp" { r.mlp[layer] } else { r.attention[layer] })
                };
                all.push(Line {
                    layer,
                    branch,
                    modality: &m.modality,
                    gradient: gradient(m),
                    ratio: of(ratios),
                    weight: of(weights),
                });
            }
        }
    }
    all
}
