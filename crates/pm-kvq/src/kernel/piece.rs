//! One piece of one key head as vector code: all scores, their softmax, all values.

use std::cell::RefCell;

use half::{bf16, f16};
use nics_kernels::lanes::{Avx2, Avx512};
use nics_kernels::{Isa, Values};

use super::source::{Blocks4, Blocks8, Codes2, Codes4, Codes8, Numbers, Source};
use super::stored::Stored;
use super::tile::Tiles;
use super::{Blocks, Page, PageView, Rows};
use crate::{Bits, pack};

/// What a piece computes in; kept from one to the next.
#[derive(Debug, Default)]
struct Scratch {
    /// `[group, stride]`: scores, then weights.
    scores: Vec<f32>,
    /// `[group, dim]`: queries in the order of a format's channels.
    queries: Vec<f32>,
    /// `[group, dim]`: sums, likewise.
    sums: Vec<f32>,
    /// The orders that were met.
    orders: Vec<Order>,
}

/// The order in which the channels of a format come out of its blocks.
#[derive(Debug)]
struct Order {
    of: (Format, usize, usize),
    /// `[dim]`: the channel at each place.
    channels: Vec<u32>,
}

/// A format of stored rows, as far as its order goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Codes(Bits),
    Pairs,
    Natural,
}

impl Format {
    fn of(rows: &Rows) -> Self {
        match rows {
            Rows::Codes(page) => Self::Codes(page.bits),
            Rows::Exact(Values::Bf16(_)) => Self::Pairs,
            Rows::Exact(_) | Rows::Blocks(_) => Self::Natural,
        }
    }

