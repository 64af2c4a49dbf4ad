//! What the seams promise, held against a second way of computing it: hooked generation against one uncached call, scores
//! against a softmax by hand, recorders against the layers' own inputs; and what was refused leaves no trace.

mod seam_models;

use std::sync::{Arc, Mutex};

use nics_core::cache::{DenseCache, NoCache};
use nics_core::generate::{Generator, Request, collect};
use nics_core::models::{Batch, Decoder, Input, Model};
use nics_core::nn::Linear;
use nics_core::seam::{KvCache, LayerHook, Point, Projection, Ragged, Reduced, Rows, SeqId, Snapshot};
use nics_core::{Error, Result};
use seam_models::*;
use tch::{Device, Kind, Tensor};

/// Drops, behind layer `layer`, the prompt's rows whose position leaves a remainder of 1 by 3. What is written later
/// stays.
struct Thin {
    layer: usize,
    prompt: i64,
}

impl Thin {
    fn keeps(&self, position: i64) -> bool {
        position >= self.prompt - 1 || position % 3 != 1
    }
}

impl LayerHook for Thin {
    fn at(&mut self, p: Point, rows: &Rows, scores: Option<&[Tensor]>) -> Result<Option<Reduced>> {
        assert!(scores.is_none(), "nobody asked");
        if p != Point::AfterAttention(self.layer) {
            return Ok(None);
        }
        let (mut kept, mut index) = (Vec::new(), Vec::new());
        for (_, from, positions) in rows.ragged.iter() {
            let own: Vec<usize> = (0..positions.len()).filter(|&i| self.keeps(positions[i])).collect();
            index.extend(own.iter().map(|&i| (from + i) as i64));
            kept.push(own);
        }
        Ok(Some(Reduced { x: rows.x.index_select(0, &Tensor::from_slice(&index)), kept }))
    }
}

#[test]
fn a_shortened_prompt_continues_as_one_uncached_call_would() {
    let model = decoder("llama");
    let (prompt, new) = (ids(20, 1), 10);
    let mut hook = Thin { layer: 1, prompt: prompt.len() as i64 };
    let dropped = (0..prompt.len() as i64).filter(|&p| !hook.keeps(p)).count();
    assert_eq!(dropped, 6);

    // Cached, with single rows behind the prompt.
    let mut cache = DenseCache::new();
    let seq = cache.open(prompt.len() + new).unwrap();
    let mut all = prompt.clone();
    let mut hidden = Vec::new();
    for step in 0..new {
        let start = if step == 0 { 0 } else { all.len() - 1 };
        let out = forward(&model, &mut cache, seq, start, &all[start..], Some(&mut hook)).unwrap();
        let last = out.hidden.get(-1);
        all.push(model.logits(&last).unwrap().argmax(-1, false).int64_value(&[]) as u32);
        hidden.push(last);
        // Each layer has a length of its own: layers 0 and 1 attend before the hook acts.
        let kept: Vec<usize> = (0..3).map(|l| cache.kept(seq, l)).collect();
        let rows = prompt.len() + step;
        assert_eq!(kept, [rows, rows, rows - dropped]);
    }

    // One uncached call over everything knows the same rows at the same positions.
    let whole = &all[..all.len() - 1];
    let out = forward(&model, &mut NoCache::new(), SeqId(0), 0, whole, Some(&mut hook)).unwrap();
    let first = out.hidden.size()[0] - new as i64;
    assert_close(&Tensor::stack(&hidden, 0), &out.hidden.narrow(0, first, new as i64));
    let expected: Vec<i64> = (0..whole.len() as i64).filter(|&p| hook.keeps(p)).collect();
    assert_eq!(out.rows.positions(), expected);

    // The generator writes the same tokens (a hook sees whole prompts), and others than without the hook.
    let mut cache = DenseCache::new();
    let mut generator = Generator::new(&model, &mut cache).with_hook(&mut hook).with_prefill_chunk(4);
    let written = collect(&mut generator, [Request::greedy(prompt.clone(), new, &[])], 1).unwrap();
    assert_eq!(written[0], all[prompt.len()..]);
    drop(generator);
    let plain = collect(&mut Generator::new(&model, &mut cache), [Request::greedy(prompt, new, &[])], 1);
    assert_ne!(plain.unwrap()[0], written[0]);
}

