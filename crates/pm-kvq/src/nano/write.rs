//! Texts that a model writes through a cache, from their first lines on.

use nics_core::models::{Batch, Input, Model};
use nics_core::seam::{KvCache, Ragged, SeqId};
use nics_datasets::adding_ring::{AddingRing, DIGITS, LINE_TOKENS, RECALL_ID, TOKENS, Task};
use tch::Tensor;

use crate::{Error, Result};

/// Rows of a text that a cache holds at most: the last token is not read any more.
pub const ROWS: usize = TOKENS - 1;
/// Where ring and recall part: the row of the separator before the last line.
const FORK: usize = TOKENS - LINE_TOKENS - 1;

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Texts {
    /// The tokens behind each first line, up to the end of the text.
    pub ring: Vec<Vec<u32>>,
    /// The digits behind each `=`, which takes the place of the separator before the last line.
    pub recall: Vec<Vec<u32>>,
    /// Bytes of one sequence's cache after each call of the ring, scales and zeros included: after the prompt, and then
    /// after each token.
    pub bytes: Vec<usize>,
}

impl Texts {
    /// For each problem how many of its tokens are right up to the first wrong one.
    pub fn prefixes(&self, problems: &[AddingRing]) -> Vec<usize> {
        let right = |(problem, ids): (&AddingRing, &Vec<u32>)| {
            let expected = &problem.ids(Task::Ring, TOKENS / LINE_TOKENS)[LINE_TOKENS..];
            ids.iter().zip(expected).take_while(|(a, b)| a == b).count()
        };
        problems.iter().zip(&self.ring).map(right).collect()
    }

    /// For each problem how many of its tokens are right.
    pub fn tokens(&self, problems: &[AddingRing]) -> Vec<usize> {
        let right = |(problem, ids): (&AddingRing, &Vec<u32>)| {
            let expected = &problem.ids(Task::Ring, TOKENS / LINE_TOKENS)[LINE_TOKENS..];
            ids.iter().zip(expected).filter(|(a, b)| a == b).count()
        };
        problems.iter().zip(&self.ring).map(right).collect()
    }

    /// For each problem how many digits of its first line were recalled.
    pub fn recalled(&self, problems: &[AddingRing]) -> Vec<usize> {
        let right = |(problem, ids): (&AddingRing, &Vec<u32>)| {
            ids.iter().zip(problem.prompt()).filter(|(a, b)| **a == *b).count()
        };
        problems.iter().zip(&self.recall).map(right).collect()
    }

    /// The most bytes of a sequence.
    pub fn peak_bytes(&self) -> usize {
        self.bytes.iter().copied().max().unwrap_or(0)
    }

    /// Bytes of a sequence, averaged over the calls that wrote a token.
    pub fn mean_bytes(&self) -> f64 {
        self.bytes.iter().sum::<usize>() as f64 / self.bytes.len().max(1) as f64
    }
}

/// Writes the texts of some problems greedily, all in step, through a cache that holds no other sequence.
///
/// Up to the last line both forms of the task are one text; there the sequences are copied and go on twice.
///
/// # Errors
/// What model or cache refuse, a full budget among it.
pub fn write(model: &dyn Model, cache: &mut dyn KvCache, problems: &[AddingRing]) -> Result<Texts> {
    let _no_grad = tch::no_grad_guard();
    let seqs = problems.iter().map(|_| cache.open(TOKENS)).collect::<Result<Vec<_>, _>>()?;
    let &[first, ..] = seqs.as_slice() else { return Err(Error::Input("there is no text to write".into())) };
    let mut run = Run { model, cache, bytes: Vec::new() };
    let prompts: Vec<Vec<u32>> = problems.iter().map(AddingRing::prompt).collect();
    let mut ring: Vec<Vec<u32>> = vec![Vec::with_capacity(TOKENS); problems.len()];
    let mut next = run.step(&seqs, 0, &prompts)?;
    run.count(first)?;
    for row in LINE_TOKENS.. {
        push(&mut ring, &next);
        if row == FORK {
            break;
        }
        next = run.step(&seqs, row, &single(&next))?;
        run.count(first)?;
    }
    let twins = seqs.iter().map(|&s| run.cache.fork(s)).collect::<Result<Vec<_>, _>>()?;
    let mut recall = vec![Vec::with_capacity(DIGITS); problems.len()];
    let mut recalled = vec![RECALL_ID; problems.len()];
    for row in FORK..FORK + DIGITS {
        recalled = run.step(&twins, row, &single(&recalled))?;
        push(&mut recall, &recalled);
    }
    for &s in &twins {
        run.cache.close(s);
    }
    for row in FORK..ROWS {
        next = run.step(&seqs, row, &single(&next))?;
        run.count(first)?;
        push(&mut ring, &next);
    }
    for &s in &seqs {
        run.cache.close(s);
    }
    Ok(Texts { ring, recall, bytes: run.bytes })
}

fn single(ids: &[u32]) -> Vec<Vec<u32>> {
    ids.iter().map(|&id| vec![id]).collect()
}

fn push(texts: &mut [Vec<u32>], ids: &[u32]) {
    texts.iter_mut().zip(ids).for_each(|(text, &id)| text.push(id));
}

struct Run<'a> {
    model: &'a dyn Model,
    cache: &'a mut dyn KvCache,
    bytes: Vec<usize>,
}

impl Run<'_> {
    /// Reads the same number of new tokens of every sequence; the likeliest next token of each.
    fn step(&mut self, seqs: &[SeqId], at: usize, new: &[Vec<u32>]) -> Result<Vec<u32>> {
        let rows: Vec<(SeqId, usize, usize)> =
            seqs.iter().zip(new).map(|(&s, ids)| (s, at, ids.len())).collect();
        let ids: Vec<i64> = new.iter().flatten().map(|&id| i64::from(id)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(self.model.dims().device)?;
        let batch = Batch::new(Ragged::contiguous(&rows), Input::Ids(&ids));
        let last = Tensor::f_from_slice(&batch.rows.last_rows())?.f_to_device(self.model.dims().device)?;
        let out = self.model.forward(&batch, self.cache, None)?;
        let logits = self.model.logits(&out.hidden.f_index_select(0, &last)?)?;
        let chosen = Vec::<i64>::try_from(logits.f_argmax(-1, false)?)?;
        Ok(chosen.into_iter().map(|id| id as u32).collect())
    }

    fn count(&mut self, s: SeqId) -> Result<()> {
        let held =
            self.cache.held(s).ok_or_else(|| Error::Input("the cache does not tell its bytes".into()))?;
        self.bytes.push(held.payload);
        Ok(())
    }
}
