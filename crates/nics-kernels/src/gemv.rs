//! `y = x Wᵀ + b` for a few rows of `x`: each weight is read once from memory for all rows.
//!
//! Weights are f32, bf16 or f16 as the checkpoint has them; sums are in f32. An output is the sum of one chain of vector
//! additions in the order of the input channels, whatever the number of rows, so a row's result is the same bit for bit
//! in every batch.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use crate::each_kind;
use crate::element::{Element, Values, ValuesMut};
use crate::isa::Isa;
use crate::lanes::{self, BLOCK, Lanes, Plain, Weight};
use crate::pool::Pool;

/// The most rows of one call.
pub const MAX_ROWS: usize = 16;
/// Outputs that are computed together: enough independent sums to hide the latency of an addition.
const OUTPUTS: usize = 8;
/// Rows that are computed together.
const ROWS: usize = 4;
/// Channels whose part of x (16 KiB at most) and weights (8 KiB) stay in the first cache for all rows and outputs.
const CHANNELS: usize = 512;
/// Bytes by which the weights of a single group of rows are prefetched ahead of what is read.
const AHEAD: usize = 512;
/// Bytes of weights that a task reads, at most and at least about. Tasks become smaller towards the end of a matrix, so that
/// threads end together; what a task reads ahead ends with it, so small ones cost more.
const MOST_BYTES: usize = 1 << 20;
const LEAST_BYTES: usize = 64 << 10;

/// One matrix of a call.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[out, in]`.
    pub weight: Values<'a>,
    /// `[out]`.
    pub bias: Option<Values<'a>>,
    /// `[rows, out]`.
    pub y: ValuesMut<'a>,
}

/// Where a product's results go, shared between tasks that write different outputs.
struct Target<'a> {
    weight: Values<'a>,
    bias: Option<Values<'a>>,
    y: Pointer,
    out: usize,
}

/// Some outputs of one product.
struct Task {
    target: usize,
    outputs: Range<usize>,
}

#[derive(Clone, Copy)]
enum Pointer {
    F32(*mut f32),
    Bf16(*mut bf16),
    F16(*mut f16),
}

// SAFETY: tasks write disjoint outputs, and the slices behind the pointers are borrowed for the whole call.
unsafe impl Sync for Target<'_> {}

/// A line of the cache: rows of x begin with one, so that no load touches two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line {
    #[allow(dead_code)] // Read as a slice of values.
    values: [f32; LINE],
}

const LINE: usize = 16;

