//! What one layer of one sequence stores: its sink and its pages, in the cache's pools.
//!
//! A page's block holds the rows of all heads, `[keys and values, kv_heads, tokens of a page, head_dim]`, exact or as codes
//! in the native layout ([`crate::pack`]); a second one, from another pool, its scales and then its zeros, float32, each
//! `[keys and values, kv_heads, tokens of a page, groups]`. From 16 to 8 bits rows are quantized, below the codes are shifted, so that
//! a width is always reached in the same way and what is stored depends on the rows and the width alone.

use half::{bf16, f16};
use nics_kernels::{Element, Kind, Values};

use super::pool::{Block, Pool};
use crate::kernel::{PageView, Rows, narrow};
use crate::ledger::{Ledger, Shape};
use crate::shrink::{self, Shift};
use crate::{Bits, pack};

/// How the rows of every layer of a cache are laid out.
#[derive(Debug, Clone)]
pub struct Layout {
    /// What a token is.
    pub shape: Shape,
    /// Tokens of the sink.
    pub sink: usize,
    /// Tokens of a page.
    pub page: usize,
    /// Format of exact rows.
    pub exact: Kind,
    /// How codes are halved.
    pub shift: Shift,
}

impl Layout {
    fn groups(&self) -> usize {
        self.shape.head_dim / self.shape.group
    }

    /// Rows of a block: keys and values of all heads.
    fn rows(&self) -> usize {
        2 * self.shape.kv_heads * self.page
    }

    /// Bytes of a row of one head.
    fn row(&self, bits: Bits) -> usize {
        if bits == Bits::B16 {
            self.shape.head_dim * self.exact.size()
        } else {
            bits.bytes(self.shape.head_dim)
        }
    }

    /// Order of an exact page's block, whose unit is a page of 2 bits.
    fn exact_order(&self) -> u8 {
        if self.exact == Kind::F32 { 4 } else { 3 }
    }

    /// Bytes of a page at a width, scales and zeros included.
    pub fn page_bytes(&self, bits: Bits) -> usize {
        let parameters = if bits == Bits::B16 { 0 } else { self.parameter_bytes() };
        self.rows() * self.row(bits) + parameters
    }

    fn parameter_bytes(&self) -> usize {
        self.rows() * self.groups() * 2 * size_of::<f32>()
    }

    /// Bytes of a sink.
    pub fn sink_bytes(&self) -> usize {
        2 * self.shape.kv_heads * self.sink * self.row(Bits::B16)
    }
}

/// The pools of a cache.
#[derive(Debug)]
pub struct Pools {
    pages: Pool,
    parameters: Pool,
    sinks: Pool,
}

impl Pools {
    /// Empty pools for a layout.
    pub fn new(layout: &Layout) -> Self {
        Self {
            pages: Pool::new(layout.rows() * layout.row(Bits::B2), layout.exact_order()),
            parameters: Pool::new(layout.parameter_bytes(), 0),
            sinks: Pool::new(layout.sink_bytes(), 0),
        }
    }

    /// Bytes that the pools hold.
    pub fn allocated(&self) -> usize {
        self.pages.allocated() + self.parameters.allocated() + self.sinks.allocated()
    }

    /// Bytes given out.
    pub fn used(&self) -> usize {
        self.pages.used() + self.parameters.used() + self.sinks.used()
    }
}

#[derive(Debug)]
struct Page {
    bits: Bits,
    block: Block,
    /// Scales and zeros; `None` while rows are exact.
    parameters: Option<Block>,
}

/// What a layer stores; its [`Ledger`] says how much of it counts.
#[derive(Debug, Default)]
pub struct Store {
    sink: Option<Block>,
    pages: Vec<Page>,
}

/// New rows of one sequence, `[rows, kv_heads, head_dim]` each, keys rotated.
#[derive(Debug, Clone, Copy)]
pub struct NewRows<'a> {
    /// Keys.
    pub keys: &'a [f32],
    /// Values.
    pub values: &'a [f32],
}

