//! The limits of a [`TextEngine`](super::TextEngine).

use super::prefix::Rule;
use crate::generate::Generator;
use crate::models::Model;
use crate::seam::KvCache;
use crate::{Error, Result};

/// Limits of a [`TextEngine`](super::TextEngine).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextSettings {
    /// The most bytes of keys and values, kept prefixes included.
    ///
    /// Between two calls of the model no more than this is allocated. Within one, a layer of the dense cache that grows
    /// has its old storage beside the new one, and a sequence that is cut to size its old one: for that moment at most
    /// one layer, or one sequence, is there twice.
    pub kv_limit_bytes: usize,
    /// The most sequences that are written at a time; at least 1. Up to 16, tokens are the same to the bit of every logit
    /// whoever is served beside (see [batch invariance](crate::generate#batch-invariance)).
    pub max_sequences: usize,
    /// The most rows of a prompt that one call reads; at least 1. Prompts are split at its multiples, which are also where
    /// prompts of the same beginning may part when [`exact_prefix`](Self::exact_prefix) is set.
    pub prefill_chunk: usize,
    /// The most prompt rows of all sequences that one step reads, which bounds the time between two tokens; at least 1.
    pub prefill_budget: usize,
    /// Prefixes of at least so many tokens are reused; `None` reuses none.
    pub min_prefix: Option<usize>,
    /// Whether a reused row must be the one that reading the prompt anew would give, to the bit. A request's tokens then
    /// do not depend on what was served before it. What can be reused are whole chunks of earlier prompts, and all of an
    /// equal prompt but its last token; rows of replies, which were written one by one, are computed again when the
    /// conversation goes on. Without it every row is reused, and the last bits of logits, and with them a token that is
    /// nearly a tie, depend on what was there.
    pub exact_prefix: bool,
    /// The most positions of a sequence, in place of the checkpoint's own limit.
    pub context: Option<usize>,
}

impl Default for TextSettings {
    /// 2 GiB, 16 sequences, 512 prompt rows a step in chunks of 256, exact prefixes from 16 tokens on.
    fn default() -> Self {
        Self {
            kv_limit_bytes: 2 << 30,
            max_sequences: 16,
            prefill_chunk: 256,
            prefill_budget: 512,
            min_prefix: Some(16),
            exact_prefix: true,
            context: None,
        }
    }
}

impl TextSettings {
    /// A generator that reads prompts in the calls in which an engine of these settings reads them: each prompt on its
    /// own, its last row with those that write.
    pub fn generator<'a>(&self, model: &'a dyn Model, cache: &'a mut dyn KvCache) -> Generator<'a> {
        let context = self.context.unwrap_or(model.dims().context);
        Generator::new(model, cache)
            .with_context(context)
            .with_prefill_chunk(self.prefill_chunk)
            .with_prefill_budget(self.prefill_budget)
            .isolate_prompts(true)
            .last_row_apart(true)
    }

    /// Which rows of one sequence another may start from.
    pub(super) fn rule(&self) -> Rule {
        if self.exact_prefix { Rule::Chunks(self.prefill_chunk.min(self.prefill_budget)) } else { Rule::Any }
    }

    /// # Errors
    /// `Error::Input` for limits of 0, and for a memory limit that not even two tokens fit.
    pub(super) fn check(&self, model: &dyn Model, cache: &dyn KvCache) -> Result<()> {
        for (name, value) in [
            ("max_sequences", self.max_sequences),
            ("prefill_chunk", self.prefill_chunk),
            ("prefill_budget", self.prefill_budget),
        ] {
            if value == 0 {
                return Err(Error::Input(format!("{name} is 0, expected at least 1")));
            }
        }
        let least = cache.forecast(model.dims(), 2);
        if self.kv_limit_bytes < least {
            return Err(Error::Input(format!(
                "the limit of {} bytes for keys and values is too small: a prompt of one token and its reply of one \
                 take {least}",
                self.kv_limit_bytes
            )));
        }
        Ok(())
    }
}
