//! The seams on the tiny checkpoints of `datasets/golden`: hooks that shorten, projections that record, caches that are
//! cut back and copied, gradients through no cache, and refusals of what does not fit.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nics_core::cache::{DenseCache, NoCache};
use nics_core::checkpoint::{Checkpoint, TensorPath};
use nics_core::generate::{Finish, Generator, Prompt, Request, collect};
use nics_core::golden::difference;
use nics_core::models::{self, Batch, Decoder, Input, Model};
use nics_core::nn::Linear;
use nics_core::plugin::Plugins;
use nics_core::sampling::Sampling;
use nics_core::seam::{
    KvCache, LayerHook, Mask, Plugin, Point, Projection, Ragged, Reduced, Rows, SeqId, Site,
};
use nics_core::train::masked_cross_entropy;
use nics_core::{Error, Result};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

fn load(name: &str) -> Decoder {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(name);
    models::load(&Checkpoint::open_dir(&dir).unwrap(), Device::Cpu, Kind::Float).unwrap()
}

fn ids(n: usize, seed: i64) -> Tensor {
    Tensor::from_slice(&(0..n as i64).map(|i| (i * 37 + seed * 11 + 5) % 199).collect::<Vec<_>>())
}

fn words(n: usize, seed: i64) -> Vec<u32> {
    Vec::<i64>::try_from(ids(n, seed)).unwrap().into_iter().map(|i| i as u32).collect()
}

fn call(model: &Decoder, cache: &mut dyn KvCache, seq: SeqId, start: usize, ids: &Tensor) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let rows = Ragged::contiguous(&[(seq, start, ids.numel())]);
    model.forward(&Batch::new(rows, Input::Ids(ids)), cache, None).unwrap().hidden
}

fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64) {
    let (_, relative) = difference(found, expected).unwrap();
    assert!(relative <= tolerance, "off by {relative:e}");
}

/// Drops every other row, but never the last, at one point of the first call.
struct Thin {
    at: Point,
    done: bool,
}

impl LayerHook for Thin {
    fn at(&mut self, p: Point, rows: &Rows, _scores: Option<&[Tensor]>) -> Result<Option<Reduced>> {
        if p != self.at || self.done {
            return Ok(None);
        }
        self.done = true;
        let mut picked = Vec::new();
        let mut kept = Vec::new();
        for (_, from, positions) in rows.ragged.iter() {
            let n = positions.len();
            let own: Vec<usize> = (0..n).filter(|i| i % 2 == 0 || i + 1 == n).collect();
            picked.extend(own.iter().map(|i| (from + i) as i64));
            kept.push(own);
        }
        Ok(Some(Reduced { x: rows.x.index_select(0, &Tensor::from_slice(&picked)), kept }))
    }
}

#[test]
fn a_hook_shortens_from_its_layer_on() {
    let model = load("qwen2");
    let layers = model.dims().layers;
    let mut cache = DenseCache::new();
    let seq = cache.open(64).unwrap();
    let mut hook = Thin { at: Point::AfterAttention(0), done: false };
    let input = ids(9, 0);
    let batch = Batch::new(Ragged::contiguous(&[(seq, 0, 9)]), Input::Ids(&input));
    let _no_grad = tch::no_grad_guard();
    let out = model.forward(&batch, &mut cache, Some(&mut hook)).unwrap();
    assert_eq!(out.rows.positions(), [0, 2, 4, 6, 8]);
    assert_eq!(out.hidden.size()[0], 5);
    assert_eq!(cache.kept(seq, 0), 9, "the layer of the hook had attended before");
    for layer in 1..layers {
        assert_eq!(cache.kept(seq, layer), 5);
    }
    // The next token goes on at position 9 in every layer.
    let next = call(&model, &mut cache, seq, 9, &ids(1, 3));
    assert!(next.isfinite().all().int64_value(&[]) == 1);
    assert_eq!((cache.kept(seq, 0), cache.kept(seq, 1)), (10, 6));
    // Cut back by position: layers of different lengths lose what lies at 5 and after.
    cache.truncate(seq, 5).unwrap();
    assert_eq!((cache.kept(seq, 0), cache.kept(seq, 1)), (5, 3));
}

