//! The path that the judge would take: both models at every step, both branches continued where they differ.
//!
//! The small model's token stands unless the judge finds that the sentence which the large model would make of it says
//! something else than the sentence which it makes of its own. This is what the router imitates, and an upper bound of
//! it. Its share of large-model tokens counts what was taken, not what was computed: the large model runs at every step.

use nics_core::cache::DenseCache;
use nics_core::models::{Batch, Input, Model};
use nics_core::seam::{KvCache, Ragged, SeqId};
use tch::{Kind, Tensor};

use super::Models;
use crate::nano::RingTask;
use crate::{Error, Result};

/// More tokens than a sentence has.
const SENTENCE_TOKENS: usize = 12;

/// A text written along the path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FollowedPath {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// How many of them are the large model's.
    pub large: usize,
}

struct Running {
    at: usize,
    ids: Vec<u32>,
    prompt: usize,
    small: SeqId,
    large: SeqId,
    taken: usize,
}

/// Writes a response to each prompt, `batch` at a time, greedily, of at most `limit` tokens.
///
/// # Errors
/// What a model refuses.
pub fn follow(
    models: &Models,
    prompts: &[Vec<u32>],
    limit: usize,
    batch: usize,
) -> Result<Vec<FollowedPath>> {
    let _guard = tch::no_grad_guard();
    let mut paths = vec![FollowedPath::default(); prompts.len()];
    for (chunk, part) in prompts.chunks(batch.max(1)).enumerate() {
        let mut caches = [DenseCache::new(), DenseCache::new()];
        let mut running = Vec::new();
        for (i, prompt) in part.iter().enumerate() {
            if prompt.is_empty() {
                return Err(Error::EmptyPrompt { seq: i as u64 });
            }
            let room = prompt.len() + limit + SENTENCE_TOKENS;
            let (small, large) = (caches[0].open(room)?, caches[1].open(room)?);
            let at = chunk * batch.max(1) + i;
            running.push(Running { at, ids: prompt.clone(), prompt: prompt.len(), small, large, taken: 0 });
        }
        let mut read = vec![0; running.len()];
        while !running.is_empty() {
            step(models, &mut caches, &mut running, &read)?;
            let mut i = 0;
            read.clear();
            while i < running.len() {
                let one = &running[i];
                let ended = one.ids.last() == Some(&models.task.eos());
                if ended || one.ids.len() - one.prompt >= limit {
                    let one = running.remove(i);
                    caches[0].close(one.small);
                    caches[1].close(one.large);
                    paths[one.at] = FollowedPath { tokens: one.ids[one.prompt..].to_vec(), large: one.taken };
                } else {
                    read.push(one.ids.len() - 1);
                    i += 1;
                }
            }
        }
    }
    Ok(paths)
}

