//! The rivals are caches like any other: ragged batches, cutting back, copies, refusals, and the bytes that they report.

use std::path::Path;

use nics_core::checkpoint::Checkpoint;
use nics_core::golden::difference;
use nics_core::models::{self, Decoder, Model, ModelDims, read};
use nics_core::seam::{KvCache, Mask, Ragged, SeqId, Site};
use pm_kvq::baselines::{
    Baseline, Block, Coders, Format, FrozenFp8, Kivi, Mikv, Residual, RotateKv, Rtn, Simulated, When,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

/// A decoder of heads that every format can store.
fn model() -> Decoder {
    nics_core::device::set_threads(Some(1)).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = (golden.join("model_qwen2.json"), golden.join("model_qwen2.safetensors"));
    models::load(&Checkpoint::open_files(&files.0, &[files.1]).unwrap(), Device::Cpu, Kind::Float).unwrap()
}

fn all(dims: &ModelDims) -> Vec<Simulated> {
    let codes = Format::Groups { bits: 4, group: 64 };
    let rotated = Coders::rotated(Format::Block(Block::Q4_0), dims.head_dim).unwrap();
    let mut caches = vec![
        Simulated::new(dims, Rtn::new(codes, When::Before)),
        Simulated::new(dims, Rtn::new(codes, When::After)),
        Simulated::new(dims, Rtn::new(rotated, When::Before)),
        Simulated::new(dims, Rtn::new(Format::Fp8 { scale: 1.0, saturate: true }, When::Before)),
        Simulated::new(dims, Kivi::new(2, 4, 32).unwrap()),
        Simulated::new(dims, Mikv::new(codes, 0)),
        Simulated::new(dims, Mikv::new(codes, 3)),
        Simulated::new(dims, RotateKv::new(dims, 4, 128, 2, &[]).unwrap()),
        Simulated::new(dims, Residual::new(4, 64, 5).unwrap()),
    ];
    caches.extend(Block::ALL.map(|b| Simulated::new(dims, Rtn::new(Format::Block(b), When::Before))));
    caches.into_iter().map(Result::unwrap).collect()
}

fn ids(n: usize, salt: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + salt * 11 + i * i) % 64).collect()
}

/// Hidden states of `ids`, the first `prompt` in one call and the rest one by one.
fn run(
    model: &Decoder,
    cache: &mut Simulated,
    seq: SeqId,
    from: usize,
    ids: &[u32],
    prompt: usize,
) -> Tensor {
    let mut all = Vec::new();
    let mut at = 0;
    while at < ids.len() {
        let to = if at == 0 { prompt } else { at + 1 };
        all.push(read(model, cache, &[(seq, from + at, &ids[at..to])]).unwrap());
        at = to;
    }
    Tensor::cat(&all, 0)
}

#[test]
fn a_ragged_batch_equals_single_calls() {
    let model = model();
    let _no_grad = tch::no_grad_guard();
    for (mut one, mut many) in all(model.dims()).into_iter().zip(all(model.dims())) {
        let prompts = [ids(9, 1), ids(5, 2), ids(12, 3)];
        let alone: Vec<Tensor> = prompts
            .iter()
            .map(|p| {
                let seq = one.open(32).unwrap();
                Tensor::cat(
                    &[
                        run(&model, &mut one, seq, 0, p, p.len()),
                        run(&model, &mut one, seq, p.len(), &[7, 8], 1),
                    ],
                    0,
                )
            })
            .collect();
        let seqs: Vec<SeqId> = prompts.iter().map(|_| many.open(32).unwrap()).collect();
        let rows: Vec<_> = seqs.iter().zip(&prompts).map(|(s, p)| (*s, 0, p.as_slice())).collect();
        let mut outs = vec![read(&model, &mut many, &rows).unwrap()];
        for (i, token) in [7u32, 8].into_iter().enumerate() {
            let token = [token];
            let rows: Vec<_> =
                seqs.iter().zip(&prompts).map(|(s, p)| (*s, p.len() + i, token.as_slice())).collect();
            outs.push(read(&model, &mut many, &rows).unwrap());
        }
        let mut from = 0;
        for (i, p) in prompts.iter().enumerate() {
            let n = p.len() as i64;
            let own = Tensor::cat(
                &[outs[0].narrow(0, from, n), outs[1].narrow(0, i as i64, 1), outs[2].narrow(0, i as i64, 1)],
                0,
            );
            from += n;
            let (_, off) = difference(&own, &alone[i]).unwrap();
            // Rounding may flip a code now and then.
            assert!(off <= 0.05, "{:?}: off by {off}", many.snapshot(seqs[i]).unwrap().cache);
        }
        for (a, b) in (0..3).map(|i| (SeqId(i), seqs[i as usize])) {
            assert_eq!(one.held(a), many.held(b));
        }
    }
}