#[test]
fn a_hook_at_the_embeddings_is_a_shorter_prompt_with_gaps() {
    let model = load("llama");
    let input = ids(7, 1);
    let mut hook = Thin { at: Point::Embeddings, done: false };
    let batch = Batch::new(Ragged::contiguous(&[(SeqId(0), 0, 7)]), Input::Ids(&input));
    let _no_grad = tch::no_grad_guard();
    let hooked = model.forward(&batch, &mut NoCache::new(), Some(&mut hook)).unwrap();
    let kept = Tensor::from_slice(&[0i64, 2, 4, 6]);
    let picked = input.index_select(0, &kept);
    let rows = Ragged::new(vec![(SeqId(0), vec![0, 2, 4, 6])]);
    let plain = model.forward(&Batch::new(rows, Input::Ids(&picked)), &mut NoCache::new(), None).unwrap();
    assert_close(&hooked.hidden, &plain.hidden, 1e-6);
}

#[test]
fn generation_goes_through_a_hook() {
    let model = load("qwen3");
    let mut cache = DenseCache::new();
    let mut hook = Thin { at: Point::AfterAttention(1), done: false };
    let mut generator = Generator::new(&model, &mut cache).with_hook(&mut hook);
    let replies = collect(&mut generator, [Request::greedy(words(12, 2), 8, &[])], 1).unwrap();
    assert_eq!(replies[0].len(), 8);
}

type Reduction = fn(&Rows) -> Reduced;

struct Bad(Reduction);

impl LayerHook for Bad {
    fn at(&mut self, _p: Point, rows: &Rows, _scores: Option<&[Tensor]>) -> Result<Option<Reduced>> {
        Ok(Some((self.0)(rows)))
    }
}

