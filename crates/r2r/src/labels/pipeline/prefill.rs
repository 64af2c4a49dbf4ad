//! Step 1: the small model reads the conversations, and what it computed at every position is kept.

use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::{Kind, Tensor};

use super::LabelError;
use super::budget::Budget;
use super::lines::Lines;
use super::party::{Party, same_tokenizer};
use super::respond::Response;
use super::shards::{Index, ShardEntry, file_name, write};
use super::work::{Step, Watch, Work};
use crate::labels::{ThinkTokens, prefill_features, token_types};
use crate::{Error, Result};

/// What the small model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// The prompt's and the response's tokens, as the large model wrote them. The default: a text that is encoded anew can
    /// become other tokens than those which were written, and every position behind the first such place would be labelled
    /// with what no model ever sees when it writes.
    #[default]
    Exact,
    /// The conversation written out as a text and encoded anew, with the thinking part and the answer in the form in which
    /// chat templates write them: what the paper's pipeline reads.
    Rebuilt,
}

/// How the small model reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefillSettings {
    /// What it reads.
    pub form: Form,
    /// The largest logits that are kept of a position. Default 100.
    pub top_k: i64,
    /// Longer conversations are left out. Default 32768.
    pub max_tokens: usize,
    /// Rows of a file, up to the end of the document that reaches them. Default 262144.
    pub shard_tokens: usize,
}

impl Default for PrefillSettings {
    fn default() -> Self {
        Self { form: Form::Exact, top_k: 100, max_tokens: 32768, shard_tokens: 1 << 18 }
    }
}

/// Parts of a file that is being filled.
#[derive(Default)]
struct Part {
    rows: usize,
    documents: u64,
    consumed: u64,
    columns: [Vec<i32>; 4],
    types: Vec<u8>,
    hidden: Vec<Tensor>,
    logits: Vec<Tensor>,
    indices: Vec<Tensor>,
}

/// Lets the small model read the responses with a complete thinking part and writes `features-NNNN.safetensors` with their
/// `index.json`. Gives how many rows there are.
///
/// # Errors
/// Those of [`Work::begin`], [`LabelError::OtherTokenizer`], [`LabelError::VocabTooSmall`], [`Error::TopKTooLarge`],
/// [`Error::NonFiniteFeatures`], and nothing to read at all.
pub fn prefill(
    work: &mut Work,
    small: &Party,
    large: Option<&nics_core::tokenizer::Tokenizer>,
    settings: &PrefillSettings,
    budget: Budget,
    watch: &mut Watch,
) -> Result<u64> {
    if let Some(large) = large {
        same_tokenizer(small.tokenizer, large)?;
    }
    if settings.shard_tokens == 0 {
        return Err(Error::setting("shard_tokens", 0, "at least 1"));
    }
    let dims = small.model.dims();
    if settings.top_k < 1 || settings.top_k > dims.vocab {
        return Err(Error::TopKTooLarge { k: settings.top_k, vocab: dims.vocab });
    }
    let think = small.think()?;
    let row = dims.hidden as usize * dims.kind.elt_size_in_bytes() + 12 * settings.top_k as usize + 32;
    let shard_rows = budget.rows(Some(dims), settings.shard_tokens, row)?;
    let identity = json!({
        "small": small.identity,
        "name": small.name,
        "tokenizer": crate::checkpoint::tokenizer_hash(small.tokenizer),
        "settings": settings,
        "mem_limit": budget.limit,
    });
    if work.begin(Step::Prefill, identity)? {
        return Ok(work.done(Step::Prefill).map_or(0, |d| d.records));
    }
    let all = work.done(Step::Respond).map_or(0, |d| d.records as usize);
    let index_path = work.file(Step::Prefill);
    let mut index = Index::read(&index_path)?;
    let mut read = index.consumed() as usize;
    watch.at(Step::Prefill, read, all);
    let mut part = Part::default();
    for response in Lines::<Response>::open(&work.file(Step::Respond))?.skip(read) {
        watch.check()?;
        let response = response?;
        part.consumed += 1;
        if response.thought {
            let ids = conversation(&response, small, settings.form)?;
            if ids.len() <= settings.max_tokens.min(dims.context) {
                part.add(response.doc, &ids, think, small, settings.top_k)?;
            } else {
                let (len, most) = (ids.len(), settings.max_tokens.min(dims.context));
                tracing::info!(
                    doc = response.doc,
                    "a conversation of {len} tokens, beyond {most}, is left out"
                );
            }
        }
        read += 1;
        watch.at(Step::Prefill, read, all);
        if part.rows >= shard_rows {
            part.flush(work, &mut index)?;
        }
    }
    if part.consumed > 0 {
        part.flush(work, &mut index)?;
    }
    if index.rows() == 0 {
        return Err(Error::Input(format!(
            "none of the {all} responses has a thinking part that ends and fits: there is nothing to label; give responses \
             more room (--max-new-tokens), and ask a model that thinks"
        )));
    }
    work.end(Step::Prefill, index.rows())?;
    Ok(index.rows())
}

