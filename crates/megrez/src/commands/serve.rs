//! `megrez serve`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use megrez::prompts::Prompts;
use megrez::serve::MegrezFrontend;
use nics_base::exit::Usage;
use nics_core::cli::{PluggedModelArgs, at_least_one};
use nics_core::models::Model;
use nics_core::server::{Driver, ServeArgs, TextEngine, TextSettings, serve_until_signal};

use super::{Loaded, plugins_of_binary};

/// Answers OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions, /tokenize, /detokenize, /health, /metrics.
///
/// Says `listening on http://HOST:PORT` on stderr once the model is loaded. SIGTERM or Ctrl-C finishes what was taken and
/// ends with code 0; a second one ends at once. Keys come from --api-key-file or the variable MEGREZ_API_KEY; an address
/// other than loopback needs one, or --allow-open.
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    model: PluggedModelArgs,
    #[command(flatten)]
    http: ServeArgs,
    /// Most prompt tokens that are read between two steps of writing
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = at_least_one)]
    prefill_budget: usize,
    /// Compute every prompt anew instead of reusing beginnings that were computed before
    #[arg(long)]
    no_prefix_reuse: bool,
    /// TOML file with the text that announces tools to the model; default: built in
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
}

impl Serve {
    pub fn run(self) -> Result<()> {
        let config = self.http.config("MEGREZ_API_KEY")?;
        config.validate().map_err(|e| Usage(e.to_string()))?;
        let prompts = self.prompts.as_deref().map_or_else(|| Ok(Prompts::default()), Prompts::read)?;
        let (checkpoint, _) = self.model.checkpoint(&plugins_of_binary())?;
        let name = self.http.served_name.clone().unwrap_or_else(|| checkpoint.name().to_owned());
        let frontend = Arc::new(MegrezFrontend::open(&checkpoint, &name, self.http.context, &prompts)?);
        serve_until_signal(config, self.http.max_queue, frontend, move |driver| self.engine(driver))?
    }

    /// Loads the model and answers requests; runs on the engine's thread.
    fn engine(&self, driver: Driver) -> Result<()> {
        let mut loaded = Loaded::open(&self.model)?;
        let dims = loaded.megrez.decoder.dims().clone();
        // Never more than all sequences at full length can use, twice, so that ended ones can be kept for their prefixes.
        let context = self.http.context.unwrap_or(dims.context);
        let useful =
            loaded.cache.forecast(&dims, context).saturating_mul(self.http.max_seqs).saturating_mul(2);
        let settings = TextSettings {
            kv_limit_bytes: self.http.kv_limit(dims.device, useful),
            max_sequences: self.http.max_seqs,
            prefill_budget: self.prefill_budget,
            min_prefix: TextSettings::default().min_prefix.filter(|_| !self.no_prefix_reuse),
            context: self.http.context,
            ..TextSettings::default()
        };
        tracing::info!(?settings, variant = loaded.variant, "the model is loaded");
        let mut engine = TextEngine::new(&loaded.megrez.decoder, &mut *loaded.cache, settings)?;
        if let Some(hook) = &mut loaded.hook {
            engine = engine.with_hook(&mut **hook);
        }
        driver.run(&mut engine);
        Ok(())
    }
}