#[test]
fn truncation_counts_positions_not_rows() {
    let model = decoder("llama");
    let all = ids(30, 2);
    let mut hook = Thin { layer: 0, prompt: 24 };
    let mut cache = DenseCache::new();
    let seq = cache.open(40).unwrap();
    let _ = forward(&model, &mut cache, seq, 0, &all[..24], Some(&mut hook)).unwrap();
    let rest = forward(&model, &mut cache, seq, 24, &all[24..], Some(&mut hook)).unwrap().hidden;
    let payload = cache.bytes().payload;
    cache.truncate(seq, 26).unwrap();
    assert!(cache.bytes().payload < payload);
    let dropped = (0..24).filter(|&p| !hook.keeps(p)).count();
    assert_eq!((cache.kept(seq, 0), cache.kept(seq, 1)), (26, 26 - dropped));
    let again = forward(&model, &mut cache, seq, 26, &all[26..], Some(&mut hook)).unwrap().hidden;
    assert_close(&again, &rest.narrow(0, 2, 4));
    // Into the prompt: positions 1, 4 and 7 are not there behind layer 0.
    cache.truncate(seq, 8).unwrap();
    assert_eq!((cache.kept(seq, 0), cache.kept(seq, 1), cache.kept(seq, 2)), (8, 5, 5));
}

/// Gives back what a test says, once.
struct Says(Option<Reduced>);

impl LayerHook for Says {
    fn at(&mut self, p: Point, _rows: &Rows, _scores: Option<&[Tensor]>) -> Result<Option<Reduced>> {
        Ok(if p == Point::AfterAttention(1) { self.0.take() } else { None })
    }
}

#[test]
fn reductions_of_several_sequences_are_checked_one_by_one() {
    let model = decoder("llama");
    let hidden = model.dims().hidden;
    let x = |rows: i64, width: i64| Tensor::zeros([rows, width], (Kind::Float, Device::Cpu));
    let input = tensor(&ids(9, 3));
    let rows = [(SeqId(0), 0, 4), (SeqId(1), 0, 5)];
    for (x, kept, word) in [
        (x(4, hidden), vec![vec![0, 1, 2, 3]], "names 1 sequences of 2"),
        (x(9, hidden), vec![vec![0, 1, 2, 3], vec![0, 1, 2, 3, 4], vec![]], "names 3 sequences of 2"),
        (x(3, hidden), vec![vec![1, 1], vec![4]], "rows of sequence 0 out of order or range"),
        (x(2, hidden), vec![vec![0], vec![5]], "rows of sequence 1 out of order or range"),
        (x(3, hidden), vec![vec![0], vec![4]], "gives back [3, 48] for 2 kept rows"),
        (x(2, hidden + 1), vec![vec![0], vec![4]], "gives back [2, 49] for 2 kept rows"),
        (x(2, hidden).reshape([2, 1, -1]), vec![vec![0], vec![4]], "for 2 kept rows"),
        (x(0, hidden), vec![vec![], vec![]], "keeps no row at all"),
    ] {
        let mut hook = Says(Some(Reduced { x, kept }));
        let batch = Batch::new(Ragged::contiguous(&rows), Input::Ids(&input));
        let e = model.forward(&batch, &mut NoCache::new(), Some(&mut hook)).unwrap_err().to_string();
        assert!(e.starts_with("the layer hook at AfterAttention(1)") && e.contains(word), "{e}");
    }
    // A sequence may lose all its rows while another keeps some: a model can, a generator cannot.
    let lost = || Says(Some(Reduced { x: x(1, hidden), kept: vec![vec![], vec![3]] }));
    let batch = Batch::new(Ragged::contiguous(&rows), Input::Ids(&input));
    let out = model.forward(&batch, &mut NoCache::new(), Some(&mut lost())).unwrap();
    assert_eq!((out.rows.lens(), out.rows.positions()), (&[0, 1][..], &[3][..]));
    let (mut cache, mut hook) = (DenseCache::new(), lost());
    let mut generator = Generator::new(&model, &mut cache).with_hook(&mut hook);
    for salt in [3, 4] {
        generator.add(Request::greedy(ids(4, salt), 4, &[])).unwrap();
    }
    let e = generator.step().unwrap_err().to_string();
    assert!(e.contains("removed the last row"), "{e}");
}

