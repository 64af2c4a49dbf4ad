//! `kernels.cu`: what it is compiled for, what it is told, and its launches.

use std::f64::consts::LOG2_E;

use nics_cuda::{Argument, Device as Card, Function, Grid, Source, compiled};
use nics_kernels::Kind as Format;
use tch::{Device, Kind, Tensor};

use super::pages::{Layout, Page, Pages};
use crate::{Bits, Error, Result};

/// The kernels, for [`defines`] of a layout.
pub const SOURCE: &str = include_str!("kernels.cu");
/// Warps of a block that attends, each with a segment of its own.
const WARPS: usize = 4;
/// Tokens of a segment at most.
const SEGMENT: usize = 128;
/// Threads of a block that halves.
const THREADS: u32 = 512;
/// Shared memory that every device gives a block unasked.
const SHARED: usize = 48 << 10;

/// Why the kernels do not serve a layout; `None` when they do.
pub fn unsupported(layout: &Layout) -> Option<String> {
    let Layout { queries, kv_heads, head_dim, group, .. } = *layout;
    if !head_dim.is_multiple_of(64) || head_dim > 256 {
        return Some(format!("the kernels take heads of 64, 128, 192 or 256 channels, not {head_dim}"));
    }
    if !group.is_multiple_of(16) {
        return Some(format!("the kernels take groups of a multiple of 16 channels, not {group}"));
    }
    let of_group = queries / kv_heads;
    let floats =
        of_group * (head_dim + head_dim / group + 2 * WARPS) + WARPS * SEGMENT * of_group.next_multiple_of(4);
    let bytes = floats * size_of::<f32>();
    (of_group > 16 || bytes > SHARED).then(|| {
        format!(
            "{of_group} query heads of {head_dim} channels on a key head are more than the kernels take \
             (16, and {bytes} of {SHARED} bytes of shared memory)"
        )
    })
}

/// The numbers that [`SOURCE`] is compiled for.
pub fn defines(layout: &Layout) -> [(&'static str, i64); 4] {
    [
        ("DIM", layout.head_dim as i64),
        ("QUERIES", (layout.queries / layout.kv_heads) as i64),
        ("GROUP", layout.group as i64),
        ("IEEE_HALF", i64::from(layout.exact == Format::F16)),
    ]
}

/// Where the pages of a call's sequences lie, and who takes which of them: what the kernels are told, as 64-bit words.
///
/// A *segment* is up to 128 tokens of a page; a *chunk* is up to four segments of one sequence, the work of one block. Where a
/// sequence is cut depends on its pages alone, so its result is the same bit for bit in every batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    /// All tables, one after the other.
    pub words: Vec<i64>,
    /// Segments: rows, parameters (addresses), bits, capacity, first token, tokens.
    pub segments: usize,
    /// Chunks: sequence, first segment, segments. Behind them stands the first chunk of each sequence, and their number.
    pub chunks: usize,
}

impl Segments {
    /// Those of some sequences, in their order.
    pub fn of(sequences: &[&Pages]) -> Self {
        let (mut segments, mut chunks, mut first): (Vec<[i64; 6]>, Vec<[i64; 3]>, Vec<i64>) =
            Default::default();
        for (s, pages) in sequences.iter().enumerate() {
            first.push(chunks.len() as i64);
            let begin = segments.len();
            for page in pages.pages() {
                let rows = address(&page.rows);
                let parameters = page.parameters.as_ref().map_or(0, address);
                let (bits, capacity) = (i64::from(page.bits.get()), pages.layout().page as i64);
                segments.extend((0..page.tokens).step_by(SEGMENT).map(|from| {
                    let tokens = (page.tokens - from).min(SEGMENT) as i64;
                    [rows, parameters, bits, capacity, from as i64, tokens]
                }));
            }
            let own = (begin..segments.len()).step_by(WARPS);
            chunks.extend(own.map(|at| [s as i64, at as i64, (segments.len() - at).min(WARPS) as i64]));
        }
        first.push(chunks.len() as i64);
        let words = [segments.as_flattened(), chunks.as_flattened(), &first].concat();
        Self { words, segments: segments.len(), chunks: chunks.len() }
    }

    /// Words in front of the table of chunks, and of that of first chunks.
    pub fn offsets(&self) -> [usize; 2] {
        [self.segments * 6, self.segments * 6 + self.chunks * 3]
    }
}

fn address(t: &Tensor) -> i64 {
    t.data_ptr() as i64
}

/// The kernels on a device.
#[derive(Debug)]
pub struct Kernels {
    attend: Function,
    combine: Function,
    quantize: Function,
    halve_8: Function,
    halve_4: Function,
}

