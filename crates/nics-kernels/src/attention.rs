//! Attention of one new row of each sequence over its dense keys and values.
//!
//! A key head serves a group of query heads: its keys and values are read once for all of them. Long sequences are cut
//! into pieces of [`PIECE`] keys that are computed side by side and put together afterwards (softmax by pieces, Milakov &
//! Gimelshein, 2018). Where a sequence is cut depends on its length alone, so a row's result is the same bit for bit in
//! every batch and at every number of threads.

use std::cell::RefCell;

use crate::each_kind;
use crate::element::{Element, Values, ValuesMut};
use crate::exp::exp;
use crate::isa::Isa;
use crate::lanes::{Lanes, Plain, Weight};
use crate::pool::Pool;

/// Keys of a piece.
pub const PIECE: usize = 512;
/// Keys whose scores are taken together.
const KEYS: usize = 8;

/// The heads of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key/value heads; divides `queries`.
    pub keys: usize,
    /// Channels of a head.
    pub dim: usize,
}

/// What one sequence keeps, and which part of it the new row sees.
#[derive(Debug, Clone, Copy)]
pub struct Kept<'a> {
    /// `[key heads, capacity, dim]`, rotated.
    pub keys: Values<'a>,
    /// `[key heads, capacity, dim]`.
    pub values: Values<'a>,
    /// Rows for which there is room.
    pub capacity: usize,
    /// First row that is seen.
    pub from: usize,
    /// One past the last row that is seen.
    pub to: usize,
}

/// Softmax of `q kᵀ` over the seen rows, times `v`; one row for each of `sequences`.
///
/// # Shapes
/// `q`: `[sequences, query heads, dim]`, rotated and scaled. `out`: the same.
///
/// # Panics
/// When lengths or formats do not fit, or a sequence sees no row.
pub fn attend(pool: &Pool, heads: Heads, q: &[f32], sequences: &[Kept], out: ValuesMut) {
    attend_with(Isa::detect(), pool, heads, q, sequences, out);
}

/// A piece's part of a group's result: for each query the largest score, the sum of the exponentials and `Σ e v`.
struct Piece {
    sequence: usize,
    key_head: usize,
    from: usize,
    to: usize,
    at: usize,
}

struct Shared(*mut f32);

// SAFETY: pieces and sequences write disjoint ranges of the scratch and of the result.
unsafe impl Sync for Shared {}

