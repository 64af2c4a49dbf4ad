//! Prefixes that the default engine reuses: which rows, to the bit those of a prompt that is read anew, and what gives way
//! for whom.
#![cfg(feature = "server")]

mod seam_models;
mod server_engine_kit;

use nics_core::cache::DenseCache;
use nics_core::checkpoint::TensorPath;
use nics_core::models::{self, Decoder, Model};
use nics_core::seam::{Bytes, KvCache};
use nics_core::server::{Engine, Job, JobId, TextSettings};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use seam_models::*;
use server_engine_kit::*;
use tch::{Device, Kind};

/// Prompts with much in common: conversations whose turns go on, choices of one prompt, prompts that end or part
/// anywhere in another.
fn related(conversations: u32) -> Vec<Job> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut prompts = Vec::new();
    for conversation in 0..conversations {
        let all = ids(150, conversation);
        let mut at = 0;
        for _ in 0..5 {
            at += rng.random_range(10..30);
            prompts.push(all[..at].to_vec());
            let parted = rng.random_range(1..=at);
            prompts.push([&all[..parted], &ids(rng.random_range(1..20), 50 + conversation)].concat());
        }
        let again = prompts[prompts.len() - 2].clone();
        prompts.extend([again.clone(), again]);
    }
    let job = |(id, prompt)| {
        let mut job = drawn(id, prompt, 6);
        job.sampling.logprobs = Some(3);
        job
    };
    (0..).zip(prompts).map(job).collect()
}

/// Serves related prompts with prefixes reused, in many orders and companies, and holds every logit to the bit to that of
/// a prompt that is read anew. `ways`: how many at a time, in memory for how many rows. Gives whether inexact reuse shows other bits.
fn served_before_or_not(
    model: &Decoder,
    exact: &TextSettings,
    conversations: u32,
    ways: &[(usize, usize)],
) -> bool {
    let mut jobs = related(conversations);
    let anew = TextSettings { min_prefix: None, ..exact.clone() };
    let (expected, reused) = bits(model, &anew, &jobs);
    assert_eq!(reused, 0);
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let rows = |n| n * DenseCache::new().forecast(model.dims(), 1);
    for &(sequences, limit) in ways {
        jobs.shuffle(&mut rng);
        let settings =
            TextSettings { max_sequences: sequences, kv_limit_bytes: rows(limit), ..exact.clone() };
        let (found, reused) = bits(model, &settings, &jobs);
        assert!(reused > 150 * u64::from(conversations), "{reused} of the prompts' tokens were reused");
        assert!(found == expected, "{sequences} at a time in {limit} rows");
    }
    let any = TextSettings { exact_prefix: false, ..exact.clone() };
    bits(model, &any, &jobs).0 != expected
}

#[test]
fn every_logit_is_the_same_to_the_bit_whatever_was_served_before() {
    // Chunks longer than what the kernels of few rows take, which give a row the same bits in any company.
    let exact = TextSettings { min_prefix: Some(1), prefill_chunk: 32, prefill_budget: 64, ..settings() };
    let ways = [(1, 10_000), (1, 400), (4, 10_000), (4, 600), (16, 10_000)];
    let differ = ["llama", "qwen2-window", "qwen3"]
        .map(|name| served_before_or_not(&decoder(name), &exact, 3, &ways))
        .contains(&true);
    assert!(differ, "these jobs show nothing: inexact reuse gives the same bits");
}

#[test]
fn every_logit_is_the_same_to_the_bit_at_real_widths() {
    // Two layers of Qwen2.5-0.5B, chunks longer and shorter than what the kernels of few rows take, two threads.
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 2, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 512,
        "tie_word_embeddings": true, "hidden_act": "silu", "use_sliding_window": false,
    });
    nics_core::device::set_threads(Some(2)).unwrap();
    let mut differ = false;
    for (kind, prefill_chunk) in [(Kind::Float, 32), (Kind::BFloat16, 32), (Kind::BFloat16, 12)] {
        let config = models::config(config.as_object().unwrap()).unwrap();
        let root = TensorPath::random(5, 0.02, Device::Cpu, kind);
        let model = models::load_at(config, &root).unwrap();
        let exact = TextSettings { min_prefix: Some(1), prefill_chunk, prefill_budget: 64, ..settings() };
        differ |= served_before_or_not(&model, &exact, 1, &[(4, 600)]);
    }
    assert!(differ, "these jobs show nothing: inexact reuse gives the same bits");
}

