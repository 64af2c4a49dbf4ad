//! Judges that read: a chat model is shown both sentences and answers 0 or 1.

use std::collections::HashMap;
use std::path::Path;

use nics_base::hash;
use nics_core::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::{Judge, Pair, Verdict};
use crate::labels::ThinkTokens;
use crate::labels::judge::{SYSTEM, USER, fill, strict_score};
use crate::labels::sentences::{Window, branch, marked};
use crate::labels::stops::StopTokens;
use crate::{Error, Result};

/// Verdicts that are kept in memory: some 80 MB.
const MAX_KNOWN: usize = 1 << 20;

/// What a chat model is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Its role.
    pub system: String,
    /// The task with both sentences.
    pub user: String,
}

impl Question {
    /// By which the same question is known again.
    pub fn hash(&self) -> String {
        hash::bytes([self.system.as_bytes(), &[0], self.user.as_bytes()].concat())[..32].to_owned()
    }
}

/// Replies to questions, greedily and shortly.
pub trait Chat {
    /// All that its replies depend on.
    fn identity(&self) -> Value;

    /// How many questions it takes at once.
    fn batch(&self) -> usize;

    /// Whether a reply may depend on which questions come together: they are then asked together again when a run goes on.
    fn in_groups(&self) -> bool;

    /// A reply to each question, in their order.
    ///
    /// # Errors
    /// Each question has a failure of its own.
    fn reply(&mut self, questions: &[Question]) -> Vec<Result<String>>;
}

/// What a judge is shown.
#[derive(Debug, Clone)]
pub struct TextSettings {
    /// How much around the place where the branches part.
    pub window: Window,
    /// The system message.
    pub system: String,
    /// The task; `{{context}}`, `{{small}}` and `{{large}}` stand for the texts.
    pub user: String,
}

impl Default for TextSettings {
    fn default() -> Self {
        Self { window: Window::default(), system: SYSTEM.trim().into(), user: USER.trim().into() }
    }
}

impl TextSettings {
    /// Reads the task from a file.
    ///
    /// # Errors
    /// A file that cannot be read, or that lacks the place of a sentence.
    pub fn read_task(&mut self, path: &Path) -> Result<()> {
        let io = |source| nics_base::Error::Io { action: "read", path: path.to_owned(), source };
        self.user = std::fs::read_to_string(path).map_err(io)?;
        for place in ["{{small}}", "{{large}}"] {
            if !self.user.contains(place) {
                let reason = format!("it lacks {place}, where the sentence goes");
                return Err(Error::Damaged { path: path.to_owned(), reason });
            }
        }
        Ok(())
    }
}

/// A chat model that judges. A question that it has answered before is not asked again.
pub struct TextJudge<C> {
    chat: C,
    tokenizer: Tokenizer,
    think: ThinkTokens,
    stops: StopTokens,
    settings: TextSettings,
    known: HashMap<String, i64>,
}

impl<C: Chat> TextJudge<C> {
    /// A judge over the tokenizer of the pair. `stops` are the tokens that end a sentence.
    ///
    /// # Errors
    /// [`Error::ThinkTokenUnknown`].
    pub fn new(chat: C, tokenizer: &Tokenizer, stops: StopTokens, settings: TextSettings) -> Result<Self> {
        let think = ThinkTokens::of(tokenizer)?;
        let tokenizer = tokenizer.clone();
        Ok(Self { chat, tokenizer, think, stops, settings, known: HashMap::new() })
    }

    /// What the chat model is asked about a pair.
    pub fn question(&self, pair: &Pair) -> Result<Question> {
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, false).map_err(nics_core::Error::from);
        // What is before the thinking part is not shown, so it need not be decoded either.
        let from = pair.context.iter().rposition(|&id| i64::from(id) == self.think.start);
        let from = from.filter(|_| self.settings.window.skip_input).unwrap_or(0);
        let context = decode(&pair.context[from..])?;
        let previous = pair.context.last().is_some_and(|&id| self.stops.contains(i64::from(id)));
        let part = |token: u32, continuation: &[u32]| -> Result<_> {
            let after_stop = previous && self.stops.contains(i64::from(token));
            let (token, rest) = (marked(&decode(&[token])?), decode(continuation)?);
            Ok(branch(&context, &token, &rest, after_stop, self.settings.window))
        };
        let small = part(pair.small, &pair.small_continuation)?;
        let large = part(pair.large, &pair.large_continuation)?;
        let values = [
            ("context", small.common.as_str()),
            ("small", small.sentence.as_str()),
            ("large", large.sentence.as_str()),
        ];
        Ok(Question { system: self.settings.system.clone(), user: fill(&self.settings.user, &values) })
    }
}

impl<C: Chat> Judge for TextJudge<C> {
    fn identity(&self) -> Value {
        let Window { continuation, previous, common, skip_input } = self.settings.window;
        json!({
            "kind": "chat",
            "chat": self.chat.identity(),
            "system": hash::bytes(&self.settings.system),
            "task": hash::bytes(&self.settings.user),
            "window": [json!(continuation), json!(previous), json!(common), json!(skip_input)],
        })
    }

    fn batch(&self) -> usize {
        self.chat.batch()
    }

    fn unit(&self) -> usize {
        if self.chat.in_groups() { self.chat.batch() } else { 1 }
    }

    fn judge(&mut self, pairs: &[Pair], verdicts: &mut Vec<Verdict>) -> Result<()> {
        let questions = pairs.iter().map(|pair| self.question(pair)).collect::<Result<Vec<_>>>()?;
        let hashes: Vec<String> = questions.iter().map(Question::hash).collect();
        let mut asked: Vec<&str> = Vec::new();
        let mut new = Vec::new();
        for (question, hash) in questions.into_iter().zip(&hashes) {
            if !self.known.contains_key(hash) && !asked.contains(&hash.as_str()) {
                asked.push(hash);
                new.push(question);
            }
        }
        let mut replies: HashMap<&str, Result<String>> =
            asked.into_iter().zip(self.chat.reply(&new)).collect();
        for hash in &hashes {
            let verdict = if let Some(reply) = replies.remove(hash.as_str()) {
                let reply = reply?;
                let score = strict_score(&reply);
                if self.known.len() < MAX_KNOWN {
                    self.known.insert(hash.clone(), score);
                }
                Verdict { score, reply: Some(reply), prompt_hash: Some(hash.clone()) }
            } else {
                let score = self.known.get(hash).copied();
                let score = score.or_else(|| {
                    // Asked twice in one call, and too many are known to keep it.
                    let same = verdicts.iter().rev().find(|v| v.prompt_hash.as_ref() == Some(hash));
                    same.map(|v| v.score)
                });
                Verdict { score: score.unwrap_or(-1), reply: None, prompt_hash: Some(hash.clone()) }
            };
            verdicts.push(verdict);
        }
        Ok(())
    }

    fn remember(&mut self, prompt_hash: &str, score: i64) {
        if self.known.len() < MAX_KNOWN {
            self.known.entry(prompt_hash.to_owned()).or_insert(score);
        }
    }
}
