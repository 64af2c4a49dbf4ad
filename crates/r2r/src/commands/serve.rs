//! `r2r serve`.

use std::sync::{Arc, OnceLock};

use anyhow::{Result, bail};
use clap::Args;
use nics_base::exit::Usage;
use nics_core::cache::DenseCache;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::SeedArg;
use nics_core::models::{self, Model as _};
use nics_core::seam::KvCache;
use nics_core::server::{Driver, ModelCard, ServeArgs, ToolFormat, serve_until_signal};
use nics_core::template::ChatTemplate;
use nics_core::tokenizer::Tokenizer;
use r2r::policy::PolicySpec;
use r2r::remote::LargeSpec;
use r2r::serve::{PairEngine, PairFrontend, PairSettings, Sizes};

use super::opened::{Opened, PairArgs, own_sampling};

/// New tokens of a reply when neither the request nor generation_config.json says how many.
const MAX_NEW_TOKENS: u64 = 1024;

/// Answers OpenAI's API with two models: /v1/models, /v1/chat/completions, /v1/completions, /tokenize, /detokenize, /health,
/// /metrics.
///
/// A request may have a threshold or a target_llm_ratio of its own, and streams say who chose each token: docs/r2r.md. Says
/// `listening on http://HOST:PORT` on stderr once the pair is ready. SIGTERM or Ctrl-C finishes what was taken and ends with
/// code 0; a second one ends at once. Keys come from --api-key-file or the variable R2R_API_KEY; an address other than
/// loopback needs one, or --allow-open. --kv-memory is for both models together when both are here.
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    pair: PairArgs,
    #[command(flatten)]
    http: ServeArgs,
    #[command(flatten)]
    seed: SeedArg,
}

impl Serve {
    pub fn run(self) -> Result<()> {
        let config = self.http.config("R2R_API_KEY")?;
        config.validate().map_err(|e| Usage(e.to_string()))?;
        let policy = self.pair.policy(self.seed.seed)?;
        let frontend = Arc::new(self.frontend(policy)?);
        let sizes = frontend.sizes();
        serve_until_signal(config, self.http.max_queue, frontend, move |driver| self.engine(driver, &sizes))?
    }

    /// What requests go through; reads no weights.
    fn frontend(&self, policy: PolicySpec) -> Result<PairFrontend> {
        let checkpoint = Checkpoint::open(&self.pair.small)?;
        let small = models::config(checkpoint.config_json())?;
        let mut context = small.context;
        let mut vocab = small.vocab;
        if let LargeSpec::Local(path) = &self.pair.large.large {
            let large = models::config(Checkpoint::open(path)?.config_json())?;
            (context, vocab) = (context.min(large.context), vocab.min(large.vocab));
        }
        if let Some(given) = self.pair.large.large_context {
            context = context.min(given);
        }
        if let Some(asked) = self.http.context {
            if asked > context || asked < 2 {
                bail!("--context {asked}: expected 2 to {context}, which is what both models can");
            }
            context = asked;
        }
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint)?;
        let eos = tokenizer.special_ids().eos.clone();
        if eos.is_empty() {
            bail!(
                "nothing says which token ends a reply of {}: neither generation_config.json, config.json nor the \
                 tokenizer names an end token",
                checkpoint.name()
            );
        }
        let generation = checkpoint.generation_config()?.unwrap_or_default();
        let new = generation["max_new_tokens"].as_u64().unwrap_or(MAX_NEW_TOKENS).max(1);
        let mark = |token| tokenizer.token_id(token);
        let tools = mark("<tool_call>").zip(mark("</tool_call>"));
        let card = ModelCard {
            id: self.http.served_name.clone().unwrap_or_else(|| checkpoint.name().to_owned()),
            owner: "r2r".into(),
            context,
            vocab: vocab as usize,
            sampling: own_sampling(&checkpoint)?,
            max_new_tokens: new as usize,
            eos,
            tools: tools.map(|(start, end)| ToolFormat { start, end }),
        };
        Ok(PairFrontend::new(card, tokenizer, ChatTemplate::from_checkpoint(&checkpoint)?, policy))
    }

    /// Loads the pair and answers requests; runs on the engine's thread.
    fn engine(&self, driver: Driver, sizes: &OnceLock<Sizes>) -> Result<()> {
        let opened = Opened::open(&self.pair, self.seed.seed)?;
        if let Some(of_models) = opened.sizes {
            let _ = sizes.set(of_models);
        }
        let (small, large) = (opened.small.dims(), opened.large_dims());
        // Never more than all sequences at full length can use.
        let context = self.http.context.unwrap_or(usize::MAX).min(opened.context);
        let cache = DenseCache::new();
        let of_large = large.map_or(0, |dims| cache.forecast(dims, context));
        let useful = cache.forecast(small, context).saturating_add(of_large);
        let limit = self.http.kv_limit(small.device, useful.saturating_mul(self.http.max_seqs));
        let settings = PairSettings::share(limit, self.http.max_seqs, small, large);
        tracing::info!(?settings, policy = %opened.policy.kind, "the pair is ready");
        let mut engine = PairEngine::new(opened.decoder()?, settings)?;
        driver.run(&mut engine);
        Ok(())
    }
}