thread_local! {
    /// The parts of all pieces.
    static PARTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// A piece's queries and scores.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// [`attend`] with chosen instructions.
///
/// # Panics
/// As [`attend`], and when the processor lacks the instructions.
pub fn attend_with(isa: Isa, pool: &Pool, heads: Heads, q: &[f32], sequences: &[Kept], out: ValuesMut) {
    isa.assert_available();
    let Heads { queries, keys, dim } = heads;
    assert!(dim > 0 && keys > 0 && queries.is_multiple_of(keys), "{heads:?} are no heads");
    let (group, row) = (queries / keys, queries * dim);
    assert_eq!(q.len(), sequences.len() * row, "q is not [{}, {queries}, {dim}]", sequences.len());
    assert_eq!(out.len(), q.len(), "out is not of the shape of q");
    for kept in sequences {
        assert!(kept.from < kept.to && kept.to <= kept.capacity, "no row of {kept:?} is seen");
        assert_eq!(kept.keys.kind(), kept.values.kind(), "keys and values differ in format");
        let size = keys * kept.capacity * dim;
        assert!(
            kept.keys.len() == size && kept.values.len() == size,
            "not [{keys}, {}, {dim}]",
            kept.capacity
        );
    }
    let part = group * (2 + dim);
    let mut pieces = Vec::new();
    let mut first = Vec::with_capacity(sequences.len() + 1);
    for (s, kept) in sequences.iter().enumerate() {
        first.push(pieces.len());
        for from in (kept.from..kept.to).step_by(PIECE) {
            let to = (from + PIECE).min(kept.to);
            pieces.extend((0..keys).map(|key_head| Piece { sequence: s, key_head, from, to, at: 0 }));
        }
    }
    first.push(pieces.len());
    for (i, piece) in pieces.iter_mut().enumerate() {
        piece.at = i * part;
    }
    PARTS.with(|parts| {
        let mut parts = parts.borrow_mut();
        parts.clear();
        parts.resize(pieces.len() * part, 0.0);
        let shared = Shared(parts.as_mut_ptr());
        pool.run(pieces.len(), &|i| {
            let piece = &pieces[i];
            let kept = &sequences[piece.sequence];
            let q = &q[piece.sequence * row + piece.key_head * group * dim..][..group * dim];
            let shared = &shared;
            // SAFETY: this piece alone writes `part` values from `at` on.
            let part = unsafe { std::slice::from_raw_parts_mut(shared.0.add(piece.at), part) };
            let rows = (piece.key_head * kept.capacity + piece.from) * dim
                ..(piece.key_head * kept.capacity + piece.to) * dim;
            match (kept.keys, kept.values) {
                (Values::F32(k), Values::F32(v)) => one(isa, q, &k[rows.clone()], &v[rows], dim, part),
                (Values::Bf16(k), Values::Bf16(v)) => one(isa, q, &k[rows.clone()], &v[rows], dim, part),
                (Values::F16(k), Values::F16(v)) => one(isa, q, &k[rows.clone()], &v[rows], dim, part),
                _ => unreachable!("formats are equal, as asserted above"),
            }
        });
        let parts = &*parts;
        each_kind!(out, ValuesMut, out => for (s, out) in out.chunks_exact_mut(row).enumerate() {
            put_together(&parts[first[s] * part..first[s + 1] * part], keys, dim, out);
        });
    });
}

/// Adds up a sequence's pieces and divides by the sums.
///
/// # Shapes
/// `parts`: `[pieces, key heads, group * (2 + dim)]`, of each group its queries' largest scores, the sums of their
/// exponentials ([`exponentials`]), and `Σ e v`, `[group, dim]`. `out`: `[key heads * group, dim]`.
pub fn put_together<T: Element>(parts: &[f32], keys: usize, dim: usize, out: &mut [T]) {
    let group = out.len() / dim / keys;
    let part = group * (2 + dim);
    let mut weights = Vec::with_capacity(parts.len() / part / keys);
    for (head, out) in out.chunks_exact_mut(dim).enumerate() {
        let (key_head, g) = (head / group, head % group);
        let of_head = || parts.chunks_exact(part).skip(key_head).step_by(keys);
        let max = of_head().map(|p| p[g]).fold(f32::NEG_INFINITY, f32::max);
        weights.clear();
        weights.extend(of_head().map(|p| (p[g] - max).exp()));
        let sum: f32 = of_head().zip(&weights).map(|(p, w)| w * p[group + g]).sum();
        for (c, out) in out.iter_mut().enumerate() {
            let total: f32 = of_head().zip(&weights).map(|(p, w)| w * p[2 * group + g * dim + c]).sum();
            *out = T::from_f32(total / sum);
        }
    }
}

/// One piece of one key head: `q` `[group, dim]`, `k` and `v` `[rows, dim]`.
fn one<T: Weight>(isa: Isa, q: &[f32], k: &[T], v: &[T], dim: usize, part: &mut [f32]) {
    SCORES.with(|scratch| {
        let mut scratch = scratch.borrow_mut();
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has these instructions, as asserted at the entry.
            Isa::Avx512 if dim.is_multiple_of(32) => unsafe {
                piece_avx512(q, k, v, dim, part, &mut scratch);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above; AVX-512 comes with AVX2.
            Isa::Avx512 | Isa::Avx2 if dim.is_multiple_of(16) => unsafe {
                piece_avx2(q, k, v, dim, part, &mut scratch);
            },
            _ if dim.is_multiple_of(16) => piece::<Plain, T>(q, k, v, dim, part, &mut scratch),
            _ => piece_of_any_width(q, k, v, dim, part, &mut scratch),
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn piece_avx2<T: Weight>(q: &[f32], k: &[T], v: &[T], dim: usize, part: &mut [f32], scratch: &mut Vec<f32>) {
    piece::<crate::lanes::Avx2, T>(q, k, v, dim, part, scratch);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn piece_avx512<T: Weight>(
    q: &[f32],
    k: &[T],
    v: &[T],
    dim: usize,
    part: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    piece::<crate::lanes::Avx512, T>(q, k, v, dim, part, scratch);
}

/// Vector code; `dim` is a multiple of `2 N`.
#[inline(always)]
fn piece<L: Lanes, T: Weight>(
    q: &[f32],
    k: &[T],
    v: &[T],
    dim: usize,
    part: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let (group, rows, step) = (q.len() / dim, k.len() / dim, 2 * L::N);
    assert!(dim.is_multiple_of(step) && rows > 0 && part.len() == group * (2 + dim));
    assert!(q.len() == group * dim && k.len() == rows * dim && v.len() == rows * dim);
    let stride = rows.next_multiple_of(KEYS);
    scratch.clear();
    scratch.resize(group * (dim + stride), 0.0);
    let (arranged, scores) = scratch.split_at_mut(group * dim);
    // Channels in the order in which a step of keys comes out.
    for (to, from) in arranged.chunks_exact_mut(step).zip(q.chunks_exact(step)) {
        if T::PAIRED {
            for i in 0..L::N {
                to[i] = from[2 * i];
                to[L::N + i] = from[2 * i + 1];
            }
        } else {
            to.copy_from_slice(from);
        }
    }
    // SAFETY: the caller runs with the instructions of `L`. A key's row is read at `row * dim + c .. + step`, a query's at
    // `g * dim + c .. + step`, with `c + step <= dim`; scores are written at `g * stride + j .. + KEYS`. A missing key
    // reads the last one again; its score is never looked at.
    unsafe {
        for j in (0..rows).step_by(KEYS) {
            let mut at = [k.as_ptr(); KEYS];
            for (i, at) in at.iter_mut().enumerate() {
                *at = k.as_ptr().add((j + i).min(rows - 1) * dim);
            }
            // The values are wanted once the scores are there.
            for line in 0..(KEYS * dim * size_of::<T>()).div_ceil(64) {
                L::prefetch(v.as_ptr().wrapping_add(j * dim).cast::<u8>().wrapping_add(line * 64));
            }
            for g in 0..group {
                let query = arranged.as_ptr().add(g * dim);
                let mut acc = [L::zero(); KEYS];
                for c in (0..dim).step_by(step) {
                    for second in [false, true] {
                        let x = L::load(query.add(c + if second { L::N } else { 0 }));
                        for i in 0..KEYS {
                            acc[i] = L::fma(T::half::<L>(at[i].add(c), second), x, acc[i]);
                        }
                    }
                }
                scores[g * stride + j..][..KEYS].copy_from_slice(&L::sums(acc));
            }
        }
    }
    exponentials(scores, stride, rows, part);
    let (_, sums) = part.split_at_mut(2 * group);
    for g in (0..group).step_by(4) {
        match group - g {
            1 => weigh::<L, T, 1>(v, rows, dim, scores, stride, g, sums),
            2 => weigh::<L, T, 2>(v, rows, dim, scores, stride, g, sums),
            3 => weigh::<L, T, 3>(v, rows, dim, scores, stride, g, sums),
            _ => weigh::<L, T, 4>(v, rows, dim, scores, stride, g, sums),
        }
    }
}

/// `Σ e v` of queries `g .. g + G`.
#[inline(always)]
fn weigh<L: Lanes, T: Weight, const G: usize>(
    v: &[T],
    rows: usize,
    dim: usize,
    scores: &[f32],
    stride: usize,
    g: usize,
    sums: &mut [f32],
) {
    let step = 2 * L::N;
    let mut c = 0;
    while c < dim {
        // Two steps at once where there are two: each row of values is then read in one piece.
        if dim - c >= 2 * step {
            weigh_steps::<L, T, G, 2>(v, rows, dim, c, scores, stride, g, sums);
            c += 2 * step;
        } else {
            weigh_steps::<L, T, G, 1>(v, rows, dim, c, scores, stride, g, sums);
            c += step;
        }
    }
}

/// [`weigh`] for the channels of `S` steps from `c` on.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn weigh_steps<L: Lanes, T: Weight, const G: usize, const S: usize>(
    v: &[T],
    rows: usize,
    dim: usize,
    c: usize,
    scores: &[f32],
    stride: usize,
    g: usize,
    sums: &mut [f32],
) {
    let step = 2 * L::N;
    assert!(v.len() == rows * dim && scores.len() >= (g + G) * stride && stride >= rows);
    assert!(sums.len() >= (g + G) * dim && c + S * step <= dim);
    // SAFETY: the caller runs with the instructions of `L`; reads and writes are inside by the assertions.
    unsafe {
        let mut acc = [[[L::zero(); 2]; S]; G];
        for row in 0..rows {
            let at = v.as_ptr().add(row * dim + c);
            for s in 0..S {
                let first = T::half::<L>(at.add(s * step), false);
                let second = T::half::<L>(at.add(s * step), true);
                for i in 0..G {
                    let e = L::splat(*scores.get_unchecked((g + i) * stride + row));
                    acc[i][s][0] = L::fma(e, first, acc[i][s][0]);
                    acc[i][s][1] = L::fma(e, second, acc[i][s][1]);
                }
            }
        }
        for i in 0..G {
            for s in 0..S {
                let to = &mut sums[(g + i) * dim + c + s * step..][..step];
                let mut both = [0f32; 32];
                L::store(acc[i][s][0], both.as_mut_ptr());
                L::store(acc[i][s][1], both.as_mut_ptr().add(L::N));
                if T::PAIRED {
                    for n in 0..L::N {
                        to[2 * n] = both[n];
                        to[2 * n + 1] = both[L::N + n];
                    }
                } else {
                    to.copy_from_slice(&both[..step]);
                }
            }
        }
    }
}

/// Turns each query's scores into exponentials of what they lack to the largest; keeps the largest and the sum.
///
/// # Shapes
/// `scores`: `[group, stride]`, of which the first `rows` of each line count. `part`: `[2 * group ..]`: the largest, then the
/// sums.
#[inline(always)]
pub fn exponentials(scores: &mut [f32], stride: usize, rows: usize, part: &mut [f32]) {
    const LANES: usize = 16;
    let group = scores.len() / stride;
    for (g, scores) in scores.chunks_exact_mut(stride).enumerate() {
        let scores = &mut scores[..rows];
        let mut max = [f32::NEG_INFINITY; LANES];
        for part in scores.chunks(LANES) {
            for (max, x) in max.iter_mut().zip(part) {
                *max = if *x > *max { *x } else { *max };
            }
        }
        let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let mut sums = [0f32; LANES];
        for part in scores.chunks_mut(LANES) {
            for (sum, x) in sums.iter_mut().zip(part) {
                *x = exp(*x - max);
                *sum += *x;
            }
        }
        part[g] = max;
        part[group + g] = sums.iter().sum();
    }
}

/// The same for heads of any width, in plain Rust.
fn piece_of_any_width<T: Element>(
    q: &[f32],
    k: &[T],
    v: &[T],
    dim: usize,
    part: &mut [f32],
    scores: &mut Vec<f32>,
) {
    let (group, rows) = (q.len() / dim, k.len() / dim);
    scores.clear();
    for q in q.chunks_exact(dim) {
        scores.extend(k.chunks_exact(dim).map(|k| q.iter().zip(k).map(|(q, k)| q * k.to_f32()).sum::<f32>()));
    }
    exponentials(scores, rows, rows, part);
    let sums = &mut part[2 * group..];
    sums.fill(0.0);
    for (sums, e) in sums.chunks_exact_mut(dim).zip(scores.chunks_exact(rows)) {
        for (e, v) in e.iter().zip(v.chunks_exact(dim)) {
            sums.iter_mut().zip(v).for_each(|(sum, v)| *sum += e * v.to_f32());
        }
    }
}
