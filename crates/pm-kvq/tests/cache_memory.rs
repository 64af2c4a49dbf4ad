//! The process occupies what the cache reports. Alone in its binary: other tests would count in.
#![cfg(target_os = "linux")]

#[path = "cache/kit.rs"]
#[allow(dead_code)]
mod kit;

use std::sync::{Mutex, PoisonError};

use nics_core::memory::{peak_resident, reset_peak};
use nics_core::seam::{KvCache, Mask, Ragged, Site};
use pm_kvq::cache::PagedCache;
use tch::{Device, Kind, Tensor};

use crate::kit::{config, dims, rope};

/// Rows of a call.
const CHUNK: usize = 256;

/// Fills a cache of one layer of 8 heads of 128 channels until sequences hold `bytes` in pages of `bits`; gives by how much
/// the peak of the process grew, and what the cache reports at its own peak.
fn fill(bits: u32, bytes: usize) -> (usize, usize) {
    let dims = dims(1, 8, 8, 128, Kind::BFloat16);
    let token = 2 * 8 * 128 * bits as usize / 8;
    // Sequences that end at the width asked for, as many as give the bytes.
    let tokens = 8192;
    let sequences = bytes.div_ceil(token * tokens);
    let words = format!(
        "preset=official,count=total,budget-mode=exact,min-bits={bits},max-len={tokens},exhausted=stop"
    );
    let mut cache = PagedCache::new(&dims, &config(&words)).unwrap();
    tch::manual_seed(1);
    let of = || Tensor::randn([CHUNK as i64, 8, 128], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
    let (k, v) = (of(), of());
    let input = Tensor::zeros([CHUNK as i64, dims.hidden], (Kind::BFloat16, Device::Cpu));
    // Without attention: the cache alone is measured.
    let call = |cache: &mut PagedCache, s, from: usize| {
        let rows = Ragged::contiguous(&[(s, from, CHUNK)]);
        let (rope, mask) = (rope(&dims, &rows), Mask::Causal);
        let site =
            Site { layer: 0, rows: &rows, rope: &rope, input: &input, mask, want_scores: None, scale: 0.1 };
        cache.append(&site, &k, &v).unwrap();
    };
    // Warm-up: a whole sequence, gone again.
    let warm = cache.open(tokens).unwrap();
    (0..tokens).step_by(CHUNK).for_each(|from| call(&mut cache, warm, from));
    cache.close(warm);
    let before = cache.bytes().allocated;
    assert!(reset_peak(), "the peak of this process cannot be reset");
    let start = peak_resident().unwrap() as usize;
    let mut most = 0;
    for _ in 0..sequences {
        let s = cache.open(tokens).unwrap();
        for from in (0..tokens).step_by(CHUNK) {
            call(&mut cache, s, from);
            most = most.max(cache.bytes().allocated);
        }
    }
    assert!(cache.bytes().payload >= bytes * 9 / 10, "{} of {bytes} bytes", cache.bytes().payload);
    let grown = (peak_resident().unwrap() as usize).saturating_sub(start);
    (grown, most - before)
}

/// One measurement at a time: the other's memory would count in.
static ALONE: Mutex<()> = Mutex::new(());

fn check(bytes: usize) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for bits in [16, 8, 4, 2] {
        let (grown, reported) = fill(bits, bytes);
        let off = grown as f64 / reported as f64 - 1.0;
        println!(
            "{bits} bits: the process grew by {grown} bytes, the cache by {reported} ({:+.2} %)",
            100.0 * off
        );
        // A last slab of 8 MiB may not have been written to yet.
        let least = 0.97 * reported as f64 - f64::from(8 << 20);
        assert!(off < 0.03 && grown as f64 > least, "{bits} bits: {grown} bytes beside {reported}");
    }
}

#[test]
fn the_process_grows_by_what_the_cache_reports() {
    check(192 << 20);
}

#[test]
#[ignore = "long"]
fn the_process_grows_by_what_the_cache_reports_at_a_gibibyte() {
    check(1 << 30);
}
