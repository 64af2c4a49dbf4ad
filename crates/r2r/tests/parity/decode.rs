//! The decoding loop over two tiny models.

use std::sync::{Arc, Mutex};

use nics_core::cache::NoCache;
use nics_core::generate;
use nics_core::models::{Batch, Input, Model};
use nics_core::seam::{Ragged, SeqId};
use r2r::decode::{Decoder, LocalLarge, Request, Source, TokenEvent, Usage, collect};
use r2r::policy::{AlwaysLarge, AlwaysSmall, Neural, Policy, Random, Sequence, StepView};
use r2r::router::{Architecture, Router, RouterConfig, Storage};
use r2r::sampling::SmallSampling;
use serde_json::Value;
use tch::Tensor;

use crate::kit::{Case, cases, floats, ints};
use crate::labels::decoder;

struct Pair {
    case: Case,
    small: nics_core::models::Decoder,
    large: nics_core::models::Decoder,
}

fn pairs() -> Vec<Pair> {
    let load = |case: Case| Pair {
        small: decoder(&case, "slm.", "slm_config"),
        large: decoder(&case, "llm.", "llm_config"),
        case,
    };
    cases("decode_loop").into_iter().map(load).collect()
}

impl Pair {
    fn number(&self, key: &str) -> usize {
        self.case.json[key].as_u64().unwrap() as usize
    }

    fn eos(&self) -> Vec<u32> {
        vec![self.number("eos_token_id") as u32]
    }

    fn requests(&self) -> Vec<Request> {
        let prompts: Vec<Vec<u32>> = serde_json::from_value(self.case.json["prompts"].clone()).unwrap();
        let most = self.number("max_new_tokens");
        prompts.into_iter().map(|p| Request::greedy(p, most, &self.eos())).collect()
    }

    fn neural(&self) -> Box<dyn Policy> {
        let mut args = self.case.json["router"].as_object().unwrap().clone();
        let table = match args.remove("token_embedding") {
            Some(Value::String(name)) => self.case.tensor(&name).shallow_clone(),
            other => panic!("the router's embedding is {other:?}"),
        };
        let config = RouterConfig::from_json(Architecture::HiddenTokenLogits, &args).unwrap();
        let router = Router::load(config, &self.case.path("router."), Some(&table), Storage::F32).unwrap();
        let threshold = self.case.json["threshold"].as_f64().unwrap();
        Box::new(Neural::new(Arc::new(Mutex::new(router)), threshold).unwrap())
    }

    fn run(&self, policy: Box<dyn Policy>, requests: Vec<Request>, batch: usize) -> Vec<Vec<TokenEvent>> {
        let mut decoder = Decoder::new(&self.small, Box::new(LocalLarge::new(&self.large)), policy);
        let events = collect(&mut decoder, requests, batch).unwrap();
        assert_eq!(decoder.running(), 0);
        events
    }
}

fn tokens(events: &[TokenEvent]) -> Vec<u32> {
    events.iter().map(|e| e.token).collect()
}

fn usage(events: &[TokenEvent]) -> Usage {
    events.iter().fold(Usage::default(), |sum, event| {
        sum.and(match event.source {
            Source::Small => Usage { small_tokens: 1, ..Usage::default() },
            Source::Large { read, .. } => {
                Usage { large_tokens: 1, large_read: read as u64, ..Usage::default() }
            }
        })
    })
}

#[test]
fn tokens_sources_calls_and_probabilities() {
    for pair in pairs() {
        for batch in [1, 2, pair.requests().len()] {
            let all = pair.run(pair.neural(), pair.requests(), batch);
            let (expected, sources) = (pair.case.tensor("out.tokens"), pair.case.tensor("out.source"));
            let mut calls = Vec::new();
            for (i, events) in all.iter().enumerate() {
                let row =
                    |t: &Tensor| ints(&t.get(i as i64)).into_iter().filter(|v| *v >= 0).collect::<Vec<i64>>();
                assert_eq!(tokens(events).iter().map(|&t| i64::from(t)).collect::<Vec<_>>(), row(expected));
                let found: Vec<i64> = events.iter().map(|e| i64::from(e.source != Source::Small)).collect();
                assert_eq!(found, row(sources));
                let probability = floats(&pair.case.tensor("out.prob").get(i as i64));
                for (event, expected) in events.iter().zip(probability) {
                    // Tolerance of the fixtures' README.
                    assert!((f64::from(event.score) - expected).abs() <= 2e-4);
                    if let Source::Large { cached, read } = event.source {
                        let call = [i as i64, cached as i64, read as i64, i64::from(event.token)];
                        calls.push((event.position, i, call));
                    }
                }
                let (stats, usage) = (&pair.case.json["stats"][i], usage(events));
                let same = |key: &str, found: f64| {
                    assert!((found - stats[key].as_f64().unwrap()).abs() < 1e-9, "{key}: {found}, {stats}");
                };
                let size = |key: &str| pair.case.json[key].as_f64().unwrap();
                let (small, large) = (size("param_quick"), size("param_reference"));
                same("total_tokens", usage.tokens() as f64);
                same("quick_model_tokens", usage.small_tokens as f64);
                same("reference_model_tokens", usage.large_tokens as f64);
                same("reference_model_percentage", 100.0 * usage.large_share());
                same("avg_params_billions", usage.exclusive_parameters(small, large));
                same(
                    "total_params_billions",
                    usage.exclusive_parameters(small, large) * usage.tokens() as f64,
                );
                let additive = small + usage.large_share() * large + 0.056;
                assert!((usage.additive_parameters(small, large, 0.056) - additive).abs() < 1e-12);
            }
            // The reference writes all sequences at once: step after step.
            calls.sort_unstable();
            let calls: Vec<i64> = calls.into_iter().flat_map(|(_, _, call)| call).collect();
            assert_eq!(calls, ints(pair.case.tensor("out.llm_calls")), "{batch} at a time");
        }
    }
}