impl Store {
    /// Takes in new rows: what is stored agrees with `before` and agrees with `after` afterwards.
    pub fn append(
        &mut self,
        pools: &mut Pools,
        layout: &Layout,
        before: &Ledger,
        after: &Ledger,
        new: NewRows,
    ) {
        let mut next = 0; // the next of the new rows
        if after.sink() > before.sink() {
            let sink = self.sink.get_or_insert_with(|| pools.sinks.take(0));
            let rows = before.sink()..after.sink();
            write(pools.sinks.bytes_mut(sink), layout, layout.sink, rows.clone(), new, next);
            next += rows.len();
        }
        let old = self.pages.len();
        let written = |p: usize| before.pages().get(p).map_or(0, |page| page.tokens);
        // Full pages first: what they free is there for the new ones.
        for (p, state) in after.pages()[..old].iter().enumerate().filter(|(p, s)| s.tokens == written(*p)) {
            self.narrow(pools, layout, p, state.bits);
        }
        for (p, state) in after.pages().iter().enumerate().filter(|(p, s)| s.tokens > written(*p)) {
            if p >= old {
                let block = pools.pages.take(layout.exact_order());
                self.pages.push(Page { bits: Bits::B16, block, parameters: None });
            }
            let rows = written(p)..state.tokens;
            write(pools.pages.bytes_mut(&self.pages[p].block), layout, layout.page, rows.clone(), new, next);
            next += rows.len();
            self.narrow(pools, layout, p, state.bits);
        }
    }

    /// Narrows page `p` to a width.
    fn narrow(&mut self, pools: &mut Pools, layout: &Layout, p: usize, to: Bits) {
        let page = &mut self.pages[p];
        let d = layout.shape.head_dim;
        while page.bits > to {
            let Some(half) = page.bits.half() else { return };
            let parameters = page.parameters.get_or_insert_with(|| pools.parameters.take(0));
            let floats = floats_mut(pools.parameters.bytes_mut(parameters));
            let (scales, zeros) = floats.split_at_mut(floats.len() / 2);
            let rows = pools.pages.bytes_mut(&page.block);
            match (page.bits, layout.shift) {
                (Bits::B16, Shift::Equivalent) if layout.exact != Kind::F32 => {
                    narrow::quantize(layout.exact, d, layout.shape.group, rows, scales, zeros);
                }
                (Bits::B16, shift) => quantize(layout, shift, rows, scales, zeros),
                (from, Shift::Equivalent) => narrow::halve(from, d, rows, scales),
                (from, shift) => {
                    shrink::shrink_codes(shift, from, d, rows);
                    for (s, z) in scales.iter_mut().zip(zeros) {
                        (*s, *z) = shrink::parameters(shift, from, *s, *z);
                    }
                }
            }
            pools.pages.halve(&mut page.block);
            if page.bits == Bits::B16 && layout.exact == Kind::F32 {
                pools.pages.halve(&mut page.block);
            }
            page.bits = half;
        }
    }

    /// Forgets what `ledger`, cut back before, no longer counts.
    pub fn truncate(&mut self, pools: &mut Pools, ledger: &Ledger) {
        for page in self.pages.drain(ledger.pages().len().min(self.pages.len())..) {
            release(pools, page);
        }
        if ledger.sink() == 0
            && let Some(sink) = self.sink.take()
        {
            pools.sinks.give(sink);
        }
    }

    /// Gives everything back.
    pub fn close(&mut self, pools: &mut Pools) {
        for page in self.pages.drain(..) {
            release(pools, page);
        }
        if let Some(sink) = self.sink.take() {
            pools.sinks.give(sink);
        }
    }

    /// A copy of the first `pages` pages, and of the sink.
    pub fn copy(&self, pools: &mut Pools, pages: usize) -> Self {
        let copied = |pool: &mut Pool, block: &Block, order: u8| {
            let own = pool.take(order);
            let bytes = pool.bytes(block).to_vec();
            pool.bytes_mut(&own).copy_from_slice(&bytes);
            own
        };
        let sink = self.sink.as_ref().map(|block| copied(&mut pools.sinks, block, 0));
        let pages = self.pages.iter().take(pages).map(|page| Page {
            bits: page.bits,
            block: copied(&mut pools.pages, &page.block, page.block.order()),
            parameters: page.parameters.as_ref().map(|block| copied(&mut pools.parameters, block, 0)),
        });
        let pages = pages.collect();
        Self { sink, pages }
    }

    /// Bytes of the blocks that it holds.
    pub fn allocated(&self, layout: &Layout) -> usize {
        let sink = if self.sink.is_some() { layout.sink_bytes() } else { 0 };
        sink + self.pages.iter().map(|page| layout.page_bytes(page.bits)).sum::<usize>()
    }