#[test]
fn room_is_made_by_what_is_of_no_use_to_the_prompt_that_comes() {
    let model = decoder("llama");
    let row = DenseCache::new().forecast(model.dims(), 1);
    let mut cache = DenseCache::new();
    let settings = TextSettings { kv_limit_bytes: 120 * row, ..settings() };
    let mut stepped = Stepped::new(&model, &mut cache, settings);
    // Two are kept, 40 rows each; the first is used last.
    for (id, salt) in [(0, 1), (1, 2), (2, 1)] {
        stepped.take(&greedy(id, ids(41, salt), 4));
        stepped.finish();
    }
    // 50 rows fit when the other goes. The one that this prompt begins like stays: it starts from a copy.
    stepped.take(&greedy(3, [&ids(41, 1)[..24], &ids(20, 9)].concat(), 6));
    assert_eq!(stepped.engine.cached_tokens(JobId(3)), 24);
    stepped.finish();
    stepped.take(&greedy(4, ids(41, 1), 4));
    assert_eq!(stepped.engine.cached_tokens(JobId(4)), 40, "it is there, all of it");
    stepped.finish();
    stepped.take(&greedy(5, ids(41, 2), 4));
    assert_eq!(stepped.engine.cached_tokens(JobId(5)), 0, "it has given way");
}