    fn channel<L: Tiles>(self, dim: usize, place: usize) -> usize {
        let (vector, lane) = (place / L::N, place % L::N);
        let (two, four) = ((vector / 2, vector % 2), (vector / 4, vector % 4));
        match self {
            Self::Codes(Bits::B4) => <Codes4 as Source<L>>::channel(dim, two.0, two.1, lane),
            Self::Codes(Bits::B2) => <Codes2 as Source<L>>::channel(dim, four.0, four.1, lane),
            Self::Pairs => <Numbers<bf16> as Source<L>>::channel(dim, two.0, two.1, lane),
            Self::Codes(_) | Self::Natural => place,
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Writes `part`, `[group * (2 + dim)]`: for each query the largest score, the sum of the exponentials, and `Σ e v`. `q`:
/// `[group, dim]`. Every page has a token. `false`, and nothing is done, when rows or groups of codes fill no vectors.
pub fn attend(isa: Isa, q: &[f32], pages: &[Page<'_>], dim: usize, part: &mut [f32]) -> bool {
    (isa >= Isa::Avx512 && with::<Avx512>(q, pages, dim, part))
        || (isa >= Isa::Avx2 && with::<Avx2>(q, pages, dim, part))
}

fn with<L: Tiles>(q: &[f32], pages: &[Page<'_>], dim: usize, part: &mut [f32]) -> bool {
    let fit = pages.iter().all(|p| fits::<L>(dim, &p.keys) && fits::<L>(dim, &p.values));
    if fit {
        SCRATCH.with(|scratch| run::<L>(q, pages, dim, part, &mut scratch.borrow_mut()));
    }
    fit
}

/// Whether rows are whole blocks, and every vector's channels share a scale.
fn fits<L: Tiles>(dim: usize, rows: &Rows) -> bool {
    let Rows::Codes(PageView { bits, tokens, scales, .. }) = rows else {
        // Blocks of 32 are refused at the entry where they do not fill rows.
        return dim.is_multiple_of(2 * L::N);
    };
    let group = dim / (scales.len() / tokens);
    if *bits == Bits::B8 {
        return dim.is_multiple_of(2 * L::N) && group.is_multiple_of(L::N);
    }
    let run = pack::run(*bits, dim);
    let stride = bits.bytes(run);
    // A vector's channels: neighbours in a run, or of several neighbouring runs.
    let span = if stride >= L::N { L::N } else { run * (L::N / stride) };
    bits.bytes(dim).is_multiple_of(L::N) && (group == dim || group.is_multiple_of(span))
}

/// Runs `$body` with `$S` naming the source of `$rows` and `$stored` bound to where they lie.
macro_rules! each_source {
    ($rows:expr, $dim:expr, $S:ident, $stored:ident => $body:expr) => {
        match &$rows {
            Rows::Codes(page) => {
                let $stored = Stored::codes(page, $dim);
                match page.bits {
                    Bits::B8 => {
                        type $S = Codes8;
                        $body
                    }
                    Bits::B4 => {
                        type $S = Codes4;
                        $body
                    }
                    Bits::B2 => {
                        type $S = Codes2;
                        $body
                    }
                    Bits::B16 => unreachable!("refused at the entry"),
                }
            }
            Rows::Blocks(Blocks::Q8(rows)) => {
                type $S = Blocks8;
                let $stored = Stored::rows(rows, $dim / 32 * 34);
                $body
            }
            Rows::Blocks(Blocks::Q4(rows)) => {
                type $S = Blocks4;
                let $stored = Stored::rows(rows, $dim / 32 * 18);
                $body
            }
            Rows::Exact(Values::F32(rows)) => {
                type $S = Numbers<f32>;
                let $stored = Stored::rows(rows, $dim);
                $body
            }
            Rows::Exact(Values::Bf16(rows)) => {
                type $S = Numbers<bf16>;
                let $stored = Stored::rows(rows, $dim);
                $body
            }
            Rows::Exact(Values::F16(rows)) => {
                type $S = Numbers<f16>;
                let $stored = Stored::rows(rows, $dim);
                $body
            }
        }
    };
}

fn run<L: Tiles>(q: &[f32], pages: &[Page<'_>], dim: usize, part: &mut [f32], scratch: &mut Scratch) {
    let group = q.len() / dim;
    let tokens: usize = pages.iter().map(|page| page.keys.tokens(dim)).sum();
    // Tokens are taken several at a time: the last may reach past the end.
    let stride = tokens.next_multiple_of(16) + 16;
    let Scratch { scores, queries, sums, orders } = scratch;
    scores.clear();
    scores.resize(group * stride, 0.0);
    queries.resize(group * dim, 0.0);
    let (mut at, mut now) = (0, None);
    for (i, page) in pages.iter().enumerate() {
        let format = Format::of(&page.keys);
        let next = [pages.get(i + 1).map_or(&[][..], |page| page.keys.bytes()), page.values.bytes()];
        let order = order::<L>(orders, format, dim);
        if now.replace(format) != Some(format) {
            for (to, from) in queries.chunks_exact_mut(dim).zip(q.chunks_exact(dim)) {
                to.iter_mut().zip(order).for_each(|(to, channel)| *to = from[*channel as usize]);
            }
        }
        each_source!(page.keys, dim, S, rows => {
            let rows = rows.before(next);
            // SAFETY: the processor has the instructions, as asserted at the entry; the rows are whole blocks (`fits`).
            unsafe {
                if rows.groups > 1 {
                    L::keys::<S, true>(&rows, queries, dim, order, scores, stride, at);
                } else {
                    L::keys::<S, false>(&rows, queries, dim, order, scores, stride, at);
                }
            }
        });
        at += page.keys.tokens(dim);
    }
    // SAFETY: as above.
    unsafe { L::softmax(scores, stride, tokens, part) };
    let out = &mut part[2 * group..];
    out.fill(0.0);
    sums.clear();
    sums.resize(group * dim, 0.0);
    (at, now) = (0, None);
    for page in pages {
        let format = Format::of(&page.values);
        if let Some(before) = now.replace(format).filter(|before| *before != format) {
            put_back(order::<L>(orders, before, dim), sums, out);
        }
        let order = order::<L>(orders, format, dim);
        each_source!(page.values, dim, S, rows => {
            // SAFETY: as above.
            unsafe {
                if rows.groups > 1 {
                    L::values::<S, true>(&rows, scores, stride, at, dim, order, sums);
                } else {
                    L::values::<S, false>(&rows, scores, stride, at, dim, order, sums);
                }
            }
        });
        at += page.values.tokens(dim);
    }
    if let Some(format) = now {
        put_back(order::<L>(orders, format, dim), sums, out);
    }
}

/// Adds the sums to `out` in the natural order, and clears them.
fn put_back(order: &[u32], sums: &mut [f32], out: &mut [f32]) {
    for (sums, out) in sums.chunks_exact_mut(order.len()).zip(out.chunks_exact_mut(order.len())) {
        for (sum, channel) in sums.iter_mut().zip(order) {
            out[*channel as usize] += std::mem::take(sum);
        }
    }
}

fn order<L: Tiles>(orders: &mut Vec<Order>, format: Format, dim: usize) -> &[u32] {
    let of = (format, L::N, dim);
    let at = orders.iter().position(|order| order.of == of).unwrap_or_else(|| {
        let channels = (0..dim).map(|place| format.channel::<L>(dim, place) as u32).collect();
        orders.push(Order { of, channels });
        orders.len() - 1
    });
    &orders[at].channels
}
