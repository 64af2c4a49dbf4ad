//! The front end: conversations to token ids, and what a reply says it cost.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use nics_core::sampling::Sampling;
use nics_core::server::{Frontend, ModelCard};
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use nics_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::OwnFields;
use crate::decode::{Sizes, Usage};
use crate::policy::PolicySpec;

/// Tokens of the small model.
pub(super) const SMALL: &str = "slm_tokens";
/// Tokens of the large model.
pub(super) const LARGE: &str = "llm_tokens";
/// Tokens that the large model read.
pub(super) const LARGE_READ: &str = "llm_tokens_read";
/// Tokens of the small model that the large one was asked for and did not give.
pub(super) const DEGRADED: &str = "degraded_tokens";

/// Turns requests into token ids of the pair's one tokenizer.
pub struct PairFrontend {
    card: ModelCard,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    policy: PolicySpec,
    sizes: Arc<OnceLock<Sizes>>,
}

impl PairFrontend {
    /// Over the tokenizer that both models share. `policy` is the one that the engine runs, which says what a request may
    /// set. Sampling of the card that the small model cannot do is left out.
    pub fn new(
        card: ModelCard,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        policy: PolicySpec,
    ) -> Self {
        let own = &card.sampling;
        let sampling = Sampling {
            temperature: own.temperature,
            top_k: own.top_k,
            top_p: own.top_p,
            ..Sampling::default()
        };
        Self { card: ModelCard { sampling, ..card }, tokenizer, template, policy, sizes: Arc::default() }
    }

    /// Where the sizes of the models are put, once they are known; replies say from then on how many parameters they took.
    pub fn sizes(&self) -> Arc<OnceLock<Sizes>> {
        self.sizes.clone()
    }
}

impl Frontend for PairFrontend {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn chat(
        &self,
        messages: &[Message],
        tools: Option<&[Value]>,
        settings: &Map<String, Value>,
    ) -> Result<Vec<u32>> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::input("this model has no chat template: send /v1/completions the text itself")
        })?;
        let options = RenderOptions {
            add_generation_prompt: true,
            tools: tools.map(|tools| tools.to_vec().into()),
            extra: settings.clone(),
            ..RenderOptions::default()
        };
        let text = template.render(messages, &options)?;
        // The template writes the begin token where there is one.
        Ok(self.tokenizer.encode(&text, false)?)
    }

    fn check_sampling(&self, sampling: &Sampling) -> Result<()> {
        let refused = [
            ("logprobs", sampling.logprobs.is_some(), "of two models a token has no one probability"),
            ("min_p", sampling.min_p > 0.0, "the small model has no such filter"),
            (
                "repetition_penalty",
                (sampling.repetition_penalty - 1.0).abs() > f32::EPSILON,
                "the small model has no penalties",
            ),
        ];
        match refused.into_iter().find(|(_, given, _)| *given) {
            Some((field, _, why)) => {
                let message = format!("{field} is not supported by this server: {why}");
                Err(Error::Field { field: field.to_owned(), message })
            }
            None => Ok(()),
        }
    }

    fn usage(&self, counts: &BTreeMap<&'static str, u64>) -> Map<String, Value> {
        let count = |name| counts.get(name).copied().unwrap_or(0);
        let usage = Usage {
            small_tokens: count(SMALL),
            large_tokens: count(LARGE),
            large_read: count(LARGE_READ),
            degraded_tokens: count(DEGRADED),
        };
        let mut map = Map::new();
        for name in [SMALL, LARGE, LARGE_READ, DEGRADED] {
            map.insert(name.to_owned(), count(name).into());
        }
        map.insert("llm_token_ratio".to_owned(), usage.large_share().into());
        if let Some(sizes) = self.sizes.get() {
            map.insert("mean_parameters_billions".to_owned(), json!(usage.mean_parameters(sizes)));
        }
        map
    }

    fn own_fields(&self, fields: &Map<String, Value>) -> Result<Map<String, Value>> {
        OwnFields::read(fields, &self.policy).map(OwnFields::to_map)
    }
}
