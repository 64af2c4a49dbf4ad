//! The default engine: what a job writes does not depend on what else runs, memory stays within its limit.
#![cfg(feature = "server")]

mod seam_models;
mod server_engine_kit;

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use nics_core::cache::DenseCache;
use nics_core::generate::{Finish, Prompt, Request};
use nics_core::models::Model;
use nics_core::seam::{Bytes, KvCache};
use nics_core::server::{Admission, Engine, Job, JobId, TextEngine, TextSettings};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use seam_models::*;
use server_engine_kit::*;

/// Jobs of many lengths; some greedy, some drawn, some with beginnings in common.
fn jobs(n: u64, seed: u64) -> Vec<Job> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n)
        .map(|id| {
            let mut prompt = if rng.random_range(0..3) == 0 { ids(24, 1) } else { Vec::new() };
            prompt.extend(ids(rng.random_range(1..50), rng.random_range(2..90)));
            let new = rng.random_range(1..24);
            if rng.random_range(0..2) == 0 { greedy(id, prompt, new) } else { drawn(id, prompt, new) }
        })
        .collect()
}

#[test]
fn tokens_are_those_of_a_single_stream_whatever_comes_and_goes() {
    for name in ["llama", "qwen2-window", "qwen3"] {
        let model = decoder(name);
        for min_prefix in [None, Some(16)] {
            let jobs = jobs(24, 7);
            let mut cache = DenseCache::new();
            let settings = TextSettings { min_prefix, max_sequences: 6, ..settings() };
            let mut stepped = Stepped::new(&model, &mut cache, settings);
            let mut waiting: VecDeque<&Job> = jobs.iter().collect();
            while !waiting.is_empty() || stepped.engine.running() > 0 {
                // Two may come before each step.
                for _ in 0..2 {
                    if stepped.engine.running() < 6
                        && let Some(job) = waiting.pop_front()
                    {
                        stepped.take(job);
                    }
                }
                stepped.step();
            }
            for job in &jobs {
                assert_eq!(stepped.tokens[&job.id.0], alone(&model, job), "{name}, job {}", job.id.0);
                assert_eq!(stepped.ends[&job.id.0], End::Finished(Finish::Length));
            }
            let stats = stepped.engine.stats();
            let prompts: usize = jobs.iter().map(|j| j.prompt.len()).sum();
            assert_eq!(stats.prompt_tokens_total + stats.prompt_tokens_reused_total, prompts as u64);
            assert_eq!(stats.prompt_tokens_reused_total > 0, min_prefix.is_some());
            assert_eq!(
                stats.generated_tokens_total,
                jobs.iter().map(|j| j.max_new_tokens as u64).sum::<u64>()
            );
            drop(stepped);
            assert_eq!(cache.bytes(), Bytes::default(), "the cache is given back empty");
        }
    }
}

#[test]
fn every_logit_is_the_same_to_the_bit_in_company_and_alone() {
    for name in ["llama", "qwen2-window", "qwen3"] {
        let model = decoder(name);
        // Whatever a job may choose, its choices show the bits.
        let mut jobs = jobs(16, 5);
        for job in &mut jobs {
            job.sampling.logprobs = Some(3);
        }
        let write = |sequences| {
            let settings = TextSettings { min_prefix: None, max_sequences: sequences, ..settings() };
            bits(&model, &settings, &jobs).0
        };
        let alone = write(1);
        for sequences in [2, 5, 16] {
            assert!(write(sequences) == alone, "{name}, {sequences} at a time");
        }
    }
}

#[test]
fn a_prompt_is_split_at_the_same_rows_whoever_else_is_read() {
    let model = Watched::new(decoder("llama"));
    let mut cache = DenseCache::new();
    let settings = TextSettings { min_prefix: None, ..settings() };
    let mut stepped = Stepped::new(&model, &mut cache, settings);
    // 8 rows a call and 16 a step: sequences 0 and 1 go first, then what is left of them and a part of 2.
    stepped.take(&greedy(0, ids(20, 0), 3));
    stepped.take(&greedy(1, ids(9, 1), 3));
    stepped.take(&greedy(2, ids(30, 2), 3));
    stepped.step();
    assert_eq!(model.taken_calls(), [vec![(0, 0, 8)], vec![(1, 0, 8)]]);
    stepped.step();
    assert_eq!(
        model.taken_calls(),
        [vec![(1, 8, 1)], vec![(0, 8, 8)], vec![(2, 0, 8)]],
        "a last row goes with the sequences that write"
    );
    stepped.step();
    assert_eq!(model.taken_calls(), [vec![(1, 9, 1)], vec![(0, 16, 3)], vec![(2, 8, 8)]]);
    stepped.step();
    assert_eq!(model.taken_calls(), [vec![(0, 19, 1), (1, 10, 1)], vec![(2, 16, 8)]]);
    assert_eq!(stepped.ends.keys().copied().collect::<Vec<_>>(), [1]);
    stepped.finish();
}

