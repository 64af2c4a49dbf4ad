//! The inner loops: a few queries against the rows of a page.

use nics_kernels::attention::exponentials;
use nics_kernels::lanes::{Avx2, Avx512};

use super::source::{Source, Unpack};
use super::stored::Stored;

/// Queries that are computed together at most.
const QUERIES: usize = 5;

/// The loops, compiled for a set of instructions.
///
/// # Safety
/// As for [`Unpack`]; the rows of a page are whole blocks of `S`.
pub unsafe trait Tiles: Unpack {
    /// Scores of a page's tokens, from place `at` of each line of `scores`, `[group, stride]`; `q`: `[group, dim]` in the order
    /// of the source. `EACH`: each token has several scales. There is room for 3 more scores than tokens.
    unsafe fn keys<S: Source<Self>, const EACH: bool>(
        rows: &Stored,
        q: &[f32],
        dim: usize,
        order: &[u32],
        scores: &mut [f32],
        stride: usize,
        at: usize,
    );

    /// Adds a page's weighted rows to `sums`, `[group, dim]` in the order of the source. `weights`: as the scores of
    /// [`Tiles::keys`]; those of this page are used up.
    unsafe fn values<S: Source<Self>, const EACH: bool>(
        rows: &Stored,
        weights: &mut [f32],
        stride: usize,
        at: usize,
        dim: usize,
        order: &[u32],
        sums: &mut [f32],
    );

    /// [`exponentials`].
    unsafe fn softmax(scores: &mut [f32], stride: usize, rows: usize, part: &mut [f32]);
}

macro_rules! tiles {
    ($lanes:ty, $features:literal, $tokens:literal, $vectors:literal) => {
        // SAFETY (in the functions): the features are those of the lanes, whose presence is the caller's promise.
        unsafe impl Tiles for $lanes {
            #[inline]
            unsafe fn keys<S: Source<Self>, const EACH: bool>(
                rows: &Stored,
                q: &[f32],
                dim: usize,
                order: &[u32],
                scores: &mut [f32],
                stride: usize,
                at: usize,
            ) {
                #[target_feature(enable = $features)]
                fn with<S: Source<$lanes>, const EACH: bool>(
                    rows: &Stored,
                    q: &[f32],
                    dim: usize,
                    order: &[u32],
                    scores: &mut [f32],
                    stride: usize,
                    at: usize,
                ) {
                    keys::<$lanes, S, EACH, $tokens>(rows, q, dim, order, scores, stride, at);
                }
                unsafe { with::<S, EACH>(rows, q, dim, order, scores, stride, at) }
            }

            #[inline]
            unsafe fn values<S: Source<Self>, const EACH: bool>(
                rows: &Stored,
                weights: &mut [f32],
                stride: usize,
                at: usize,
                dim: usize,
                order: &[u32],
                sums: &mut [f32],
            ) {
                #[target_feature(enable = $features)]
                fn with<S: Source<$lanes>, const EACH: bool>(
                    rows: &Stored,
                    weights: &mut [f32],
                    stride: usize,
                    at: usize,
                    dim: usize,
                    order: &[u32],
                    sums: &mut [f32],
                ) {
                    values::<$lanes, S, EACH, $vectors>(rows, weights, stride, at, dim, order, sums);
                }
                unsafe { with::<S, EACH>(rows, weights, stride, at, dim, order, sums) }
            }

            #[inline]
            unsafe fn softmax(scores: &mut [f32], stride: usize, rows: usize, part: &mut [f32]) {
                #[target_feature(enable = $features)]
                fn with(scores: &mut [f32], stride: usize, rows: usize, part: &mut [f32]) {
                    exponentials(scores, stride, rows, part);
                }
                unsafe { with(scores, stride, rows, part) }
            }
        }
    };
}

