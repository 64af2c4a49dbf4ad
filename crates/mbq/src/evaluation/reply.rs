//! Replies of a model to the questions of a benchmark: greedy, appended as they are finished, resumable and in shards.

use std::collections::HashSet;
use std::path::Path;

use nics_base::hash;
use nics_base::interrupt::Interrupt;
use nics_base::shard::{Records, Shard, ShardName, gathered};
use nics_core::cache::DenseCache;
use nics_core::generate::{Finish, Generator, Prompt, Request, run as generate};
use nics_core::models::Model;
use nics_core::sampling::Sampling;
use nics_core::text::TextStream;
use nics_core::vision::{Media, picture};
use nics_datasets::{Picture, Visual, VisualQuestion, VisualSet};
use serde::{Deserialize, Serialize};

use super::task::{prompt, stops};
use crate::language::Language;
use crate::prompt::Prompter;
use crate::{Error, Result};

/// What decides a reply beside its question and the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The benchmark.
    pub task: Visual,
    /// At most so many of its questions, the first.
    pub limit: Option<usize>,
    /// The most tokens of a reply.
    pub max_new_tokens: usize,
    /// The most tiles of an image, for models that cut one into tiles; `None` is the checkpoint's own.
    pub tiles: Option<u32>,
}

/// A reply: a line of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Number of the question.
    pub index: usize,
    /// Its name.
    pub id: String,
    /// The text.
    pub text: String,
    /// Tokens of the prompt, and how many of them are images.
    pub prompt: [usize; 2],
    /// Tokens that were written.
    pub tokens: usize,
    /// Why it ended: `eos`, `stop`, `length`, `context`; `too_long` for a prompt that fills the context, which has no reply.
    pub finish: String,
}

/// What a run needs beside questions and model.
pub struct Running<'a> {
    /// Folder of the replies.
    pub dir: &'a Path,
    /// Which questions are its.
    pub shard: Shard,
    /// What the model is, as a part of the name of its files.
    pub identity: &'a serde_json::Value,
    /// Tokens that end a reply.
    pub eos: &'a [u32],
    /// Replies that are written together.
    pub batch: usize,
    /// Asked for between tokens.
    pub interrupt: &'a Interrupt,
    /// Told how many replies there are.
    pub progress: &'a mut dyn FnMut(usize),
}

/// The replies of a shard, in the order of the questions. Those that an earlier, interrupted run of the same settings has made
/// are not made again; a run over everything takes those of its shards, where all are finished in the folder.
///
/// # Errors
/// Images that cannot be read, naming file and row; what model or folder refuse; a stop that was asked for.
pub fn replies(
    model: &Language,
    prompter: &Prompter,
    set: &mut VisualSet,
    settings: &Settings,
    running: &mut Running,
) -> Result<Vec<Reply>> {
    let (stem, config) = (settings.task.name(), hash::value(&(settings, running.identity))?);
    let total = set.questions.len().min(settings.limit.unwrap_or(usize::MAX));
    if running.shard.is_whole()
        && let Some(replies) = gathered::<Reply>(running.dir, stem, &config)?
    {
        return Ok(replies);
    }
    let mut records = Records::<Reply>::open(running.dir, &ShardName::new(stem, &config, running.shard))?;
    (running.progress)(records.records().len());
    if !records.is_finished() {
        let known: HashSet<usize> = records.records().iter().map(|r| r.index).collect();
        let todo: Vec<usize> = running.shard.items(total).filter(|i| !known.contains(i)).collect();
        write(model, prompter, set, settings, running, &todo, &mut records)?;
    }
    Ok(records.finish(|r| r.index)?.1)
}

/// A prompt, or the reply that stands for one that the model's context does not hold.
enum Begun {
    Request(Box<Request>, [usize; 2]),
    TooLong(Reply),
}

