//! Answering items, one JSON line each, in the order of the items; resumable and shard-native.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::shard::{Records, Shard, ShardName};
use nics_core::generate::{Generator, Prompt, Request, run as generate};
use nics_core::sampling::{Sampling, log_softmax};
use nics_core::seam::KvCache;
use nics_core::{Error, Result};
use nics_datasets::Choice;
use serde::{Deserialize, Serialize};

use super::extract::{choice_letter, last_number};
use super::task::{Gold, Item, Mode, Selection};
use crate::model::Megrez;

/// How items are answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Which items.
    pub selection: Selection,
    /// How multiple-choice questions are answered.
    pub mode: Mode,
    /// How replies are generated.
    pub sampling: Sampling,
    /// The most tokens of a reply.
    pub max_new_tokens: usize,
}

/// One answered item: one line of the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Number of the item in the selection.
    pub index: usize,
    /// Its name.
    pub id: String,
    /// The task.
    pub task: String,
    /// Subject or language.
    pub subject: String,
    /// Hash of the prompt's tokens.
    pub prompt_hash: String,
    /// The reply; for log-probabilities, the letter chosen.
    pub output: String,
    /// The answer found in it.
    pub extracted: Option<String>,
    /// What is right.
    pub gold: String,
    /// Whether the answer is right.
    pub correct: bool,
    /// Tokens generated.
    pub tokens: usize,
    /// Log-probability of each option's letter.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<f32>,
}

/// Where answers go and what else a run needs to know.
pub struct Output<'a> {
    /// Folder of the result.
    pub dir: &'a Path,
    /// Which items this run answers.
    pub shard: Shard,
    /// What the model is: part of the hash that names the files.
    pub identity: serde_json::Value,
    /// Items that are answered together.
    pub batch: usize,
    /// Asks the run to stop; what was answered is kept.
    pub interrupt: &'a Interrupt,
    /// Called with the number of answers so far.
    pub progress: &'a mut dyn FnMut(usize),
}

/// Answers the items of a shard and gives the records, in order, with the file that holds them. Items that an earlier,
/// interrupted run of the same settings has answered are not answered again.
///
/// # Errors
/// What is wrong with model, data or folder; an interrupt.
pub fn answer(
    megrez: &Megrez,
    cache: &mut dyn KvCache,
    items: &[Item],
    settings: &Settings,
    output: &mut Output,
) -> Result<(PathBuf, Vec<Record>)> {
    settings.sampling.validate()?;
    let hash = hash::value(&(settings, &output.identity))?;
    let records = Records::open(output.dir, &ShardName::new("items", &hash, output.shard))?;
    if records.is_finished() {
        return Ok(records.finish(|r: &Record| r.index)?);
    }
    let known: HashSet<usize> = records.records().iter().map(|r| r.index).collect();
    let todo: Vec<usize> = output.shard.items(items.len()).filter(|i| !known.contains(i)).collect();
    let mut writer = Writer { records, progress: &mut *output.progress };
    (writer.progress)(known.len());
    let by_letter = settings.selection.task.is_choice() && settings.mode == Mode::Ppl;
    if by_letter {
        for i in todo {
            output.interrupt.check()?;
            writer.add(choose(megrez, i, &items[i], settings)?)?;
        }
    } else {
        reply(megrez, cache, items, &todo, settings, output.batch, output.interrupt, &mut writer)?;
    }
    Ok(writer.records.finish(|r| r.index)?)
}

struct Writer<'a> {
    records: Records<Record>,
    progress: &'a mut dyn FnMut(usize),
}

impl Writer<'_> {
    fn add(&mut self, record: Record) -> Result<()> {
        self.records.append(record)?;
        (self.progress)(self.records.records().len());
        Ok(())
    }
}

