//! Whole runs over a [`Generator`], and scoring without one.

use std::collections::VecDeque;

use tch::{Kind, Tensor};

use super::{Generator, Request, RequestId, Token};
use crate::models::{Batch, Input, Model};
use crate::seam::{Ragged, SeqId};
use crate::{Error, Result};

/// Runs many requests, at most `batch` at a time, and hands every token to `each` with the index of its request.
/// `each` returns whether the sequence shall go on.
///
/// # Errors
/// The first error of [`Generator::add`] or [`Generator::step`].
pub fn run(
    generator: &mut Generator,
    requests: impl IntoIterator<Item = Request>,
    batch: usize,
    each: &mut dyn FnMut(usize, &Token) -> Result<bool>,
) -> Result<()> {
    let mut waiting = requests.into_iter().enumerate();
    let mut indices: VecDeque<(RequestId, usize)> = VecDeque::new();
    loop {
        while generator.running() < batch.max(1) {
            let Some((index, request)) = waiting.next() else { break };
            indices.push_back((generator.add(request)?, index));
        }
        if generator.running() == 0 {
            return Ok(());
        }
        for token in generator.step()? {
            let Some(&(_, index)) = indices.iter().find(|(id, _)| *id == token.request) else { continue };
            let goes_on = each(index, &token)?;
            if token.finish.is_some() || !goes_on {
                generator.cancel(token.request);
                indices.retain(|(id, _)| *id != token.request);
            }
        }
    }
}

/// Token ids that `requests` write, without end tokens cut off.
pub fn collect(
    generator: &mut Generator,
    requests: impl IntoIterator<Item = Request>,
    batch: usize,
) -> Result<Vec<Vec<u32>>> {
    let mut all: Vec<Vec<u32>> = Vec::new();
    run(generator, requests, batch, &mut |index, token| {
        if all.len() <= index {
            all.resize_with(index + 1, Vec::new);
        }
        all[index].push(token.token);
        Ok(true)
    })?;
    Ok(all)
}

/// Log-probability of each token of `continuation` after `prompt`, without a cache: `Σ log p` is the score of a
/// multiple-choice answer.
pub fn score(model: &dyn Model, prompt: &[u32], continuation: &[u32]) -> Result<Vec<f32>> {
    if prompt.is_empty() || continuation.is_empty() {
        return Err(Error::input("scoring needs a prompt and a continuation, one of them is empty"));
    }
    let need = prompt.len() + continuation.len();
    if need > model.dims().context {
        return Err(Error::ContextOverflow { need, max: model.dims().context, what: "the model's context" });
    }
    let _no_grad = tch::no_grad_guard();
    let device = model.dims().device;
    let ids: Vec<i64> = prompt.iter().chain(continuation).map(|&id| i64::from(id)).collect();
    let (rows, n) = (need as i64 - 1, continuation.len() as i64);
    let input = Tensor::f_from_slice(&ids[..rows as usize])?.f_to_device(device)?;
    let batch = Batch::new(Ragged::contiguous(&[(SeqId(0), 0, rows as usize)]), Input::Ids(&input));
    let output = model.forward(&batch, &mut crate::cache::NoCache::new(), None)?;
    let logits = model.logits(&output.hidden.f_narrow(0, rows - n, n)?)?.f_to_kind(Kind::Float)?;
    let targets = Tensor::f_from_slice(&ids[prompt.len()..])?.f_to_device(device)?.f_unsqueeze(1)?;
    let picked = logits.f_log_softmax(-1, Kind::Float)?.f_gather(1, &targets, false)?.f_squeeze_dim(1)?;
    Ok(Vec::<f32>::try_from(picked.f_to_device(tch::Device::Cpu)?)?)
}
