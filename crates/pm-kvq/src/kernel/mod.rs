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
#[cfg(target_arch = "x86_64")]
mod source;
#[cfg(target_arch = "x86_64")]
mod tile;

use std::cell::RefCell;
use std::ops::Range;

use nics_kernels::attention::put_together;
pub use nics_kernels::attention::{Heads, PIECE};
use nics_kernels::{Isa, Kind, Pool, Values, ValuesMut, each_kind};

use crate::Bits;

/// Codes of up to a page's tokens of one key/value head.
#[derive(Debug, Clone, Copy)]
pub struct PageView<'a> {
    /// Their width: 8, 4 or 2 bits.
    pub bits: Bits,
    /// How many tokens.
    pub tokens: usize,
    /// `[tokens, head_dim]`, in the native layout of [`crate::pack`].
    pub codes: &'a [u8],
    /// `[tokens, head_dim / group]`.
    pub scales: &'a [f32],
    /// Of the shape of `scales`; `x̂ = code · s − z`.
    pub zeros: &'a [f32],
}

/// Keys or values of some tokens of one key/value head.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// As codes.
    Codes(PageView<'a>),
    /// As numbers, `[tokens, head_dim]`: the first tokens, the window, and pages that were never quantized.
    Exact(Values<'a>),
}

impl<'a> Rows<'a> {
    /// Exact rows that lie in a page of bytes, as bf16 or f16.
    ///
    /// # Panics
    /// When the bytes are not whole, aligned values, or `kind` is another.
    pub fn of_bytes(bytes: &'a [u8], kind: Kind) -> Self {
        fn whole<T>(bytes: &[u8]) -> &[T] {
            // SAFETY: bf16 and f16 are sixteen bits of which every pattern is a value.
            let (before, values, after) = unsafe { bytes.align_to::<T>() };
            assert!(before.is_empty() && after.is_empty(), "16-bit rows in bytes that are not whole values");
            values
        }
        Self::Exact(match kind {
            Kind::Bf16 => Values::Bf16(whole(bytes)),
            Kind::F16 => Values::F16(whole(bytes)),
            Kind::F32 => panic!("16-bit rows are bf16 or f16, not f32"),
        })
    }

    /// How many tokens.
    pub fn tokens(&self, head_dim: usize) -> usize {
        match self {
            Self::Codes(page) => page.tokens,
            Self::Exact(rows) => rows.len() / head_dim,
        }
    }

    /// Where they lie.
    #[cfg(target_arch = "x86_64")]
    fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Codes(page) => page.codes,
            Self::Exact(rows) => each_kind!(rows, Values, rows => {
                // SAFETY: the bytes of numbers.
                unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), size_of_val(*rows)) }
            }),
        }
    }

    fn check(&self, head_dim: usize) {
        match self {
            Self::Codes(PageView { bits, tokens, codes, scales, zeros }) => {
                assert!(
                    *bits != Bits::B16,
                    "codes of 16 bits are not attended; dequantize them into exact rows"
                );
                assert!(head_dim.is_multiple_of(4), "rows of {head_dim} codes do not fill bytes");
                assert_eq!(codes.len(), bits.bytes(tokens * head_dim), "bytes of codes for {tokens} tokens");
                let groups = scales.len().checked_div(*tokens).unwrap_or(0);
                let whole = *tokens == 0 || groups > 0 && head_dim.is_multiple_of(groups);
                assert!(
                    whole && scales.len() == tokens * groups && zeros.len() == scales.len(),
                    "{} scales and {} zeros are not [{tokens}, {head_dim} / group]",
                    scales.len(),
                    zeros.len()
                );
            }
            Self::Exact(rows) => {
                assert!(
                    rows.len().is_multiple_of(head_dim),
                    "{} values are no rows of {head_dim}",
                    rows.len()
                );
            }
        }
    }

    /// The tokens `from .. to` alone.
    fn part(&self, head_dim: usize, from: usize, to: usize) -> Self {
        match *self {
            Self::Codes(page) => {
                let (row, groups) = (page.bits.bytes(head_dim), page.scales.len() / page.tokens);
                Self::Codes(PageView {
                    tokens: to - from,
                    codes: &page.codes[from * row..to * row],
                    scales: &page.scales[from * groups..to * groups],
                    zeros: &page.zeros[from * groups..to * groups],
                    ..page
                })
            }
            Self::Exact(rows) => {
                let range = from * head_dim..to * head_dim;
                Self::Exact(match rows {
                    Values::F32(x) => Values::F32(&x[range]),
                    Values::Bf16(x) => Values::Bf16(&x[range]),
                    Values::F16(x) => Values::F16(&x[range]),
                })
            }
        }
    }
}

/// Keys and values of the same tokens of one key/value head.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a> {
    /// Keys, rotated.
    pub keys: Rows<'a>,
    /// Values.
    pub values: Rows<'a>,
}

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
