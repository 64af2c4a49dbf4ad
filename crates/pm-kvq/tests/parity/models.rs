//! The folder's models, and decoding as the fixtures were made: one call for the prompt, then one for each token.

use nics_core::checkpoint::Checkpoint;
use nics_core::models::{self, Decoder, Model, read_last};
use nics_core::seam::{KvCache, SeqId};
use tch::{Device, Kind, Tensor};

use crate::kit::{Case, golden};

/// The model of a case: what its name ends with.
pub fn model_of(case: &Case) -> Decoder {
    let name = case.name.rsplit('_').next().unwrap();
    let (config, weights) = (format!("model_{name}.json"), format!("model_{name}.safetensors"));
    let checkpoint = Checkpoint::open_files(&golden().path(&config), &[golden().path(&weights)]).unwrap();
    models::load(&checkpoint, Device::Cpu, Kind::Float).unwrap()
}

/// Logits of the last row of each call, `[calls, vocab]`; `after` sees the cache after each.
pub fn decode<C: KvCache>(
    model: &dyn Model,
    cache: &mut C,
    ids: &[u32],
    prefill: usize,
    mut after: impl FnMut(&mut C, SeqId, usize),
) -> nics_core::Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let seq = cache.open(ids.len())?;
    let mut at = 0;
    let mut logits = Vec::new();
    while at < ids.len() {
        let to = if at == 0 { prefill } else { at + 1 };
        logits.push(model.logits(&read_last(model, cache, &[(seq, at, &ids[at..to])])?)?);
        at = to;
        after(cache, seq, at);
    }
    Ok(Tensor::f_cat(&logits, 0)?)
}

/// How far logits are from expected ones: the mean difference, and how often the largest is the same.
pub fn agreement(found: &Tensor, expected: &Tensor) -> (f64, f64) {
    assert_eq!(found.size(), expected.size());
    let off = (found - expected).abs().mean(Kind::Double).double_value(&[]);
    let same = found.argmax(-1, false).eq_tensor(&expected.argmax(-1, false));
    (off, same.mean(Kind::Double).double_value(&[]))
}

/// The fixtures' tolerance for logits behind a quantized cache.
#[track_caller]
pub fn assert_agrees(found: &Tensor, expected: &Tensor, what: &str) {
    let (off, same) = agreement(found, expected);
    assert!(
        off <= 0.03 && same >= 0.93,
        "{what}: logits off by {off} in the mean, {same} of the choices the same"
    );
}