#[test]
fn a_call_that_failed_leaves_the_sequence_where_it_was() {
    let model = decoder("llama");
    let request = || Request::greedy(ids(12, 4), 8, &[]);
    let mut cache = DenseCache::new();
    let expected = collect(&mut Generator::new(&model, &mut cache), [request()], 1).unwrap().remove(0);
    let mut hook = Says(Some(Reduced { x: Tensor::from_slice(&[0f32]), kept: Vec::new() }));
    let mut generator = Generator::new(&model, &mut cache).with_hook(&mut hook);
    generator.add(request()).unwrap();
    assert!(generator.step().is_err(), "layers 0 and 1 have kept the prompt by now");
    let mut written = Vec::new();
    while generator.running() > 0 {
        written.extend(generator.step().unwrap().iter().map(|t| t.token));
    }
    assert_eq!(written, expected);
}

/// Wraps a projection and keeps what goes in.
struct Recorder {
    name: String,
    inner: Box<dyn Projection>,
    seen: Arc<Mutex<Vec<(String, Tensor)>>>,
}

impl Projection for Recorder {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.seen.lock().unwrap().push((self.name.clone(), x.shallow_clone()));
        self.inner.forward(x)
    }

    fn dense(&self) -> Result<Tensor> {
        self.inner.dense()
    }

    fn bias(&self) -> Option<Tensor> {
        self.inner.bias()
    }

    fn parameters(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        self.inner.parameters()
    }
}

#[test]
fn recorders_change_nothing_and_see_what_each_layer_sees() {
    let _no_grad = tch::no_grad_guard();
    for name in ["llama-bias", "qwen2", "qwen3", "megrez"] {
        let mut model = decoder(name);
        let prompt = ids(11, 5);
        let plain = forward(&model, &mut NoCache::new(), SeqId(0), 0, &prompt, None).unwrap().hidden;
        let plain = model.logits(&plain).unwrap();
        let keys = |model: &mut Decoder| {
            let mut keys = Vec::new();
            model
                .visit_parameters(&mut |name, _| {
                    keys.push(name.to_owned());
                    Ok(())
                })
                .unwrap();
            keys
        };
        let before = keys(&mut model);

        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut paths = Vec::new();
        model
            .visit_projections(&mut |path, projection| {
                let inner = std::mem::replace(projection, Box::new(Linear::new(Tensor::new(), None)));
                *projection = Box::new(Recorder { name: path.to_owned(), inner, seen: Arc::clone(&seen) });
                paths.push(path.to_owned());
                Ok(())
            })
            .unwrap();
        assert_eq!(keys(&mut model), before, "keys of the checkpoint, whatever is in the place of a layer");

        let input = tensor(&prompt);
        let rows = Ragged::contiguous(&[(SeqId(0), 0, prompt.len())]);
        let batch = Batch { layer_inputs: true, ..Batch::new(rows, Input::Ids(&input)) };
        let out = model.forward(&batch, &mut NoCache::new(), None).unwrap();
        assert_same(&model.logits(&out.hidden).unwrap(), &plain);

        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), paths.len(), "each ran once");
        let input = |path: &str| -> &Tensor {
            let found = seen.iter().find(|(name, _)| name == path);
            &found.unwrap_or_else(|| panic!("{path} saw nothing")).1
        };
        for (l, layer) in model.layers.iter().enumerate() {
            let normed = layer.input_layernorm.forward(&out.layer_inputs[l]).unwrap();
            for name in ["q_proj", "k_proj", "v_proj"] {
                assert_same(input(&format!("model.layers.{l}.self_attn.{name}")), &normed);
            }
            let at = |name: &str| input(&format!("model.layers.{l}.mlp.{name}"));
            assert_same(at("gate_proj"), at("up_proj"));
            assert_eq!(at("down_proj").size(), [prompt.len() as i64, model.dims().intermediate]);
        }
        assert_same(input("lm_head"), &out.hidden);
    }
}

