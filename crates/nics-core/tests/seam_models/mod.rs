//! Tiny random models of `datasets/golden`, and calls of them.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::path::Path;

use nics_core::checkpoint::Checkpoint;
use nics_core::golden::difference;
use nics_core::models::{self, Batch, Decoder, Input, Model, Output};
use nics_core::seam::{KvCache, LayerHook, Ragged, SeqId};
use tch::{Device, Kind, Tensor};

/// `datasets/golden/NAME`.
pub fn decoder(name: &str) -> Decoder {
    // Products this small only lose by a second thread.
    nics_core::device::set_threads(Some(1)).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(name);
    models::load(&Checkpoint::open_dir(&dir).unwrap(), Device::Cpu, Kind::Float).unwrap()
}

/// `n` ids that look like nothing in particular.
pub fn ids(n: usize, salt: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + salt * 101 + i * i) % 250).collect()
}

pub fn tensor(ids: &[u32]) -> Tensor {
    Tensor::from_slice(&ids.iter().map(|&i| i64::from(i)).collect::<Vec<_>>())
}

/// Rows `start..` of one sequence.
pub fn forward(
    model: &Decoder,
    cache: &mut dyn KvCache,
    seq: SeqId,
    start: usize,
    ids: &[u32],
    hook: Option<&mut dyn LayerHook>,
) -> nics_core::Result<Output> {
    let _no_grad = tch::no_grad_guard();
    let input = tensor(ids);
    let rows = Ragged::contiguous(&[(seq, start, ids.len())]);
    model.forward(&Batch::new(rows, Input::Ids(&input)), cache, hook)
}

#[track_caller]
pub fn assert_close(found: &Tensor, expected: &Tensor) {
    let (_, relative) = difference(found, expected).unwrap();
    assert!(relative <= 1e-5, "off by {relative:e}");
}

/// Equal to the bit.
#[track_caller]
pub fn assert_same(found: &Tensor, expected: &Tensor) {
    let (absolute, _) = difference(found, expected).unwrap();
    assert!(absolute == 0.0, "off by {absolute:e}");
}
