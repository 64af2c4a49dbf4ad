//! A model ready to write: what most commands begin with.

use std::path::Path;

use anyhow::{Context, Result, bail};
use nics_core::cache::DenseCache;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::{Given, ModelArgs, PromptLine, SamplingArgs};
use nics_core::device::{device_name, dtype_name};
use nics_core::generate::{Finish, Prompt, Request};
use nics_core::models::{self, Decoder, Model};
use nics_core::sampling::Sampling;
use nics_core::seam::KvCache;
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use pm_kvq::cache::PagedCache;
use pm_kvq::calibrate::artefact::{read_allocation, read_scales};
use pm_kvq::calibrate::fold::{fold, foldable};
use pm_kvq::calibrate::{Origin, Scaled};
use pm_kvq::watch::{Log, Watched};
use serde_json::Value;

use super::cache::{CacheArgs, Kv, with_widths};

/// What was loaded.
pub struct Opened {
    pub checkpoint: Checkpoint,
    pub model: Decoder,
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    /// Tokens that end a reply.
    pub eos: Vec<u32>,
    own: Sampling,
}

/// A cache, and what is seen of it.
pub struct Kept {
    pub cache: Box<dyn KvCache>,
    pub log: Log,
}

impl Opened {
    pub fn open(args: &ModelArgs) -> Result<Self> {
        args.set_threads()?;
        let checkpoint = Checkpoint::open(&args.model)?;
        let device = args.run_on.device.open()?;
        let kind = args.run_on.dtype.resolve(models::stored_kind(&checkpoint));
        let model = models::load(&checkpoint, device, kind)?;
        let (tokenizer, template) = match checkpoint.try_file("tokenizer.json")? {
            None => (None, None),
            Some(_) => {
                (Some(Tokenizer::from_checkpoint(&checkpoint)?), ChatTemplate::from_checkpoint(&checkpoint)?)
            }
        };
        let generation = checkpoint.generation_config()?.unwrap_or_default();
        let eos = if let Some(tokenizer) = &tokenizer {
            tokenizer.special_ids().eos.clone()
        } else {
            let config = checkpoint.config_json().get("eos_token_id");
            let of = |value: &Value| -> Vec<u32> {
                let all = value.as_array().map_or_else(|| std::slice::from_ref(value), Vec::as_slice);
                all.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
            };
            let own = of(&generation["eos_token_id"]);
            if own.is_empty() { config.map(of).unwrap_or_default() } else { own }
        };
        let own = Sampling::from_generation_config(&generation);
        Ok(Self { checkpoint, model, tokenizer, template, eos, own })
    }

    /// The tokenizer, for what cannot do without.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().with_context(|| {
            format!("{} has no tokenizer.json: give prompts as token ids (`ids`)", self.checkpoint.name())
        })
    }

    pub fn maybe_tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// A conversation as token ids, up to where the reply begins. `special`: whether the tokenizer adds its own begin to
    /// that of the template.
    pub fn conversation(&self, messages: &[Message], special: bool) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        let template = self.template.as_ref().with_context(|| {
            format!(
                "{} has no chat template: give --raw to continue texts as they are",
                self.checkpoint.name()
            )
        })?;
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        Ok(tokenizer.encode(&template.render(messages, &options)?, special)?)
    }

    /// The ids of a prompt, which leave room for a token.
    pub fn encode(&self, line: &PromptLine, raw: bool) -> Result<Vec<u32>> {
        let ids = match line.given()? {
            Given::Ids(ids) => ids.to_vec(),
            Given::Messages(messages) => self.conversation(messages, false)?,
            Given::Text(text) if raw => self.tokenizer()?.encode(text, false)?,
            Given::Text(text) => self.conversation(&[Message::new("user", text)], false)?,
        };
        self.check_prompt(&ids)?;
        Ok(ids)
    }

    /// The prompts of some lines, each named by its place when it is wrong.
    pub fn encode_all(&self, lines: &[PromptLine], raw: bool) -> Result<Vec<Vec<u32>>> {
        let encode = |(i, line)| self.encode(line, raw).with_context(|| format!("prompt {}", i + 1));
        lines.iter().enumerate().map(encode).collect()
    }

    /// Refuses a prompt that no token could follow.
    pub fn check_prompt(&self, ids: &[u32]) -> Result<()> {
        let dims = self.model.dims();
        if ids.is_empty() {
            bail!("the prompt is empty");
        }
        if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= dims.vocab) {
            bail!("token {id} is outside the vocabulary of {}", dims.vocab);
        }
        if ids.len() >= dims.context {
            bail!(
                "the prompt has {} tokens, which leaves no room in the context of {}",
                ids.len(),
                dims.context
            );
        }
        Ok(())
    }

    /// How tokens are drawn: the flags over the model's own settings.
    pub fn sampling(&self, flags: &SamplingArgs) -> Result<Sampling> {
        Ok(flags.over(&self.own)?)
    }

    pub fn request(&self, prompt: &[u32], sampling: &Sampling, seed: u64, max_new_tokens: usize) -> Request {
        Request {
            prompt: Prompt::Ids(prompt.to_vec()),
            sampling: Sampling { seed, ..sampling.clone() },
            max_new_tokens,
            eos: self.eos.clone(),
        }
    }

    /// Why a reply ended.
    pub fn finish(
        &self,
        prompt: usize,
        written: usize,
        stopped: bool,
        finish: Option<Finish>,
    ) -> &'static str {
        match (stopped, finish) {
            (true, _) => "stop",
            (_, Some(Finish::Eos)) => "eos",
            (_, Some(Finish::Context)) if prompt + written < self.model.dims().context => "cache_exhausted",
            (_, Some(Finish::Context)) => "context",
            _ => "length",
        }
    }

    /// Device and dtype as rows name them.
    pub fn place(&self) -> (String, String) {
        let dims = self.model.dims();
        (device_name(dims.device), dtype_name(dims.kind))
    }

    /// The cache that the flags ask for. Key scales go into the weights where they can, else in front of the cache.
    pub fn cache(&mut self, args: &CacheArgs, scales: Option<&Path>) -> Result<Kept> {
        let mut kv = args.kv()?;
        let dims = self.model.dims().clone();
        let origin = match (&args.budgets, scales) {
            (None, None) => None,
            _ => Some(Origin::of(&self.checkpoint)?),
        };
        if let (Kv::Paged(config), Some(path), Some(origin)) = (&mut kv, &args.budgets, &origin) {
            with_widths(config, &read_allocation(path, origin, dims.layers)?);
        }
        let (mut cache, log): (Box<dyn KvCache>, Log) = match kv {
            Kv::Dense => watched(DenseCache::new(), dims.layers),
            Kv::Baseline(baseline) => watched(baseline.cache(&dims, &[])?, dims.layers),
            Kv::Paged(config) => {
                let cache = Watched::new(PagedCache::new(&dims, &config)?, dims.layers, PagedCache::stats);
                let log = cache.log();
                (Box::new(cache), log)
            }
        };
        if let (Some(path), Some(origin)) = (scales, &origin) {
            let (scales, _) = read_scales(path, origin, &dims)?;
            if foldable(&mut self.model).is_ok() {
                fold(&mut self.model, &scales)?;
            } else {
                cache = Box::new(Scaled::new(cache, &scales, &dims)?);
            }
        }
        Ok(Kept { cache, log })
    }
}

fn watched<C: KvCache + 'static>(cache: C, layers: usize) -> (Box<dyn KvCache>, Log) {
    let cache = Watched::new(cache, layers, |_, _| Vec::new());
    let log = cache.log();
    (Box::new(cache), log)
}