#[test]
fn copies_go_on_alike_and_apart() {
    let model = model();
    let _no_grad = tch::no_grad_guard();
    for mut cache in all(model.dims()) {
        let seq = cache.open(40).unwrap();
        let _ = run(&model, &mut cache, seq, 0, &ids(14, 1), 7);
        let before = cache.bytes();
        let fork = cache.fork(seq).unwrap();
        let snapshot = cache.snapshot(seq).unwrap();
        let restored = cache.restore(&snapshot).unwrap();
        let next = |cache: &mut Simulated, seq| run(&model, cache, seq, 14, &ids(6, 4), 1);
        let expected = next(&mut cache, seq);
        for copy in [fork, restored] {
            assert_eq!(cache.kept(copy, 0), 14);
            assert_eq!(next(&mut cache, copy), expected);
            assert_eq!(cache.held(copy), cache.held(seq));
        }
        for s in [fork, restored, seq] {
            cache.close(s);
        }
        assert_eq!((cache.bytes().payload, cache.bytes().allocated), (0, 0));
        assert!(before.payload > 0 && before.payload < before.allocated);
        // Damaged, or of another method.
        let mut other = Simulated::new(model.dims(), FrozenFp8).unwrap();
        assert!(other.restore(&snapshot).is_err());
        let mut damaged = cache.restore(&snapshot).map(|s| cache.snapshot(s).unwrap()).unwrap();
        for (name, t) in &mut damaged.tensors {
            if name == "1.stored" {
                *t = t.narrow(0, 0, 3);
            }
        }
        assert!(cache.restore(&damaged).unwrap_err().to_string().contains("1.stored"));
    }
}

#[test]
fn a_prompt_may_begin_like_another() {
    let model = model();
    let _no_grad = tch::no_grad_guard();
    let mut branched = 0;
    for mut cache in all(model.dims()) {
        let seq = cache.open(20).unwrap();
        let _ = run(&model, &mut cache, seq, 0, &ids(12, 1), 12);
        let Some(branch) = cache.branch(seq, 8, 30).unwrap() else {
            assert!(!cache.resume(seq, 8, 30).unwrap());
            assert_eq!(cache.kept(seq, 0), 12);
            continue;
        };
        branched += 1;
        let fresh = cache.open(30).unwrap();
        let _ = run(&model, &mut cache, fresh, 0, &ids(8, 1), 8);
        // Prompts of two lengths go through other kernels, so a code may flip now and then.
        let next = |cache: &mut Simulated, seq| run(&model, cache, seq, 8, &ids(5, 2), 5);
        let (own, expected) = (next(&mut cache, branch), next(&mut cache, fresh));
        assert!(difference(&own, &expected).unwrap().1 <= 0.05);
        assert!(cache.resume(seq, 8, 30).unwrap());
        assert_eq!(next(&mut cache, seq), own);
        assert_eq!(cache.held(seq), cache.held(branch));
        assert!(cache.branch(seq, 14, 30).unwrap().is_none() && cache.branch(seq, 8, 7).unwrap().is_none());
    }
    assert!(branched >= 8, "{branched}");
}

