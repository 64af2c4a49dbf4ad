//! How keys and values of a page lie in memory.

use half::f16;
use nics_kernels::{Kind, Values, each_kind};

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

/// Rows in the block formats of everyday use: 32 channels behind a scale `d` of half precision.
#[derive(Debug, Clone, Copy)]
pub enum Blocks<'a> {
    /// `q8_0`: `d`, then 32 signed bytes; `x̂ = d · q`. A block has 34 bytes.
    Q8(&'a [u8]),
    /// `q4_0`: `d`, then 16 bytes of which byte `j` holds codes `j` and `j + 16`; `x̂ = d · (q − 8)`. A block has 18 bytes.
    Q4(&'a [u8]),
}

impl<'a> Blocks<'a> {
    /// The blocks and the bytes of one.
    pub(super) fn parts(self) -> (&'a [u8], usize) {
        match self {
            Self::Q8(blocks) => (blocks, 34),
            Self::Q4(blocks) => (blocks, 18),
        }
    }

    /// The numbers of one block.
    pub(super) fn dequantize(self, block: &[u8]) -> [f32; 32] {
        let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
        std::array::from_fn(|i| match self {
            Self::Q8(_) => d * f32::from(block[2 + i].cast_signed()),
            Self::Q4(_) => d * (f32::from(block[2 + i % 16] >> (i / 16 * 4) & 15) - 8.0),
        })
    }
}

/// Keys or values of some tokens of one key/value head.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// As codes.
    Codes(PageView<'a>),
    /// As blocks of 32, `[tokens, head_dim / 32]`.
    Blocks(Blocks<'a>),
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
            Self::Blocks(blocks) => {
                let (bytes, block) = blocks.parts();
                bytes.len() / (head_dim / 32 * block)
            }
            Self::Exact(rows) => rows.len() / head_dim,
        }
    }

    /// Where they lie.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Codes(page) => page.codes,
            Self::Blocks(blocks) => blocks.parts().0,
            Self::Exact(rows) => each_kind!(rows, Values, rows => {
                // SAFETY: the bytes of numbers.
                unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), size_of_val(*rows)) }
            }),
        }
    }

    pub(super) fn check(&self, head_dim: usize) {
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
            Self::Blocks(blocks) => {
                assert!(head_dim.is_multiple_of(32), "blocks of 32 do not fill rows of {head_dim}");
                let (bytes, row) = (blocks.parts().0.len(), head_dim / 32 * blocks.parts().1);
                assert!(bytes.is_multiple_of(row), "{bytes} bytes of blocks are no rows of {row}");
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
    pub(super) fn part(&self, head_dim: usize, from: usize, to: usize) -> Self {
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
            Self::Blocks(blocks) => {
                let (bytes, block) = blocks.parts();
                let row = head_dim / 32 * block;
                let bytes = &bytes[from * row..to * row];
                Self::Blocks(match blocks {
                    Blocks::Q8(_) => Blocks::Q8(bytes),
                    Blocks::Q4(_) => Blocks::Q4(bytes),
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