// The sums of 5 queries by 4 tokens, or by 4 vectors of channels, fill 20 of 32 registers; of 16 registers, half of that.
tiles!(Avx512, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c", 4, 4);
tiles!(Avx2, "avx2,fma,f16c", 2, 2);

/// Runs `$tile::<.., G>` for queries `0 .. group`, in portions of equal size of at most `$most`.
macro_rules! portions {
    ($group:expr, $most:expr, $g:ident, $count:ident => $body:expr) => {{
        let size = $group.div_ceil($group.div_ceil($most));
        let mut $g = 0;
        while $g < $group {
            match size.min($group - $g) {
                1 => {
                    const $count: usize = 1;
                    $body
                }
                2 => {
                    const $count: usize = 2;
                    $body
                }
                3 => {
                    const $count: usize = 3;
                    $body
                }
                4 => {
                    const $count: usize = 4;
                    $body
                }
                _ => {
                    const $count: usize = QUERIES;
                    $body
                }
            }
            $g += size;
        }
    }};
}

#[inline(always)]
fn keys<L: Unpack, S: Source<L>, const EACH: bool, const T: usize>(
    rows: &Stored,
    q: &[f32],
    dim: usize,
    order: &[u32],
    scores: &mut [f32],
    stride: usize,
    at: usize,
) {
    let (group, tokens) = (q.len() / dim, rows.tokens);
    let blocks = rows.row / S::BYTES;
    assert!(blocks * S::BYTES == rows.row && blocks * S::PARTS * L::N == dim && order.len() == dim);
    assert!(scores.len() == group * stride && at + tokens.next_multiple_of(T) <= stride);
    assert!(q.len() == group * dim);
    for t in (0..tokens).step_by(T) {
        rows.fetch::<L>(t, T);
        portions!(group, QUERIES, g, COUNT => {
            let (q, scores) = (&q[g * dim..], &mut scores[g * stride + at + t..]);
            // SAFETY: the caller runs with the instructions of `L`; the assertions above.
            unsafe { keys_tile::<L, S, EACH, T, COUNT>(rows, t, q.as_ptr(), dim, order, scores.as_mut_ptr(), stride) }
        });
    }
    if rows.groups == 1 {
        let (scales, zeros) = (&rows.scales[..tokens], &rows.zeros[..tokens]);
        for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_exact_mut(stride)) {
            let sum = sum_of_products(q, None);
            for ((x, s), z) in scores[at..at + tokens].iter_mut().zip(scales).zip(zeros) {
                *x = *x * *s - sum * *z;
            }
        }
    }
}

/// # Safety
/// The processor has the instructions of `L`. `q` has `G` lines of `dim`, `scores` `G` lines of `T` scores at every `stride`;
/// `dim` is whole blocks.
#[inline(always)]
unsafe fn keys_tile<L: Unpack, S: Source<L>, const EACH: bool, const T: usize, const G: usize>(
    rows: &Stored,
    t: usize,
    q: *const f32,
    dim: usize,
    order: &[u32],
    scores: *mut f32,
    stride: usize,
) {
    unsafe {
        let mut at = [rows.at; T];
        let mut token = [t; T];
        for i in 0..T {
            // A missing token reads the last one again; its score is never looked at.
            token[i] = (t + i).min(rows.tokens - 1);
            at[i] = rows.at.add(token[i] * rows.row);
        }
        let mut acc = [[L::zero(); T]; G];
        for block in 0..rows.row / S::BYTES {
            let mut raw = [S::load(at[0].add(block * S::BYTES)); T];
            for i in 1..T {
                raw[i] = S::load(at[i].add(block * S::BYTES));
            }
            for n in 0..S::PARTS {
                let place = (block * S::PARTS + n) * L::N;
                let mut x = [L::zero(); T];
                for i in 0..T {
                    x[i] = S::part(raw[i], n);
                    if EACH {
                        let (s, z) = rows.parameters(token[i], order[place], dim);
                        x[i] = L::fma(x[i], L::splat(s), L::splat(-z));
                    }
                }
                for g in 0..G {
                    let query = L::load(q.add(g * dim + place));
                    for i in 0..T {
                        acc[g][i] = L::fma(x[i], query, acc[g][i]);
                    }
                }
            }
        }
        // Four sums at a time: of one query, or of two.
        let mut g = 0;
        while g < G {
            let mut four = [L::zero(); 4];
            for k in 0..4 {
                if g + k / T < G {
                    four[k] = acc[g + k / T][k % T];
                }
            }
            let four = L::sums4(four);
            for k in 0..4 {
                if g + k / T < G {
                    *scores.add((g + k / T) * stride + k % T) = four[k];
                }
            }
            g += 4 / T;
        }
    }
}

