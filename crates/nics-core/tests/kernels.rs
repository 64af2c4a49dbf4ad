//! A few rows on the CPU go through our own kernels: they equal libtorch's way, a row is the same in every batch, and
//! whoever needs gradients still gets them.

use nics_core::cache::{DenseCache, attend_one};
use nics_core::checkpoint::TensorPath;
use nics_core::golden::difference;
use nics_core::models::{self, Batch, Decoder, Input, Model};
use nics_core::nn::{Linear, RopeConfig, Rotary};
use nics_core::seam::{KvCache, Mask, Projection, Ragged, Site};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

fn random(shape: &[i64], kind: Kind, seed: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// What rounding to a format may make of a value near 1.
fn epsilon(kind: Kind) -> f64 {
    match kind {
        Kind::Float => 1e-5,
        Kind::BFloat16 => 1.2e-2,
        _ => 1.5e-3,
    }
}

#[track_caller]
fn close(found: &Tensor, expected: &Tensor, kind: Kind) {
    let (_, relative) = difference(&found.to_kind(Kind::Float), &expected.to_kind(Kind::Float)).unwrap();
    assert!(relative <= epsilon(kind), "{kind:?}: off by {relative:e}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn linear_layers_equal_the_product_in_double_precision(
        rows in 1i64..20, input in 1i64..300, outs in prop::collection::vec(1i64..90, 1..4), kind in 0usize..3,
        bias in any::<bool>(), seed in 0i64..1000,
    ) {
        let kind = KINDS[kind];
        let layers: Vec<Linear> = outs.iter().enumerate().map(|(i, &out)| {
            let salt = seed * 10 + i as i64;
            let bias = bias.then(|| random(&[out], kind, salt + 5));
            Linear::new(random(&[out, input], kind, salt), bias)
        }).collect();
        let x = random(&[rows, input], kind, seed + 7);
        let others: Vec<&dyn Projection> = layers[1..].iter().map(|l| l as &dyn Projection).collect();
        let ys = layers[0].forward_many(&others, &x).unwrap();
        prop_assert_eq!(ys.len(), layers.len());
        for (layer, y) in layers.iter().zip(&ys) {
            let weight = layer.dense().unwrap().to_kind(Kind::Double);
            let expected = x.to_kind(Kind::Double).linear(&weight, layer.bias().map(|b| b.to_kind(Kind::Double)).as_ref());
            prop_assert_eq!(y.kind(), kind);
            close(y, &expected, kind);
            close(&layer.forward(&x).unwrap(), &expected, kind);
        }
    }

    #[test]
    fn a_few_rows_of_each_sequence_equal_attention_by_libtorch_and_themselves_one_by_one(
        lengths in prop::collection::vec(1usize..30, 1..5), long in any::<bool>(), kv_heads in 1i64..3, group in 1i64..8,
        half in prop::sample::select(vec![3i64, 8, 16, 32, 64]), kind in 0usize..3, mask in 0usize..3, w in 1usize..20,
        new in prop::collection::vec(1usize..=16, 5), seed in 0i64..1000,
    ) {
        let (kind, d, heads) = (KINDS[kind], 2 * half, kv_heads * group);
        let rope = RopeConfig::parse(1e4, d, 4096, None).unwrap();
        let rotary = Rotary::new(rope, Device::Cpu);
        let mask = [Mask::Causal, Mask::Window(w), Mask::Full][mask];
        let mut cache = DenseCache::new();
        let input = Tensor::zeros([1, 1], (kind, Device::Cpu));
        let mut seqs = Vec::new();
        let drawn = |rows: &Ragged, salt: i64| {
            let n = rows.len() as i64;
            (random(&[n, heads, d], kind, salt), random(&[n, kv_heads, d], kind, salt + 1), random(&[n, kv_heads, d], kind, salt + 2))
        };
        let attend = |cache: &mut DenseCache, rows: &Ragged, q: &Tensor, k: &Tensor, v: &Tensor| {
            let rope = rotary.rows(rows).unwrap();
            let site = Site { layer: 0, rows, rope: &rope, input: &input, mask, want_scores: None, scale: 0.3 };
            cache.attend(&site, q, k, v).unwrap().out
        };
        for (i, &n) in lengths.iter().enumerate() {
            let n = if long && i == 0 { n + 1100 } else { n };
            let s = cache.open(n + 16).unwrap();
            let rows = Ragged::contiguous(&[(s, 0, n)]);
            let (q, k, v) = drawn(&rows, seed * 100 + i as i64 * 10);
            let _ = attend(&mut cache, &rows, &q, &k, &v);
            seqs.push((s, n, new[i]));
        }
        let alone: Vec<_> = seqs.iter().map(|&(s, ..)| cache.fork(s).unwrap()).collect();
        let rows = Ragged::contiguous(&seqs);
        let (q, k, v) = drawn(&rows, seed * 100 + 99);
        let out = attend(&mut cache, &rows, &q, &k, &v);
        prop_assert_eq!((out.kind(), out.size()), (kind, vec![rows.len() as i64, heads, d]));
        let rotated = rotary.rows(&rows).unwrap().apply(&q.to_kind(Kind::Double)).unwrap();
        let mut first = 0;
        for (&(s, n, more), &alone) in seqs.iter().zip(&alone) {
            prop_assert_eq!(cache.kept(s, 0), n + more);
            let (keys, values) = cache.rows(s, 0).unwrap();
            let positions: Vec<i64> = (0..(n + more) as i64).collect();
            let part = |t: &Tensor| t.narrow(0, first, more as i64);
            let (keys, values) = (keys.to_kind(Kind::Double), values.to_kind(Kind::Double));
            let expected =
                attend_one(&part(&rotated), &keys, &values, &positions[n..], &positions, mask, 0.3).unwrap();
            close(&part(&out), &expected, kind);
            for j in (0..more).filter(|_| !matches!(mask, Mask::Full)) {
                let one = |t: &Tensor| t.narrow(0, first + j as i64, 1);
                let row = Ragged::contiguous(&[(alone, n + j, 1)]);
                prop_assert_eq!(attend(&mut cache, &row, &one(&q), &one(&k), &one(&v)), one(&out));
            }
            first += more as i64;
        }
    }
}

/// A decoder of one of the sizes that vector code is made for.
fn decoder(kind: Kind) -> Decoder {
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": true
    });
    let config = models::config(config.as_object().unwrap()).unwrap();
    Decoder::load(config, &TensorPath::random(3, 0.05, Device::Cpu, kind)).unwrap()
}

