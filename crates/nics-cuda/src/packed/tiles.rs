//! How codes lie on a device.
//!
//! Thirty-two outputs are a *tile*, 128 input channels a *block*, 32 channels a *column*: a block has four. A block of a tile
//! is `bits` vectors of 512 bytes, 16 for each lane of a warp, so that every load of the kernel is one run of memory; what
//! follows a block is the tile's next one. The four 32-bit words of a lane's vectors belong to the four columns, and the
//! `bits` words of a column hold the lane's 32 codes of it as sixteen *pairs*, one of a pair in the lower half of a word and
//! one in the upper:
//!
//! | bits | where pair `p` is |
//! |---|---|
//! | 2 | vector `p / 8`, bits `2 (p mod 8)` of both halves |
//! | 3 | `p < 15`: vector `p / 5`, bits `3 (p mod 5)`; pair 15: bit 15 of vectors 0, 1, 2, from the low bit on |
//! | 4 | vector `p / 4`, bits `4 (p mod 4)` |
//! | 8 | vector `p / 2`, bits `8 (p mod 2)` |
//!
//! A lane has the codes that the registers of the instruction `mma.m16n8k16` want there. With `g = lane / 4`, `t = lane mod 4`
//! and the bits of `p` from the high one on `s`, `m`, `k`, `r`, the pair is of output `16 m + 8 r + g` of the tile and of channels
//! `8 t + 4 s + 2 k` and the next one of the column: so a lane needs 8 channels of x side by side.
//!
//! Scales and zeros are `[tiles, groups, g, i]` for output `8 i + g`, so that a lane reads those of its four outputs at once.
//! Outputs and channels that fill up a tile or a block have code, zero and scale 0.

use half::f16;

use crate::{Error, Result};

/// Outputs of a tile.
pub const TILE: usize = 32;
/// Channels of a block.
pub const BLOCK: usize = 128;
/// Channels of a column.
const COLUMN: usize = 32;
/// Codes that a lane has of a column, in pairs.
const PAIRS: usize = 16;

/// What a matrix looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Outputs.
    pub out: usize,
    /// Input channels, a multiple of 8.
    pub input: usize,
    /// Channels that share a scale: all, or a multiple of 32 that divides them.
    pub group: usize,
}

impl Layout {
    /// Checks that kernels take such a matrix.
    ///
    /// # Errors
    /// [`Error::Matrix`] tells what they do not take.
    pub fn check(&self) -> Result<()> {
        let Self { bits, out, input, group } = *self;
        let fault = |why: String| Err(Error::Matrix(why));
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return fault(format!("{bits} bits, expected 2, 3, 4 or 8"));
        }
        let most = i32::MAX as usize / 2;
        if out == 0 || input == 0 || out > most || input > most {
            return fault(format!("[{out}, {input}] is empty or too large"));
        }
        if !input.is_multiple_of(8) {
            return fault(format!("{input} channels, expected a multiple of 8"));
        }
        if group != input && (group == 0 || !group.is_multiple_of(COLUMN) || !input.is_multiple_of(group)) {
            return fault(format!(
                "groups of {group} of {input} channels, expected all of them, or a divisor that is a multiple of {COLUMN}"
            ));
        }
        Ok(())
    }

    /// Tiles.
    pub fn tiles(&self) -> usize {
        self.out.div_ceil(TILE)
    }

    /// Blocks of a tile.
    pub fn blocks(&self) -> usize {
        self.input.div_ceil(BLOCK)
    }

    /// Groups of an output.
    pub fn groups(&self) -> usize {
        self.input / self.group
    }

    /// 32-bit words of all codes.
    pub fn words(&self) -> usize {
        self.tiles() * self.blocks() * self.bits as usize * 32 * 4
    }

    /// Scales of all tiles, and as many zeros.
    pub fn parameters(&self) -> usize {
        self.tiles() * self.groups() * TILE
    }

    /// Where the scale of an output's group is.
    fn parameter(&self, output: usize, group: usize) -> usize {
        let (g, i) = (output % 8, output % TILE / 8);
        ((output / TILE * self.groups() + group) * 8 + g) * 4 + i
    }

    /// Where the first word of the column of 32 channels from `32 column` on is for an output and the eight channels `t`; its
    /// other words are [`Self::STEP`] further on each.
    fn word(&self, output: usize, column: usize, t: usize) -> usize {
        let block = output / TILE * self.blocks() + column / (BLOCK / COLUMN);
        let lane = output % 8 * 4 + t;
        (block * self.bits as usize * 32 + lane) * 4 + column % (BLOCK / COLUMN)
    }

    /// From a vector to the next one of the same lane.
    const STEP: usize = 32 * 4;

    /// Pair and half of a word for an output and the `c`-th of its eight channels.
    fn pair(output: usize, c: usize) -> (usize, usize) {
        let (s, k, half) = (c / 4, c / 2 % 2, c % 2);
        let (m, r) = (output % TILE / 16, output % 16 / 8);
        (s * 8 + m * 4 + k * 2 + r, half)
    }

    /// Where the bits of a pair are: of each piece the vector, its lowest bit in the half, and how many there are.
    fn pieces(&self, pair: usize) -> [(usize, usize, u32); 3] {
        const NONE: (usize, usize, u32) = (0, 0, 0);
        if self.bits == 3 {
            return match pair {
                15 => [(0, 15, 1), (1, 15, 1), (2, 15, 1)],
                _ => [(pair / 5, pair % 5 * 3, 3), NONE, NONE],
            };
        }
        let bits = self.bits as usize;
        let each = PAIRS / bits;
        [(pair / each, pair % each * bits, self.bits), NONE, NONE]
    }
}