thread_local! {
    static WIDENED: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Several products of the same `x` (`[rows, input]`) in one go, with the best instructions there are.
///
/// # Panics
/// When a length does not fit, or `rows` is not 1 to [`MAX_ROWS`].
pub fn gemv(pool: &Pool, x: Values, rows: usize, products: &mut [Product]) {
    gemv_with(Isa::detect(), pool, x, rows, products);
}

/// [`gemv`] with chosen instructions.
///
/// # Panics
/// As [`gemv`], and when the processor lacks the instructions.
pub fn gemv_with(isa: Isa, pool: &Pool, x: Values, rows: usize, products: &mut [Product]) {
    isa.assert_available();
    assert!((1..=MAX_ROWS).contains(&rows), "{rows} rows, expected 1 to {MAX_ROWS}");
    assert!(x.len().is_multiple_of(rows), "{} values are not {rows} rows", x.len());
    let input = x.len() / rows;
    if input == 0 {
        return;
    }
    let mut tasks: Vec<Task> = Vec::new();
    let targets: Vec<Target> = products
        .iter_mut()
        .enumerate()
        .map(|(i, p)| {
            let out = p.y.len() / rows;
            assert_eq!(p.y.len(), out * rows, "results are not {rows} rows");
            assert_eq!(p.weight.len(), out * input, "the weight is not [{out}, {input}]");
            assert!(p.bias.is_none_or(|b| b.len() == out), "the bias is not [{out}]");
            let shares = shares(out, input * p.weight.kind().size(), pool.threads());
            tasks.extend(shares.map(|outputs| Task { target: i, outputs }));
            Target {
                weight: p.weight,
                bias: p.bias,
                y: match &mut p.y {
                    ValuesMut::F32(y) => Pointer::F32(y.as_mut_ptr()),
                    ValuesMut::Bf16(y) => Pointer::Bf16(y.as_mut_ptr()),
                    ValuesMut::F16(y) => Pointer::F16(y.as_mut_ptr()),
                },
                out,
            }
        })
        .collect();
    WIDENED.with(|buffer| {
        let mut buffer = buffer.borrow_mut();
        let mut layouts: Vec<(bool, usize)> = Vec::with_capacity(2);
        buffer.clear();
        // bf16 weights are widened two by two, so x is kept in the order in which they come out.
        for target in &targets {
            if layouts.iter().all(|(paired, _)| *paired != target.paired()) {
                layouts.push((target.paired(), buffer.len()));
                let lanes = if isa == Isa::Avx512 { 16 } else { 8 };
                widen(x, rows, target.paired().then_some(lanes), &mut buffer);
            }
        }
        let buffer = &*buffer;
        pool.run(tasks.len(), &|task| {
            let Task { target, outputs } = &tasks[task];
            let (target, outputs) = (&targets[*target], outputs.clone());
            let from = layouts.iter().find(|(p, _)| *p == target.paired()).map_or(0, |(_, from)| *from);
            let x = Widened { values: Line::values(&buffer[from..]), rows, input };
            each_kind!(target.weight, Values, w => match isa {
                Isa::Scalar => block::<Plain, _>(w, &x, target, outputs),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has these instructions, as asserted above.
                Isa::Avx2 => unsafe { block_avx2(w, &x, target, outputs) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has these instructions, as asserted above.
                Isa::Avx512 => unsafe { block_avx512(w, &x, target, outputs) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("asserted above"),
            });
        });
    });
}

/// How the outputs of a matrix with rows of so many bytes are shared out among threads: large tasks first, smaller ones towards
/// the end, multiples of 8 outputs but for the last.
pub fn shares(out: usize, row_bytes: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    let (least, most) = ((LEAST_BYTES / row_bytes.max(1)).max(1), (MOST_BYTES / row_bytes.max(1)).max(1));
    let mut first = 0;
    std::iter::from_fn(move || {
        let share = (out - first) / (2 * threads.max(1));
        let end = out.min(first + share.clamp(least, most.max(least)).next_multiple_of(OUTPUTS));
        let outputs = first..end;
        first = end;
        (!outputs.is_empty()).then_some(outputs)
    })
}

/// `x` in f32, in panels of [`CHANNELS`] channels of every row, padded with zeros.
#[derive(Clone, Copy)]
struct Widened<'a> {
    values: &'a [f32],
    rows: usize,
    input: usize,
}

impl Line {
    fn values(lines: &[Self]) -> &[f32] {
        // SAFETY: a line is its values and nothing else.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * LINE) }
    }

    fn values_mut(lines: &mut [Self]) -> &mut [f32] {
        // SAFETY: a line is its values and nothing else.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LINE) }
    }
}

impl<'a> Widened<'a> {
    /// The panel that begins with channel `from`, `[rows, CHANNELS]`.
    #[inline(always)]
    fn panel(&self, from: usize) -> &'a [f32] {
        let size = self.rows * CHANNELS;
        &self.values[from / CHANNELS * size..][..size]
    }
}

/// Appends `x` in f32. With `paired` lanes, each block of twice as many channels holds the even ones first.
fn widen(x: Values, rows: usize, paired: Option<usize>, into: &mut Vec<Line>) {
    let input = x.len() / rows;
    let from = into.len();
    into.resize(from + input.div_ceil(CHANNELS) * rows * CHANNELS / LINE, Line { values: [0.0; LINE] });
    let into = Line::values_mut(&mut into[from..]);
    each_kind!(x, Values, x => for (row, x) in x.chunks_exact(input).enumerate() {
        for (panel, x) in x.chunks(CHANNELS).enumerate() {
            let to = &mut into[(panel * rows + row) * CHANNELS..][..CHANNELS];
            match paired {
                None => to.iter_mut().zip(x).for_each(|(to, x)| *to = x.to_f32()),
                Some(lanes) => {
                    for (to, x) in to.chunks_exact_mut(2 * lanes).zip(x.chunks(2 * lanes)) {
                        let (even, odd) = to.split_at_mut(lanes);
                        even.iter_mut().zip(x.iter().step_by(2)).for_each(|(to, x)| *to = x.to_f32());
                        odd.iter_mut().zip(x.iter().skip(1).step_by(2)).for_each(|(to, x)| *to = x.to_f32());
                    }
                }
            }
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_avx2<W: Weight>(w: &[W], x: &Widened, target: &Target, outputs: Range<usize>) {
    block::<lanes::Avx2, W>(w, x, target, outputs);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn block_avx512<W: Weight>(w: &[W], x: &Widened, target: &Target, outputs: Range<usize>) {
    block::<lanes::Avx512, W>(w, x, target, outputs);
}

/// Some outputs of one product, for all rows.
#[inline(always)]
fn block<L: Lanes, W: Weight>(w: &[W], x: &Widened, target: &Target, outputs: Range<usize>) {
    // SAFETY: the caller runs with the instructions of `L`.
    let mut acc = [[unsafe { L::zero() }; OUTPUTS]; MAX_ROWS];
    for first in outputs.clone().step_by(OUTPUTS) {
        let count = (outputs.end - first).min(OUTPUTS);
        let next = &w[(first + count) * x.input..outputs.end.min(first + count + OUTPUTS) * x.input];
        let w = &w[first * x.input..(first + count) * x.input];
        acc[..x.rows].fill([unsafe { L::zero() }; OUTPUTS]);
        for from in (0..x.input).step_by(CHANNELS) {
            let (mut row, groups) = (0, x.rows.div_ceil(ROWS));
            for group in 0..groups {
                let rows = (x.rows - row).div_ceil(groups - group);
                let acc = &mut acc[row..row + rows];
                let turn = Turn { next, group, groups };
                // Sums, rows of x and weights of one step fit 32 registers.
                match rows {
                    1 => add::<L, W, 8, 1>(w, turn, x, from, row, acc, 0),
                    2 => add::<L, W, 8, 2>(w, turn, x, from, row, acc, 0),
                    3 => {
                        add::<L, W, 4, 3>(w, turn, x, from, row, acc, 0);
                        add::<L, W, 4, 3>(w, turn, x, from, row, acc, 4);
                    }
                    _ => {
                        add::<L, W, 4, ROWS>(w, turn, x, from, row, acc, 0);
                        add::<L, W, 4, ROWS>(w, turn, x, from, row, acc, 4);
                    }
                }
                row += rows;
            }
        }
        for (row, acc) in acc[..x.rows].iter().enumerate() {
            // SAFETY: instructions as above; these outputs of the row are inside `y`, this task alone writes them.
            unsafe { target.store(row, first, &L::sums(*acc)[..count]) };
        }
    }
}

/// What a group of rows prefetches while it computes: its share of the weights of the task's next outputs, so that the
/// memory works while the processor does.
#[derive(Clone, Copy)]
struct Turn<'a, W> {
    next: &'a [W],
    group: usize,
    groups: usize,
}

impl<W> Turn<'_, W> {
    /// Which of the lines of a step of the next outputs, when several groups of rows take turns.
    #[inline(always)]
    fn lines(&self, of_step: usize) -> Range<usize> {
        if self.next.is_empty() || self.groups == 1 {
            return 0..0;
        }
        of_step * self.group / self.groups..of_step * (self.group + 1) / self.groups
    }

    /// For a single group of rows: how many weights ahead of channel `at` of a row to prefetch, a little further in the same
    /// row or, near its end, at the beginning of the row that follows it in the next outputs.
    #[inline(always)]
    fn ahead(&self, at: usize, input: usize) -> Option<usize> {
        let ahead = AHEAD / size_of::<W>();
        match self.groups {
            1 if at + ahead < input => Some(ahead),
            1 if !self.next.is_empty() => Some(ahead + (OUTPUTS - 1) * input),
            _ => None,
        }
    }
}

/// Adds [`CHANNELS`] channels from `from` on to the sums of rows `row .. row + R` and outputs `at .. at + O` of the
/// `w.len() / input` that there are. A missing output takes the weights of the last one; its sum is thrown away.
#[inline(always)]
fn add<L: Lanes, W: Weight, const O: usize, const R: usize>(
    w: &[W],
    turn: Turn<W>,
    x: &Widened,
    from: usize,
    row: usize,
    acc: &mut [[L::V; OUTPUTS]],
    at: usize,
) {
    let count = w.len() / x.input;
    if at >= count {
        return;
    }
    let channels = (x.input - from).min(CHANNELS);
    let step = 2 * L::N;
    let (whole, left) = (channels / step * step, channels % step);
    let panel = x.panel(from);
    assert!(w.len() == count * x.input && at + O <= OUTPUTS && acc.len() == R && row + R <= x.rows);
    assert!(panel.len() == x.rows * CHANNELS && channels.next_multiple_of(BLOCK) <= CHANNELS);
    // SAFETY: the caller runs with the instructions of `L`. Weights are read at `o * input + from + i .. + step` with
    // `from + i + step <= input` and `o < count`; x at `r * CHANNELS + i .. + step` with `r < rows` and
    // `i + step <= CHANNELS`. Both are inside by the assertions.
    unsafe {
        let mut sums = [[L::zero(); R]; O];
        for r in 0..R {
            for o in 0..O {
                sums[o][r] = acc[r][at + o];
            }
        }
        let mut weights = [w.as_ptr(); O];
        for (o, weights) in weights.iter_mut().enumerate() {
            *weights = w.as_ptr().add((at + o).min(count - 1) * x.input + from);
        }
        let rows = panel.as_ptr().add(row * CHANNELS);
        let ahead = turn.next.as_ptr().wrapping_add(at * x.input + from * O).cast::<u8>();
        let lines = turn.lines(O * step * size_of::<W>() / 64);
        let mut i = 0;
        while i < whole {
            if let Some(ahead) = turn.ahead(from + i, x.input) {
                for weights in &weights {
                    for line in 0..step * size_of::<W>() / 64 {
                        L::prefetch(weights.wrapping_add(i + ahead).cast::<u8>().wrapping_add(line * 64));
                    }
                }
            }
            for line in lines.clone() {
                L::prefetch(ahead.wrapping_add(i * O * size_of::<W>() + line * 64));
            }
            for second in [false, true] {
                let mut xs = [L::zero(); R];
                for r in 0..R {
                    xs[r] = L::load(rows.add(r * CHANNELS + i + if second { L::N } else { 0 }));
                }
                for o in 0..O {
                    let w = W::half::<L>(weights[o].add(i), second);
                    for r in 0..R {
                        sums[o][r] = L::fma(w, xs[r], sums[o][r]);
                    }
                }
            }
            i += step;
        }
        if left > 0 {
            for o in 0..O {
                let mut padded = [W::from_f32(0.0); BLOCK];
                std::ptr::copy_nonoverlapping(weights[o].add(whole), padded.as_mut_ptr(), left);
                for second in [false, true] {
                    let w = W::half::<L>(padded.as_ptr(), second);
                    for r in 0..R {
                        let x = L::load(rows.add(r * CHANNELS + whole + if second { L::N } else { 0 }));
                        sums[o][r] = L::fma(w, x, sums[o][r]);
                    }
                }
            }
        }
        for r in 0..R {
            for o in 0..O {
                acc[r][at + o] = sums[o][r];
            }
        }
    }
}

impl Target<'_> {
    /// Whether its weights come out even channels first.
    fn paired(&self) -> bool {
        match self.weight {
            Values::F32(_) => <f32 as Weight>::PAIRED,
            Values::Bf16(_) => <bf16 as Weight>::PAIRED,
            Values::F16(_) => <f16 as Weight>::PAIRED,
        }
    }

    /// Adds the bias and writes some results of a row in their format.
    ///
    /// # Safety
    /// The outputs are inside `y`, and no other thread touches their places.
    #[inline(always)]
    unsafe fn store(&self, row: usize, first: usize, sums: &[f32]) {
        let mut biased = [0f32; OUTPUTS];
        let biased = &mut biased[..sums.len()];
        biased.copy_from_slice(sums);
        if let Some(bias) = &self.bias {
            each_kind!(bias, Values, b => biased.iter_mut().zip(&b[first..]).for_each(|(y, b)| *y += b.to_f32()));
        }
        let at = row * self.out + first;
        // SAFETY: the caller's promise.
        unsafe {
            match self.y {
                Pointer::F32(y) => write(y.add(at), biased),
                Pointer::Bf16(y) => write(y.add(at), biased),
                Pointer::F16(y) => write(y.add(at), biased),
            }
        }
    }
}

/// # Safety
/// As many values as `from` has may be written at `to`.
#[inline(always)]
unsafe fn write<T: Element>(to: *mut T, from: &[f32]) {
    for (i, value) in from.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { to.add(i).write(T::from_f32(*value)) };
    }
}