/// Logits of the next token and the hidden state, without any cache.
fn last(model: &dyn Model, ids: &[u32]) -> (Tensor, Tensor) {
    let input = Tensor::from_slice(&ids.iter().map(|&i| i64::from(i)).collect::<Vec<_>>());
    let rows = Ragged::contiguous(&[(SeqId(0), 0, ids.len())]);
    let out = model.forward(&Batch::new(rows, Input::Ids(&input)), &mut NoCache::new(), None).unwrap();
    let hidden = out.hidden.narrow(0, ids.len() as i64 - 1, 1);
    (model.logits(&hidden).unwrap(), hidden)
}

fn likeliest(logits: &Tensor, vocab: i64) -> u32 {
    logits.narrow(1, 0, vocab).argmax(1, false).int64_value(&[0]) as u32
}

#[test]
fn the_loop_equals_one_without_caches() {
    let _guard = tch::no_grad_guard();
    for pair in pairs() {
        let vocab = pair.small.dims().vocab.min(pair.large.dims().vocab);
        let make: [&dyn Fn() -> Box<dyn Policy>; 3] =
            [&|| pair.neural(), &|| Box::new(Random::new(0.4, 11).unwrap()), &|| Box::new(AlwaysLarge)];
        for make in make {
            let all = pair.run(make(), pair.requests(), 3);
            let mut policy = make();
            for (i, request) in pair.requests().into_iter().enumerate() {
                let mut ids = request.prompt.clone();
                for event in &all[i] {
                    let (logits, hidden) = last(&pair.small, &ids);
                    let proposal = likeliest(&logits, vocab);
                    let token = Tensor::from_slice(&[i64::from(proposal)]);
                    let view = StepView { logits: &logits, hidden: &hidden, token: &token };
                    let large = policy.decide(&view, &[Sequence(i as u64)]).unwrap()[0].large;
                    let expected =
                        if large { likeliest(&last(&pair.large, &ids).0, vocab) } else { proposal };
                    assert_eq!(
                        (event.token, event.source != Source::Small),
                        (expected, large),
                        "{}",
                        policy.name()
                    );
                    ids.push(expected);
                }
                let ended = pair.eos().contains(ids.last().unwrap());
                assert!(ended || ids.len() == request.prompt.len() + request.max_new_tokens);
            }
        }
    }
}

#[test]
fn one_model_alone_writes_as_it_does_by_itself() {
    for pair in pairs() {
        let requests = |eos: Vec<u32>| {
            pair.requests()
                .into_iter()
                .map(move |r| generate::Request::greedy(r.prompt, r.max_new_tokens, &eos))
        };
        let by_itself = |model: &dyn Model| {
            let mut cache = nics_core::cache::DenseCache::new();
            let mut generator = generate::Generator::new(model, &mut cache);
            generate::collect(&mut generator, requests(pair.eos()), 1).unwrap()
        };
        // The large model without the rows of padding that it alone has, which are never chosen beside the small one.
        let vocab = pair.small.dims().vocab.min(pair.large.dims().vocab);
        let mut cut =
            Case { name: String::new(), json: pair.case.json.clone(), tensors: pair.case.under("") };
        cut.json["llm_config"]["vocab_size"] = vocab.into();
        for name in ["llm.lm_head.weight", "llm.model.embed_tokens.weight"] {
            let rows = cut.tensor(name).narrow(0, 0, vocab);
            cut.tensors.insert(name.into(), rows);
        }
        let cut = decoder(&cut, "llm.", "llm_config");
        for (policy, model) in [
            (Box::new(AlwaysSmall) as Box<dyn Policy>, &pair.small as &dyn Model),
            (Box::new(AlwaysLarge), &cut),
        ] {
            let name = policy.name();
            let found: Vec<Vec<u32>> =
                pair.run(policy, pair.requests(), 3).iter().map(|events| tokens(events)).collect();
            assert_eq!(found, by_itself(model), "{name}");
        }
    }
}

