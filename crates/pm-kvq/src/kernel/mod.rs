//! CPU kernels over the cache's pages as plain slices: decode attention that reads codes where they lie, and halving of
//! widths in place.
//!
//! A page is up to 128 tokens of one key/value head. Its codes stand in the native layout ([`crate::pack`]); each token has
//! a scale and a zero for each group of its channels, `x̂ = code · s − z`. With one group a head, dequantization leaves the
//! sums over channels and tokens:
//!
//! ```text
//! score_t = s_t · (q · c_t) − z_t · Σ q        out = Σ_t (e_t s_t) c_t − Σ_t e_t z_t
//! ```
//!
//! so that no dequantized copy is ever made; with smaller groups a code becomes `x̂` in the register that it is unpacked
//! into. A page is read once for all query heads of its group. The softmax goes by pieces of some [`PIECE`] tokens that are
//! computed side by side and put together afterwards; where a sequence is cut depends on its pages alone, so its result is
//! the same bit for bit in every batch and at every number of threads.
//!
//! AVX-512 and AVX2 are chosen at run time; [`Isa::Scalar`] is the reference that they are held against, and serves widths
//! of heads that fill no vectors.

// Vector code gets its instructions by being inlined into a function that has them; indices keep its loops over registers.
#![allow(clippy::inline_always, clippy::needless_range_loop)]

pub mod narrow;
#[cfg(target_arch = "x86_64")]
mod piece;
mod plain;
mod rows;
#[cfg(target_arch = "x86_64")]
mod source;
#[cfg(target_arch = "x86_64")]
mod stored;
#[cfg(target_arch = "x86_64")]
mod tile;

use std::cell::RefCell;
use std::ops::Range;

use nics_kernels::attention::put_together;
pub use nics_kernels::attention::{Heads, PIECE};
use nics_kernels::{Isa, Pool, Values, ValuesMut, each_kind};
pub use rows::{Blocks, Page, PageView, Rows};

