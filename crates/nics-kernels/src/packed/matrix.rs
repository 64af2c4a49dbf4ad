//! Weights of 2, 3, 4 or 8 bits in the order in which kernels read them.
//!
//! Sixteen outputs are a *tile*, 32 input channels a *unit*. A unit of a tile is `bits` vectors of 64 bytes; the 4 bytes of
//! lane `r` belong to output `r` of the tile, and byte `i` of them to channel `4j + i` of *quad* `j`, 0 to 7:
//!
//! | bits | vectors of a unit | where the code of quad `j` is |
//! |---|---|---|
//! | 2 | L0, L1 | bits `2(j mod 4)`, `2(j mod 4) + 1` of L0 (`j < 4`) or L1 |
//! | 3 | A, B, C | quads 0, 2, 4 in bits 0 to 2 of A, B, C, quads 1, 3, 5 in bits 3 to 5; the low bits of quad 6 in bits 6 and 7 of A, its high one in bit 6 of C; the low bits of quad 7 in bits 6 and 7 of B, its high one in bit 7 of C |
//! | 4 | 4 | vector `j / 2`: the low nibble for even `j`, the high one for odd |
//! | 8 | 8 | vector `j` |
//!
//! A code can be multiplied where it lies, as that power of two times itself, which a mask leaves of its byte. At 3 bits quads 6
//! and 7 need a shift and a choice between two vectors: `16 q` from A and C, `32 q` from B and C.
//!
//! The units of a tile follow each other, then come those of the next tile: one thread reads one stream. Beside it is a
//! stream of scales and zeros, 16 of each for every group of channels of a tile. Rows and channels that fill up a tile or a
//! unit have scale or code 0 and add nothing.

use std::fmt;

use half::f16;

use crate::memory::prefer_huge_pages;

/// Outputs of a tile.
pub const TILE: usize = 16;
/// Channels of a unit.
pub const UNIT: usize = 32;
/// Quads of a unit.
pub(super) const QUADS: usize = 8;
/// The most channels whose products are summed as integers.
pub const CHUNK: usize = 128;

/// What keeps codes from being packed.
#[derive(Debug, Clone, PartialEq)]
pub struct PackError(String);

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PackError {}

/// 64 bytes of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(super) struct Vector(pub(super) [u8; 64]);

/// The scales of all tiles, 16 for each group of each tile.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scales {
    /// Two bytes each.
    F16(Vec<f16>),
    /// Where some are too small for that.
    F32(Vec<f32>),
}

/// A matrix `[out, in]` of codes `q` with a scale `s` and a zero `z` for each group of input channels: `(q - z) s`.
#[derive(Debug, PartialEq)]
pub struct Packed {
    bits: u32,
    out: usize,
    input: usize,
    group: usize,
    pub(super) stream: Vec<Vector>,
    pub(super) scales: Scales,
    pub(super) zeros: Vec<u8>,
}

impl Clone for Packed {
    /// In huge pages, as the original.
    fn clone(&self) -> Self {
        let mut stream: Vec<Vector> = Vec::with_capacity(self.stream.len());
        prefer_huge_pages(stream.as_ptr().cast(), size_of_val(&self.stream[..]));
        stream.extend_from_slice(&self.stream);
        let (scales, zeros) = (self.scales.clone(), self.zeros.clone());
        Self { stream, scales, zeros, ..*self }
    }
}

/// A scale below this loses more than its last bits in half precision.
const SMALLEST: f32 = 6.2e-5;

impl Packed {
    /// Packs codes, one a byte, `[out, in]`, with scales and zeros `[out, in / group]`. `group` is `in`, or divides it and is
    /// 32, 64, 96 or a multiple of 128. Scales are kept in half precision, as files have them, or in float32 where one is
    /// too small or too large for it.
    ///
    /// # Errors
    /// Another width than 2, 3, 4 or 8, lengths or groups that do not fit, a code or zero beyond the width, a scale that is
    /// negative or no number.
    pub fn new(
        bits: u32,
        [out, input]: [usize; 2],
        group: usize,
        codes: &[u8],
        scales: &[f32],
        zeros: &[u8],
    ) -> Result<Self, PackError> {
        let fault = |what: String| Err(PackError(what));
        if out == 0 || input == 0 || codes.len() != out * input {
            return fault(format!("{} codes are not [{out}, {input}]", codes.len()));
        }
        Self::check(bits, input, group)?;
        let groups = input / group;
        if scales.len() != out * groups || zeros.len() != out * groups {
            let found = [scales.len(), zeros.len()];
            return fault(format!("{found:?} scales and zeros, expected {} of each", out * groups));
        }
        let most = (1u32 << bits) - 1;
        if let Some(at) = codes.iter().position(|q| u32::from(*q) > most) {
            return fault(format!("code {} of output {} is above {most}", codes[at], at / input));
        }
        if let Some(at) = zeros.iter().position(|z| u32::from(*z) > most) {
            return fault(format!("zero {} of output {} is above {most}", zeros[at], at / groups));
        }
        if let Some(at) = scales.iter().position(|s| !(s.is_finite() && *s >= 0.0)) {
            return fault(format!("scale {} of output {}", scales[at], at / groups));
        }
        let mut packed = Self {
            bits,
            out,
            input,
            group,
            stream: Vec::new(),
            scales: Scales::F32(Vec::new()),
            zeros: Vec::new(),
        };
        packed.fill_parameters(scales, zeros);
        packed.fill_stream(codes);
        Ok(packed)
    }

