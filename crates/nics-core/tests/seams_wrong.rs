//! Wrong shapes and dtypes at the seams: an error and never a panic, and what was refused leaves no trace.

mod seam_models;

use nics_core::cache::{DenseCache, NoCache};
use nics_core::models::{Batch, Input, Model};
use nics_core::nn::{Rope, RopeConfig, Rotary};
use nics_core::seam::{KvCache, Mask, Ragged, SeqId, Site};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use seam_models::*;
use tch::{Device, Kind, Tensor};

const HEADS: i64 = 4;
const KV_HEADS: i64 = 2;
const DIM: i64 = 8;
const KINDS: [Kind; 7] =
    [Kind::Double, Kind::Half, Kind::BFloat16, Kind::Int64, Kind::Int, Kind::Uint8, Kind::Bool];

fn rope(rows: &Ragged) -> Rope {
    Rotary::new(RopeConfig::parse(1e4, DIM, 64, None).unwrap(), Device::Cpu).rows(rows).unwrap()
}

/// A tensor of another shape or dtype than `like`, never one that would do in its place.
fn wrong(rng: &mut ChaCha8Rng, like: &Tensor) -> Tensor {
    let mut shape = like.size();
    let at = rng.random_range(0..shape.len());
    match rng.random_range(0..5) {
        // An odd number: twice the key heads are still right for queries.
        0 => shape[at] += *[1, 3].choose(rng).unwrap(),
        1 => shape[at] = 0,
        2 => shape.insert(at, 1),
        3 => drop(shape.remove(at)),
        _ => return like.to_kind(*KINDS.choose(rng).unwrap()),
    }
    Tensor::ones(&shape, (like.kind(), Device::Cpu))
}

#[test]
fn attention_refuses_a_thousand_wrong_calls_and_goes_on() {
    let _no_grad = tch::no_grad_guard();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let site = |rows: &Ragged, rope: &Rope, input: &Tensor, call: &dyn Fn(&Site)| {
        let site = Site { layer: 0, rows, rope, input, mask: Mask::Causal, want_scores: None, scale: 0.35 };
        call(&site);
    };
    for case in 0..1000 {
        let dense = case % 2 == 0;
        let (mut with, mut without) = (DenseCache::new(), NoCache::new());
        let seqs = [0, 1].map(|_| with.open(16).unwrap());
        let cache: &mut dyn KvCache = if dense { &mut with } else { &mut without };
        let new = |rng: &mut ChaCha8Rng, rows: usize, heads: i64| {
            let n = rows as i64 * heads * DIM;
            let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::from_slice(&values).view([rows as i64, heads, DIM])
        };
        let lens = [rng.random_range(1..4), rng.random_range(1..4)];
        let rows = Ragged::contiguous(&[(seqs[0], 0, lens[0]), (seqs[1], 0, lens[1])]);
        let n = rows.len();
        let (q, k, v) = (new(&mut rng, n, HEADS), new(&mut rng, n, KV_HEADS), new(&mut rng, n, KV_HEADS));
        let (right, input) = (rope(&rows), new(&mut rng, n, 1).view([n as i64, DIM]));
        let cache = std::cell::RefCell::new(cache);
        let keep = || seqs.map(|s| cache.borrow().kept(s, 0));
        // A first call, so that the dense cache has something to lose.
        site(&rows, &right, &input, &|s| drop(cache.borrow_mut().attend(s, &q, &k, &v).unwrap()));
        let before = keep();

        let start = if dense { lens } else { [0, 0] };
        let rows = Ragged::contiguous(&[(seqs[0], start[0], lens[0]), (seqs[1], start[1], lens[1])]);
        let right = rope(&rows);
        let want = *[None, Some(0), Some(1), Some(99)].choose(&mut rng).unwrap();
        let options = (Kind::Float, Device::Cpu);
        let which = rng.random_range(0..8);
        let (mut a, mut b, mut c) = (q.shallow_clone(), k.shallow_clone(), v.shallow_clone());
        let (mut rotary, mut rows_of, mut layer) = (None, rows.clone(), 0);
        let mut mask = Mask::Causal;
        let additive;
        match which {
            0 => a = wrong(&mut rng, &q),
            1 => b = wrong(&mut rng, &k),
            2 => c = wrong(&mut rng, &v),
            3 => rotary = Some(rope(&Ragged::contiguous(&[(seqs[0], 0, n + 1)]))),
            4 => {
                // Fits no number of rows, or has no four axes, or goes with uncached calls alone.
                let shape: &[i64] =
                    [&[][..], &[7], &[7, 7], &[1, 1, 7], &[1, 1, 7, 7]].choose(&mut rng).unwrap();
                additive = Tensor::zeros(shape, options);
                mask = Mask::Additive(&additive);
            }
            5 if dense => rows_of = Ragged::contiguous(&[(SeqId(77), 0, n)]),
            6 if dense => layer = *[usize::MAX, 1 << 40].choose(&mut rng).unwrap(),
            // One head broadcasts silently, unless it is looked at.
            7 if dense => (b, c) = (k.narrow(1, 0, 1), v.narrow(1, 0, 1)),
            _ => rows_of = Ragged::contiguous(&[(seqs[0], 0, n + 1)]),
        }
        let rotary = rotary.as_ref().unwrap_or(&right);
        // `wrong` may choose the dtype that it has.
        let same = |x: &Tensor, y: &Tensor| x.size() == y.size() && x.kind() == y.kind();
        let unchanged = which < 3 && same(&a, &q) && same(&b, &k) && same(&c, &v);
        let at =
            Site { layer, rows: &rows_of, rope: rotary, input: &input, mask, want_scores: want, scale: 0.35 };
        let result = cache.borrow_mut().attend(&at, &a, &b, &c);
        let shapes = || format!("case {case}, kind {which}: q {a:?} k {b:?} v {c:?}");
        assert_eq!(result.is_ok(), unchanged, "{}", shapes());
        assert_eq!(keep(), before, "{}: something of a refused call is kept", shapes());
        // And the next call is answered as if nothing had been.
        site(&rows, &right, &input, &|s| {
            let out = cache.borrow_mut().attend(s, &q, &k, &v).unwrap().out;
            assert_eq!(out.size(), [n as i64, HEADS, DIM]);
            assert_eq!(out.isfinite().all().int64_value(&[]), 1);
        });
    }
}

