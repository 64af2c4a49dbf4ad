//! Speculative decoding gives the large model's own output: token for token when greedy, in distribution when sampling.

use std::collections::BTreeMap;

use nics_core::cache::DenseCache;
use nics_core::checkpoint::TensorPath;
use nics_core::generate::{self, Finish, Generator};
use nics_core::models::{self, Decoder, Model};
use nics_core::sampling::{Sampling, softmax};
use r2r::baselines::speculative::{Reply, Request, Speculative, SpeculativeUsage};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Device, Kind};

const VOCAB: u32 = 12;

fn model(seed: u64, std: f64, hidden: i64) -> Decoder {
    let Value::Object(config) = json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "vocab_size": VOCAB, "max_position_embeddings": 48,
    }) else {
        panic!("an object")
    };
    let at = TensorPath::random(seed, std, Device::Cpu, Kind::Float);
    Decoder::load(models::config(&config).unwrap(), &at).unwrap()
}

fn prompts(n: usize) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    (0..n).map(|i| (0..=i % 7).map(|_| rng.random_range(0..VOCAB)).collect()).collect()
}

fn requests(sampling: &Sampling, limit: usize, eos: &[u32]) -> Vec<Request> {
    prompts(9)
        .into_iter()
        .map(|prompt| Request {
            prompt,
            max_new_tokens: limit,
            eos: eos.to_vec(),
            sampling: sampling.clone(),
        })
        .collect()
}

fn alone(model: &dyn Model, limit: usize, eos: &[u32]) -> Vec<Vec<u32>> {
    let requests = prompts(9).into_iter().map(|p| generate::Request::greedy(p, limit, eos));
    let mut cache = DenseCache::new();
    generate::collect(&mut Generator::new(model, &mut cache), requests, 4).unwrap()
}

fn run(small: &Decoder, large: &Decoder, draft: usize, requests: &[Request], batch: usize) -> Vec<Reply> {
    Speculative::new(small, large, draft).unwrap().generate(requests, batch).unwrap()
}

#[test]
fn greedy_output_is_the_large_models_own_whatever_is_drafted() {
    let large = model(1, 0.6, 16);
    let (stranger, twin) = (model(2, 0.6, 8), model(1, 0.6, 16));
    for eos in [vec![], vec![0, 5]] {
        for limit in [1, 2, 20, 100] {
            let expected = alone(&large, limit, &eos);
            for (small, draft) in [(&stranger, 1), (&stranger, 4), (&twin, 3), (&twin, 7)] {
                for batch in [1, 4, 100] {
                    let requests = requests(&Sampling::default(), limit, &eos);
                    let replies = run(small, &large, draft, &requests, batch);
                    for (reply, expected) in replies.iter().zip(&expected) {
                        assert_eq!(&reply.tokens, expected, "draft {draft}, batch {batch}, limit {limit}");
                        let ended = expected.last().is_some_and(|id| eos.contains(id));
                        let full = if limit == 100 { Finish::Context } else { Finish::Length };
                        assert_eq!(reply.finish, if ended { Finish::Eos } else { full });
                    }
                }
            }
        }
    }
}

#[test]
fn usage_counts_what_happened() {
    let (large, twin) = (model(1, 0.6, 16), model(1, 0.6, 16));
    let requests = requests(&Sampling::default(), 20, &[]);
    let replies = run(&twin, &large, 4, &requests, 100);
    let usage = replies.iter().fold(SpeculativeUsage::default(), |sum, r| sum.and(r.usage));
    // A draft of oneself is always accepted: five tokens a call.
    assert_eq!((usage.tokens, usage.accepted, usage.drafted), (9 * 20, 9 * 16, 9 * 16));
    assert_eq!(usage.calls, 9 * 4);
    assert!((usage.calls_per_token() - 0.2).abs() < 1e-12 && (usage.acceptance() - 1.0).abs() < 1e-12);
    // Everything but the last token of each reply is read once.
    let prompts: usize = requests.iter().map(|r| r.prompt.len()).sum();
    assert_eq!(usage.large_read, (prompts + 9 * 19) as u64);
    // A stranger's drafts are mostly refused: some are read in vain, and there are more calls.
    let replies = run(&model(2, 0.6, 8), &large, 4, &requests, 100);
    let other = replies.iter().fold(SpeculativeUsage::default(), |sum, r| sum.and(r.usage));
    assert_eq!(other.tokens, 9 * 20);
    assert_eq!(other.tokens, other.accepted + other.calls);
    assert!(other.calls > 2 * usage.calls && other.large_read > usage.large_read);
}