#[test]
fn reductions_that_do_not_add_up_are_refused() {
    let model = load("llama");
    let input = ids(4, 0);
    let cases: [(Reduction, &str); 5] = [
        (|r| Reduced { x: r.x.shallow_clone(), kept: vec![] }, "names 0 sequences of 1"),
        (|r| Reduced { x: r.x.shallow_clone(), kept: vec![vec![0, 1, 2, 4]] }, "out of order or range"),
        (|r| Reduced { x: r.x.shallow_clone(), kept: vec![vec![1, 0, 2, 3]] }, "out of order or range"),
        (|r| Reduced { x: r.x.narrow(0, 0, 2), kept: vec![vec![0, 1, 2]] }, "for 3 kept rows"),
        (|r| Reduced { x: r.x.narrow(0, 0, 0), kept: vec![vec![]] }, "keeps no row"),
    ];
    for (bad, expected) in cases {
        let batch = Batch::new(Ragged::contiguous(&[(SeqId(0), 0, 4)]), Input::Ids(&input));
        let error = model.forward(&batch, &mut NoCache::new(), Some(&mut Bad(bad))).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// Asks for scores and keeps them.
#[derive(Default)]
struct Watch(Vec<Vec<Tensor>>);

impl LayerHook for Watch {
    fn wants_scores(&self, _layer: usize) -> Option<usize> {
        Some(3)
    }

    fn at(&mut self, _p: Point, _rows: &Rows, scores: Option<&[Tensor]>) -> Result<Option<Reduced>> {
        self.0.extend(scores.map(|s| s.iter().map(Tensor::shallow_clone).collect()));
        Ok(None)
    }
}

#[test]
fn scores_are_probabilities_over_what_a_row_may_see() {
    let model = load("qwen2-window");
    let _no_grad = tch::no_grad_guard();
    let input = Tensor::cat(&[ids(20, 0), ids(2, 1)], 0);
    let rows = || Ragged::contiguous(&[(SeqId(0), 0, 20), (SeqId(1), 0, 2)]);
    let mut uncached = Watch::default();
    model.forward(&Batch::new(rows(), Input::Ids(&input)), &mut NoCache::new(), Some(&mut uncached)).unwrap();
    let mut cached = Watch::default();
    let mut cache = DenseCache::new();
    for _ in 0..2 {
        cache.open(32).unwrap();
    }
    model.forward(&Batch::new(rows(), Input::Ids(&input)), &mut cache, Some(&mut cached)).unwrap();
    assert_eq!(uncached.0.len(), model.dims().layers);
    for (layer, (a, b)) in uncached.0.iter().zip(&cached.0).enumerate() {
        let (heads, window) = (model.dims().heads, model.layers[layer].window);
        assert_eq!(a[0].size(), [heads, 3, 20]);
        assert_eq!(a[1].size(), [heads, 2, 2]);
        for (a, b) in a.iter().zip(b) {
            assert_close(a, b, 1e-6);
            let sums = a.sum_dim_intlist(-1i64, false, Kind::Float);
            assert_close(&sums, &Tensor::ones_like(&sums), 1e-5);
        }
        // The last row sees as many keys as its window holds, or all.
        let seen = a[0].get(0).get(2).gt(0.0).sum(Kind::Int64).int64_value(&[]);
        assert_eq!(seen as usize, window.unwrap_or(20).min(20), "layer {layer}");
    }
    assert!(
        model.layers.iter().any(|l| l.window.is_some()) && model.layers.iter().any(|l| l.window.is_none())
    );
}

/// Records what goes through a projection.
struct Recorder {
    inner: Box<dyn Projection>,
    seen: Arc<Mutex<Vec<i64>>>,
}

impl Projection for Recorder {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.seen.lock().unwrap().push(x.size()[0]);
        self.inner.forward(x)
    }

    fn dense(&self) -> Result<Tensor> {
        self.inner.dense()
    }

    fn parameters(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        self.inner.parameters()
    }
}

#[test]
fn projections_are_replaced_by_path() {
    let mut model = load("qwen2");
    let input = ids(5, 0);
    let before = call(&model, &mut NoCache::new(), SeqId(0), 0, &input);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut paths = Vec::new();
    model
        .visit_projections(&mut |path, projection| {
            paths.push(path.to_owned());
            let inner = std::mem::replace(
                projection,
                Box::new(Linear::new(Tensor::zeros([1, 1], (Kind::Float, Device::Cpu)), None)),
            );
            *projection = Box::new(Recorder { inner, seen: seen.clone() });
            Ok(())
        })
        .unwrap();
    assert_eq!(paths.len(), 7 * model.dims().layers + 1);
    assert!(paths.contains(&"model.layers.1.self_attn.k_proj".to_owned()));
    let after = call(&model, &mut NoCache::new(), SeqId(0), 0, &input);
    assert_close(&after, &before, 0.0);
    assert_eq!(*seen.lock().unwrap(), vec![5; 7 * model.dims().layers]);
    // Parameters are visited through the replacement under the checkpoint's own keys.
    let mut keys = Vec::new();
    model
        .visit_parameters(&mut |key, _| {
            keys.push(key.to_owned());
            Ok(())
        })
        .unwrap();
    assert!(keys.contains(&"model.layers.0.self_attn.q_proj.bias".to_owned()));
    assert!(!keys.iter().any(|k| k.starts_with("lm_head")), "a tied head is not visited");
}

#[test]
fn gradients_reach_every_parameter() {
    for name in ["llama", "qwen2", "qwen3"] {
        let mut model = load(name);
        let mut parameters = Vec::new();
        model
            .visit_parameters(&mut |key, tensor| {
                *tensor = tensor.f_detach()?.f_set_requires_grad(true)?;
                parameters.push((key.to_owned(), tensor.shallow_clone()));
                Ok(())
            })
            .unwrap();
        // A tied head still holds the tensor from before; build it anew over the trained table.
        if model.config().tied {
            model.lm_head = Box::new(Linear::new(model.embed_tokens.shallow_clone(), None));
        }
        let input = Tensor::cat(&[ids(6, 0), ids(6, 1)], 0);
        let rows = Ragged::contiguous(&[(SeqId(0), 0, 6), (SeqId(1), 0, 6)]);
        let out = model.forward(&Batch::new(rows, Input::Ids(&input)), &mut NoCache::new(), None).unwrap();
        let labels = input.roll(-1, 0);
        let loss = masked_cross_entropy(&model.logits(&out.hidden).unwrap(), &labels).unwrap();
        loss.sum.backward();
        for (key, parameter) in parameters {
            let grad = parameter.grad();
            assert!(grad.defined(), "{name}: {key} has no gradient");
            assert_eq!(grad.isfinite().all().int64_value(&[]), 1, "{name}: {key}");
            // A bias on keys shifts all scores of a row alike: its gradient is zero but for rounding.
            if !key.ends_with("k_proj.bias") {
                assert!(grad.abs().max().double_value(&[]) > 0.0, "{name}: {key} has a zero gradient");
            }
        }
    }
}

#[test]
fn a_snapshot_goes_on_where_it_was_taken() {
    let model = load("qwen3");
    let mut cache = DenseCache::new();
    let seq = cache.open(40).unwrap();
    let _ = call(&model, &mut cache, seq, 0, &ids(10, 0));
    let snapshot = cache.snapshot(seq).unwrap();
    let expected = call(&model, &mut cache, seq, 10, &ids(3, 4));
    let mut other = DenseCache::new();
    let restored = other.restore(&snapshot).unwrap();
    assert_close(&call(&model, &mut other, restored, 10, &ids(3, 4)), &expected, 1e-6);
    assert!(other.bytes().payload > 0);
    other.close(restored);
    assert_eq!(other.bytes().allocated, 0);

    let mut foreign = cache.snapshot(seq).unwrap();
    foreign.cache = "packed".into();
    assert!(other.restore(&foreign).unwrap_err().to_string().contains("packed"));
    let mut damaged = cache.snapshot(seq).unwrap();
    damaged.tensors.retain(|(name, _)| name != "1.v");
    assert!(other.restore(&damaged).unwrap_err().to_string().contains("layer 1"));
}

#[test]
fn memory_is_counted_and_grows_in_steps() {
    let model = load("llama");
    let dims = model.dims().clone();
    let row = 2 * dims.layers * (dims.kv_heads * dims.head_dim) as usize * 4;
    let mut cache = DenseCache::new();
    let seq = cache.open(100).unwrap();
    let _ = call(&model, &mut cache, seq, 0, &ids(3, 0));
    assert_eq!(cache.bytes().payload, 3 * row);
    assert_eq!(cache.bytes().allocated, 64 * row);
    let _ = call(&model, &mut cache, seq, 3, &ids(90, 0));
    assert_eq!(cache.bytes().payload, 93 * row);
    assert_eq!(cache.bytes().allocated, 100 * row, "never more than the sequence may hold");
    let rows = Ragged::contiguous(&[(seq, 93, 8)]);
    let input = ids(8, 0);
    let error = model.forward(&Batch::new(rows, Input::Ids(&input)), &mut cache, None).unwrap_err();
    assert!(matches!(error, Error::ContextOverflow { need: 101, max: 100, .. }), "{error}");
    assert_eq!(cache.kept(seq, 0), 93, "nothing of the refused call is kept");
}

#[test]
fn sequences_end_for_the_right_reason_and_free_their_cache() {
    let model = load("llama");
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache).with_context(12);
    let reply = collect(&mut generator, [Request::greedy(words(4, 0), 3, &[])], 1).unwrap().remove(0);
    let finish = |generator: &mut Generator, request: Request| {
        let id = generator.add(request).unwrap();
        loop {
            if let Some(token) = generator.step().unwrap().iter().find(|t| t.finish.is_some()) {
                assert_eq!(token.request, id);
                return token.finish.unwrap();
            }
        }
    };
    assert_eq!(finish(&mut generator, Request::greedy(words(4, 0), 3, &[])), Finish::Length);
    assert_eq!(finish(&mut generator, Request::greedy(words(4, 0), 3, &reply[..1])), Finish::Eos);
    assert_eq!(finish(&mut generator, Request::greedy(words(4, 0), 30, &[])), Finish::Context);
    assert!(generator.add(Request::greedy(vec![], 3, &[])).unwrap_err().to_string().contains("empty"));
    assert!(generator.add(Request::greedy(words(4, 0), 0, &[])).is_err());
    assert!(
        generator.add(Request::greedy(vec![1 << 20], 3, &[])).unwrap_err().to_string().contains("1048576")
    );
    assert!(matches!(
        generator.add(Request::greedy(words(12, 0), 3, &[])),
        Err(Error::ContextOverflow { need: 13, max: 12, .. })
    ));
    let id = generator.add(Request::greedy(words(4, 0), 3, &[])).unwrap();
    generator.step().unwrap();
    generator.cancel(id);
    assert_eq!(generator.running(), 0);
    drop(generator);
    assert_eq!(cache.bytes().allocated, 0);
}

