//! A rule for a judge: sentences of equal tokens, up to synonyms, mean the same.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use nics_base::settings;
use nics_core::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Judge, Pair, Verdict};
use crate::labels::stops::StopTokens;
use crate::{Error, Result};

/// Which tokens mean the same, in TOML or JSON:
///
/// ```toml
/// classes = [["so", "thus", "hence"], [".", ";"]]
/// ignore = ["um"]
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SynonymTable {
    /// Tokens of one class are one; by their text, white space around it aside.
    pub classes: Vec<Vec<String>>,
    /// Tokens that count for nothing.
    pub ignore: Vec<String>,
}

impl SynonymTable {
    /// Reads a table: JSON where the file's name ends so, else TOML.
    ///
    /// # Errors
    /// A file that cannot be read, or that is no table.
    pub fn read(path: &Path) -> Result<Self> {
        let json = path.extension().is_some_and(|e| e == "json");
        Ok(settings::read(path, |text| {
            if json { serde_json::from_str(text).map_err(|e| e.to_string()) } else { settings::parse(text) }
        })?)
    }
}

/// Sentences of equal tokens, up to synonyms, mean the same.
///
/// Of both branches the part up to and with the first token that ends a sentence counts.
#[derive(Debug)]
pub struct RuleJudge {
    /// The token that stands for a token's class; `None` for tokens that count for nothing.
    classes: HashMap<u32, Option<u32>>,
    stops: StopTokens,
    identity: Value,
}

impl RuleJudge {
    /// A judge by `table` over a tokenizer.
    ///
    /// # Errors
    /// [`Error::Setting`] for a text of the table that is no token, or that is in two places.
    pub fn new(table: &SynonymTable, tokenizer: &Tokenizer, stops: StopTokens) -> Result<Self> {
        let mut texts: HashMap<String, Vec<u32>> = HashMap::new();
        for id in 0..tokenizer.vocab_size() as u32 {
            let text = tokenizer.decode(&[id], false).map_err(nics_core::Error::from)?;
            texts.entry(text.trim().to_owned()).or_default().push(id);
            // Special tokens and pieces of bytes go by their literal form too.
            if let Some(token) = tokenizer.token(id).filter(|token| token.trim() != text.trim()) {
                texts.entry(token).or_default().push(id);
            }
        }
        let mut classes = HashMap::new();
        let mut seen = HashSet::new();
        let all = table.classes.iter().map(|class| (class, true)).chain([(&table.ignore, false)]);
        for (class, counts) in all {
            let mut first = None;
            for text in class {
                if !seen.insert(text) {
                    return Err(Error::setting(
                        "the table of synonyms",
                        format!("{text:?} twice"),
                        "each text once",
                    ));
                }
                let ids = texts.get(text.trim()).ok_or_else(|| {
                    let expected = "texts that are one token of the vocabulary each";
                    Error::setting("the table of synonyms", format!("{text:?}"), expected)
                })?;
                let representative = *first.get_or_insert(ids[0]);
                classes.extend(ids.iter().map(|&id| (id, counts.then_some(representative))));
            }
        }
        let identity = json!({ "kind": "rule", "table": table, "stops": stops.ids() });
        Ok(Self { classes, stops, identity })
    }

    fn sentence(&self, token: u32, continuation: &[u32]) -> Vec<u32> {
        let all = std::iter::once(token).chain(continuation.iter().copied());
        let mut ended = false;
        let sentence =
            all.take_while(|&id| !std::mem::replace(&mut ended, self.stops.contains(i64::from(id))));
        sentence.filter_map(|id| self.classes.get(&id).copied().unwrap_or(Some(id))).collect()
    }
}

impl Judge for RuleJudge {
    fn identity(&self) -> Value {
        self.identity.clone()
    }

    fn batch(&self) -> usize {
        1024
    }

    fn judge(&mut self, pairs: &[Pair], verdicts: &mut Vec<Verdict>) -> Result<()> {
        for pair in pairs {
            let small = self.sentence(pair.small, &pair.small_continuation);
            let large = self.sentence(pair.large, &pair.large_continuation);
            verdicts.push(Verdict::of(i64::from(small != large)));
        }
        Ok(())
    }
}