#[test]
fn cutting_back_what_was_just_read_undoes_it() {
    let model = model();
    let _no_grad = tch::no_grad_guard();
    // Where a row's storage depends on itself alone.
    let codes = Format::Groups { bits: 4, group: 64 };
    let alone = |when| Simulated::new(model.dims(), Rtn::new(codes, when)).unwrap();
    for mut cache in [alone(When::Before), alone(When::After)] {
        let seq = cache.open(40).unwrap();
        let _ = run(&model, &mut cache, seq, 0, &ids(10, 1), 10);
        let held = cache.held(seq);
        let first = run(&model, &mut cache, seq, 10, &ids(4, 2), 2);
        cache.truncate(seq, 10).unwrap();
        assert_eq!((cache.held(seq), cache.kept(seq, 2)), (held, 10));
        assert_eq!(run(&model, &mut cache, seq, 10, &ids(4, 2), 2), first);
        // To nothing, and from the start.
        cache.truncate(seq, 0).unwrap();
        assert_eq!(cache.held(seq).unwrap().payload, 0);
        let _ = run(&model, &mut cache, seq, 0, &ids(10, 1), 10);
        assert_eq!(cache.held(seq), held);
    }
    for mut cache in all(model.dims()) {
        let seq = cache.open(40).unwrap();
        let _ = run(&model, &mut cache, seq, 0, &ids(10, 1), 6);
        cache.truncate(seq, 7).unwrap();
        let _ = run(&model, &mut cache, seq, 7, &ids(9, 2), 3);
        assert_eq!((cache.kept(seq, 0), cache.kept(seq, 2)), (16, 16));
        cache.truncate(seq, 0).unwrap();
        let again = run(&model, &mut cache, seq, 0, &ids(10, 1), 6);
        let fresh = cache.open(40).unwrap();
        assert_eq!(run(&model, &mut cache, fresh, 0, &ids(10, 1), 6), again);
    }
}

#[test]
fn bytes_are_those_of_the_formats() {
    let model = model();
    let dims = model.dims().clone();
    let _no_grad = tch::no_grad_guard();
    let (layers, heads, d) = (dims.layers, dims.kv_heads as usize, dims.head_dim as usize);
    let rows = layers * heads * 2; // keys and values of one token
    let held = |cache: &mut Simulated, tokens: usize, prompt: usize| {
        let seq = cache.open(64).unwrap();
        let _ = run(&model, cache, seq, 0, &ids(tokens, 1), prompt);
        cache.held(seq).unwrap().payload
    };
    for block in Block::ALL {
        let mut cache = Simulated::new(&dims, Rtn::new(Format::Block(block), When::Before)).unwrap();
        assert_eq!(held(&mut cache, 10, 5), rows * 10 * d / 32 * block.bytes());
        assert_eq!(cache.forecast(&dims, 10), rows * 10 * d / 32 * block.bytes());
    }
    for mut cache in all(&dims) {
        for (tokens, prompt) in [(1, 1), (9, 4), (11, 11)] {
            assert!(held(&mut cache, tokens, prompt) <= cache.forecast(&dims, tokens));
        }
    }
    let codes = Format::Groups { bits: 2, group: 128 };
    let mut cache = Simulated::new(&dims, Rtn::new(codes, When::After)).unwrap();
    assert_eq!(held(&mut cache, 10, 5), rows * 10 * (d / 4 + 4));
    let mut cache =
        Simulated::new(&dims, Rtn::new(Format::Fp8 { scale: 1.0, saturate: false }, When::Before)).unwrap();
    assert_eq!(held(&mut cache, 10, 5), rows * 10 * d);
    // 11 tokens in blocks of 4: 8 stored, 3 exact; 2 blocks of scales and zeros for keys, one each token for values.
    let mut cache = Simulated::new(&dims, Kivi::new(2, 4, 128).unwrap()).unwrap();
    let expected = layers * heads * (8 * d / 4 + 2 * d * 4 + 8 * (d / 4 + 4) + 3 * 2 * d * 2);
    assert_eq!(held(&mut cache, 11, 5), expected);
    assert_eq!(cache.forecast(&dims, 11), expected);
    // A residual of 5: the prompt is stored at once, then up to 4 rows wait.
    let mut cache = Simulated::new(&dims, Residual::new(4, 64, 5).unwrap()).unwrap();
    assert_eq!(held(&mut cache, 9, 5), rows * (5 * (d / 2 + 8) + 4 * d * 2));
    assert_eq!(held(&mut cache, 10, 5), rows * 10 * (d / 2 + 8));
}