    /// Keys (`part` 0) or values (`part` 1) of one head, in the order of the tokens.
    pub fn views<'a>(
        &'a self,
        pools: &'a Pools,
        layout: &'a Layout,
        ledger: &'a Ledger,
        part: usize,
        head: usize,
    ) -> impl Iterator<Item = Rows<'a>> {
        let place = part * layout.shape.kv_heads + head;
        let exact = move |bytes: &'a [u8], capacity: usize, tokens: usize| {
            let row = layout.row(Bits::B16);
            exact_rows(&bytes[place * capacity * row..][..tokens * row], layout.exact)
        };
        let sink = self.sink.as_ref().filter(|_| ledger.sink() > 0);
        let sink = sink.map(|block| exact(pools.sinks.bytes(block), layout.sink, ledger.sink()));
        let pages = self.pages.iter().zip(ledger.pages()).map(move |(page, state)| {
            let bytes = pools.pages.bytes(&page.block);
            let Some(parameters) = &page.parameters else { return exact(bytes, layout.page, state.tokens) };
            let (row, groups) = (layout.row(page.bits), layout.groups());
            let (scales, zeros) = {
                let floats = floats(pools.parameters.bytes(parameters));
                floats.split_at(floats.len() / 2)
            };
            let first = place * layout.page;
            Rows::Codes(PageView {
                bits: page.bits,
                tokens: state.tokens,
                codes: &bytes[first * row..][..state.tokens * row],
                scales: &scales[first * groups..][..state.tokens * groups],
                zeros: &zeros[first * groups..][..state.tokens * groups],
            })
        });
        sink.into_iter().chain(pages)
    }

    /// Keys and values as they read, written into `[kv_heads, tokens, head_dim]` each.
    pub fn read<T: Element>(
        &self,
        pools: &Pools,
        layout: &Layout,
        ledger: &Ledger,
        [keys, values]: [&mut [T]; 2],
    ) {
        let d = layout.shape.head_dim;
        let of_head = ledger.tokens() * d;
        let mut codes = vec![0; layout.page * d];
        for (part, out) in [keys, values].into_iter().enumerate() {
            for (head, out) in out.chunks_exact_mut(of_head.max(1)).enumerate() {
                let mut rest = out;
                for rows in self.views(pools, layout, ledger, part, head) {
                    let (own, next) = rest.split_at_mut(rows.tokens(d) * d);
                    dequantize(&rows, d, &mut codes, own);
                    rest = next;
                }
            }
        }
    }

    /// Raw blocks, for a snapshot: the bytes of the sink, of the pages, of scales and zeros.
    pub fn raw(&self, pools: &Pools) -> [Vec<u8>; 3] {
        let sink = self.sink.as_ref().map_or(Vec::new(), |block| pools.sinks.bytes(block).to_vec());
        let (mut pages, mut parameters) = (Vec::new(), Vec::new());
        for page in &self.pages {
            pages.extend_from_slice(pools.pages.bytes(&page.block));
            if let Some(block) = &page.parameters {
                parameters.extend_from_slice(pools.parameters.bytes(block));
            }
        }
        [sink, pages, parameters]
    }

    /// From what [`raw`](Self::raw) gave; `None` when the lengths do not fit.
    pub fn of_raw(
        pools: &mut Pools,
        layout: &Layout,
        widths: &[Bits],
        [mut sink, mut pages, mut parameters]: [&[u8]; 3],
    ) -> Option<Self> {
        fn fill(pool: &mut Pool, order: u8, from: &mut &[u8]) -> Option<Block> {
            let (own, rest) = from.split_at_checked(pool.size(order))?;
            *from = rest;
            let block = pool.take(order);
            pool.bytes_mut(&block).copy_from_slice(own);
            Some(block)
        }
        let mut store = Self::default();
        let mut whole = || -> Option<()> {
            if !sink.is_empty() {
                store.sink = Some(fill(&mut pools.sinks, 0, &mut sink)?);
            }
            for bits in widths {
                let order = match bits {
                    Bits::B16 => layout.exact_order(),
                    Bits::B8 => 2,
                    Bits::B4 => 1,
                    Bits::B2 => 0,
                };
                let block = fill(&mut pools.pages, order, &mut pages)?;
                store.pages.push(Page { bits: *bits, block, parameters: None });
                if *bits != Bits::B16 {
                    let own = fill(&mut pools.parameters, 0, &mut parameters)?;
                    store.pages.last_mut()?.parameters = Some(own);
                }
            }
            [sink, pages, parameters].iter().all(|rest| rest.is_empty()).then_some(())
        };
        if whole().is_none() {
            store.close(pools);
            return None;
        }
        Some(store)
    }
}

fn release(pools: &mut Pools, page: Page) {
    pools.pages.give(page.block);
    if let Some(parameters) = page.parameters {
        pools.parameters.give(parameters);
    }
}

