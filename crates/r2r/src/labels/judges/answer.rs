//! Branches that end in the same answer mean the same.

use nics_core::cache::DenseCache;
use serde_json::{Value, json};

use super::{Judge, Pair, Verdict};
use crate::labels::pipeline::Party;
use crate::labels::pipeline::writing::{Wanted, write};
use crate::{Error, Result};

/// The answer of a whole conversation's text, where it has one.
pub type Extract<'m> = Box<dyn Fn(&str) -> Option<String> + Send + 'm>;

/// Lets the large model write both branches to their ends and compares the answers.
///
/// Equal answers are 0, others 1, also where only one branch comes to an answer; where neither does it cannot tell. The
/// branch of the large model's own token is not written again where it is known.
pub struct AnswerJudge<'m> {
    party: &'m Party<'m>,
    extract: Extract<'m>,
    name: String,
    max_new_tokens: usize,
    batch: usize,
}

impl<'m> AnswerJudge<'m> {
    /// A judge that looks for answers with `extract`, which is called `name`. A branch has at most `max_new_tokens` tokens,
    /// `batch` are written at once.
    pub fn new(
        party: &'m Party<'m>,
        name: &str,
        extract: Extract<'m>,
        max_new_tokens: usize,
        batch: usize,
    ) -> Result<Self> {
        for (name, value) in [("max_new_tokens", max_new_tokens), ("batch", batch)] {
            if value == 0 {
                return Err(Error::setting(name, 0, "at least 1"));
            }
        }
        Ok(Self { party, extract, name: name.to_owned(), max_new_tokens, batch })
    }
}

impl Judge for AnswerJudge<'_> {
    fn identity(&self) -> Value {
        json!({
            "kind": "answer",
            "extract": self.name,
            "model": self.party.identity,
            "max_new_tokens": self.max_new_tokens,
            "batch": self.batch,
        })
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn unit(&self) -> usize {
        self.batch
    }

    fn judge(&mut self, pairs: &[Pair], verdicts: &mut Vec<Verdict>) -> Result<()> {
        // Both branches of each pair as far as they are known; those that go on are written together.
        let mut branches: Vec<Vec<u32>> = Vec::with_capacity(2 * pairs.len());
        let mut wanted = Vec::new();
        let mut places = Vec::new();
        for pair in pairs {
            let small: Vec<u32> = [&pair.context[..], &[pair.small], &pair.small_continuation].concat();
            let large: Vec<u32> = match &pair.written {
                Some(written) => [&pair.context[..], written].concat(),
                None => [&pair.context[..], &[pair.large], &pair.large_continuation].concat(),
            };
            for (text, known) in [(small, false), (large, pair.written.is_some())] {
                let ended = text.last().is_some_and(|id| self.party.eos.contains(id));
                if !known && !ended {
                    let limit = self.max_new_tokens;
                    wanted.push(Wanted { prompt: text.clone(), limit, prefix: None });
                    places.push(branches.len());
                }
                branches.push(text);
            }
        }
        let mut cache = DenseCache::new();
        write(self.party.model, &mut cache, wanted, self.batch, &self.party.eos, &mut |place, token, _| {
            branches[places[place]].push(token);
            Ok(true)
        })?;
        for pair in branches.chunks(2) {
            let answers = pair
                .iter()
                .map(|ids| Ok((self.extract)(&self.party.decode(ids)?)))
                .collect::<Result<Vec<_>>>()?;
            let score = match (&answers[0], &answers[1]) {
                (None, None) => -1,
                (a, b) => i64::from(a != b),
            };
            let said = |answer: &Option<String>| answer.clone().unwrap_or_else(|| "none".into());
            let reply = Some(format!("{} / {}", said(&answers[0]), said(&answers[1])));
            verdicts.push(Verdict { score, reply, prompt_hash: None });
        }
        Ok(())
    }
}