#[test]
fn a_call_that_fails_changes_nothing() {
    let model = model();
    let _no_grad = tch::no_grad_guard();
    for mut cache in all(model.dims()) {
        let (a, b) = (cache.open(20).unwrap(), cache.open(6).unwrap());
        let _ = run(&model, &mut cache, a, 0, &ids(11, 1), 11);
        let _ = run(&model, &mut cache, b, 0, &ids(5, 1), 5);
        let (rows, held) = (cache.rows(a, 0).unwrap().0.copy(), cache.bytes());
        // The second sequence has no room.
        let e = read(&model, &mut cache, &[(a, 11, &[1]), (b, 5, &[1, 2])]).unwrap_err().to_string();
        assert!(e.contains("cache") && e.contains('6'), "{e}");
        assert_eq!(cache.bytes().payload, held.payload);
        assert_eq!(cache.rows(a, 0).unwrap().0, rows);
        let e = read(&model, &mut cache, &[(SeqId(99), 0, &[1])]).unwrap_err().to_string();
        assert!(e.contains("99"), "{e}");
        let next = run(&model, &mut cache, a, 11, &[3], 1);
        assert!(next.isfinite().all().int64_value(&[]) == 1);
    }
}

#[test]
fn wrong_rows_are_refused() {
    let model = model();
    let dims = model.dims();
    let options = (Kind::Float, Device::Cpu);
    let attend = |cache: &mut Simulated, layer: usize, heads: i64, fill: f64| {
        let seq = cache.open(4).unwrap();
        let rows = Ragged::contiguous(&[(seq, 0, 1)]);
        let rope = nics_core::nn::Rope {
            cos: Tensor::ones([1, dims.head_dim], options),
            sin: Tensor::zeros([1, dims.head_dim], options),
        };
        let input = Tensor::zeros([1, dims.hidden], options);
        let site = Site {
            layer,
            rows: &rows,
            rope: &rope,
            input: &input,
            mask: Mask::Causal,
            want_scores: None,
            scale: 1.0,
        };
        let t = |heads: i64, fill: f64| Tensor::full([1, heads, dims.head_dim], fill, options);
        let result = cache.attend(&site, &t(heads * 2, 1.0), &t(heads, fill), &t(heads, 1.0));
        result.map(drop).map_err(|e| e.to_string())
    };
    for mut cache in all(dims) {
        attend(&mut cache, 0, dims.kv_heads, 1.0).unwrap();
        assert!(attend(&mut cache, 0, dims.kv_heads, f64::NAN).unwrap_err().contains("layer 0"));
        assert!(attend(&mut cache, 99, dims.kv_heads, 1.0).unwrap_err().contains("layer 99"));
        assert!(attend(&mut cache, 0, dims.kv_heads * 2, 1.0).unwrap_err().contains("heads"));
    }
}

