//! What attention gives.

use nics_core::cache::DenseCache;
use nics_core::seam::KvCache;
use pm_kvq::cache::PagedCache;
use tch::{Kind, Tensor};

use crate::kit::{Sequence, call, config, dims};

fn off(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

#[test]
fn without_a_budget_it_is_the_dense_cache() {
    for (kind, exact, tolerance) in [
        (Kind::Float, "f32", 1e-5),
        (Kind::BFloat16, "auto", 0.1),
        (Kind::Half, "auto", 0.03),
        (Kind::Double, "f32", 1e-4),
    ] {
        let dims = dims(1, 6, 2, 64, kind);
        let mut paged = PagedCache::new(&dims, &config(&format!("window=16,exact={exact}"))).unwrap();
        let mut dense = DenseCache::new();
        let rows = [Sequence::new(&dims, 90, 1), Sequence::new(&dims, 90, 2)];
        let seqs = [0, 1].map(|_| (paged.open(90).unwrap(), dense.open(90).unwrap()));
        // One prompt, the other beside a row of the first, then single rows, then a few at once.
        let steps: [&[(usize, usize, usize)]; 6] = [
            &[(0, 0, 40)],
            &[(0, 40, 41), (1, 0, 30)],
            &[(0, 41, 42), (1, 30, 31)],
            &[(1, 31, 36)],
            &[(0, 42, 80), (1, 36, 39)],
            &[(0, 80, 81), (1, 39, 40)],
        ];
        for (i, step) in steps.into_iter().enumerate() {
            let of =
                |which: fn(&(nics_core::seam::SeqId, nics_core::seam::SeqId)) -> nics_core::seam::SeqId| {
                    step.iter()
                        .map(|(s, from, to)| (which(&seqs[*s]), &rows[*s], *from, *to))
                        .collect::<Vec<_>>()
                };
            let a = call(&mut paged, &dims, 0, &of(|s| s.0), None).unwrap();
            let b = call(&mut dense, &dims, 0, &of(|s| s.1), None).unwrap();
            assert_eq!((a.out.size(), a.out.kind()), (b.out.size(), b.out.kind()));
            assert!(off(&a.out, &b.out) < tolerance, "{kind:?} step {i}: {}", off(&a.out, &b.out));
            assert!(a.exhausted.is_empty());
        }
        let a = call(&mut paged, &dims, 0, &[(seqs[0].0, &rows[0], 81, 84)], Some(2)).unwrap();
        let b = call(&mut dense, &dims, 0, &[(seqs[0].1, &rows[0], 81, 84)], Some(2)).unwrap();
        assert!(off(&a.out, &b.out) < tolerance);
        assert!(off(&a.scores.unwrap()[0], &b.scores.unwrap()[0]) < tolerance);
    }
}

/// Codes attended where they lie equal libtorch's attention over what the cache says that it keeps.
#[test]
fn codes_are_attended_as_they_read() {
    for (head_dim, group, kv_heads) in [(128, 128, 2), (64, 64, 1), (96, 32, 1), (80, 80, 2), (256, 128, 1)] {
        for bits in [2, 4, 8] {
            let dims = dims(1, 2 * kv_heads, kv_heads, head_dim, Kind::Float);
            let words =
                format!("window=16,window-mode=block,min-bits={bits},group={group},max-len=201,shrink=layer");
            let mut cache = PagedCache::new(&dims, &config(&words)).unwrap();
            let mut dense = DenseCache::new();
            let rows = Sequence::new(&dims, 201, 7);
            let s = cache.open(201).unwrap();
            call(&mut cache, &dims, 0, &[(s, &rows, 0, 200)], None).unwrap();
            let widths = cache.stats(s)[0].widths.unwrap();
            assert_eq!((widths.0.get(), widths.1.get()), (bits, bits));
            // The dense cache gets what the paged one reads, turned back so that it rotates it there again.
            let [k, v] = cache.rows(s, 0).unwrap();
            let d = dense.open(201).unwrap();
            let unrotated = unrotate(&dims, &k.transpose(0, 1), 200);
            let stored = Sequence {
                q: rows.q.copy(),
                k: Tensor::cat(&[unrotated, rows.k.narrow(0, 200, 1)], 0),
                v: Tensor::cat(&[v.transpose(0, 1), rows.v.narrow(0, 200, 1)], 0),
            };
            call(&mut dense, &dims, 0, &[(d, &stored, 0, 200)], None).unwrap();
            let expected = call(&mut dense, &dims, 0, &[(d, &stored, 200, 201)], None).unwrap();
            let copy = cache.fork(s).unwrap();
            let few = call(&mut cache, &dims, 0, &[(s, &rows, 200, 201)], None).unwrap();
            let by_copy = call(&mut cache, &dims, 0, &[(copy, &rows, 200, 201)], Some(1)).unwrap();
            for found in [&few.out, &by_copy.out] {
                assert!(off(found, &expected.out) < 2e-3, "{head_dim} {bits}: {}", off(found, &expected.out));
            }
        }
    }
}

/// Turns rotated keys back: rotation by the opposite angle.
fn unrotate(dims: &nics_core::models::ModelDims, k: &Tensor, rows: usize) -> Tensor {
    let ragged = nics_core::seam::Ragged::contiguous(&[(nics_core::seam::SeqId(0), 0, rows)]);
    let rope = crate::kit::rope(dims, &ragged);
    let back = nics_core::nn::Rope { cos: rope.cos.copy(), sin: -rope.sin.copy() };
    back.apply(k).unwrap()
}

#[test]
fn error_of_a_width_is_within_its_bound() {
    let dims = dims(1, 2, 1, 128, Kind::Float);
    for bits in [8u32, 4, 2] {
        let words =
            format!("sink=0,window=16,window-mode=block,min-bits={bits},max-len=160,shrink=layer,exact=f32");
        let mut cache = PagedCache::new(&dims, &config(&words)).unwrap();
        let rows = Sequence::new(&dims, 160, 3);
        let s = cache.open(160).unwrap();
        call(&mut cache, &dims, 0, &[(s, &rows, 0, 160)], None).unwrap();
        let [_, v] = cache.rows(s, 0).unwrap();
        let exact = rows.v.transpose(0, 1);
        let range = exact.amax([-1].as_slice(), true) - exact.amin([-1].as_slice(), true);
        let step = range / f64::from((1 << bits) - 1);
        // Half a step, and what the halvings before it added.
        let bound: Tensor = step * (0.5 * (1.0 + 1.0 / 5.0 + 1.0 / 85.0) + 1e-3);
        let middle = cache.stats(s)[0].middle as i64;
        let beyond = ((v - exact).abs() - bound).narrow(1, 0, middle).max().double_value(&[]);
        assert!(beyond <= 0.0, "{bits} bits: beyond the bound by {beyond}");
    }
}