/// Keeps the scores of every layer but the second.
struct Watch {
    last: usize,
    seen: Vec<Vec<Tensor>>,
}

impl LayerHook for Watch {
    fn wants_scores(&self, layer: usize) -> Option<usize> {
        (layer != 1).then_some(self.last)
    }

    fn at(&mut self, p: Point, _rows: &Rows, scores: Option<&[Tensor]>) -> Result<Option<Reduced>> {
        match p {
            Point::Embeddings | Point::AfterAttention(1) => assert!(scores.is_none(), "nobody asked"),
            Point::AfterAttention(_) => {
                self.seen.push(scores.expect("asked for").iter().map(Tensor::shallow_clone).collect());
            }
        }
        Ok(None)
    }
}

/// Attention probabilities of one sequence in layer `l`, by hand, `[heads, rows, rows]`.
fn by_hand(model: &Decoder, l: usize, x: &Tensor) -> Tensor {
    let layer = &model.layers[l];
    let (q, k, _) = layer.self_attn.qkv(&layer.input_layernorm.forward(x).unwrap()).unwrap();
    let n = x.size()[0];
    let rope = model.rope(&Ragged::contiguous(&[(SeqId(0), 0, n as usize)])).unwrap();
    let (q, k) = (rope.apply(&q).unwrap(), rope.apply(&k).unwrap());
    let group = q.size()[1] / k.size()[1];
    let k = k.repeat_interleave_self_int(group, 1, None); // [rows, heads, d]
    let scores = q.transpose(0, 1).matmul(&k.permute([1, 2, 0])) * model.scale();
    let position = Tensor::arange(n, (Kind::Int64, Device::Cpu));
    let behind = position.unsqueeze(1) - &position;
    let window = layer.window.map_or(i64::MAX, |w| w as i64);
    let hidden = behind.lt(0).logical_or(&behind.ge(window));
    scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Float)
}

#[test]
fn scores_are_those_of_a_softmax_by_hand() {
    let _no_grad = tch::no_grad_guard();
    for name in ["llama", "qwen3", "qwen2-window"] {
        let model = decoder(name);
        let texts = [ids(26, 6), ids(17, 7)];
        let layers: Vec<usize> = (0..model.dims().layers).filter(|&l| l != 1).collect();
        // `[sequence][layer]`, from each sequence's own call.
        let expected = texts.each_ref().map(|ids| {
            let input = tensor(ids);
            let rows = Ragged::contiguous(&[(SeqId(0), 0, ids.len())]);
            let batch = Batch { layer_inputs: true, ..Batch::new(rows, Input::Ids(&input)) };
            let inputs = model.forward(&batch, &mut NoCache::new(), None).unwrap().layer_inputs;
            layers.iter().map(|&l| by_hand(&model, l, &inputs[l])).collect::<Vec<_>>()
        });
        // The scores of the last of several calls that end at `ends`.
        let check = |cache: &mut dyn KvCache, ends: &[[usize; 2]], last: usize| {
            let seqs = [cache.open(64).unwrap(), cache.open(64).unwrap()];
            let mut from = [0, 0];
            let mut watch = Watch { last, seen: Vec::new() };
            for to in ends {
                watch.seen.clear();
                let input = tensor(&[&texts[0][from[0]..to[0]], &texts[1][from[1]..to[1]]].concat());
                let rows = [0, 1].map(|s| (seqs[s], from[s], to[s] - from[s]));
                let batch = Batch::new(Ragged::contiguous(&rows), Input::Ids(&input));
                model.forward(&batch, cache, Some(&mut watch)).unwrap();
                from = *to;
            }
            assert_eq!(watch.seen.len(), layers.len());
            for (l, scores) in watch.seen.iter().enumerate() {
                assert_eq!(scores.len(), 2);
                for (s, found) in scores.iter().enumerate() {
                    let all = &expected[s][l];
                    let rows = all.size()[1];
                    let last = (last as i64).min(rows);
                    assert_close(found, &all.narrow(1, rows - last, last));
                    let sums = found.sum_dim_intlist(-1i64, false, Kind::Float);
                    assert_close(&sums, &Tensor::ones_like(&sums));
                }
            }
        };
        let whole = [26, 17];
        check(&mut NoCache::new(), &[whole], 4);
        check(&mut NoCache::new(), &[whole], 1000);
        check(&mut DenseCache::new(), &[whole], 1000);
        check(&mut DenseCache::new(), &[[5, 9], whole], 4);
        check(&mut DenseCache::new(), &[[25, 16], whole], 1);
    }
}