#[test]
fn a_sequence_is_the_same_whoever_else_is_written() {
    let model = load("qwen3");
    let request = |n: usize, seed: u64| Request {
        prompt: Prompt::Ids(words(n, seed as i64)),
        sampling: Sampling { temperature: 0.9, top_k: 20, seed, logprobs: Some(2), ..Sampling::default() },
        max_new_tokens: 10,
        eos: vec![],
    };
    let alone: Vec<Vec<u32>> = (0..4)
        .map(|i| {
            let mut cache = DenseCache::new();
            let mut generator = Generator::new(&model, &mut cache);
            collect(&mut generator, [request(3 + 5 * i, i as u64)], 1).unwrap().remove(0)
        })
        .collect();
    // Joining one after another, with prompts read in pieces of two rows.
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache).with_prefill_chunk(2);
    let mut written = vec![Vec::new(); 4];
    let mut names = Vec::new();
    for step in 0.. {
        if step % 3 == 0 && names.len() < 4 {
            let i = names.len();
            names.push(generator.add(request(3 + 5 * i, i as u64)).unwrap());
        }
        for token in generator.step().unwrap() {
            let i = names.iter().position(|n| *n == token.request).unwrap();
            written[i].push(token.token);
            assert_eq!(token.top.len(), 2);
            assert!(token.top[0].1 >= token.top[1].1 && token.logprob.unwrap() <= token.top[0].1 + 1e-6);
        }
        if names.len() == 4 && generator.running() == 0 {
            break;
        }
    }
    assert_eq!(written, alone);
}