#[test]
fn what_is_kept_of_a_sequence_is_its_prompt() {
    let model = decoder("llama");
    let row = DenseCache::new().forecast(model.dims(), 1);
    for (exact_prefix, rows) in [(true, 40), (false, 71)] {
        let mut cache = DenseCache::new();
        let mut stepped = Stepped::new(&model, &mut cache, TextSettings { exact_prefix, ..settings() });
        stepped.take(&greedy(0, ids(41, 1), 31));
        stepped.finish();
        let payload = stepped.engine.cache().bytes().payload;
        assert_eq!(payload, rows * row);
        // Cancelled while it is read: whole chunks.
        stepped.take(&greedy(1, ids(41, 7), 31));
        stepped.step();
        stepped.step();
        stepped.engine.cancel(JobId(1));
        stepped.check_memory();
        assert_eq!(stepped.engine.cache().bytes().payload - payload, 16 * row);
    }
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_is_not_computed_again() {
    let model = decoder("qwen3");
    // Chunks are of 8 rows. Without exactness all rows count, those of the reply, too.
    for (exact_prefix, turn, again, parting, reused) in [(false, 47, 39, 20, 106), (true, 32, 32, 16, 80)] {
        let mut cache = DenseCache::new();
        let mut stepped = Stepped::new(&model, &mut cache, TextSettings { exact_prefix, ..settings() });
        let first = greedy(0, ids(40, 1), 8);
        stepped.take(&first);
        stepped.finish();
        let reply = stepped.tokens[&0].clone();
        assert_eq!(stepped.cached[&0], 0);

        // The conversation goes on: the last token's row is not there. What there is is taken over.
        let second = drawn(1, [&ids(40, 1)[..], &reply, &ids(10, 2)].concat(), 60);
        stepped.take(&second);
        assert_eq!(stepped.engine.cached_tokens(JobId(1)), turn);
        stepped.finish();
        assert_eq!(
            stepped.tokens[&1],
            alone(&model, &second),
            "it has grown beyond what the first was opened for"
        );

        // The same prompt again: its last token is computed; and one that parts from it in the middle.
        let jobs = [
            (greedy(2, ids(40, 1), 8), again),
            (greedy(3, [&ids(40, 1)[..20], &ids(9, 5)].concat(), 8), parting),
            (greedy(4, [&ids(40, 1)[..15], &ids(9, 6)].concat(), 8), 0),
        ];
        for (job, expected) in &jobs {
            stepped.take(job);
            assert_eq!(stepped.engine.cached_tokens(job.id), *expected, "job {}", job.id.0);
        }
        stepped.finish();
        for (job, _) in &jobs {
            assert_eq!(stepped.tokens[&job.id.0], alone(&model, job), "job {}", job.id.0);
        }
        assert_eq!(stepped.engine.stats().prompt_tokens_reused_total, reused);
    }
}

#[test]
fn choices_of_one_prompt_compute_it_once() {
    let model = Watched::new(decoder("llama"));
    let mut cache = DenseCache::new();
    let mut stepped = Stepped::new(&model, &mut cache, settings());
    let jobs: Vec<Job> = (0..5).map(|id| drawn(id, ids(36, 3), 12)).collect();
    // And one with half of it in common, which waits for that half alone: whole chunks of 8.
    let half = drawn(5, [&ids(36, 3)[..18], &ids(12, 8)].concat(), 12);
    for job in jobs.iter().chain([&half]) {
        stepped.take(job);
    }
    stepped.finish();
    for job in jobs.iter().chain([&half]) {
        assert_eq!(stepped.tokens[&job.id.0], alone(&model.inner, job), "job {}", job.id.0);
        let expected = [0, 35, 35, 35, 35, 16][job.id.0 as usize];
        assert_eq!(stepped.cached[&job.id.0], expected, "job {}", job.id.0);
    }
    let rows: usize = model.taken_calls().iter().flatten().map(|(_, _, rows)| rows).sum();
    assert_eq!(rows, 36 + 4 + 14 + 6 * 11, "prompts and all tokens but the last ones");
    let calls_of_many = stepped.engine.stats().steps_total;
    assert!(calls_of_many < 5 * 12, "they write side by side");
}

#[test]
fn kept_sequences_give_way_the_least_recently_used_first() {
    let model = decoder("llama");
    let row = DenseCache::new().forecast(model.dims(), 1);
    let mut cache = DenseCache::new();
    let settings = TextSettings { kv_limit_bytes: 150 * row, exact_prefix: false, ..settings() };
    let mut stepped = Stepped::new(&model, &mut cache, settings);
    let cached_of = |stepped: &mut Stepped, job: &Job| {
        stepped.take(job);
        let cached = stepped.engine.cached_tokens(job.id);
        stepped.finish();
        assert_eq!(stepped.tokens[&job.id.0], alone(&model, job), "job {}", job.id.0);
        cached
    };
    // Three of 40 rows are kept, or two beside one that runs.
    for id in 0..3 {
        assert_eq!(cached_of(&mut stepped, &greedy(id, ids(36, id as u32), 4)), 0);
    }
    assert_eq!(cached_of(&mut stepped, &greedy(3, ids(36, 0), 4)), 35, "0 is there");
    // 1 is the oldest now and goes for it; 2 and 0 stay.
    assert_eq!(cached_of(&mut stepped, &greedy(4, ids(36, 5), 4)), 0);
    assert_eq!(cached_of(&mut stepped, &greedy(5, ids(36, 2), 4)), 35);
    assert_eq!(cached_of(&mut stepped, &greedy(6, ids(36, 1), 4)), 0);
    // One that needs all the memory leaves nothing; its own beginning it still takes over.
    let grown = greedy(7, [&ids(36, 1)[..30], &ids(6, 9)].concat(), 114);
    assert_eq!(cached_of(&mut stepped, &grown), 30);
    assert!(stepped.engine.stats().kv_bytes >= 149 * row);
    assert_eq!(cached_of(&mut stepped, &greedy(8, ids(36, 0), 114)), 0);
}

#[test]
fn a_cache_that_cannot_give_beginnings_serves_without() {
    let model = decoder("llama");
    let mut cache = Plain { inner: DenseCache::new(), rows: usize::MAX };
    let mut stepped = Stepped::new(&model, &mut cache, settings());
    let jobs: Vec<Job> = (0..4).map(|id| drawn(id, ids(30, 1), 10)).collect();
    for job in &jobs {
        stepped.take(job);
    }
    stepped.finish();
    for job in &jobs {
        assert_eq!(stepped.tokens[&job.id.0], alone(&model, job));
        assert_eq!(stepped.cached[&job.id.0], 0);
    }
    assert_eq!(stepped.engine.stats().kv_bytes, 0, "nothing is kept for nothing");
    assert_eq!(stepped.engine.cache().bytes(), Bytes::default());
}

#[test]
fn a_prompt_that_goes_on_within_a_chunk_reads_up_to_its_end() {
    let model = Watched::new(decoder("llama"));
    let mut cache = DenseCache::new();
    let mut stepped = Stepped::new(&model, &mut cache, TextSettings { exact_prefix: false, ..settings() });
    stepped.take(&greedy(0, ids(40, 1), 2));
    stepped.finish();
    model.taken_calls();
    stepped.take(&greedy(1, [&ids(40, 1)[..20], &ids(20, 9)].concat(), 1));
    stepped.finish();
    let rows: Vec<(i64, usize)> =
        model.taken_calls().iter().flatten().map(|&(_, first, rows)| (first, rows)).collect();
    assert_eq!(rows, [(20, 4), (24, 8), (32, 7), (39, 1)]);
}