/// The tokens of a conversation.
fn conversation(response: &Response, party: &Party, form: Form) -> Result<Vec<i64>> {
    let exact = || [response.prompt.as_slice(), &response.response].concat();
    let ids = match form {
        Form::Exact => exact(),
        Form::Rebuilt => {
            let end = party.end()?;
            let written = response.response.strip_suffix(&[end]).unwrap_or(&response.response);
            let text =
                rebuilt(&party.decode(&response.prompt)?, &party.decode(written)?, &party.decode(&[end])?);
            party.encode(&text)?
        }
    };
    Ok(ids.into_iter().map(i64::from).collect())
}

/// A conversation as a text: the thinking part and the answer as chat templates write them.
fn rebuilt(prompt: &str, response: &str, end: &str) -> String {
    const START: &str = "<think>";
    // Some templates begin the thinking part themselves, with others the model does.
    let prompt = match prompt.trim_end().strip_suffix(START) {
        Some(before) => before,
        None => prompt,
    };
    let (reasoning, answer) = response.split_once("</think>").unwrap_or((response, ""));
    let reasoning = reasoning.trim_start().strip_prefix(START).unwrap_or(reasoning);
    format!("{prompt}{START}\n{}\n</think>\n\n{}{end}", reasoning.trim(), answer.trim())
}

impl Part {
    fn add(&mut self, doc: usize, ids: &[i64], think: ThinkTokens, small: &Party, top_k: i64) -> Result<()> {
        let vocab = small.model.dims().vocab;
        if let Some(&token) = ids.iter().find(|&&id| id >= vocab) {
            return Err(LabelError::VocabTooSmall { document: doc, token, vocab }.into());
        }
        let found = prefill_features(small.model, ids, top_k)?;
        let argmax: Vec<i64> = Vec::try_from(&found.argmax)?;
        self.columns[0].extend(ids.iter().map(|&id| id as i32));
        self.columns[1].extend(argmax.iter().map(|&id| id as i32));
        self.columns[2].extend(ids.iter().map(|_| doc as i32));
        self.columns[3].extend(0..ids.len() as i32);
        self.types.extend(token_types(ids, think).into_iter().map(|t| t as u8));
        self.hidden.push(found.hidden);
        self.logits.push(found.top_logits);
        self.indices.push(found.top_indices.f_to_kind(Kind::Int)?);
        self.rows += ids.len();
        self.documents += 1;
        Ok(())
    }

    fn flush(&mut self, work: &Work, index: &mut Index) -> Result<()> {
        let part = std::mem::take(self);
        let (mut file, mut hash) = (None, String::new());
        if part.rows > 0 {
            let name = file_name("features", index.files.len());
            let cat = |parts: &[Tensor]| Tensor::f_cat(parts, 0);
            let [ids, argmax, doc, pos] = &part.columns;
            let tensors = [
                ("ids", Tensor::f_from_slice(ids)?),
                ("argmax", Tensor::f_from_slice(argmax)?),
                ("doc", Tensor::f_from_slice(doc)?),
                ("pos", Tensor::f_from_slice(pos)?),
                ("type", Tensor::f_from_slice(&part.types)?),
                ("hidden", cat(&part.hidden)?),
                ("top_logits", cat(&part.logits)?),
                ("top_index", cat(&part.indices)?),
            ];
            hash = write(&work.path(&name), &tensors)?;
            file = Some(name);
        }
        let (rows, documents, consumed) = (part.rows as u64, part.documents, part.consumed);
        index.files.push(ShardEntry { file, rows, documents, hash, consumed });
        index.write(&work.file(Step::Prefill))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_written_as_templates_write_it() {
        let expected = "Q<think>\nfirst\nthen\n</think>\n\n42<end>";
        for (prompt, response) in [
            ("Q", "<think>\nfirst\nthen\n</think>\n\n42"),
            ("Q<think>\n", "first\nthen\n</think>\n\n42"),
            ("Q<think>", "\nfirst\nthen</think>42\n"),
        ] {
            assert_eq!(rebuilt(prompt, response, "<end>"), expected);
        }
    }
}
