//! Where training starts and where it ends: a new or a loaded model, and the folder that is written.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nics_base::artefact::{AtomicDir, write_atomic};
use nics_core::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, TensorPath, save};
use nics_core::models::{self, Decoder, Model};
use nics_core::sampling::Sampling;
use nics_core::tokenizer::Tokenizer;
use nics_core::train::Summary;
use nics_core::{Error, Result};
use nics_datasets::word_problems::Split;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::card::{Card, TEST_PROBLEMS};
use super::data::Conversations;
use super::recipe::{Recipe, Start};
use crate::model::Megrez;
use crate::prompt::{Prompter, TURN_END};
use crate::vocabulary::{self, SPECIAL_TOKENS, train_bpe};

/// Files beside the weights that the result takes over, and the configuration.
pub(super) struct Layout {
    config: Value,
    files: Vec<PathBuf>,
}

/// Files of a base checkpoint that belong to a fine-tuned one too.
const COMPANIONS: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// The model at the beginning of a run.
pub(super) fn start(recipe: &Recipe, state: &Path, device: Device) -> Result<(Megrez, Layout)> {
    match &recipe.model {
        Start::From { checkpoint, .. } => {
            let checkpoint = Checkpoint::open(checkpoint)?;
            let megrez = Megrez::load(&checkpoint, device, Kind::Float)?;
            let mut files = Vec::new();
            for name in COMPANIONS {
                files.extend(checkpoint.try_file(name)?);
            }
            let config = Value::Object(checkpoint.config_json().clone());
            Ok((megrez, Layout { config, files }))
        }
        Start::Scratch { config, initializer_range, seed, .. } => {
            let vocabulary = vocabulary(recipe, state)?;
            let tokenizer = Tokenizer::from_file(&vocabulary.join("tokenizer.json"))?;
            let config = complete(config, *initializer_range, &tokenizer)?;
            let Value::Object(fields) = &config else { return Err(Error::input("config is not an object")) };
            let decoder_config = models::config(fields)
                .map_err(|e| Error::Config(format!("model.scratch.config of the recipe: {e}")))?;
            let root = initial(*seed, *initializer_range, decoder_config.layers, device);
            let decoder = Decoder::load(decoder_config, &root)?;
            let eos = tokenizer.token_id(TURN_END).into_iter().collect();
            let megrez = Megrez {
                decoder,
                prompter: Prompter::new(tokenizer)?,
                eos,
                sampling: Sampling::default(),
                max_new_tokens: super::SOLUTION_TOKENS,
                name: "scratch".into(),
            };
            let files = ["tokenizer.json", "tokenizer_config.json"].map(|f| vocabulary.join(f)).to_vec();
            Ok((megrez, Layout { config, files }))
        }
    }
}

/// Weights drawn from `seed`; what ends a residual branch starts smaller by `sqrt(2 layers)` (Radford et al., 2019).
fn initial(seed: u64, std: f64, layers: usize, device: Device) -> TensorPath {
    let shrink = 1.0 / (2.0 * layers as f64).sqrt();
    TensorPath::random(seed, std, device, Kind::Float).with_transform(Arc::new(
        move |name: &str, t: Tensor| {
            let ends_branch = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            Ok(if ends_branch { t * shrink } else { t })
        },
    ))
}

/// The folder of the run's vocabulary, learned from its first conversations unless an earlier run has done so.
fn vocabulary(recipe: &Recipe, state: &Path) -> Result<PathBuf> {
    let Start::Scratch { config, vocab_size, vocabulary_conversations, .. } = &recipe.model else {
        return Err(Error::input("only a model from scratch has a vocabulary of its own"));
    };
    // Named by what it depends on, so that a changed recipe does not find an old vocabulary.
    let hash = nics_base::hash::value(&(&recipe.data.source, vocab_size, vocabulary_conversations))?;
    let dir = state.join(format!("vocabulary-{}", &hash[..12]));
    if dir.join("tokenizer_config.json").exists() {
        return Ok(dir);
    }
    let conversations = Conversations::open(&recipe.data.source, recipe.train.seed)?;
    let text = (0..*vocabulary_conversations as u64).map(|i| {
        let turns: Vec<String> = conversations
            .get(i)
            .iter()
            .map(|m| format!("{}\n{}", m.role, m.text().unwrap_or_default()))
            .collect();
        format!("system\n{}\n{}", vocabulary::DEFAULT_SYSTEM, turns.join("\n"))
    });
    let texts: Vec<String> = text.collect();
    let tokenizer = train_bpe(texts.into_iter(), *vocab_size, &SPECIAL_TOKENS).map_err(Error::input)?;
    let context = config.get("max_position_embeddings").and_then(Value::as_u64).unwrap_or(2048);
    let unfinished = AtomicDir::create(&dir)?;
    vocabulary::save(&tokenizer, unfinished.path(), context as usize).map_err(Error::input)?;
    unfinished.commit()?;
    Ok(dir)
}