#[test]
fn a_cancelled_job_is_gone_at_once_and_changes_nothing_for_others() {
    let model = decoder("qwen2");
    let staying = [drawn(0, ids(30, 1), 20), drawn(1, ids(30, 1), 20), greedy(2, ids(5, 2), 20)];
    let mut cache = DenseCache::new();
    let settings = TextSettings { max_sequences: 4, ..settings() };
    let mut stepped = Stepped::new(&model, &mut cache, settings);
    // The others wait for its prompt, which begins like theirs, and it goes before that is read.
    stepped.take(&drawn(9, ids(30, 1), 40));
    for job in &staying {
        stepped.take(job);
    }
    assert!(matches!(stepped.engine.admit(&greedy(3, vec![1], 1)), Admission::Full));
    stepped.step();
    stepped.engine.cancel(JobId(9));
    stepped.engine.cancel(JobId(9));
    stepped.engine.cancel(JobId(77));
    assert_eq!(stepped.engine.running(), 3);
    let mut next = 10;
    for turn in 0.. {
        // Passing jobs: cancelled before a step, in the prompt, and while writing.
        if stepped.engine.running() < 4 {
            stepped.take(&drawn(next, ids(20, next as u32), 40));
            for _ in 0..turn % 4 {
                stepped.step();
            }
            stepped.engine.cancel(JobId(next));
            stepped.check_memory();
            next += 1;
        }
        stepped.step();
        if staying.iter().all(|job| stepped.ends.contains_key(&job.id.0)) {
            break;
        }
    }
    for job in &staying {
        assert_eq!(stepped.tokens[&job.id.0], alone(&model, job), "job {}", job.id.0);
    }
    assert_eq!(stepped.engine.running(), 0);
    assert_eq!(stepped.engine.cached_tokens(JobId(0)), 0);
}

#[test]
fn memory_stays_within_its_limit_and_every_job_is_answered() {
    let model = decoder("llama");
    let row = DenseCache::new().forecast(model.dims(), 1);
    for (limit, min_prefix) in [(100, None), (100, Some(16)), (220, Some(4))] {
        let jobs = jobs(60, 3);
        let mut cache = DenseCache::new();
        let settings = TextSettings { kv_limit_bytes: limit * row, min_prefix, ..settings() };
        let mut stepped = Stepped::new(&model, &mut cache, settings);
        let (mut waiting, mut full): (VecDeque<&Job>, usize) = (jobs.iter().collect(), 0);
        while !waiting.is_empty() || stepped.engine.running() > 0 {
            while let Some(job) = waiting.front() {
                match stepped.engine.admit(job) {
                    Admission::Taken => {
                        stepped.tokens.insert(job.id.0, Vec::new());
                        waiting.pop_front();
                        stepped.check_memory();
                    }
                    Admission::Full => {
                        full += 1;
                        assert!(stepped.engine.running() > 0, "nothing runs that could make room");
                        break;
                    }
                    Admission::Refused(e) => panic!("{e}"),
                }
            }
            stepped.step();
        }
        assert!(full > 0, "the limit was never reached");
        for job in &jobs {
            assert_eq!(stepped.tokens[&job.id.0], alone(&model, job), "job {}", job.id.0);
        }
        let stats = stepped.engine.stats();
        assert_eq!(stats.prompt_tokens_reused_total > 0, min_prefix.is_some());
    }
}

#[test]
fn a_full_budget_in_the_cache_ends_a_job_with_the_context() {
    let model = decoder("llama");
    let mut cache = Plain { inner: DenseCache::new(), rows: 20 };
    let mut stepped = Stepped::new(&model, &mut cache, settings());
    let (writes, reads) = (greedy(0, ids(10, 1), 30), greedy(1, ids(40, 2), 5));
    stepped.take(&writes);
    stepped.take(&reads);
    stepped.finish();
    // 10 prompt rows and 10 of tokens fill it; one more token comes out of the last row.
    assert_eq!(stepped.ends[&0], End::Finished(Finish::Context));
    assert_eq!(stepped.tokens[&0], alone(&model, &writes)[..11]);
    assert!(
        matches!(&stepped.ends[&1], End::Failed(why) if why.contains("cache holds 24")),
        "{:?}",
        stepped.ends
    );
}

#[test]
fn logits_that_are_not_finite_fail_their_job_alone() {
    let model = Watched { poison: Some(251), ..Watched::new(decoder("llama")) };
    let good = [greedy(0, ids(20, 1), 10), drawn(1, ids(7, 2), 10)];
    // One of the prompts is poisoned in its last row, which is the one that gives logits.
    let bad = greedy(2, [&ids(12, 3)[..], &[251]].concat(), 10);
    let mut cache = DenseCache::new();
    let mut stepped = Stepped::new(&model, &mut cache, settings());
    stepped.take(&good[0]);
    stepped.take(&bad);
    stepped.take(&good[1]);
    stepped.finish();
    assert!(
        matches!(&stepped.ends[&2], End::Failed(why) if why.contains("not finite")),
        "{:?}",
        stepped.ends
    );
    assert!(stepped.tokens[&2].is_empty());
    for job in &good {
        assert!(!alone(&model.inner, job).contains(&251), "the case is void");
        assert_eq!(stepped.tokens[&job.id.0], alone(&model.inner, job));
    }
}

