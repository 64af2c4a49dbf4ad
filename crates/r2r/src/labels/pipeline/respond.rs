//! Step 0: the large model answers.

use std::path::Path;

use nics_core::cache::DenseCache;
use nics_core::generate::Finish;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::budget::Budget;
use super::lines::{Lines, Log};
use super::party::Party;
use super::query::{self, Query};
use super::work::{Step, Watch, Work};
use super::writing::{Wanted, write};
use crate::{Error, Result};

/// How the large model answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RespondSettings {
    /// The most tokens of a response. Default 32768.
    pub max_new_tokens: usize,
    /// Responses written at once. Default 16.
    pub batch: usize,
    /// Responses that are kept together: what a kill loses at most. Default 64.
    pub group: usize,
    /// What the model is told about its role.
    pub system: Option<String>,
    /// Further variables of the chat template, e.g. `enable_thinking`.
    pub template: Map<String, Value>,
}

impl Default for RespondSettings {
    fn default() -> Self {
        Self { max_new_tokens: 32768, batch: 16, group: 64, system: None, template: Map::new() }
    }
}

/// How a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// The model ended it.
    Eos,
    /// It has as many tokens as it may.
    Length,
    /// It filled the model's context, or its prompt did.
    Context,
}

impl From<Finish> for Ending {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::Eos => Self::Eos,
            Finish::Length => Self::Length,
            Finish::Context => Self::Context,
        }
    }
}

/// A line of `responses.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Response {
    /// Place of the query among all of them, whatever the shard: names the document from here on.
    pub doc: usize,
    /// The query's name.
    pub id: Value,
    /// The query's source.
    #[serde(default)]
    pub source: String,
    /// The query's kind.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// What was asked, where that was a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// The prompt, up to where the response begins.
    pub prompt: Vec<u32>,
    /// The response, its end token included.
    pub response: Vec<u32>,
    /// How it ended.
    pub finish: Ending,
    /// Whether its thinking part ends: only then it is used further.
    pub thought: bool,
}

/// Lets the large model answer the queries of the shard, greedily, and writes `responses.jsonl`: a line a query. Gives how
/// many there are.
///
/// # Errors
/// Those of [`query::check`] and [`Work::begin`], [`Error::ThinkTokenUnknown`], a prompt with ids that the model lacks.
pub fn respond(
    work: &mut Work,
    queries: &Path,
    large: &Party,
    settings: &RespondSettings,
    budget: Budget,
    watch: &mut Watch,
) -> Result<u64> {
    for (name, value) in
        [("max_new_tokens", settings.max_new_tokens), ("batch", settings.batch), ("group", settings.group)]
    {
        if value == 0 {
            return Err(Error::setting(name, 0, "at least 1"));
        }
    }
    // A model that does not think labels nothing: now, not after its last response.
    large.think()?;
    let file = query::check(queries)?;
    let identity = json!({
        "queries": file.hash,
        "large": large.identity,
        "name": large.name,
        "settings": settings,
        "mem_limit": budget.limit,
    });
    if work.begin(Step::Respond, identity)? {
        return Ok(work.done(Step::Respond).map_or(0, |d| d.records));
    }
    let shard = work.shard();
    let all = shard.items(file.queries).count();
    let mut log = Log::open(&work.file(Step::Respond))?;
    if log.lines() < all {
        log.keep(log.lines() / settings.group * settings.group)?;
    }
    let done = log.lines();
    watch.at(Step::Respond, done, all);
    let mine = Lines::<Query>::open(queries)?.enumerate().filter(|(doc, _)| shard.takes(*doc)).skip(done);
    let mut group: Vec<Response> = Vec::new();
    for (doc, query) in mine {
        let query = query?;
        let prompt = match (&query.ids, &query.question) {
            (Some(ids), _) => ids.clone(),
            (None, Some(question)) => large.encode(&large.conversation(
                settings.system.as_deref(),
                question,
                &settings.template,
            )?)?,
            (None, None) => Vec::new(),
        };
        let vocab = large.model.dims().vocab;
        if let Some(id) = prompt.iter().find(|&&id| i64::from(id) >= vocab) {
            let name = query.name();
            return Err(Error::Input(format!(
                "query {name}: token {id} is outside the large model's vocabulary of {vocab}"
            )));
        }
        group.push(Response {
            doc,
            id: query.id,
            source: query.source,
            kind: query.kind,
            question: query.question,
            prompt,
            response: Vec::new(),
            finish: Ending::Context,
            thought: false,
        });
        if group.len() == settings.group {
            answer(&mut group, large, settings, budget, watch)?;
            flush(&mut group, &mut log, watch, all)?;
        }
    }
    if !group.is_empty() {
        answer(&mut group, large, settings, budget, watch)?;
        flush(&mut group, &mut log, watch, all)?;
    }
    log.sync()?;
    work.end(Step::Respond, log.lines() as u64)?;
    Ok(log.lines() as u64)
}

fn flush(group: &mut Vec<Response>, log: &mut Log, watch: &mut Watch, all: usize) -> Result<()> {
    log.append(group)?;
    group.clear();
    watch.at(Step::Respond, log.lines(), all);
    Ok(())
}

fn answer(
    group: &mut [Response],
    large: &Party,
    settings: &RespondSettings,
    budget: Budget,
    watch: &Watch,
) -> Result<()> {
    let dims = large.model.dims();
    let longest = group.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
    let most = (longest + settings.max_new_tokens).min(dims.context);
    let batch = budget.sequences(dims, settings.batch, most, 0)?;
    let think = large.think()?;
    let wanted: Vec<Wanted> = group
        .iter()
        .map(|r| Wanted { prompt: r.prompt.clone(), limit: settings.max_new_tokens, prefix: None })
        .collect();
    let mut cache = DenseCache::new();
    write(large.model, &mut cache, wanted, batch, &large.eos, &mut |place, token, finish| {
        watch.check()?;
        let response = &mut group[place];
        response.response.push(token);
        response.thought |= i64::from(token) == think.end;
        if let Some(finish) = finish {
            response.finish = finish.into();
        }
        Ok(true)
    })
}