#[test]
fn a_ragged_batch_equals_single_sequences_when_sampling() {
    for pair in pairs() {
        let requests = || -> Vec<Request> {
            let sampled = |(i, mut r): (usize, Request)| {
                r.small = SmallSampling { temperature: 0.8, top_k: 0, top_p: 0.9 };
                r.large.temperature = 0.9;
                r.large.seed = 70 + i as u64;
                r.seed = 40 + i as u64;
                r
            };
            pair.requests().into_iter().enumerate().map(sampled).collect()
        };
        let single = pair.run(Box::new(Random::new(0.3, 5).unwrap()), requests(), 1);
        for batch in [2, 3] {
            let ragged = pair.run(Box::new(Random::new(0.3, 5).unwrap()), requests(), batch);
            for (a, b) in single.iter().zip(&ragged) {
                let key = |e: &TokenEvent| (e.token, e.source, e.finish);
                assert_eq!(a.iter().map(key).collect::<Vec<_>>(), b.iter().map(key).collect::<Vec<_>>());
            }
        }
    }
}

/// Fails now and then.
struct Shaky<'m> {
    inner: LocalLarge<'m>,
    calls: usize,
}

impl r2r::decode::LargeModel for Shaky<'_> {
    fn vocab(&self) -> usize {
        self.inner.vocab()
    }
    fn context(&self) -> usize {
        self.inner.context()
    }
    fn open(
        &mut self,
        sequence: Sequence,
        max_tokens: usize,
        sampling: &nics_core::sampling::Sampling,
        vocab: usize,
    ) -> r2r::Result<()> {
        self.inner.open(sequence, max_tokens, sampling, vocab)
    }
    fn ask(&mut self, requests: &[r2r::decode::LargeRequest]) -> r2r::Result<()> {
        self.calls += 1;
        if self.calls.is_multiple_of(3) {
            return Err(r2r::Error::Input("gone for a moment".into()));
        }
        self.inner.ask(requests)
    }
    fn answers(&mut self, wait: std::time::Duration) -> r2r::Result<Vec<r2r::decode::Answer>> {
        self.calls += 1;
        if self.calls.is_multiple_of(4) {
            return Err(r2r::Error::Input("gone for a moment".into()));
        }
        self.inner.answers(wait)
    }
    fn close(&mut self, sequence: Sequence) {
        self.inner.close(sequence);
    }
}

#[test]
fn a_step_that_failed_is_made_again() {
    for pair in pairs() {
        // Sampling, and a policy with a memory: neither may notice.
        let policy = || Box::new(Random::new(0.6, 3).unwrap());
        let requests = || {
            pair.requests().into_iter().map(|mut r| {
                r.small.temperature = 0.8;
                r.large.temperature = 0.8;
                r
            })
        };
        let expected = pair.run(policy(), requests().collect(), 3);
        let large = Shaky { inner: LocalLarge::new(&pair.large), calls: 0 };
        let mut decoder = Decoder::new(&pair.small, Box::new(large), policy());
        for request in requests() {
            decoder.add(request).unwrap();
        }
        let (mut found, mut failed): (Vec<Vec<u32>>, usize) = (vec![Vec::new(); expected.len()], 0);
        while decoder.running() > 0 {
            match decoder.step() {
                Ok(events) => events.iter().for_each(|e| found[e.sequence.0 as usize].push(e.token)),
                Err(_) => failed += 1,
            }
        }
        assert!(failed > 3);
        assert_eq!(found, expected.iter().map(|e| tokens(e)).collect::<Vec<_>>());
    }
}

#[test]
fn senseless_requests_are_refused_by_name() {
    for pair in pairs() {
        let large = Box::new(LocalLarge::new(&pair.large));
        let mut decoder = Decoder::new(&pair.small, large, Box::new(AlwaysSmall));
        let refused = |decoder: &mut Decoder, request: Request| decoder.add(request).unwrap_err().to_string();
        assert!(refused(&mut decoder, Request::greedy(vec![], 4, &[])).contains("empty"));
        let outside = pair.small.dims().vocab as u32;
        assert!(refused(&mut decoder, Request::greedy(vec![outside], 4, &[])).contains(&outside.to_string()));
        assert!(refused(&mut decoder, Request::greedy(vec![1], 0, &[])).contains("max_new_tokens"));
        let long = vec![1; pair.small.dims().context];
        assert!(refused(&mut decoder, Request::greedy(long, 1, &[])).contains("context"));
        let mut hot = Request::greedy(vec![1], 1, &[]);
        hot.small.temperature = -1.0;
        assert!(refused(&mut decoder, hot).contains("temperature"));
        assert_eq!(decoder.running(), 0);
        let sequence = decoder.add(Request::greedy(vec![1], 5, &[])).unwrap();
        decoder.step().unwrap();
        assert_eq!(decoder.usage(sequence).unwrap().tokens(), 1);
        decoder.cancel(sequence);
        assert!(decoder.usage(sequence).is_none() && decoder.step().unwrap().is_empty());
    }
}