fn ids(n: usize, salt: i64) -> Tensor {
    Tensor::from_slice(&(0..n as i64).map(|i| (i * i * 31 + i * 7 + salt * 53) % 1000).collect::<Vec<_>>())
}

#[test]
fn decoding_equals_the_uncached_model_and_a_row_is_the_same_in_every_batch() {
    nics_core::device::set_threads(Some(2)).unwrap();
    let _no_grad = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::BFloat16] {
        let model = decoder(kind);
        let mut cache = DenseCache::new();
        let seqs: Vec<_> = (0..5).map(|_| cache.open(64).unwrap()).collect();
        let alone: Vec<_> = (0..5).map(|_| cache.open(64).unwrap()).collect();
        for (i, s) in seqs.iter().chain(&alone).enumerate() {
            let rows = Ragged::contiguous(&[(*s, 0, 20 + i % 5)]);
            model
                .forward(&Batch::new(rows, Input::Ids(&ids(20 + i % 5, i as i64 % 5))), &mut cache, None)
                .unwrap();
        }
        for step in 0..4 {
            let rows: Vec<_> = seqs.iter().enumerate().map(|(i, s)| (*s, 20 + i + step, 1)).collect();
            let input = ids(5, step as i64 + 100);
            let batch = Batch::new(Ragged::contiguous(&rows), Input::Ids(&input));
            let together = model.logits(&model.forward(&batch, &mut cache, None).unwrap().hidden).unwrap();
            for (i, s) in alone.iter().enumerate() {
                let input = input.narrow(0, i as i64, 1);
                let batch = Batch::new(Ragged::contiguous(&[(*s, 20 + i + step, 1)]), Input::Ids(&input));
                let one = model.logits(&model.forward(&batch, &mut cache, None).unwrap().hidden).unwrap();
                assert_eq!(one.squeeze_dim(0), together.get(i as i64), "{kind:?}, step {step}, row {i}");
            }
            if step == 3 {
                // The whole text of the first sequence at once, by libtorch.
                let mut all = vec![ids(20, 0)];
                all.extend((0..4).map(|step| ids(5, step + 100).narrow(0, 0, 1)));
                let all = Tensor::cat(&all, 0);
                let s = cache.open(64).unwrap();
                let batch = Batch::new(Ragged::contiguous(&[(s, 0, 24)]), Input::Ids(&all));
                let whole = model.logits(&model.forward(&batch, &mut cache, None).unwrap().hidden).unwrap();
                let (_, relative) =
                    difference(&together.get(0).to_kind(Kind::Float), &whole.get(23).to_kind(Kind::Float))
                        .unwrap();
                assert!(
                    relative < if kind == Kind::Float { 1e-4 } else { 5e-2 },
                    "{kind:?}: off by {relative:e}"
                );
            }
        }
    }
}

#[test]
fn gradients_pass_through_a_few_rows() {
    let mut model = decoder(Kind::Float);
    let mut weights = 0;
    model
        .visit_parameters(&mut |_, t| {
            *t = t.set_requires_grad(true);
            weights += 1;
            Ok(())
        })
        .unwrap();
    let mut cache = nics_core::cache::NoCache::new();
    let rows = Ragged::contiguous(&[(nics_core::seam::SeqId(0), 0, 3)]);
    let out = model.forward(&Batch::new(rows, Input::Ids(&ids(3, 1))), &mut cache, None).unwrap();
    model.logits(&out.hidden).unwrap().square().sum(Kind::Float).backward();
    let mut reached = 0;
    model
        .visit_parameters(&mut |_, t| {
            reached +=
                usize::from(t.grad().defined() && t.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
            Ok(())
        })
        .unwrap();
    assert!(weights > 30);
    // The embedding's rows of other tokens have none, but the table as a whole has.
    assert_eq!(reached, weights);
}
