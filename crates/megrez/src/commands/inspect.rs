//! `megrez inspect`.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::JsonArg;
use nics_core::template::ChatTemplate;
use nics_core::tokenizer::Tokenizer;
use serde_json::json;

/// Says what a checkpoint holds: architecture, sizes, tensors, tokenizer, template and hashes.
#[derive(Args)]
pub struct Inspect {
    /// Checkpoint: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(value_name = "FOLDER|ID")]
    model: String,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    json: JsonArg,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let (mut parameters, mut tensors) = (0usize, 0usize);
        let mut dtypes: BTreeMap<String, usize> = BTreeMap::new();
        let mut list = Vec::new();
        for name in checkpoint.names() {
            let shape = checkpoint.shape(name).unwrap_or_default();
            let dtype = checkpoint.dtype(name).map(|d| format!("{d:?}")).unwrap_or_default();
            parameters += shape.iter().product::<usize>();
            tensors += 1;
            *dtypes.entry(dtype.clone()).or_default() += 1;
            if self.tensors {
                list.push(json!({ "name": name, "dtype": dtype, "shape": shape }));
            }
        }
        let config = checkpoint.config_json();
        let size = |name: &str| config.get(name).cloned().unwrap_or_default();
        let tokenizer = match checkpoint.try_file("tokenizer.json")? {
            None => None,
            Some(_) => Some(Tokenizer::from_checkpoint(&checkpoint)?.vocab_size()),
        };
        let template = ChatTemplate::from_checkpoint(&checkpoint)?.is_some();
        let about = json!({
            "name": checkpoint.name(),
            "architecture": checkpoint.architecture()?,
            "layers": size("num_hidden_layers"),
            "hidden": size("hidden_size"),
            "heads": size("num_attention_heads"),
            "kv_heads": size("num_key_value_heads"),
            "context": size("max_position_embeddings"),
            "vocabulary": size("vocab_size"),
            "tensors": tensors,
            "parameters": parameters,
            "dtypes": dtypes,
            "tokens of the tokenizer": tokenizer,
            "chat template": template,
            "arch_hash": checkpoint.arch_hash(),
            "weights_hash": checkpoint.weights_hash()?,
        });
        if self.json.json {
            println!("{about}");
            for t in &list {
                println!("{t}");
            }
            return Ok(());
        }
        if let serde_json::Value::Object(about) = &about {
            for (name, value) in about {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                println!("{name:<24} {text}");
            }
        }
        for t in list {
            println!(
                "{:<6} {:<20} {}",
                t["dtype"].as_str().unwrap_or(""),
                t["shape"].to_string(),
                t["name"].as_str().unwrap_or("")
            );
        }
        Ok(())
    }
}