    /// Whether there are kernels for so many bits in groups of so many of `input` channels: asked before anything long begins.
    ///
    /// # Errors
    /// What there is no kernel for.
    pub fn check(bits: u32, input: usize, group: usize) -> Result<(), PackError> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return Err(PackError(format!("{bits} bits, expected 2, 3, 4 or 8")));
        }
        let whole = group == input;
        let in_chunks = group.is_multiple_of(UNIT) && (group <= CHUNK || group.is_multiple_of(CHUNK));
        if group == 0 || !input.is_multiple_of(group) || !(whole || in_chunks) {
            return Err(PackError(format!(
                "groups of {group} of {input} channels, expected all of them, or a divisor that is 32, 64, 96 or a multiple of 128"
            )));
        }
        Ok(())
    }

    fn fill_parameters(&mut self, scales: &[f32], zeros: &[u8]) {
        let groups = self.groups();
        let places = (0..self.tiles()).flat_map(|tile| (0..groups).map(move |group| (tile, group)));
        let at = places.flat_map(|(tile, group)| (0..TILE).map(move |r| (tile * TILE + r, group)));
        let at: Vec<Option<usize>> =
            at.map(|(row, group)| (row < self.out).then_some(row * groups + group)).collect();
        let fits = |s: f32| s == 0.0 || (SMALLEST..=f16::MAX.to_f32()).contains(&s);
        let wide = at.iter().map(|at| at.map_or(0.0, |at| scales[at]));
        self.scales = if scales.iter().all(|s| fits(*s)) {
            Scales::F16(wide.map(f16::from_f32).collect())
        } else {
            Scales::F32(wide.collect())
        };
        self.zeros = at.iter().map(|at| at.map_or(0, |at| zeros[at])).collect();
    }

    fn fill_stream(&mut self, codes: &[u8]) {
        let (vectors, units) = (self.bits as usize, self.units());
        let n = self.tiles() * units * vectors;
        self.stream.reserve_exact(n);
        prefer_huge_pages(self.stream.as_ptr().cast(), n * size_of::<Vector>());
        self.stream.resize(n, Vector([0; 64]));
        for (row, codes) in codes.chunks_exact(self.input).enumerate() {
            let (tile, r) = (row / TILE, row % TILE);
            for (unit, codes) in codes.chunks(UNIT).enumerate() {
                let from = (tile * units + unit) * vectors;
                let to = &mut self.stream[from..from + vectors];
                for (k, &code) in codes.iter().enumerate() {
                    put(self.bits, to, r, k, code);
                }
            }
        }
    }

    /// Bits of a code.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Outputs.
    pub fn out(&self) -> usize {
        self.out
    }

    /// Input channels.
    pub fn input(&self) -> usize {
        self.input
    }

    /// Input channels that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Bytes of codes, scales and zeros as a kernel reads them.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::F16(s) => 2 * s.len(),
            Scales::F32(s) => 4 * s.len(),
        };
        self.stream.len() * size_of::<Vector>() + scales + self.zeros.len()
    }

    /// The codes, one a byte, `[out, in]`.
    pub fn codes(&self) -> Vec<u8> {
        let (vectors, units) = (self.bits as usize, self.units());
        let mut codes = Vec::with_capacity(self.out * self.input);
        for row in 0..self.out {
            codes.extend((0..self.input).map(|k| {
                let from = (row / TILE * units + k / UNIT) * vectors;
                code(self.bits, &self.stream[from..from + vectors], row % TILE, k % UNIT)
            }));
        }
        codes
    }

    /// Scales and zeros, `[out, in / group]`, as they are kept.
    pub fn parameters(&self) -> (Vec<f32>, Vec<u8>) {
        let groups = self.groups();
        let at = |row: usize, group: usize| (row / TILE * groups + group) * TILE + row % TILE;
        let places = (0..self.out).flat_map(|row| (0..groups).map(move |group| at(row, group)));
        places.map(|at| (self.scale(at), self.zeros[at])).unzip()
    }

    /// What outputs `from` to `from + y.len() / in` mean, `[outputs, in]`.
    ///
    /// # Panics
    /// When those are not outputs of the matrix.
    pub fn dequantize(&self, from: usize, y: &mut [f32]) {
        assert!(y.len().is_multiple_of(self.input) && from + y.len() / self.input <= self.out);
        let (vectors, units, groups) = (self.bits as usize, self.units(), self.groups());
        for (i, y) in y.chunks_exact_mut(self.input).enumerate() {
            let (tile, r) = ((from + i) / TILE, (from + i) % TILE);
            for (group, y) in y.chunks_exact_mut(self.group).enumerate() {
                let at = (tile * groups + group) * TILE + r;
                let (scale, zero) = (self.scale(at), i32::from(self.zeros[at]));
                for (n, y) in y.iter_mut().enumerate() {
                    let k = group * self.group + n;
                    let unit = (tile * units + k / UNIT) * vectors;
                    let q = code(self.bits, &self.stream[unit..unit + vectors], r, k % UNIT);
                    *y = (i32::from(q) - zero) as f32 * scale;
                }
            }
        }
    }

    /// The scale at a place of the stream.
    #[inline(always)]
    fn scale(&self, at: usize) -> f32 {
        match &self.scales {
            Scales::F16(s) => s[at].to_f32(),
            Scales::F32(s) => s[at],
        }
    }

    /// Groups of a row.
    pub(super) fn groups(&self) -> usize {
        self.input / self.group
    }

    /// Tiles.
    pub(super) fn tiles(&self) -> usize {
        self.out.div_ceil(TILE)
    }

    /// Units of a tile.
    pub(super) fn units(&self) -> usize {
        self.input.div_ceil(UNIT)
    }

    /// Units whose products are summed as integers: those of a group, at most [`CHUNK`] channels.
    pub(super) fn chunk(&self) -> usize {
        self.group.min(CHUNK).div_ceil(UNIT)
    }

    /// A tile as kernels read it.
    pub(super) fn tile(&self, tile: usize) -> Tile<'_> {
        let (vectors, groups) = (self.units() * self.bits as usize, self.groups() * TILE);
        let own = tile * groups..(tile + 1) * groups;
        Tile {
            stream: &self.stream[tile * vectors..][..vectors],
            // Reading ahead goes into the next tile.
            scales: match &self.scales {
                Scales::F16(s) => TileScales::F16(&s[own.clone()]),
                Scales::F32(s) => TileScales::F32(&s[own.clone()]),
            },
            zeros: &self.zeros[own],
            units: self.units(),
            chunk: self.chunk(),
            group: self.group.div_ceil(UNIT),
        }
    }
}

