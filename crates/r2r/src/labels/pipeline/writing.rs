//! Many greedy continuations, a fixed number at a time.

use std::collections::VecDeque;

use nics_core::generate::{Finish, Generator, Request, RequestId};
use nics_core::models::{self, Model};
use nics_core::seam::{KvCache, SeqId};

use super::budget::PROMPT_ROWS;
use crate::Result;

/// A continuation that is wanted.
pub(crate) struct Wanted {
    /// What it begins with.
    pub prompt: Vec<u32>,
    /// The most tokens of it.
    pub limit: usize,
    /// A sequence in the cache that begins with all of the prompt but its last token.
    pub prefix: Option<SeqId>,
}

/// Writes continuations, `batch` at a time, and hands each token to `each` with its place; `false` ends one. Which
/// sequences share a call depends on the list alone, so that the same list gives the same tokens to the bit.
///
/// A prompt that leaves no room is passed over: `each` hears of none of its tokens.
pub(crate) fn write(
    model: &dyn Model,
    cache: &mut dyn KvCache,
    wanted: Vec<Wanted>,
    batch: usize,
    eos: &[u32],
    each: &mut dyn FnMut(usize, u32, Option<Finish>) -> Result<bool>,
) -> Result<()> {
    let context = model.dims().context;
    let mut generator = Generator::new(model, cache).with_prefill_chunk(PROMPT_ROWS);
    let mut waiting = wanted.into_iter().enumerate();
    let mut places: VecDeque<(RequestId, usize)> = VecDeque::new();
    loop {
        while generator.running() < batch.max(1) {
            let Some((place, one)) = waiting.next() else { break };
            let len = one.prompt.len();
            if len >= context {
                continue;
            }
            let request = Request::greedy(one.prompt, one.limit, eos);
            let room = generator.check(&request)?;
            let branch = match one.prefix {
                Some(seq) if len > 1 => generator.cache_mut().branch(seq, len - 1, room)?,
                _ => None,
            };
            let id = match branch {
                Some(seq) => generator.add_from(request, seq, len - 1)?,
                None => generator.add(request)?,
            };
            places.push_back((id, place));
        }
        if generator.running() == 0 {
            return Ok(());
        }
        for token in generator.step()? {
            let Some(&(_, place)) = places.iter().find(|(id, _)| *id == token.request) else { continue };
            let goes_on = each(place, token.token, token.finish)?;
            if token.finish.is_some() || !goes_on {
                generator.cancel(token.request);
                places.retain(|(id, _)| *id != token.request);
            }
        }
    }
}

/// Reads tokens into a new sequence of the cache.
pub(crate) fn read(model: &dyn Model, cache: &mut dyn KvCache, ids: &[u32]) -> Result<SeqId> {
    let _guard = tch::no_grad_guard();
    let sequence = cache.open(ids.len())?;
    for (chunk, part) in ids.chunks(PROMPT_ROWS).enumerate() {
        let _ = models::read(model, cache, &[(sequence, chunk * PROMPT_ROWS, part)])?;
    }
    Ok(sequence)
}
