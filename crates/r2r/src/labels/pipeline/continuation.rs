//! Step 2: where the models differ, and how the large model goes on from the small one's token.

use nics_core::cache::DenseCache;
use nics_core::seam::{KvCache, SeqId};
use nics_core::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::budget::Budget;
use super::documents::{ReadDocument, each_file};
use super::lines::Log;
use super::party::Party;
use super::work::{Step, Watch, Work};
use super::writing::{Wanted, read, write};
use crate::labels::stops::{StopTokens, reference_continuation};
use crate::labels::{Document, Mismatch, ThinkTokens, mismatches};
use crate::{Error, Result};

/// How the large model goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContinueSettings {
    /// Ends of sentences behind the one in which the models part: the continuation has so many and one more. Default 1.
    pub sentences: usize,
    /// The most tokens of a continuation. Default 8192.
    pub max_new_tokens: usize,
    /// Documents with more tokens are left out. Default 32768.
    pub max_tokens: usize,
    /// Continuations written at once. Default 32.
    pub batch: usize,
    /// Continuations that are kept together: what a kill loses at most. Default 128.
    pub group: usize,
    /// Texts of the tokens that end a sentence; the paper's rule over the vocabulary when empty.
    pub stops: Vec<String>,
}

impl Default for ContinueSettings {
    fn default() -> Self {
        Self {
            sentences: 1,
            max_new_tokens: 8192,
            max_tokens: 32768,
            batch: 32,
            group: 128,
            stops: Vec::new(),
        }
    }
}

impl ContinueSettings {
    /// The tokens that end a sentence.
    ///
    /// # Errors
    /// A text that is no token, [`Error::ThinkTokenUnknown`].
    pub fn stop_tokens(&self, tokenizer: &Tokenizer) -> Result<StopTokens> {
        let think = ThinkTokens::of(tokenizer)?;
        if self.stops.is_empty() {
            return StopTokens::of_tokenizer(tokenizer, Some(think));
        }
        let mut ids = vec![think.start, think.end];
        for text in &self.stops {
            let id = tokenizer.token_id(text).ok_or_else(|| {
                Error::setting(
                    "stops",
                    format!("{text:?}"),
                    "texts that are one token of the vocabulary each",
                )
            })?;
            ids.push(i64::from(id));
        }
        Ok(StopTokens::of_ids(ids))
    }

    fn validate(&self) -> Result<()> {
        for (name, value) in
            [("max_new_tokens", self.max_new_tokens), ("batch", self.batch), ("group", self.group)]
        {
            if value == 0 {
                return Err(Error::setting(name, 0, "at least 1"));
            }
        }
        Ok(())
    }
}

/// A line of `mismatch.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Continued {
    /// The document.
    pub doc: usize,
    /// The predicted position, which is also how many tokens stand before it.
    pub position: usize,
    /// What stands there.
    pub real: i64,
    /// What stands before it.
    pub previous: i64,
    /// What the small model would have written.
    pub small: i64,
    /// How the large model goes on from that.
    pub continuation: Vec<i64>,
    /// How it went on itself.
    pub reference: Vec<i64>,
}

/// Documents whose prefixes are read together, each with its mismatches.
type Group<'d> = Vec<(&'d ReadDocument, Vec<Mismatch>)>;

/// One run through the mismatches, from the first on.
struct Pass<'a> {
    large: &'a Party<'a>,
    settings: &'a ContinueSettings,
    stops: StopTokens,
    eos: i64,
    budget: Budget,
    log: Log,
    /// Mismatches so far.
    seen: usize,
    /// Lines that were there: units that are there whole are passed over.
    there: usize,
    /// Whether what a killed run left of a unit has been cut off.
    cut: bool,
}