#[test]
fn the_shuffle_control_keeps_values_and_loses_what_was_learned() {
    let mut model = load("qwen2");
    let input = ids(6, 0);
    let before = call(&model, &mut NoCache::new(), SeqId(0), 0, &input);
    let sum = model.embed_tokens.abs().sum(Kind::Double).double_value(&[]);
    let plugins = Plugins::default();
    plugins.weights("shuffle", "7", &mut model).unwrap();
    let after = model.embed_tokens.abs().sum(Kind::Double).double_value(&[]);
    assert!((after - sum).abs() < 1e-9 * sum);
    let (_, relative) = difference(&call(&model, &mut NoCache::new(), SeqId(0), 0, &input), &before).unwrap();
    assert!(relative > 0.1);
    assert!(plugins.weights("shuffle", "x", &mut model).unwrap_err().to_string().contains("shuffle:0"));
    assert!(plugins.weights("none", "", &mut model).unwrap_err().to_string().contains("dense, shuffle"));
    assert!(plugins.cache(Some(("dense", "4bit")), model.dims()).is_err());
    assert!(plugins.hook("dense", "", model.dims()).is_err());
}

/// Reads checkpoints of its own, and quantized ones.
struct Own;

impl Plugin for Own {
    fn name(&self) -> &'static str {
        "own"
    }

    fn checkpoint(&self, model: Option<&Checkpoint>, spec: &str) -> Result<Option<Checkpoint>> {
        match (spec, model) {
            ("none", _) => Ok(None),
            ("", Some(model)) => Ok(Some(model.clone())),
            (spec, _) => Ok(Some(Checkpoint::open_dir(&golden(spec))?)),
        }
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(name)
}