/// Decode attention: softmax of `scale · q kᵀ` over all kept tokens, times `v`; one row for each of `sequences`.
///
/// # Shapes
/// `q`: `[sequences, query heads, dim]`, rotated. Each of `sequences`: `[key heads, pages]`, each head's pages in the order
/// of their tokens. `out`: the shape of `q`.
///
/// # Panics
/// When lengths do not fit, a sequence has no token, or its heads differ in theirs.
pub fn attend(pool: &Pool, heads: Heads, q: Values, scale: f32, sequences: &[&[Page<'_>]], out: ValuesMut) {
    attend_with(Isa::detect(), pool, heads, q, scale, sequences, out);
}

/// A part of the pages of one key head: `pages`, the first from token `from` on, the last up to token `to`.
#[derive(Debug)]
struct Piece {
    sequence: usize,
    key_head: usize,
    pages: Range<usize>,
    from: usize,
    to: usize,
}

/// Cuts sequence `s` into pieces: at the end of a page once there are [`PIECE`] tokens, and inside longer pages.
fn cut(s: usize, sequence: &[Page<'_>], heads: Heads, pieces: &mut Vec<Piece>) {
    let Heads { keys, dim, .. } = heads;
    assert!(
        !sequence.is_empty() && sequence.len().is_multiple_of(keys),
        "sequence {s}: {} pages for {keys} key heads",
        sequence.len()
    );
    let pages = sequence.len() / keys;
    for page in sequence {
        page.keys.check(dim);
        page.values.check(dim);
    }
    for (i, page) in sequence.iter().enumerate() {
        let (k, v, first) =
            (page.keys.tokens(dim), page.values.tokens(dim), sequence[i % pages].keys.tokens(dim));
        assert!(
            k == v && k == first,
            "sequence {s}, key head {}, page {}: {k} keys, {v} values, {first} keys in key head 0",
            i / pages,
            i % pages
        );
    }
    let mut add = |pages: Range<usize>, from, to| {
        let piece = |key_head| Piece { sequence: s, key_head, pages: pages.clone(), from, to };
        pieces.extend((0..keys).map(piece));
    };
    // Where the open piece begins, and its tokens.
    let (mut begin, mut count) = ((0, 0), 0);
    for (p, page) in sequence[..pages].iter().enumerate() {
        let tokens = page.keys.tokens(dim);
        for from in (0..tokens).step_by(PIECE) {
            if count == 0 {
                begin = (p, from);
            }
            let to = (from + PIECE).min(tokens);
            count += to - from;
            if count >= PIECE {
                add(begin.0..p + 1, begin.1, to);
                count = 0;
            }
        }
    }
    if count > 0 {
        let last = sequence[..pages].iter().rposition(|page| page.keys.tokens(dim) > 0).unwrap_or(0);
        add(begin.0..last + 1, begin.1, sequence[last].keys.tokens(dim));
    }
}

struct Shared(*mut f32);

// SAFETY: pieces write disjoint ranges of the scratch.
unsafe impl Sync for Shared {}

thread_local! {
    /// The scaled queries, and the parts of all pieces.
    static PARTS: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// [`attend`] with chosen instructions.
///
/// # Panics
/// As [`attend`], and when the processor lacks the instructions.
pub fn attend_with(
    isa: Isa,
    pool: &Pool,
    heads: Heads,
    q: Values,
    scale: f32,
    sequences: &[&[Page<'_>]],
    out: ValuesMut,
) {
    isa.assert_available();
    let Heads { queries, keys, dim } = heads;
    assert!(dim > 0 && keys > 0 && queries > 0 && queries.is_multiple_of(keys), "{heads:?} are no heads");
    let (group, row) = (queries / keys, queries * dim);
    assert_eq!(q.len(), sequences.len() * row, "q is not [{}, {queries}, {dim}]", sequences.len());
    assert_eq!(out.len(), q.len(), "out is not of the shape of q");
    let mut pieces = Vec::new();
    let mut first = Vec::with_capacity(sequences.len() + 1);
    for (s, pages) in sequences.iter().enumerate() {
        first.push(pieces.len());
        cut(s, pages, heads, &mut pieces);
        assert!(pieces.len() > first[s], "sequence {s} has no token");
    }
    first.push(pieces.len());
    let part = group * (2 + dim);
    PARTS.with(|scratch| {
        let mut scratch = scratch.borrow_mut();
        let (scaled, parts) = &mut *scratch;
        scaled.clear();
        scaled.resize(q.len(), 0.0);
        q.widen(scaled);
        for x in scaled.iter_mut() {
            *x *= scale;
        }
        parts.clear();
        parts.resize(pieces.len() * part, 0.0);
        let shared = Shared(parts.as_mut_ptr());
        let scaled = &*scaled;
        pool.run(pieces.len(), &|i| {
            let piece = &pieces[i];
            let n = sequences[piece.sequence].len() / keys;
            let pages = &sequences[piece.sequence][piece.key_head * n..][piece.pages.clone()];
            let q = &scaled[piece.sequence * row + piece.key_head * group * dim..][..group * dim];
            let shared = &shared;
            // SAFETY: this piece alone writes the `part` values from here on.
            let part = unsafe { std::slice::from_raw_parts_mut(shared.0.add(i * part), part) };
            let last = pages.len() - 1;
            let whole = pages.iter().enumerate().filter(|(_, page)| page.keys.tokens(dim) > 0);
            let pages: Vec<Page> = whole
                .map(|(p, page)| {
                    let from = if p == 0 { piece.from } else { 0 };
                    let to = if p == last { piece.to } else { page.keys.tokens(dim) };
                    Page { keys: page.keys.part(dim, from, to), values: page.values.part(dim, from, to) }
                })
                .collect();
            #[cfg(target_arch = "x86_64")]
            if piece::attend(isa, q, &pages, dim, part) {
                return;
            }
            plain::attend(q, &pages, dim, part);
        });
        let parts = &*parts;
        each_kind!(out, ValuesMut, out => for (s, out) in out.chunks_exact_mut(row).enumerate() {
            put_together(&parts[first[s] * part..first[s + 1] * part], keys, dim, out);
        });
    });
}