impl Kernels {
    pub fn compile(layout: &Layout, device: usize) -> Result<Self, nics_cuda::Error> {
        let card = Card::open(device)?;
        let source = Source { name: "pm-kvq", text: SOURCE, defines: &defines(layout) };
        let module = card.load(&compiled(&source, card.arch(), None)?)?;
        Ok(Self {
            attend: module.function("attend")?,
            combine: module.function("combine")?,
            quantize: module.function("quantize")?,
            halve_8: module.function("halve_8")?,
            halve_4: module.function("halve_4")?,
        })
    }

    /// As [`super::Attention::attend`], of contiguous float32 queries.
    pub fn attend(&self, layout: &Layout, q: &Tensor, scale: f64, sequences: &[&Pages]) -> Result<Tensor> {
        let (kv, d) = (layout.kv_heads, layout.head_dim);
        let group = layout.queries / kv;
        let segments = Segments::of(sequences);
        let table = on_device(&segments.words, q.device())?;
        let float = (Kind::Float, q.device());
        let part = (group * (2 + d)) as i64;
        let parts = Tensor::f_empty([segments.chunks as i64, kv as i64, part], float)?;
        let out = Tensor::f_empty(q.size(), float)?;
        let [chunks, first] = segments.offsets().map(|words| pointer(&table, words));
        let heads = Argument::Int(kv as i32);
        let factor = Argument::Float((scale * LOG2_E) as f32);
        let each =
            Grid { blocks: [segments.chunks as u32, kv as u32, 1], threads: (WARPS * 32) as u32, shared: 0 };
        let whole =
            Grid { blocks: [sequences.len() as u32, layout.queries as u32, 1], threads: d as u32, shared: 0 };
        // SAFETY: the parameters of `kernels.cu`, in its order. Pages are contiguous, of the layout that the kernels were
        // compiled for, on this device, and live through the call; what is freed after it is used again by libtorch behind
        // the kernels only, on the same stream.
        unsafe {
            let arguments = [pointer(&parts, 0), pointer(q, 0), pointer(&table, 0), chunks, heads, factor];
            self.attend.launch(each, &arguments)?;
            self.combine.launch(whole, &[pointer(&out, 0), pointer(&parts, 0), first, heads])?;
        }
        Ok(out)
    }

    /// As [`super::Attention::halve`], of pages that have more than 2 bits.
    pub fn halve(&self, layout: &Layout, pages: &mut [Page]) -> Result<()> {
        let (rows, groups) = (layout.rows(), layout.rows() * layout.groups());
        let widths: Vec<Bits> = pages.iter().map(Page::bits).collect();
        for (from, kernel) in
            [(Bits::B16, &self.quantize), (Bits::B8, &self.halve_8), (Bits::B4, &self.halve_4)]
        {
            let own = || widths.iter().enumerate().filter(|(_, bits)| **bits == from).map(|(i, _)| i);
            let mut table = Vec::new();
            for i in own() {
                let page = &mut pages[i];
                if page.parameters.is_none() {
                    let [_, heads, tokens, last] = layout.shape(layout.groups());
                    let float = (Kind::Float, page.rows.device());
                    page.parameters = Some(Tensor::f_empty([2, 2, heads, tokens, last], float)?);
                }
                table.extend([address(&page.rows), page.parameters.as_ref().map_or(0, address)]);
            }
            let (Some(i), Some(half)) = (own().next(), from.half()) else { continue };
            let bytes = Argument::Unsigned(from.bytes(rows * layout.head_dim) as u64);
            let grid = Grid { blocks: [(table.len() / 2) as u32, 1, 1], threads: THREADS, shared: 0 };
            let table = on_device(&table, pages[i].rows.device())?;
            // SAFETY: as in `attend`; nobody else reads or writes the pages meanwhile.
            unsafe { kernel.launch(grid, &[pointer(&table, 0), bytes, Argument::Unsigned(groups as u64)])? };
            for i in own() {
                let page = &mut pages[i];
                page.rows = first_half(layout, half, &page.rows)?;
                page.bits = half;
            }
        }
        Ok(())
    }
}

/// What a page's first half holds, in memory of its own: the whole old page is then free.
fn first_half(layout: &Layout, half: Bits, rows: &Tensor) -> Result<Tensor> {
    let mut own = Tensor::f_empty(layout.shape(half.bytes(layout.head_dim)), (Kind::Uint8, rows.device()))?;
    let bytes = rows.f_view_dtype(Kind::Uint8)?.f_reshape([-1])?.f_narrow(0, 0, own.numel() as i64)?;
    own.f_copy_(&bytes.f_reshape(own.size())?)?;
    Ok(own)
}

fn on_device(words: &[i64], device: Device) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(words)?.f_to_device(device)?)
}

/// Address of the number at `words` of a tensor of 64-bit words, or of a tensor's first.
fn pointer(t: &Tensor, words: usize) -> Argument {
    Argument::Pointer(address(t) as u64 + 8 * words as u64)
}

impl From<nics_cuda::Error> for Error {
    fn from(e: nics_cuda::Error) -> Self {
        Self::Cuda(Box::new(e))
    }
}