#[test]
fn a_method_may_bring_the_checkpoint() {
    let plugins = Plugins::default().with(Own);
    let open = |name: &str| Checkpoint::open_dir(&golden(name)).unwrap();
    let asked = |weights: Option<(&str, &str)>, model: Option<Checkpoint>| {
        plugins.checkpoint(weights, model).map(|(checkpoint, done)| (checkpoint.name().to_owned(), done))
    };
    assert_eq!(asked(Some(("own", "qwen2")), None).unwrap(), ("qwen2".into(), true));
    assert_eq!(asked(Some(("own", "qwen2")), Some(open("llama"))).unwrap(), ("qwen2".into(), true));
    assert_eq!(asked(None, Some(open("llama"))).unwrap(), ("llama".into(), true));
    // What changes a loaded model's weights does so later.
    assert_eq!(asked(Some(("own", "none")), Some(open("llama"))).unwrap(), ("llama".into(), false));
    assert_eq!(asked(Some(("shuffle", "1")), Some(open("llama"))).unwrap(), ("llama".into(), false));
    let refused = asked(Some(("shuffle", "1")), None).unwrap_err().to_string();
    assert!(refused.contains("--weights shuffle") && refused.contains("give --model"), "{refused}");
    assert!(asked(Some(("gone", "")), None).unwrap_err().to_string().contains("knows dense, shuffle, own"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever shapes are handed over: an error or a result, never a panic.
    #[test]
    fn shapes_that_do_not_fit_are_errors(
        rows in 0usize..5, q in prop::collection::vec(0i64..5, 0..4), k in prop::collection::vec(0i64..5, 0..4),
        input in prop::collection::vec(0i64..6, 0..3), mask in 0usize..3, dense in any::<bool>(), id in -3i64..400,
    ) {
        let options = (Kind::Float, Device::Cpu);
        let root = TensorPath::random(0, 0.1, Device::Cpu, Kind::Float);
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 300,
        });
        let model = Decoder::load(models::config(json.as_object().unwrap()).unwrap(), &root).unwrap();
        let mut dense_cache = DenseCache::new();
        let seq = dense_cache.open(8).unwrap();
        let mut none = NoCache::new();
        let cache: &mut dyn KvCache = if dense { &mut dense_cache } else { &mut none };
        let ragged = Ragged::contiguous(&[(seq, 0, rows)]);
        let rope = model.rope(&Ragged::contiguous(&[(seq, 0, rows.max(1))])).unwrap();
        let x = Tensor::zeros(input.as_slice(), options);
        let (q, k) = (Tensor::zeros(q.as_slice(), options), Tensor::zeros(k.as_slice(), options));
        let site = Site {
            layer: 0,
            rows: &ragged,
            rope: &rope,
            input: &x,
            mask: [Mask::Causal, Mask::Full, Mask::Window(2)][mask],
            want_scores: Some(1),
            scale: 1.0,
        };
        let fits = q.size() == [rows as i64, 2, 2] && k.size() == q.size();
        let attended = cache.attend(&site, &q, &k, &k);
        prop_assert!(!fits || rows == 0 || attended.is_ok());
        let _ = model.forward(&Batch::new(ragged.clone(), Input::Embeds(&x)), cache, None);
        let ids = Tensor::from_slice(&vec![id; rows]);
        let out = model.forward(&Batch::new(ragged, Input::Ids(&ids)), &mut NoCache::new(), None);
        prop_assert_eq!(out.is_ok(), rows > 0 && (0..300).contains(&id));
    }
}