#[test]
fn a_step_that_fails_leaves_the_jobs_where_they_were() {
    let model = Watched::new(decoder("qwen2"));
    let jobs = [greedy(0, ids(20, 1), 10), drawn(1, ids(30, 2), 10)];
    let mut cache = DenseCache::new();
    let mut stepped = Stepped::new(&model, &mut cache, settings());
    stepped.take(&jobs[0]);
    for _ in 0..4 {
        stepped.step();
    }
    model.broken.store(1, Ordering::SeqCst);
    assert!(stepped.try_step().unwrap_err().to_string().contains("broken"));
    // A prompt's own call concerns its job alone; the writing one's concerns all.
    stepped.take(&jobs[1]);
    assert!(stepped.try_step().is_err());
    model.broken.store(usize::MAX, Ordering::SeqCst);
    stepped.finish();
    for job in &jobs {
        assert_eq!(stepped.tokens[&job.id.0], alone(&model.inner, job));
    }
    // While nothing writes, the failure is the prompt's.
    stepped.take(&greedy(2, ids(30, 6), 4));
    model.broken.store(1, Ordering::SeqCst);
    stepped.step();
    assert_eq!(stepped.ends[&2], End::Failed("broken on demand".into()));
    assert_eq!(stepped.engine.running(), 0);
}

#[test]
fn a_failure_of_prompts_in_one_call_takes_nothing_from_those_that_write() {
    let model = Watched::new(decoder("qwen3"));
    let jobs = [drawn(0, ids(9, 1), 12), greedy(1, ids(30, 2), 8)];
    let request = |job: &Job| Request {
        prompt: Prompt::Ids(job.prompt.to_vec()),
        sampling: job.sampling.clone(),
        max_new_tokens: job.max_new_tokens,
        eos: Vec::new(),
    };
    let mut cache = DenseCache::new();
    let mut generator = settings().generator(&model, &mut cache).isolate_prompts(false);
    let mut written = vec![Vec::new(); 2];
    for turn in 0.. {
        if turn == 3 {
            generator.add(request(&jobs[1])).unwrap();
            // The writing call of the step has been made when the prompt's fails: its row goes again.
            model.broken.store(2, Ordering::SeqCst);
            for _ in 0..2 {
                assert!(generator.advance().unwrap_err().to_string().contains("broken"));
            }
            model.broken.store(usize::MAX, Ordering::SeqCst);
        } else if turn == 0 {
            generator.add(request(&jobs[0])).unwrap();
        }
        for token in generator.advance().unwrap().tokens {
            written[token.request.0 as usize].push(token.token);
        }
        if turn > 3 && generator.running() == 0 {
            break;
        }
    }
    assert_eq!(written, jobs.map(|job| alone(&model.inner, &job)));
}

#[test]
fn what_can_never_be_taken_is_refused_and_senseless_limits_too() {
    let model = decoder("llama");
    let row = DenseCache::new().forecast(model.dims(), 1);
    let small = TextSettings { kv_limit_bytes: 50 * row, ..settings() };
    let mut cache = DenseCache::new();
    let mut stepped = Stepped::new(&model, &mut cache, small.clone());
    for (job, word) in [
        (greedy(0, Vec::new(), 1), "prompt is empty"),
        (greedy(0, vec![1], 0), "max_new_tokens is 0"),
        (greedy(0, vec![1, 256], 1), "token 256"),
        (greedy(0, ids(40, 1), 11), "51 tokens of prompt and reply"),
        (greedy(0, ids(256, 1), 1), "the model's context"),
    ] {
        let Admission::Refused(e) = stepped.engine.admit(&job) else { panic!("taken: {word}") };
        assert!(e.to_string().contains(word), "{e}");
    }
    assert_eq!(stepped.engine.stats().kv_bytes, 0, "what was refused holds nothing");
    stepped.take(&greedy(1, ids(40, 1), 10));
    stepped.finish();
    drop(stepped);
    for (settings, word) in [
        (TextSettings { max_sequences: 0, ..small.clone() }, "max_sequences is 0"),
        (TextSettings { prefill_chunk: 0, ..small.clone() }, "prefill_chunk is 0"),
        (TextSettings { prefill_budget: 0, ..small.clone() }, "prefill_budget is 0"),
        (TextSettings { kv_limit_bytes: 2 * row - 1, ..small }, "too small"),
    ] {
        let Err(e) = TextEngine::new(&model, &mut cache, settings) else { panic!("accepted: {word}") };
        assert!(e.to_string().contains(word), "{e}");
    }
}