fn write(
    model: &Language,
    prompter: &Prompter,
    set: &mut VisualSet,
    settings: &Settings,
    running: &mut Running,
    todo: &[usize],
    records: &mut Records<Reply>,
) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let stops = stops(settings.task);
    let open = std::cell::RefCell::new(Vec::<Open>::new());
    let (mut failed, mut short) = (None, Vec::new());
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(model.model(), &mut cache);
    // Embedded one by one as room for them comes up: images are large.
    let requests = todo.iter().map_while(|&index| {
        if failed.is_some() {
            return None;
        }
        match begin(model, prompter, set, settings, index, running.eos) {
            Ok(Begun::Request(request, prompt)) => {
                let text = TextStream::new(&prompter.tokenizer, &stops);
                let id = set.questions[index].id.clone();
                open.borrow_mut().push(Open { text, reply: new(index, id, prompt) });
                Some(Some(*request))
            }
            Ok(Begun::TooLong(reply)) => {
                short.push(reply);
                Some(None)
            }
            Err(e) => {
                failed = Some(e);
                None
            }
        }
    });
    let mut each = |n: usize, token: &nics_core::generate::Token| -> nics_core::Result<bool> {
        running.interrupt.check()?;
        let mut open = open.borrow_mut();
        let Some(Open { text, reply }) = open.get_mut(n) else { return Ok(false) };
        reply.tokens += 1;
        reply.text += &text.push(token.token)?;
        let stopped = text.stopped().is_some();
        if token.finish.is_none() && !stopped {
            return Ok(true);
        }
        reply.text += &text.finish()?;
        let why = match token.finish {
            _ if stopped => "stop",
            Some(Finish::Eos) => "eos",
            Some(Finish::Context) => "context",
            _ => "length",
        };
        why.clone_into(&mut reply.finish);
        let reply = std::mem::replace(reply, new(0, String::new(), [0; 2]));
        records.append(reply)?;
        (running.progress)(records.records().len());
        Ok(false)
    };
    generate(&mut generator, requests.flatten(), running.batch, &mut each)?;
    for reply in short {
        records.append(reply)?;
    }
    match failed {
        Some(e) => Err(e),
        None => Ok(()),
    }
}

struct Open<'a> {
    text: TextStream<'a>,
    reply: Reply,
}

fn new(index: usize, id: String, prompt: [usize; 2]) -> Reply {
    Reply { index, id, text: String::new(), prompt, tokens: 0, finish: String::new() }
}

fn begin(
    model: &Language,
    prompter: &Prompter,
    set: &mut VisualSet,
    settings: &Settings,
    index: usize,
    eos: &[u32],
) -> Result<Begun> {
    let question = set.questions[index].clone();
    let named = |e: Error| Error::Input(format!("question {}: {e}", question.id));
    let media = images(set, &question)?;
    let ids = prompter.question(&prompt(settings.task, &question), media.len()).map_err(named)?;
    let shown = match &prompter.processor {
        Some(processor) if !media.is_empty() => {
            Some(processor.prompt(&ids, &media).map_err(|e| named(e.into()))?)
        }
        _ => None,
    };
    let texts = ids.len() - media.len();
    let length = shown.as_ref().map_or(ids.len(), |prompt| prompt.ids.len());
    let lengths = [length, length - texts];
    if length >= model.decoder().dims().context {
        let mut reply = new(index, question.id.clone(), lengths);
        "too_long".clone_into(&mut reply.finish);
        return Ok(Begun::TooLong(reply));
    }
    let prompt = match shown {
        None => Prompt::Ids(ids),
        Some(shown) => Prompt::Embedded(model.vlm()?.embed_prompt(&shown).map_err(|e| named(e.into()))?),
    };
    let sampling = Sampling::default();
    let request = Request { prompt, sampling, max_new_tokens: settings.max_new_tokens, eos: eos.to_vec() };
    Ok(Begun::Request(Box::new(request), lengths))
}

/// The images of a question, decoded.
fn images(set: &mut VisualSet, question: &VisualQuestion) -> Result<Vec<Media>> {
    let all = set.images(question)?;
    let decode = |(n, image): (usize, &Picture)| {
        let decoded = match image {
            Picture::Bytes(bytes) => picture::decode(bytes),
            Picture::File(path) => picture::open(path),
        };
        Ok(Media::Image(decoded.map_err(|e| set.bad_image(question, n, &e))?))
    };
    all.iter().enumerate().map(decode).collect()
}
