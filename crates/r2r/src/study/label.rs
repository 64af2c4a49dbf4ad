//! Labels of a nano pair, by the crate's rules with the task's own judge.

use std::path::Path;

use nics_base::artefact::write_atomic;
use nics_core::cache::DenseCache;
use nics_core::checkpoint::TensorPath;
use nics_core::generate::{Generator, Request, collect, run};
use nics_datasets::ring::RingProblem;
use nics_datasets::word_problems::Split;
use tch::{Kind, Tensor};

use super::Models;
use super::settings::Study;
use crate::checkpoint::tensor_bytes;
use crate::labels::{Document, Score, assemble, mismatches, prefill_features, token_types};
use crate::nano::{RESPONSE_TOKENS, RingTask};
use crate::training::Rows;
use crate::{Error, Result};

/// Sequences written at once.
const BATCH: usize = 256;
/// More tokens than a sentence has.
const SENTENCE_TOKENS: usize = 12;

/// Which problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What routers are trained on.
    Train,
    /// What they are chosen by.
    Validation,
}

impl Part {
    /// The name of its file.
    pub fn file(self) -> &'static str {
        match self {
            Self::Train => "train.safetensors",
            Self::Validation => "validation.safetensors",
        }
    }
}

/// Labelled rows: what the small model computed at each position of the large one's responses.
#[derive(Debug)]
pub struct Labels {
    /// float32 `[rows, hidden]`.
    pub hidden: Tensor,
    /// Its likeliest token, int64 `[rows]`.
    pub token: Tensor,
    /// All of its logits, descending, float32 `[rows, vocab]`.
    pub logits: Tensor,
    /// 1 where the judge found a difference, int64 `[rows]`.
    pub divergent: Tensor,
    /// 1 where the models differ, int64 `[rows]`.
    pub mismatch: Tensor,
}