/// One token of every text. `read` is how much of each both models have.
fn step(
    models: &Models,
    caches: &mut [DenseCache; 2],
    running: &mut [Running],
    read: &[usize],
) -> Result<()> {
    let task = &models.task;
    let rows = |of: fn(&Running) -> SeqId| -> Vec<(SeqId, usize, Vec<u32>)> {
        running.iter().zip(read).map(|(one, &read)| (of(one), read, one.ids[read..].to_vec())).collect()
    };
    let [small_cache, large_cache] = caches;
    let small = next(&models.small, small_cache, &rows(|r| r.small))?;
    let large = next(&models.large, large_cache, &rows(|r| r.large))?;
    let differ: Vec<usize> = (0..running.len()).filter(|&i| small[i] != large[i]).collect();
    // Both branches of each: two sentences, continued together.
    let mut branches = Vec::new();
    for &i in &differ {
        for token in [small[i], large[i]] {
            let one = &running[i];
            let begin = sentence_start(task, &one.ids, one.ids.len());
            let mut sentence = one.ids[begin..].to_vec();
            sentence.push(token);
            branches.push((large_cache.fork(one.large)?, one.ids.len(), sentence));
        }
    }
    for _ in 0..SENTENCE_TOKENS {
        let going: Vec<usize> = (0..branches.len())
            .filter(|&b| branches[b].2.last().is_some_and(|&id| !ends_sentence(task, id)))
            .collect();
        if going.is_empty() {
            break;
        }
        let rows: Vec<(SeqId, usize, Vec<u32>)> = going
            .iter()
            .map(|&b| (branches[b].0, branches[b].1, branches[b].2.last().copied().into_iter().collect()))
            .collect();
        let tokens = next(&models.large, large_cache, &rows)?;
        for (&b, token) in going.iter().zip(tokens) {
            branches[b].1 += 1;
            branches[b].2.push(token);
        }
    }
    for (seq, _, _) in &branches {
        large_cache.close(*seq);
    }
    let mut pairs = branches.chunks(2);
    let mut divergent = vec![false; running.len()];
    for &i in &differ {
        if let Some([(_, _, a), (_, _, b)]) = pairs.next() {
            divergent[i] = !same(task, a, b);
        }
    }
    for (i, one) in running.iter_mut().enumerate() {
        one.taken += usize::from(divergent[i]);
        one.ids.push(if divergent[i] { large[i] } else { small[i] });
    }
    Ok(())
}

/// The likeliest token behind new tokens of some sequences: where each stands, and its tokens.
fn next(model: &dyn Model, cache: &mut DenseCache, parts: &[(SeqId, usize, Vec<u32>)]) -> Result<Vec<u32>> {
    let rows: Vec<_> = parts.iter().map(|(seq, from, new)| (*seq, *from, new.len())).collect();
    let ids: Vec<i64> = parts.iter().flat_map(|(_, _, new)| new.iter().map(|&id| i64::from(id))).collect();
    let device = model.dims().device;
    let rows = Ragged::contiguous(&rows);
    let last = Tensor::f_from_slice(&rows.last_rows())?.f_to_device(device)?;
    let input = Tensor::f_from_slice(&ids)?.f_to_device(device)?;
    let out = model.forward(&Batch::new(rows, Input::Ids(&input)), cache, None)?;
    let logits = model.logits(&out.hidden.f_index_select(0, &last)?)?.f_to_kind(Kind::Float)?;
    let tokens: Vec<i64> = Vec::try_from(logits.f_argmax(1, false)?)?;
    Ok(tokens.into_iter().map(|t| t as u32).collect())
}

/// Where the sentence of a position begins: behind the last separator or marker before it.
fn sentence_start(task: &RingTask, text: &[u32], position: usize) -> usize {
    let think = task.think();
    let ends = |id: u32| task.is_separator(id) || [think.start, think.end].contains(&i64::from(id));
    text[..position].iter().rposition(|&id| ends(id)).map_or(0, |at| at + 1)
}

/// Whether an id ends a sentence.
fn ends_sentence(task: &RingTask, id: u32) -> bool {
    task.is_separator(id) || id == task.eos()
}

/// The rule that judges: sentences of one meaning, word by word.
fn same(task: &RingTask, a: &[u32], b: &[u32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| task.meaning(*a) == task.meaning(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_compared_by_meaning() {
        let task = RingTask::new(19).unwrap();
        let ids = |text: &str| task.encode(text).unwrap();
        let text = ids("<bos> 1 + 2 ? <think> so 1 + 2 = 3 . then");
        assert_eq!(sentence_start(&task, &text, 13), 13);
        assert_eq!(sentence_start(&task, &text, 9), 6);
        assert!(same(&task, &ids("so 1 + 2 = 3 ."), &ids("now 1 + 2 = 3 !!")));
        assert!(!same(&task, &ids("so 1 + 2 = 3 ."), &ids("so 1 + 2 = 4 .")));
        assert!(!same(&task, &ids("so 1 + 2 = 3"), &ids("so 1 + 2 = 3 .")));
    }
}