/// Writes rows `rows` of a block for `capacity` tokens; they are the new rows from `first` on.
fn write(
    block: &mut [u8],
    layout: &Layout,
    capacity: usize,
    rows: std::ops::Range<usize>,
    new: NewRows,
    first: usize,
) {
    fn put<T: Element>(block: &mut [T], at: usize, row: &[f32]) {
        block[at..at + row.len()].iter_mut().zip(row).for_each(|(to, from)| *to = T::from_f32(*from));
    }
    let Shape { kv_heads, head_dim: d, .. } = layout.shape;
    for (part, from) in [new.keys, new.values].into_iter().enumerate() {
        for head in 0..kv_heads {
            for (i, row) in rows.clone().enumerate() {
                let at = ((part * kv_heads + head) * capacity + row) * d;
                let row = &from[((first + i) * kv_heads + head) * d..][..d];
                match layout.exact {
                    Kind::F32 => put::<f32>(cast_mut(block), at, row),
                    Kind::Bf16 => put::<bf16>(cast_mut(block), at, row),
                    Kind::F16 => put::<f16>(cast_mut(block), at, row),
                }
            }
        }
    }
}

/// Exact rows of a block to codes of 8 bits in their place, where the kernel does not: from float32, and with another
/// shift, which starts from codes of 16 bits.
fn quantize(layout: &Layout, shift: Shift, rows: &mut [u8], scales: &mut [f32], zeros: &mut [f32]) {
    let group = layout.shape.group;
    let mut values = vec![0.0; group];
    for (g, (scale, zero)) in scales.iter_mut().zip(zeros).enumerate() {
        // Groups are read before the codes in their place are written.
        let bytes = &rows[g * group * layout.exact.size()..][..group * layout.exact.size()];
        exact_values(bytes, layout.exact).widen(&mut values);
        let least = values.iter().copied().fold(f32::INFINITY, f32::min);
        let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let wide = if shift == Shift::Equivalent { Bits::B8 } else { Bits::B16 };
        let s = ((most - least) / wide.levels() as f32).clamp(1e-5, 1e5);
        for (code, x) in rows[g * group..(g + 1) * group].iter_mut().zip(&values) {
            let q = ((x - least) / s).round_ties_even().clamp(0.0, wide.levels() as f32) as u32;
            *code = if wide == Bits::B8 { q as u8 } else { shrink::code(shift, wide, q) as u8 };
        }
        (*scale, *zero) =
            if wide == Bits::B8 { (s, -least) } else { shrink::parameters(shift, wide, s, -least) };
    }
}

/// Reads rows of `d` channels; `codes` is scratch for a page.
fn dequantize<T: Element>(rows: &Rows, d: usize, codes: &mut [u8], out: &mut [T]) {
    match rows {
        Rows::Exact(values) => nics_kernels::each_kind!(values, Values, values => {
            out.iter_mut().zip(*values).for_each(|(to, from)| *to = T::from_f32(Element::to_f32(*from)));
        }),
        Rows::Codes(page) => {
            let codes = &mut codes[..page.tokens * d];
            pack::unpack(page.bits, d, page.codes, codes);
            let group = page.tokens * d / page.scales.len().max(1);
            let parameters = page.scales.iter().zip(page.zeros);
            for ((codes, out), (s, z)) in
                codes.chunks_exact(group).zip(out.chunks_exact_mut(group)).zip(parameters)
            {
                codes.iter().zip(out).for_each(|(q, to)| *to = T::from_f32(f32::from(*q) * s - z));
            }
        }
        Rows::Blocks(_) => unreachable!("this cache stores no such blocks"),
    }
}

fn exact_rows(bytes: &[u8], kind: Kind) -> Rows<'_> {
    Rows::Exact(exact_values(bytes, kind))
}

fn exact_values(bytes: &[u8], kind: Kind) -> Values<'_> {
    match kind {
        Kind::F32 => Values::F32(cast(bytes)),
        Kind::Bf16 => Values::Bf16(cast(bytes)),
        Kind::F16 => Values::F16(cast(bytes)),
    }
}

fn floats(bytes: &[u8]) -> &[f32] {
    cast(bytes)
}

fn floats_mut(bytes: &mut [u8]) -> &mut [f32] {
    cast_mut(bytes)
}

/// Bytes of a block as numbers.
fn cast<T: Element>(bytes: &[u8]) -> &[T] {
    // SAFETY: every pattern of bits is a number of each format.
    let (before, values, after) = unsafe { bytes.align_to::<T>() };
    assert!(before.is_empty() && after.is_empty(), "a block that is not whole numbers");
    values
}

fn cast_mut<T: Element>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: as in `cast`.
    let (before, values, after) = unsafe { bytes.align_to_mut::<T>() };
    assert!(before.is_empty() && after.is_empty(), "a block that is not whole numbers");
    values
}