#[test]
fn a_model_refuses_a_thousand_wrong_inputs_and_goes_on() {
    let _no_grad = tch::no_grad_guard();
    let model = decoder("qwen3");
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let hidden = model.dims().hidden;
    let vocab = model.dims().vocab;
    let good = tensor(&ids(6, 1));
    let mut cache = DenseCache::new();
    let seq = cache.open(12).unwrap();
    for case in 0..1000 {
        let rows = Ragged::contiguous(&[(seq, 0, 6)]);
        let embeds = Tensor::ones([6, hidden], (Kind::Float, Device::Cpu));
        let result = match case % 5 {
            0 => {
                // Integers of 32 bits are as good as those of 64.
                let ids = wrong(&mut rng, &good);
                if ids.size() == good.size() && ids.kind() == Kind::Int64 || ids.kind() == Kind::Int {
                    continue;
                }
                model.forward(&Batch::new(rows, Input::Ids(&ids)), &mut cache, None).map(drop)
            }
            1 => {
                let outside = *[-1, i64::MIN, vocab, i64::MAX].choose(&mut rng).unwrap();
                let mut all = ids(6, 1).into_iter().map(i64::from).collect::<Vec<_>>();
                all[rng.random_range(0..6)] = outside;
                let ids = Tensor::from_slice(&all);
                let e = model.forward(&Batch::new(rows, Input::Ids(&ids)), &mut cache, None).unwrap_err();
                assert!(
                    e.to_string().contains(&format!("token id {outside} is outside the vocabulary of 256"))
                );
                model.embed(&ids).map(drop)
            }
            2 => {
                // Embeddings of another dtype are converted; of another shape they are not.
                let x = wrong(&mut rng, &embeds);
                if x.size() == embeds.size() {
                    let _ = model.forward(&Batch::new(rows, Input::Embeds(&x)), &mut cache, None);
                    cache.truncate(seq, 0).unwrap();
                    continue;
                }
                model.forward(&Batch::new(rows, Input::Embeds(&x)), &mut cache, None).map(drop)
            }
            3 => {
                let x = wrong(&mut rng, &embeds);
                // Any number of rows in any number of axes will do.
                if x.size().last() == Some(&hidden) && x.kind() == Kind::Float {
                    let _ = model.logits(&x).unwrap();
                    continue;
                }
                model.logits(&x).map(drop)
            }
            _ => {
                // More rows than the sequence may have, a sequence that is not open, no row at all.
                let (rows, n) = match rng.random_range(0..3) {
                    0 => (vec![(seq, 0, 13)], 13),
                    1 => (vec![(seq, 0, 3), (SeqId(99), 0, 3)], 6),
                    _ => (Vec::new(), 0),
                };
                let input = tensor(&ids(n, 1));
                model
                    .forward(&Batch::new(Ragged::contiguous(&rows), Input::Ids(&input)), &mut cache, None)
                    .map(drop)
            }
        };
        assert!(result.is_err(), "case {case}");
        assert_eq!(cache.kept(seq, 0), 0, "case {case}: something of a refused call is kept");
    }
    forward(&model, &mut cache, seq, 0, &ids(6, 1), None).unwrap();
}
