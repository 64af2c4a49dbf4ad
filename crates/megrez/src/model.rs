//! Which checkpoints are Megrez, and what belongs to one.

use nics_core::cache::NoCache;
use nics_core::checkpoint::Checkpoint;
use nics_core::models::{self, Batch, Decoder, DecoderConfig, Input, Model};
use nics_core::sampling::Sampling;
use nics_core::seam::{Ragged, SeqId};
use nics_core::{Error, Result};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::prompt::{Prompter, TURN_END};

/// The decoder of a Megrez checkpoint: Megrez-3B-Instruct (`LlamaForCausalLM`), or the language model of Megrez-3B-Omni
/// (`MegrezO`, tensors under `llm.`).
///
/// # Errors
/// `UnsupportedArchitecture` for anything else, the mixture-of-experts successor Megrez2 included; and what is wrong
/// with the checkpoint.
pub fn load_decoder(checkpoint: &Checkpoint, device: Device, kind: Kind) -> Result<Decoder> {
    let config = decoder_config(checkpoint)?;
    let root = checkpoint.loading(device, kind);
    let omni = checkpoint.architecture()? == "MegrezO";
    models::load_at(config, &if omni { root.at("llm") } else { root })
}

/// The configuration of the decoder of a Megrez checkpoint; its weights are not read.
///
/// # Errors
/// As [`load_decoder`].
pub fn decoder_config(checkpoint: &Checkpoint) -> Result<DecoderConfig> {
    let path = checkpoint.dir().join("config.json");
    match checkpoint.architecture()? {
        "LlamaForCausalLM" | "MegrezO" => {
            models::llama::config(checkpoint.config_json()).map_err(|e| e.in_file(&path))
        }
        other => {
            let refused = Error::UnsupportedArchitecture {
                found: other.to_owned(),
                known: "LlamaForCausalLM (Megrez-3B-Instruct) and MegrezO (the language model of Megrez-3B-Omni); the \
                        mixture-of-experts Megrez2 is another model"
                    .into(),
            };
            Err(refused.in_file(&path))
        }
    }
}

/// How a checkpoint's replies are written unless a caller says otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Replies {
    /// Tokens that end a reply.
    pub eos: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// The most new tokens.
    pub max_new_tokens: usize,
}

impl Replies {
    /// What generation_config.json and config.json say.
    ///
    /// # Errors
    /// A tokenizer that does not fit the model, or nothing that ends a reply.
    pub fn read(checkpoint: &Checkpoint, prompter: &Prompter) -> Result<Self> {
        let generation = checkpoint.generation_config()?.unwrap_or_default();
        let vocab = decoder_config(checkpoint)?.vocab;
        let entries = prompter.tokenizer.vocab_size() as i64;
        if entries > vocab {
            return Err(Error::Input(format!(
                "{}: tokenizer.json has {entries} tokens but config.json only a vocab_size of {vocab}",
                checkpoint.dir().display()
            )));
        }
        Ok(Self {
            eos: end_tokens(&generation, checkpoint.config_json().get("eos_token_id"), prompter)?,
            sampling: defaults(&generation),
            max_new_tokens: generation["max_new_tokens"].as_u64().map_or(1024, |n| n.max(1) as usize),
        })
    }
}

/// A Megrez that can be talked to.
pub struct Megrez {
    /// The language model.
    pub decoder: Decoder,
    /// Its tokenizer and template.
    pub prompter: Prompter,
    /// Tokens that end a reply.
    pub eos: Vec<u32>,
    /// How replies are drawn unless the caller says otherwise.
    pub sampling: Sampling,
    /// The most new tokens unless the caller says otherwise.
    pub max_new_tokens: usize,
    /// Name of the checkpoint.
    pub name: String,
}

impl Megrez {
    /// Loads a checkpoint: decoder, tokenizer, template, end tokens and generation defaults.
    pub fn load(checkpoint: &Checkpoint, device: Device, kind: Kind) -> Result<Self> {
        let prompter = Prompter::from_checkpoint(checkpoint)?;
        let Replies { eos, sampling, max_new_tokens } = Replies::read(checkpoint, &prompter)?;
        let decoder = load_decoder(checkpoint, device, kind)?;
        let name = checkpoint.name().to_owned();
        Ok(Self { decoder, prompter, eos, sampling, max_new_tokens, name })
    }

    /// Refuses a prompt that no token could follow: an empty one, ids outside the vocabulary, no room in the context.
    pub fn check_prompt(&self, ids: &[u32]) -> Result<()> {
        let dims = self.decoder.dims();
        if ids.is_empty() {
            return Err(Error::input("the prompt is empty"));
        }
        if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= dims.vocab) {
            return Err(Error::Input(format!("token {id} is outside the vocabulary of {}", dims.vocab)));
        }
        if ids.len() >= dims.context {
            let what = "the model's context";
            return Err(Error::ContextOverflow { need: ids.len() + 1, max: dims.context, what });
        }
        Ok(())
    }

    /// Logits of the token after `prompt`, without a cache.
    pub fn next_logits(&self, prompt: &[u32]) -> Result<Vec<f32>> {
        self.check_prompt(prompt)?;
        let dims = self.decoder.dims();
        let _no_grad = tch::no_grad_guard();
        let ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(dims.device)?;
        let batch = Batch::new(Ragged::contiguous(&[(SeqId(0), 0, prompt.len())]), Input::Ids(&ids));
        let out = self.decoder.forward(&batch, &mut NoCache::new(), None)?;
        let last = out.hidden.f_narrow(0, prompt.len() as i64 - 1, 1)?;
        let logits = self.decoder.logits(&last)?.f_squeeze_dim(0)?;
        Ok(Vec::<f32>::try_from(logits.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?)?)
    }
}

/// End tokens, from the first place that names some: generation_config.json, config.json, the literal `<|turn_end|>`.
/// (Early releases had a wrong end token in the tokenizer's configuration, so that is not asked.) `<|turn_end|>` and
/// `<|eos|>` always end a reply.
fn end_tokens(generation: &Value, config: Option<&Value>, prompter: &Prompter) -> Result<Vec<u32>> {
    let ids = |value: &Value| -> Vec<u32> {
        let all = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
        all.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
    };
    let mut eos = ids(&generation["eos_token_id"]);
    if eos.is_empty() {
        eos = config.map(ids).unwrap_or_default();
    }
    eos.extend([TURN_END, "<|eos|>"].iter().filter_map(|t| prompter.tokenizer.token_id(t)));
    eos.sort_unstable();
    eos.dedup();
    if eos.is_empty() {
        return Err(Error::Input(format!(
            "nothing says which token ends a reply: neither generation_config.json nor config.json has an eos_token_id, \
             and the tokenizer has no {TURN_END}"
        )));
    }
    Ok(eos)
}

/// Sampling that generation_config.json asks for; without it, the vendor's for chat: temperature 0.7, top-p 0.9.
fn defaults(generation: &Value) -> Sampling {
    let number = |name: &str, default: f32| generation[name].as_f64().map_or(default, |v| v as f32);
    if generation["do_sample"].as_bool() == Some(false) {
        return Sampling { repetition_penalty: number("repetition_penalty", 1.0), ..Sampling::default() };
    }
    Sampling {
        temperature: number("temperature", 0.7),
        top_p: number("top_p", 0.9),
        top_k: generation["top_k"].as_u64().unwrap_or(0) as usize,
        min_p: number("min_p", 0.0),
        repetition_penalty: number("repetition_penalty", 1.0),
        ..Sampling::default()
    }
}