/// A whole config.json in Megrez layout from the fields of a recipe.
fn complete(fields: &Map<String, Value>, initializer_range: f64, tokenizer: &Tokenizer) -> Result<Value> {
    let id = |token: &str| {
        tokenizer.token_id(token).ok_or_else(|| Error::Input(format!("the vocabulary has no {token}")))
    };
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 5_000_000.0,
        "rope_scaling": null,
        "max_position_embeddings": 2048,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "bos_token_id": null,
        "eos_token_id": id(TURN_END)?,
        "pad_token_id": id("<|pad|>")?,
        "vocab_size": tokenizer.vocab_size(),
        "initializer_range": initializer_range,
        "torch_dtype": "float32",
    });
    if let Value::Object(config) = &mut config {
        config.extend(fields.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    Ok(config)
}

/// The parameters that the run changes, sharing their storage with the model's.
pub(super) fn trainable(decoder: &mut Decoder, start: &Start) -> Result<Vec<(String, Tensor)>> {
    let frozen: &[String] = if let Start::From { freeze, .. } = start { freeze } else { &[] };
    let mut used = vec![false; frozen.len()];
    let mut parameters = Vec::new();
    decoder.visit_parameters(&mut |name, tensor| {
        let mut keep = false;
        for (prefix, used) in frozen.iter().zip(&mut used) {
            if name.starts_with(prefix.as_str()) {
                (*used, keep) = (true, true);
            }
        }
        *tensor = tensor.f_detach()?.f_set_requires_grad(!keep)?;
        if !keep {
            parameters.push((name.to_owned(), tensor.shallow_clone()));
        }
        Ok(())
    })?;
    if let Some((prefix, _)) = frozen.iter().zip(used).find(|(_, used)| !used) {
        return Err(Error::Config(format!("model.from.freeze: no parameter starts with `{prefix}`")));
    }
    Ok(parameters)
}

/// Writes the trained model as a checkpoint that transformers loads.
pub(super) fn write(
    megrez: &mut Megrez,
    layout: &Layout,
    recipe: &Recipe,
    summary: &Summary,
    out: &Path,
) -> Result<()> {
    let dir = AtomicDir::create(out)?;
    let (mut tensors, mut parameters) = (Vec::new(), 0);
    megrez.decoder.visit_parameters(&mut |name, tensor| {
        parameters += tensor.numel();
        tensors.push((name.to_owned(), tensor.f_detach()?));
        Ok(())
    })?;
    save(dir.path(), tensors, &layout.config, DEFAULT_SHARD_BYTES)?;
    for file in &layout.files {
        let name = file.file_name().unwrap_or_default();
        std::fs::copy(file, dir.path().join(name))
            .map_err(|source| Error::Io { path: file.clone(), source })?;
    }
    let put = |name: &str, text: String| write_atomic(dir.path().join(name), text);
    if matches!(recipe.model, Start::Scratch { .. }) {
        let generation = json!({
            "eos_token_id": megrez.eos,
            "pad_token_id": layout.config["pad_token_id"],
            "do_sample": false,
            "max_new_tokens": super::SOLUTION_TOKENS,
        });
        put("generation_config.json", format!("{generation:#}\n"))?;
    }
    let run = json!({
        "recipe": recipe,
        "steps": summary.steps,
        "target_tokens": summary.tokens,
        "seconds": summary.seconds.round(),
        "last": summary.last,
        "validation": summary.eval,
    });
    put("training.json", format!("{run:#}\n"))?;
    let accuracy = (recipe.eval.problems > 0)
        .then(|| super::solved(megrez, Split::Test, TEST_PROBLEMS, recipe.eval.seed))
        .transpose()?;
    let card = Card {
        name: &out.file_name().unwrap_or_default().to_string_lossy(),
        recipe,
        summary,
        parameters,
        weights_hash: &Checkpoint::open_dir(dir.path())?.weights_hash()?,
        accuracy,
    };
    put("README.md", card.render()?)?;
    Ok(dir.commit()?)
}