/// Pairs of tokens against the large model's own probabilities, by chi square.
#[test]
fn sampled_output_has_the_large_models_distribution() {
    let (small, large) = (model(2, 0.5, 8), model(1, 0.5, 16));
    let prompt = vec![3u32, 7];
    for sampling in [
        Sampling { temperature: 1.0, ..Sampling::default() },
        Sampling { temperature: 0.7, top_k: 5, top_p: 0.9, ..Sampling::default() },
    ] {
        let n = 6000;
        let requests: Vec<Request> = (0..n)
            .map(|seed| Request {
                prompt: prompt.clone(),
                max_new_tokens: 2,
                eos: vec![],
                sampling: Sampling { seed, ..sampling.clone() },
            })
            .collect();
        let replies = run(&small, &large, 3, &requests, 2000);
        let mut found: BTreeMap<(u32, u32), f64> = BTreeMap::new();
        for reply in &replies {
            *found.entry((reply.tokens[0], reply.tokens[1])).or_default() += 1.0;
        }
        let next = |ids: &[u32]| -> Vec<f32> {
            // The model's log-probability of each token, put through the same filters.
            let mut logits: Vec<f32> =
                (0..VOCAB).map(|id| generate::score(&large, ids, &[id]).unwrap()[0]).collect();
            sampling.process(&mut logits, &std::collections::HashSet::new());
            softmax(&logits)
        };
        let first = next(&prompt);
        let (mut chi, mut cells) = (0.0, 0);
        for a in 0..VOCAB {
            if first[a as usize] <= 0.0 {
                assert!(found.keys().all(|(x, _)| *x != a), "a token that is filtered out was drawn");
                continue;
            }
            let second = next(&[prompt.as_slice(), &[a]].concat());
            for b in 0..VOCAB {
                let expected = f64::from(first[a as usize]) * f64::from(second[b as usize]) * n as f64;
                let seen = found.get(&(a, b)).copied().unwrap_or(0.0);
                if expected < 5.0 {
                    continue;
                }
                chi += (seen - expected).powi(2) / expected;
                cells += 1;
            }
        }
        // Mean `cells`, deviation sqrt(2 cells): four deviations are never met by chance, and a biased sampler is far off.
        assert!(cells > 5, "{cells}");
        let limit = f64::from(cells) + 4.0 * (2.0 * f64::from(cells)).sqrt();
        assert!(chi < limit, "{chi} over {cells} cells, expected below {limit}");
    }
}

#[test]
fn what_cannot_be_drafted_is_refused() {
    let (small, large) = (model(2, 0.6, 8), model(1, 0.6, 16));
    assert!(Speculative::new(&small, &large, 0).is_err());
    let good = Request {
        prompt: vec![1],
        max_new_tokens: 4,
        eos: vec![],
        sampling: Sampling { temperature: 1.0, ..Sampling::default() },
    };
    let refused = |request: Request| {
        let mut decoder = Speculative::new(&small, &large, 2).unwrap();
        decoder.generate(&[good.clone(), request], 2).unwrap_err().to_string()
    };
    assert!(refused(Request { prompt: vec![], ..good.clone() }).contains("sequence 1 is empty"));
    assert!(refused(Request { prompt: vec![VOCAB], ..good.clone() }).contains("token 12"));
    assert!(refused(Request { prompt: vec![1; 48], ..good.clone() }).contains("48"));
    assert!(refused(Request { max_new_tokens: 0, ..good.clone() }).contains("max_new_tokens"));
    let penalty = Sampling { repetition_penalty: 1.2, ..Sampling::default() };
    assert!(refused(Request { sampling: penalty, ..good.clone() }).contains("repetition_penalty"));
}