/// The scales of a tile.
#[derive(Clone, Copy)]
pub(super) enum TileScales<'a> {
    F16(&'a [f16]),
    F32(&'a [f32]),
}

/// A tile of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub(super) stream: &'a [Vector],
    pub(super) scales: TileScales<'a>,
    pub(super) zeros: &'a [u8],
    /// Units in all, of a chunk (the last may have fewer), and of a group.
    pub(super) units: usize,
    pub(super) chunk: usize,
    pub(super) group: usize,
}

impl Tile<'_> {
    /// Chunks.
    #[inline(always)]
    pub(super) fn chunks(&self) -> usize {
        self.units.div_ceil(self.chunk)
    }

    /// Units of a chunk.
    #[inline(always)]
    pub(super) fn units_of(&self, chunk: usize) -> usize {
        self.chunk.min(self.units - chunk * self.chunk)
    }

    /// Where the scales of a chunk begin.
    #[inline(always)]
    pub(super) fn parameters_of(&self, chunk: usize) -> usize {
        chunk * self.chunk / self.group * TILE
    }
}

/// The code of channel `k` of a unit for output `r` of its tile.
#[inline(always)]
pub(super) fn code(bits: u32, unit: &[Vector], r: usize, k: usize) -> u8 {
    let (j, byte) = (k / 4, 4 * r + k % 4);
    match bits {
        2 => unit[j / 4].0[byte] >> (2 * (j % 4)) & 3,
        3 => match j {
            6 | 7 => unit[j - 6].0[byte] >> 6 | (unit[2].0[byte] >> j & 1) << 2,
            _ => unit[j / 2].0[byte] >> (3 * (j % 2)) & 7,
        },
        4 => unit[j / 2].0[byte] >> (4 * (j % 2)) & 15,
        _ => unit[j].0[byte],
    }
}

/// Writes a code into a unit that has 0 there.
fn put(bits: u32, unit: &mut [Vector], r: usize, k: usize, code: u8) {
    let (j, byte) = (k / 4, 4 * r + k % 4);
    match bits {
        2 => unit[j / 4].0[byte] |= code << (2 * (j % 4)),
        3 if j >= 6 => {
            unit[j - 6].0[byte] |= code << 6;
            unit[2].0[byte] |= (code >> 2) << j;
        }
        3 => unit[j / 2].0[byte] |= code << (3 * (j % 2)),
        4 => unit[j / 2].0[byte] |= code << (4 * (j % 2)),
        _ => unit[j].0[byte] = code,
    }
}