#[inline(always)]
fn values<L: Unpack, S: Source<L>, const EACH: bool, const V: usize>(
    rows: &Stored,
    weights: &mut [f32],
    stride: usize,
    at: usize,
    dim: usize,
    order: &[u32],
    sums: &mut [f32],
) {
    let (group, tokens) = (sums.len() / dim, rows.tokens);
    let blocks = rows.row / S::BYTES;
    assert!(blocks * S::BYTES == rows.row && blocks * S::PARTS * L::N == dim && order.len() == dim);
    assert!(weights.len() == group * stride && at + tokens <= stride && sums.len() == group * dim);
    if rows.groups == 1 {
        let (scales, zeros) = (&rows.scales[..tokens], &rows.zeros[..tokens]);
        for (weights, sums) in weights.chunks_exact_mut(stride).zip(sums.chunks_exact_mut(dim)) {
            let weights = &mut weights[at..at + tokens];
            let zero = sum_of_products(weights, Some(zeros));
            for sum in sums {
                *sum -= zero;
            }
            weights.iter_mut().zip(scales).for_each(|(w, s)| *w *= *s);
        }
    }
    let most = if S::PARTS > V { QUERIES.div_ceil(2) } else { QUERIES };
    portions!(group, most, g, COUNT => {
        let (weights, sums) = (&weights[g * stride + at..], &mut sums[g * dim..]);
        let (weights, sums) = (weights.as_ptr(), sums.as_mut_ptr());
        let mut block = 0;
        // SAFETY: the caller runs with the instructions of `L`; the assertions above.
        unsafe {
            if S::PARTS > V {
                for block in 0..blocks {
                    values_tile::<L, S, EACH, 4, COUNT>(rows, block, weights, stride, dim, order, sums);
                }
            } else {
                let at_once = V / S::PARTS;
                while block + at_once <= blocks {
                    values_tile::<L, S, EACH, V, COUNT>(rows, block, weights, stride, dim, order, sums);
                    block += at_once;
                }
                if block < blocks {
                    values_tile::<L, S, EACH, 2, COUNT>(rows, block, weights, stride, dim, order, sums);
                }
            }
        }
    });
}

/// The blocks from `block` on that make `V` vectors.
///
/// # Safety
/// The processor has the instructions of `L`. `sums` has `G` lines of `dim`, `weights` `G` lines of a weight for each token, at
/// every `stride`; there are that many blocks.
#[inline(always)]
unsafe fn values_tile<L: Unpack, S: Source<L>, const EACH: bool, const V: usize, const G: usize>(
    rows: &Stored,
    block: usize,
    weights: *const f32,
    stride: usize,
    dim: usize,
    order: &[u32],
    sums: *mut f32,
) {
    unsafe {
        let first = block * S::PARTS * L::N;
        let mut acc = [[L::zero(); V]; G];
        for t in 0..rows.tokens {
            let at = rows.at.add(t * rows.row + block * S::BYTES);
            let mut x = [L::zero(); V];
            for b in 0..V / S::PARTS {
                let raw = S::load(at.add(b * S::BYTES));
                for n in 0..S::PARTS {
                    let v = b * S::PARTS + n;
                    x[v] = S::part(raw, n);
                    if EACH {
                        let (s, z) = rows.parameters(t, order[first + v * L::N], dim);
                        x[v] = L::fma(x[v], L::splat(s), L::splat(-z));
                    }
                }
            }
            for g in 0..G {
                let weight = L::splat(*weights.add(g * stride + t));
                for v in 0..V {
                    acc[g][v] = L::fma(x[v], weight, acc[g][v]);
                }
            }
        }
        for g in 0..G {
            for v in 0..V {
                let to = sums.add(g * dim + first + v * L::N);
                L::store(L::fma(acc[g][v], L::splat(1.0), L::load(to)), to);
            }
        }
    }
}

/// `Σ x y`, or `Σ x`, in as many chains as vectors have lanes.
#[inline(always)]
fn sum_of_products(x: &[f32], y: Option<&[f32]>) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    match y {
        Some(y) => {
            for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
                sums.iter_mut().zip(x).zip(y).for_each(|((sum, x), y)| *sum += x * y);
            }
        }
        None => {
            for x in x.chunks(LANES) {
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
            }
        }
    }
    sums.iter().sum()
}