impl Labels {
    /// How many rows.
    pub fn len(&self) -> usize {
        self.divergent.numel()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows for a router that reads the `k` largest logits, labelled by `column`.
    pub fn rows(&self, k: i64, column: &Tensor) -> Result<Rows> {
        let logits = self.logits.f_narrow(1, 0, k)?.f_contiguous()?;
        let (hidden, token) = (self.hidden.shallow_clone(), self.token.shallow_clone());
        Rows::new(Some(hidden), Some(token), Some(logits), None, column)
    }

    /// Reads what [`label`] wrote.
    pub fn read(dir: &Path, part: Part) -> Result<Self> {
        let at = TensorPath::from_file(&dir.join(part.file()))?;
        let stored = |name| -> Result<Tensor> { Ok(at.stored(name)?) };
        Ok(Self {
            hidden: stored("hidden")?,
            token: stored("token")?,
            logits: stored("logits")?,
            divergent: stored("divergent")?,
            mismatch: stored("mismatch")?,
        })
    }

    fn write(&self, dir: &Path, part: Part) -> Result<()> {
        let tensors = [
            ("hidden", &self.hidden),
            ("token", &self.token),
            ("logits", &self.logits),
            ("divergent", &self.divergent),
            ("mismatch", &self.mismatch),
        ];
        let tensors: Vec<_> = tensors.map(|(name, t)| (name.to_owned(), t.shallow_clone())).into();
        let path = dir.join(part.file());
        Ok(write_atomic(&path, tensor_bytes(&path, &tensors)?)?)
    }

    fn join(parts: &[Self]) -> Result<Self> {
        let cat = |pick: fn(&Self) -> &Tensor| -> Result<Tensor> {
            Ok(Tensor::f_cat(&parts.iter().map(pick).collect::<Vec<_>>(), 0)?)
        };
        Ok(Self {
            hidden: cat(|l| &l.hidden)?,
            token: cat(|l| &l.token)?,
            logits: cat(|l| &l.logits)?,
            divergent: cat(|l| &l.divergent)?,
            mismatch: cat(|l| &l.mismatch)?,
        })
    }
}

/// The problems of a part.
pub(super) fn problems(study: &Study, task: &RingTask, part: Part, seed: u64) -> Vec<RingProblem> {
    let (split, n) = match part {
        Part::Train => (Split::Train, study.labels.train),
        Part::Validation => (Split::Validation, study.labels.validation),
    };
    (0..n as u64).map(|i| task.ring().problem(split, study.labels.seed + seed, i)).collect()
}

/// Makes the labels of a part, writes them into `dir`, and returns them.
///
/// # Errors
/// A large model that ends no response, or no mismatch at all.
pub fn label(models: &Models, study: &Study, part: Part, seed: u64, dir: &Path) -> Result<Labels> {
    let _guard = tch::no_grad_guard();
    let task = &models.task;
    let prompts = problems(study, task, part, seed)
        .iter()
        .map(|p| task.encode(&p.prompt()))
        .collect::<Result<Vec<_>>>()?;
    let requests = prompts.iter().map(|p| Request::greedy(p.clone(), RESPONSE_TOKENS, &[task.eos()]));
    let mut cache = DenseCache::new();
    let responses = collect(&mut Generator::new(&models.large, &mut cache), requests, BATCH)?;
    let mut texts = Vec::new();
    for (prompt, response) in prompts.iter().zip(&responses) {
        // Only responses that end their thinking are used.
        if response.iter().any(|&id| i64::from(id) == task.think().end) {
            texts.push([prompt.as_slice(), response].concat());
        }
    }
    let labels = of_texts(models, &texts)?;
    labels.write(dir, part)?;
    Ok(labels)
}

/// A mismatch that waits for its judgement.
struct Open {
    text: usize,
    position: usize,
    /// The small model's sentence so far.
    small: Vec<u32>,
    /// The large model's sentence.
    large: Vec<u32>,
}

fn of_texts(models: &Models, texts: &[Vec<u32>]) -> Result<Labels> {
    let task = &models.task;
    let think = task.think();
    let vocab = task.words().len() as i64;
    let (mut features, mut kinds, mut open) = (Vec::new(), Vec::new(), Vec::new());
    for (at, text) in texts.iter().enumerate() {
        let ids: Vec<i64> = text.iter().map(|&id| i64::from(id)).collect();
        let found = prefill_features(&models.small, &ids, vocab)?;
        let types = token_types(&ids, think);
        let predictions: Vec<i64> = Vec::try_from(&found.argmax)?;
        let document = Document { tokens: &ids, predictions: &predictions, types: &types };
        for mismatch in mismatches(&document, think.end, usize::MAX)? {
            let begin = sentence_start(task, text, mismatch.position);
            let mut small = text[begin..mismatch.position].to_vec();
            small.push(mismatch.small as u32);
            let large = sentence(task, &text[begin..], mismatch.position - begin);
            open.push(Open { text: at, position: mismatch.position, small, large });
        }
        features.push(found);
        kinds.push(types);
    }
    continue_sentences(models, texts, &mut open)?;
    let mut parts = Vec::new();
    for (at, (found, types)) in features.iter().zip(&kinds).enumerate() {
        let scores: Vec<Score> = open
            .iter()
            .filter(|o| o.text == at)
            .map(|o| Score { position: o.position, score: i64::from(!same(task, &o.small, &o.large)) })
            .collect();
        let Some(labels) = assemble(types, &scores)? else { continue };
        let rows: Vec<i64> = (0..labels.len() as i64).filter(|&i| labels[i as usize].counts()).collect();
        let rows = Tensor::f_from_slice(&rows)?;
        let column = |value: &dyn Fn(usize) -> i64| -> Result<Tensor> {
            let all: Vec<i64> = (0..labels.len()).map(value).collect();
            Ok(Tensor::f_from_slice(&all)?.f_index_select(0, &rows)?)
        };
        parts.push(Labels {
            hidden: found.hidden.f_index_select(0, &rows)?.f_to_kind(Kind::Float)?,
            token: found.argmax.f_index_select(0, &rows)?,
            logits: found.top_logits.f_index_select(0, &rows)?,
            divergent: column(&|i| labels[i].divergent)?,
            mismatch: column(&|i| i64::from(labels[i].mismatch))?,
        });
    }
    if parts.is_empty() {
        return Err(Error::Input("the models differ nowhere, so there is nothing to label".into()));
    }
    Labels::join(&parts)
}

/// Where the sentence of a position begins: behind the last separator or marker before it.
pub(super) fn sentence_start(task: &RingTask, text: &[u32], position: usize) -> usize {
    let think = task.think();
    let ends = |id: u32| task.is_separator(id) || [think.start, think.end].contains(&i64::from(id));
    text[..position].iter().rposition(|&id| ends(id)).map_or(0, |at| at + 1)
}

/// Whether an id ends a sentence.
pub(super) fn ends_sentence(task: &RingTask, id: u32) -> bool {
    task.is_separator(id) || id == task.eos()
}

/// A text up to and with the first end of a sentence at or behind `from`.
fn sentence(task: &RingTask, text: &[u32], from: usize) -> Vec<u32> {
    let end = text[from..].iter().position(|&id| ends_sentence(task, id));
    text[..end.map_or(text.len(), |end| from + end + 1)].to_vec()
}

/// The rule that judges: sentences of one meaning, word by word.
pub(super) fn same(task: &RingTask, a: &[u32], b: &[u32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| task.meaning(*a) == task.meaning(*b))
}

/// Lets the large model end the small one's sentences.
fn continue_sentences(models: &Models, texts: &[Vec<u32>], open: &mut [Open]) -> Result<()> {
    let task = &models.task;
    let going: Vec<usize> = (0..open.len())
        .filter(|&i| open[i].small.last().is_some_and(|&id| !ends_sentence(task, id)))
        .collect();
    let requests: Vec<Request> = going
        .iter()
        .map(|&i| {
            let mut prompt = texts[open[i].text][..open[i].position].to_vec();
            prompt.extend(open[i].small.last());
            Request::greedy(prompt, SENTENCE_TOKENS, &[task.eos()])
        })
        .collect();
    let mut cache = DenseCache::new();
    run(&mut Generator::new(&models.large, &mut cache), requests, BATCH, &mut |at, token| {
        open[going[at]].small.push(token.token);
        Ok(!ends_sentence(task, token.token))
    })?;
    Ok(())
}