fn record(index: usize, item: &Item, settings: &Settings, prompt: &[u32]) -> Record {
    Record {
        index,
        id: item.id.clone(),
        task: settings.selection.task.name().to_owned(),
        subject: item.subject.clone(),
        prompt_hash: hash::tokens(prompt),
        output: String::new(),
        extracted: None,
        gold: match &item.gold {
            Gold::Number(n) => n.clone(),
            Gold::Option { index, .. } => Choice::letter(*index).to_string(),
        },
        correct: false,
        tokens: 0,
        logprobs: Vec::new(),
    }
}

/// Token ids up to the reply.
fn prompt(megrez: &Megrez, item: &Item) -> Result<Vec<u32>> {
    let ids = megrez.prompter.encode(&item.messages, true)?;
    megrez.check_prompt(&ids).map_err(|e| Error::Input(format!("{}: {e}", item.id)))?;
    Ok(ids)
}

/// Chooses the option whose letter is the likeliest next token.
fn choose(megrez: &Megrez, index: usize, item: &Item, settings: &Settings) -> Result<Record> {
    let Gold::Option { of, .. } = item.gold else {
        return Err(Error::Input(format!("{} has no options", item.id)));
    };
    let prompt = prompt(megrez, item)?;
    let letters = (0..of)
        .map(|i| {
            megrez.prompter.tokenizer.encode_ordinary(&Choice::letter(i).to_string()).map_err(Error::from)
        })
        .collect::<Result<Vec<_>>>()?;
    let logprobs = if letters.iter().all(|ids| ids.len() == 1) {
        let next = log_softmax(&megrez.next_logits(&prompt)?);
        letters.iter().map(|ids| next[ids[0] as usize]).collect()
    } else {
        letters
            .iter()
            .map(|ids| Ok(nics_core::generate::score(&megrez.decoder, &prompt, ids)?.iter().sum()))
            .collect::<Result<Vec<f32>>>()?
    };
    let letter = Choice::letter(nics_core::sampling::argmax(&logprobs) as usize).to_string();
    let mut record = record(index, item, settings, &prompt);
    record.correct = letter == record.gold;
    (record.output, record.extracted, record.logprobs) = (letter.clone(), Some(letter), logprobs);
    Ok(record)
}

/// Generates replies and reads the answers out of them.
#[allow(clippy::too_many_arguments)]
fn reply(
    megrez: &Megrez,
    cache: &mut dyn KvCache,
    items: &[Item],
    todo: &[usize],
    settings: &Settings,
    batch: usize,
    interrupt: &Interrupt,
    writer: &mut Writer,
) -> Result<()> {
    let prompts = todo.iter().map(|&i| prompt(megrez, &items[i])).collect::<Result<Vec<_>>>()?;
    let requests = todo.iter().zip(&prompts).map(|(&i, prompt)| Request {
        prompt: Prompt::Ids(prompt.clone()),
        // A seed of its own for each item, whatever shard or batch it falls into.
        sampling: Sampling {
            seed: settings.sampling.seed.wrapping_add(i as u64),
            ..settings.sampling.clone()
        },
        max_new_tokens: settings.max_new_tokens,
        eos: megrez.eos.clone(),
    });
    let mut replies: Vec<Vec<u32>> = vec![Vec::new(); todo.len()];
    let mut generator = Generator::new(&megrez.decoder, cache);
    generate(&mut generator, requests, batch, &mut |n, token| {
        interrupt.check()?;
        replies[n].push(token.token);
        if token.finish.is_some() {
            let item = &items[todo[n]];
            let mut record = record(todo[n], item, settings, &prompts[n]);
            let ids = std::mem::take(&mut replies[n]);
            record.tokens = ids.len();
            record.output = megrez.prompter.tokenizer.decode(&ids, true)?;
            record.extracted = match item.gold {
                Gold::Number(_) => last_number(&record.output),
                Gold::Option { of, .. } => {
                    choice_letter(&record.output, of).map(|i| Choice::letter(i).to_string())
                }
            };
            record.correct = record.extracted.as_ref() == Some(&record.gold);
            writer.add(record)?;
        }
        Ok(true)
    })
}
