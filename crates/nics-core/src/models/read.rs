//! Reading: new tokens of some sequences in one call.

use tch::Tensor;

use super::{Batch, Input, Model};
use crate::Result;
use crate::seam::{KvCache, Ragged, SeqId};

/// New tokens of a sequence: how many it has in the cache, and the tokens; not empty.
pub type NewTokens<'a> = (SeqId, usize, &'a [u32]);

/// Lets a model read new tokens in one call: hidden states of all rows after the final norm, `[rows, hidden]`.
///
/// # Errors
/// What model or cache refuse; the cache then has none of the rows.
pub fn read(model: &dyn Model, cache: &mut dyn KvCache, new: &[NewTokens]) -> Result<Tensor> {
    let rows: Vec<(SeqId, usize, usize)> = new.iter().map(|&(seq, at, ids)| (seq, at, ids.len())).collect();
    let ids: Vec<i64> = new.iter().flat_map(|(_, _, ids)| ids.iter().map(|&id| i64::from(id))).collect();
    let input = Tensor::f_from_slice(&ids)?.f_to_device(model.dims().device)?;
    let result = model.forward(&Batch::new(Ragged::contiguous(&rows), Input::Ids(&input)), cache, None);
    if result.is_err() {
        // Layers before the one that failed have taken the rows in.
        for &(seq, at, _) in new {
            cache.truncate(seq, at)?;
        }
    }
    Ok(result?.hidden)
}

/// As [`read`]: hidden states of each sequence's last row, `[sequences, hidden]`.
///
/// # Errors
/// As [`read`].
pub fn read_last(model: &dyn Model, cache: &mut dyn KvCache, new: &[NewTokens]) -> Result<Tensor> {
    let hidden = read(model, cache, new)?;
    let mut end = 0;
    let ends = new.iter().map(|(_, _, ids)| {
        end += ids.len() as i64;
        end - 1
    });
    let last = Tensor::f_from_slice(&ends.collect::<Vec<i64>>())?.f_to_device(hidden.device())?;
    Ok(hidden.f_index_select(0, &last)?)
}
