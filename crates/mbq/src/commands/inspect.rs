//! `mbq inspect`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use mbq::artefact::REPORT;
use nics_core::cli::JsonArg;
use serde_json::Value;

/// Shows what a calibration has found: what each modality weighs, and the exponent of each operator.
#[derive(Args)]
pub struct Inspect {
    /// Folder of `mbq calibrate`
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    #[command(flatten)]
    json: JsonArg,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        let path = self.folder.join(REPORT);
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let report: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let rows = rows(&report);
        if self.json.json {
            for row in &rows {
                println!("{row}");
            }
            return Ok(());
        }
        println!("model {}, balance {}", report["model"], report["config"]["balance"]);
        for ratio in report["ratios"].as_array().into_iter().flatten() {
            println!(
                "weights of {}: attention {}, MLP {}",
                ratio["modality"],
                short(&ratio["attention"]),
                short(&ratio["mlp"])
            );
        }
        for row in rows {
            println!(
                "layer {:>3}  exponent {:<5} loss {:<12.6} plain rounding {:<12.6} margin {:<9.2e} {}",
                row["layer"],
                row["exponent"],
                row["loss"].as_f64().unwrap_or(f64::NAN),
                row["rounding"].as_f64().unwrap_or(f64::NAN),
                row["margin"].as_f64().unwrap_or(f64::NAN),
                row["linears"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .collect::<Vec<_>>()
                    .join(", ")
            );
        }
        Ok(())
    }
}

/// One object for each operator.
fn rows(report: &Value) -> Vec<Value> {
    let mut all = Vec::new();
    for (l, ops) in report["layers"].as_array().into_iter().flatten().enumerate() {
        for op in ops.as_array().into_iter().flatten() {
            let losses = op["losses"].as_array().into_iter().flatten().filter_map(Value::as_f64);
            let least = losses.fold(f64::INFINITY, f64::min);
            all.push(serde_json::json!({
                "layer": l, "previous": op["previous"], "linears": op["linears"], "exponent": op["exponent"],
                "loss": least, "rounding": op["losses"][0], "margin": op["margin"],
            }));
        }
    }
    all
}

/// Numbers with three places.
fn short(values: &Value) -> String {
    let all = values.as_array().into_iter().flatten().filter_map(Value::as_f64);
    all.map(|v| format!("{v:.3}")).collect::<Vec<_>>().join(" ")
}
