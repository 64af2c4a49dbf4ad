//! What must not grow: resident memory over ten thousand steps of serving, and over loading and unloading a model.
#![cfg(all(feature = "server", target_os = "linux"))]

mod seam_models;
mod server_engine_kit;

use std::sync::{Mutex, PoisonError};

use nics_core::cache::DenseCache;
use nics_core::memory::resident;
use nics_core::models::Model;
use nics_core::seam::KvCache;
use nics_core::server::{Admission, Engine, JobId, TextSettings};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use seam_models::*;
use server_engine_kit::*;

/// Resident memory is the whole process's: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn growth(from: u64, to: u64) -> f64 {
    (to as f64 - from as f64) / from as f64
}

#[test]
#[ignore = "long"]
fn ten_thousand_steps_of_coming_and_going_do_not_grow() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let model = decoder("llama");
    let row = DenseCache::new().forecast(model.dims(), 1);
    let mut cache = DenseCache::new();
    let settings = TextSettings { kv_limit_bytes: 1500 * row, max_sequences: 8, ..settings() };
    let mut stepped = Stepped::new(&model, &mut cache, settings);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (mut next, mut warm, mut refused) = (0, 0, 0);
    for step in 0..12_000 {
        if step == 2_000 {
            warm = resident().unwrap();
        }
        // About one job in four is cancelled on its way.
        if rng.random_range(0..40) == 0
            && let Some(&id) = stepped.tokens.keys().next()
        {
            stepped.engine.cancel(JobId(id));
            stepped.tokens.remove(&id);
            stepped.cached.remove(&id);
        }
        let prompt =
            [&ids(20, rng.random_range(0..5))[..], &ids(rng.random_range(1..60), next as u32)].concat();
        let job = drawn(next, prompt, rng.random_range(1..80));
        match stepped.engine.admit(&job) {
            Admission::Taken => {
                stepped.tokens.insert(next, Vec::new());
                stepped.cached.insert(next, 0);
                next += 1;
            }
            Admission::Full => refused += 1,
            Admission::Refused(e) => panic!("{e}"),
        }
        stepped.step();
        let ended: Vec<u64> = stepped.ends.keys().copied().collect();
        for id in ended {
            stepped.ends.remove(&id);
            stepped.tokens.remove(&id);
            stepped.cached.remove(&id);
        }
    }
    let stats = stepped.engine.stats();
    assert!(next > 1000 && refused > 1000 && stats.prompt_tokens_reused_total > 1000, "{stats:?}");
    let end = resident().unwrap();
    let grown = growth(warm, end);
    println!("{next} jobs, {warm} bytes after 2,000 steps, {end} after 12,000: {:.2} %", 100.0 * grown);
    assert!(grown < 0.01, "resident memory grew by {:.2} %", 100.0 * grown);
}

#[test]
#[ignore = "long"]
fn a_hundred_models_come_and_go_without_a_trace() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let serve = |turn: u32| {
        let model = decoder("qwen2");
        let mut cache = DenseCache::new();
        let mut stepped = Stepped::new(&model, &mut cache, settings());
        stepped.take(&greedy(0, ids(20, turn), 4));
        stepped.finish();
    };
    (0..10).for_each(serve);
    let warm = resident().unwrap();
    (10..110).for_each(serve);
    let end = resident().unwrap();
    let grown = growth(warm, end);
    println!("{warm} bytes after 10 models, {end} after 110: {:.2} %", 100.0 * grown);
    assert!(grown < 0.05, "resident memory grew by {:.2} %", 100.0 * grown);
}