/// Scales of a matrix.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// Half precision, where that loses nothing.
    F16(Vec<f16>),
    /// Float32.
    F32(Vec<f32>),
}

/// A matrix as it lies on a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Tiles {
    layout: Layout,
    words: Vec<u32>,
    scales: Scales,
    zeros: Vec<u8>,
}

impl Tiles {
    /// Lays out codes, one a byte, `[out, input]`, with scales and zeros `[out, input / group]`.
    ///
    /// # Errors
    /// A matrix that kernels do not take, lengths that do not fit it, codes or zeros beyond its bits.
    pub fn pack(layout: Layout, codes: &[u8], scales: &[f32], zeros: &[u8]) -> Result<Self> {
        layout.check()?;
        let groups = layout.groups();
        let (codes_len, parameters) = (layout.out * layout.input, layout.out * groups);
        if codes.len() != codes_len || scales.len() != parameters || zeros.len() != parameters {
            return Err(Error::Matrix(format!(
                "{} codes, {} scales and {} zeros, expected {codes_len}, {parameters} and {parameters}",
                codes.len(),
                scales.len(),
                zeros.len()
            )));
        }
        let most = (1u32 << layout.bits) - 1;
        if let Some(x) = codes.iter().chain(zeros).find(|x| u32::from(**x) > most) {
            return Err(Error::Matrix(format!("a code or zero of {x}, expected at most {most}")));
        }
        let mut words = vec![0u32; layout.words()];
        for (output, row) in codes.chunks_exact(layout.input).enumerate() {
            for (eight, codes) in row.chunks_exact(8).enumerate() {
                let first = layout.word(output, eight / 4, eight % 4);
                for (c, &code) in codes.iter().enumerate() {
                    let (pair, half) = Layout::pair(output, c);
                    let mut rest = u32::from(code);
                    for (vector, at, bits) in layout.pieces(pair) {
                        words[first + vector * Layout::STEP] |=
                            (rest & ((1 << bits) - 1)) << (at + 16 * half);
                        rest >>= bits;
                    }
                }
            }
        }
        let (mut own_scales, mut own_zeros) =
            (vec![0f32; layout.parameters()], vec![0u8; layout.parameters()]);
        for (i, (&scale, &zero)) in scales.iter().zip(zeros).enumerate() {
            let at = layout.parameter(i / groups, i % groups);
            (own_scales[at], own_zeros[at]) = (scale, zero);
        }
        let scales = if own_scales.iter().all(|s| f16::from_f32(*s).to_f32().to_bits() == s.to_bits()) {
            Scales::F16(own_scales.into_iter().map(f16::from_f32).collect())
        } else {
            Scales::F32(own_scales)
        };
        Ok(Self { layout, words, scales, zeros: own_zeros })
    }

    /// Its layout.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// `[tiles, blocks, bits, 32 lanes, 4 columns]`.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// `[tiles, groups, 8, 4]`.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// `[tiles, groups, 8, 4]`.
    pub fn zeros(&self) -> &[u8] {
        &self.zeros
    }

    /// Bytes of all.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::F16(s) => size_of_val(s.as_slice()),
            Scales::F32(s) => size_of_val(s.as_slice()),
        };
        size_of_val(self.words.as_slice()) + scales + self.zeros.len()
    }

    /// The codes that were laid out.
    pub fn codes(&self) -> Vec<u8> {
        let layout = self.layout;
        let mut codes = Vec::with_capacity(layout.out * layout.input);
        for output in 0..layout.out {
            codes.extend((0..layout.input).map(|channel| {
                let first = layout.word(output, channel / COLUMN, channel % COLUMN / 8);
                let (pair, half) = Layout::pair(output, channel % 8);
                let (mut code, mut from) = (0, 0);
                for (vector, at, bits) in layout.pieces(pair) {
                    let word = self.words[first + vector * Layout::STEP];
                    code |= (word >> (at + 16 * half) & ((1 << bits) - 1)) << from;
                    from += bits;
                }
                code as u8
            }));
        }
        codes
    }

    /// The scales and zeros that were laid out.
    pub fn parameters(&self) -> (Vec<f32>, Vec<u8>) {
        let groups = self.layout.groups();
        let places = (0..self.layout.out * groups).map(|i| self.layout.parameter(i / groups, i % groups));
        let scale = |at: usize| match &self.scales {
            Scales::F16(s) => s[at].to_f32(),
            Scales::F32(s) => s[at],
        };
        places.map(|at| (scale(at), self.zeros[at])).unzip()
    }
}
