//! `mbq inspect`.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;
use mbq::artefact::REPORT;
use mbq::convert::layout_of;
use mbq::stored::{Form, Stored};
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::JsonArg;
use serde_json::{Value, json};
use tch::{Device, Kind};

/// Shows what a calibration has found, or what a quantized checkpoint holds.
///
/// Of a calibration: what each modality weighs, and the exponent of each operator. Of a checkpoint: how its layers are stored, and
/// for our own layout whether they are those that were written.
#[derive(Args)]
pub struct Inspect {
    /// Folder of `mbq calibrate`, or a quantized checkpoint: its folder or hub id
    #[arg(value_name = "FOLDER|ID")]
    folder: String,
    #[command(flatten)]
    json: JsonArg,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        let folder = Path::new(&self.folder);
        let path = folder.join(REPORT);
        if !path.exists() && (!folder.exists() || folder.join("config.json").exists()) {
            return self.checkpoint();
        }
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
        if let Some(file) = report["imported"]["file"].as_str() {
            println!("model {}, imported from {file}, which says nothing of a search", report["model"]);
            for row in rows {
                println!("layer {:>3}  {}", row["layer"], linears(&row));
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
                linears(&row)
            );
        }
        Ok(())
    }
}

impl Inspect {
    fn checkpoint(&self) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.folder)?;
        let stored = Stored::of(&checkpoint)?;
        let stored = stored.with_context(|| format!("{} is not quantized", self.folder))?;
        let root = checkpoint.root(Device::Cpu, Kind::Float);
        let bytes = |counts: &dyn Fn(&str) -> bool| -> u64 {
            let of = |name| {
                let values = checkpoint.shape(name).map_or(1, |s| s.iter().product::<usize>());
                (values * checkpoint.dtype(name).map_or(0, |d| d.bitsize())) as u64 / 8
            };
            checkpoint.names().filter(|n| counts(n)).map(of).sum()
        };
        let (packed, dense) = (bytes(&|n| stored.owns(n)), bytes(&|n| !stored.owns(n)));
        let verified = stored.form == Form::Packed;
        if verified {
            stored.verify(&root)?;
        }
        let layout = layout_of(stored.form);
        if self.json.json {
            println!(
                "{}",
                json!({"layout": layout.to_string(), "bits": stored.bits, "group_size": stored.group, "act_bits": stored.act_bits,
                    "layers": stored.layers().len(), "quantized_bytes": packed, "dense_bytes": dense,
                    "verified": verified, "quantization_config": stored.config})
            );
            return Ok(());
        }
        let group =
            if stored.group == -1 { "whole rows".into() } else { format!("groups of {}", stored.group) };
        println!("{layout}: {} linear layers of {} bits in {group}", stored.layers().len(), stored.bits);
        match (stored.act_bits, &stored.ignored) {
            (Some(bits), _) => println!("activations are rounded to {bits} bits by token"),
            (None, Some(ignored)) => println!("{ignored}"),
            (None, None) => {}
        }
        println!("{packed} bytes quantized, {dense} bytes of other tensors");
        if verified {
            let of = |field: &str| stored.config[field].as_str().unwrap_or_default().to_owned();
            let model = stored.config["source"]["model"].as_str().unwrap_or_default();
            println!("by {} from {model}; the tensors are those that were written", of("method"));
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

/// The names of an operator's layers.
fn linears(row: &Value) -> String {
    let names = row["linears"].as_array().into_iter().flatten().filter_map(Value::as_str);
    names.collect::<Vec<_>>().join(", ")
}

/// Numbers with three places.
fn short(values: &Value) -> String {
    let all = values.as_array().into_iter().flatten().filter_map(Value::as_f64);
    all.map(|v| format!("{v:.3}")).collect::<Vec<_>>().join(" ")
}