#[test]
fn settings_that_do_not_fit_are_refused() {
    let dims = model().dims().clone();
    let refused = |format: Format| Simulated::new(&dims, Rtn::new(format, When::After)).is_err();
    assert!(refused(Format::Groups { bits: 4, group: 48 }));
    assert!(refused(Format::Groups { bits: 17, group: 64 }));
    assert!(refused(Format::Groups { bits: 0, group: 64 }));
    assert!(refused(Format::Fp8 { scale: 0.0, saturate: true }));
    assert!(refused(Format::Block(Block::Q4_0)) != (dims.head_dim % 32 == 0));
    assert!(Kivi::new(2, 0, 64).is_err() && Residual::new(4, 64, 0).is_err());
    assert!(RotateKv::new(&dims, 4, 128, 0, &[Tensor::from_slice(&[0i64, 1])]).is_err());
    let twice = Tensor::zeros([dims.kv_heads * dims.head_dim], (Kind::Int64, Device::Cpu));
    let orders: Vec<Tensor> = (0..dims.layers).map(|_| twice.copy()).collect();
    assert!(RotateKv::new(&dims, 4, 128, 0, &orders).unwrap_err().to_string().contains("permutation"));
}

#[test]
fn names_say_what_is_meant() {
    let dims = model().dims().clone();
    for name in Baseline::NAMES {
        let baseline: Baseline = name.parse().unwrap();
        assert_eq!(baseline.to_string(), *name);
        let mut cache = baseline.cache(&dims, &[]).unwrap();
        assert!(cache.open(4).is_ok());
    }
    for wrong in ["", "kivi", "kivi-", "kivi-17", "q9_0", "rtn-4-5", "fp8x", "q4_0+turn"] {
        let e = wrong.parse::<Baseline>().unwrap_err().to_string();
        assert!(e.contains("kivi-2") && e.contains("q4_0"), "{e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A prompt may come in any pieces: what is stored of it is the same where storage goes row by row or block by block.
    #[test]
    fn pieces_do_not_matter(cuts in prop::collection::vec(1usize..6, 1..6), seed in 0i64..1000) {
        let dims = ModelDims {
            layers: 1, hidden: 8, intermediate: 8, heads: 4, kv_heads: 2, head_dim: 32, vocab: 8, context: 64,
            kind: Kind::Float, device: Device::Cpu,
        };
        tch::manual_seed(seed);
        let total: usize = cuts.iter().sum();
        let options = (Kind::Float, Device::Cpu);
        let (q, k, v) = (
            Tensor::randn([total as i64, 4, 32], options),
            Tensor::randn([total as i64, 2, 32], options),
            Tensor::randn([total as i64, 2, 32], options),
        );
        let methods: [fn(&ModelDims) -> Simulated; 3] = [
            |d| Simulated::new(d, Rtn::new(Format::Groups { bits: 4, group: 32 }, When::After)).unwrap(),
            |d| Simulated::new(d, Kivi::new(4, 4, 32).unwrap()).unwrap(),
            |d| Simulated::new(d, Rtn::new(Format::Block(Block::Q5_1), When::Before)).unwrap(),
        ];
        for method in methods {
            let stored = |pieces: &[usize]| {
                let mut cache = method(&dims);
                let seq = cache.open(64).unwrap();
                let mut at = 0;
                for &n in pieces {
                    let rows = Ragged::contiguous(&[(seq, at, n)]);
                    let part = |t: &Tensor| t.narrow(0, at as i64, n as i64);
                    let rope = nics_core::nn::Rope { cos: Tensor::ones([n as i64, 32], options), sin: Tensor::zeros([n as i64, 32], options) };
                    let input = Tensor::zeros([n as i64, 8], options);
                    let site = Site { layer: 0, rows: &rows, rope: &rope, input: &input, mask: Mask::Causal, want_scores: None, scale: 0.2 };
                    cache.attend(&site, &part(&q), &part(&k), &part(&v)).unwrap();
                    at += n;
                }
                let bytes = cache.held(seq).unwrap().payload;
                (cache.rows(seq, 0).unwrap(), bytes)
            };
            let (whole, pieces) = (stored(&[total]), stored(&cuts));
            prop_assert_eq!(whole.1, pieces.1);
            prop_assert_eq!(&whole.0.0, &pieces.0.0);
            prop_assert_eq!(&whole.0.1, &pieces.0.1);
        }
    }
}