#[test]
fn a_snapshot_is_independent_and_a_damaged_one_is_refused() {
    let model = decoder("qwen3");
    let all = ids(40, 8);
    let mut cache = DenseCache::new();
    let seq = cache.open(40).unwrap();
    let _ = forward(&model, &mut cache, seq, 0, &all[..25], None).unwrap();
    let snapshot = cache.snapshot(seq).unwrap();
    let expected = forward(&model, &mut cache, seq, 25, &all[25..], None).unwrap().hidden;
    cache.close(seq);
    assert_eq!(cache.bytes().allocated, 0);

    // Neither the original's later rows, nor its end, nor another copy's rows reach it.
    let mut other = DenseCache::new();
    for _ in 0..2 {
        let copy = other.restore(&snapshot).unwrap();
        assert_eq!((other.kept(copy, 0), other.kept(copy, 2)), (25, 25));
        assert_same(&forward(&model, &mut other, copy, 25, &all[25..], None).unwrap().hidden, &expected);
        // The limit travels with it.
        let e = forward(&model, &mut other, copy, 40, &all[..1], None).unwrap_err();
        assert!(matches!(e, Error::ContextOverflow { need: 41, max: 40, .. }), "{e}");
    }

    let refused = |snapshot: &Snapshot| DenseCache::new().restore(snapshot).unwrap_err().to_string();
    let own = |tensors: Vec<(String, Tensor)>| Snapshot { cache: "dense".into(), max_tokens: 40, tensors };
    let copied = || snapshot.tensors.iter().map(|(n, t)| (n.clone(), t.copy())).collect::<Vec<_>>();
    let none = NoCache::new().snapshot(SeqId(0)).unwrap();
    assert_eq!(refused(&none), "a snapshot of a `none` cache cannot go into a dense cache");
    let (int, float) = ((Kind::Int64, Device::Cpu), (Kind::Float, Device::Cpu));
    for (name, by) in [
        ("1.positions", Tensor::arange(24, int)),
        ("1.positions", Tensor::arange(25, float)),
        ("1.positions", Tensor::zeros([25], int)),
        ("1.positions", Tensor::zeros([25, 1], int)),
        ("1.k", Tensor::zeros([2, 24, 20], float)),
        ("1.v", Tensor::zeros([2, 25], float)),
    ] {
        let mut tensors = copied();
        tensors.iter_mut().find(|(n, _)| n == name).unwrap().1 = by;
        assert_eq!(refused(&own(tensors)), "the snapshot of layer 1 is incomplete or damaged", "{name}");
    }
    let small = Snapshot { max_tokens: 24, ..own(copied()) };
    assert!(refused(&small).contains("damaged"));
    // A layer number that nobody has room for.
    for layer in ["-1", "18446744073709551615", "4000000000000"] {
        let mut tensors = copied();
        for (name, _) in &mut tensors {
            *name = name.replace("2.", &format!("{layer}."));
        }
        assert!(refused(&own(tensors)).contains(&format!("layer {layer} is incomplete or damaged")));
    }
    let e = DenseCache::new().snapshot(SeqId(3)).unwrap_err().to_string();
    assert!(e.contains("sequence 3 is not open"), "{e}");
}