/// Finds the mismatches of every document, lets the large model go on from each, and writes `mismatch.jsonl`: a line a
/// mismatch. Gives how many there are.
///
/// A document is read once; its continuations branch off from what was read.
///
/// # Errors
/// Those of [`Work::begin`] and [`ContinueSettings::stop_tokens`], a token that the large model lacks.
pub fn continue_mismatches(
    work: &mut Work,
    large: &Party,
    settings: &ContinueSettings,
    budget: Budget,
    watch: &mut Watch,
) -> Result<u64> {
    settings.validate()?;
    let stops = settings.stop_tokens(large.tokenizer)?;
    let (think, eos) = (large.think()?, i64::from(large.end()?));
    let identity = json!({ "large": large.identity, "settings": settings, "mem_limit": budget.limit });
    if work.begin(Step::Continue, identity)? {
        return Ok(work.done(Step::Continue).map_or(0, |d| d.records));
    }
    let log = Log::open(&work.file(Step::Continue))?;
    let there = log.lines();
    let mut pass = Pass { large, settings, stops, eos, budget, log, seen: 0, there, cut: false };
    let all = work.done(Step::Prefill).map_or(0, |d| d.records as usize);
    let mut rows = 0;
    let dims = large.model.dims();
    let kept = budget.kept_tokens(dims)?;
    each_file(work, &mut |_, _, documents| {
        let limit = settings.max_tokens.min(dims.context);
        let mut group = Group::new();
        let (mut tokens, mut wanted) = (0, 0);
        for document in &documents {
            let found =
                Document { tokens: &document.ids, predictions: &document.argmax, types: &document.types };
            let found = mismatches(&found, think.end, limit)?;
            rows += document.ids.len();
            if found.is_empty() {
                continue;
            }
            if let Some(id) = document.ids.iter().chain(&document.argmax).find(|&&id| id >= dims.vocab) {
                return Err(Error::Input(format!(
                    "document {}: token {id} is outside the large model's vocabulary of {}",
                    document.doc, dims.vocab
                )));
            }
            if !group.is_empty() && (tokens + document.ids.len() > kept || wanted >= settings.group) {
                pass.write(&group, watch)?;
                group.clear();
                (tokens, wanted) = (0, 0);
                watch.at(Step::Continue, rows - document.ids.len(), all);
            }
            tokens += document.ids.len();
            wanted += found.len();
            group.push((document, found));
        }
        pass.write(&group, watch)?;
        watch.at(Step::Continue, rows, all);
        Ok(())
    })?;
    let Pass { log, seen, .. } = pass;
    if log.lines() != seen {
        let reason = format!("it has {} lines, the features have {seen} mismatches", log.lines());
        return Err(super::LabelError::Inconsistent { path: work.file(Step::Continue), reason }.into());
    }
    log.sync()?;
    work.end(Step::Continue, log.lines() as u64)?;
    Ok(log.lines() as u64)
}

impl Pass<'_> {
    /// Writes a group's lines, unit by unit.
    fn write(&mut self, group: &Group, watch: &mut Watch) -> Result<()> {
        let (large, settings) = (self.large, self.settings);
        let dims = large.model.dims();
        let list: Vec<(usize, Mismatch)> =
            group.iter().enumerate().flat_map(|(d, (_, found))| found.iter().map(move |m| (d, *m))).collect();
        let mut cache = DenseCache::new();
        let mut read_into: Vec<Option<SeqId>> = vec![None; group.len()];
        let longest = group.iter().map(|(d, _)| d.ids.len()).max().unwrap_or(0);
        let kept: usize = group.iter().map(|(d, _)| d.ids.len()).sum();
        let most = (longest + settings.max_new_tokens).min(dims.context);
        for (number, unit) in list.chunks(settings.group).enumerate() {
            watch.check()?;
            let first = self.seen;
            self.seen += unit.len();
            if self.seen <= self.there {
                continue;
            }
            if !self.cut {
                // What a killed run wrote of this unit is written again.
                self.log.keep(first)?;
                self.cut = true;
            }
            let batch = self.budget.sequences(dims, settings.batch, most, kept)?;
            let ids = |d: usize, n: usize| -> Vec<u32> {
                group[d].0.ids[..n].iter().map(|&id| id as u32).collect()
            };
            let mut wanted = Vec::new();
            for (d, mismatch) in unit {
                if read_into[*d].is_none() {
                    let last = group[*d].1.last().map_or(0, |m| m.context);
                    read_into[*d] = Some(read(large.model, &mut cache, &ids(*d, last))?);
                }
                let mut prompt = ids(*d, mismatch.context);
                prompt.push(mismatch.small as u32);
                wanted.push(Wanted { prompt, limit: settings.max_new_tokens, prefix: read_into[*d] });
            }
            let mut written: Vec<(Vec<i64>, usize)> = vec![(Vec::new(), 0); unit.len()];
            let sentences = settings.sentences + 1;
            write(large.model, &mut cache, wanted, batch, &large.eos, &mut |place, token, _| {
                watch.check()?;
                let (tokens, ends) = &mut written[place];
                tokens.push(i64::from(token));
                *ends += usize::from(self.stops.contains(i64::from(token)));
                // The end token that the reference implementation forces here is no part of the sentence.
                Ok(*ends < sentences)
            })?;
            let lines: Vec<Continued> = unit
                .iter()
                .zip(written)
                .map(|((d, m), (mut continuation, _))| {
                    if continuation.last().is_some_and(|&t| large.eos.contains(&(t as u32))) {
                        continuation.pop();
                    }
                    let document = group[*d].0;
                    let reference = reference_continuation(
                        &document.ids,
                        m.position,
                        settings.max_new_tokens,
                        Some(sentences),
                        &self.stops,
                        self.eos,
                    );
                    Continued {
                        doc: document.doc,
                        position: m.position,
                        real: m.real,
                        previous: m.previous,
                        small: m.small,
                        continuation,
                        reference,
                    }
                })
                .collect();
            self.log.append(&lines)?;
            // Sequences that no later unit needs.
            if let Some(&(next, _)) = list.get((number + 1) * settings.group) {
                for seq in read_into[..next].iter_mut().filter_map(Option::take) {
                    cache.close(seq);
                }
            }
        }
        Ok(())
    }
}
