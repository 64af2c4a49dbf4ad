//! The large model as its own judge.

use nics_core::cache::DenseCache;
use serde_json::{Map, Value, json};

use super::text::{Chat, Question};
use crate::labels::pipeline::Party;
use crate::labels::pipeline::writing::{Wanted, write};
use crate::{Error, Result};

/// A model in this process that answers questions.
pub struct LargeChat<'m> {
    party: &'m Party<'m>,
    max_new_tokens: usize,
    batch: usize,
    template: Map<String, Value>,
}

impl<'m> LargeChat<'m> {
    /// Replies of at most `max_new_tokens` tokens, `batch` at once. `template` are further variables of the chat template:
    /// a model that thinks has to be told not to (`enable_thinking = false` for Qwen3), or it needs more tokens.
    ///
    /// # Errors
    /// A model without a chat template.
    pub fn new(
        party: &'m Party<'m>,
        max_new_tokens: usize,
        batch: usize,
        template: Map<String, Value>,
    ) -> Result<Self> {
        if party.template.is_none() {
            return Err(Error::Input(format!(
                "{} has no chat template, so it cannot be asked for its judgement; take another judge",
                party.name
            )));
        }
        for (name, value) in [("max_new_tokens", max_new_tokens), ("batch", batch)] {
            if value == 0 {
                return Err(Error::setting(name, 0, "at least 1"));
            }
        }
        Ok(Self { party, max_new_tokens, batch, template })
    }

    fn replies(&self, questions: &[Question]) -> Result<Vec<String>> {
        let prompt = |q: &Question| -> Result<Wanted> {
            let text = self.party.conversation(Some(&q.system), &q.user, &self.template)?;
            Ok(Wanted { prompt: self.party.encode(&text)?, limit: self.max_new_tokens, prefix: None })
        };
        let wanted = questions.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        let mut written = vec![Vec::new(); questions.len()];
        let mut cache = DenseCache::new();
        write(self.party.model, &mut cache, wanted, self.batch, &self.party.eos, &mut |place, token, _| {
            written[place].push(token);
            Ok(true)
        })?;
        let text = |ids: &Vec<u32>| self.party.tokenizer.decode(ids, true).map_err(nics_core::Error::from);
        Ok(written.iter().map(text).collect::<Result<_, _>>()?)
    }
}

impl Chat for LargeChat<'_> {
    fn identity(&self) -> Value {
        json!({
            "model": self.party.identity,
            "max_new_tokens": self.max_new_tokens,
            "batch": self.batch,
            "template": self.template,
        })
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn in_groups(&self) -> bool {
        true
    }

    fn reply(&mut self, questions: &[Question]) -> Vec<Result<String>> {
        match self.replies(questions) {
            Ok(replies) => replies.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        }
    }
}
