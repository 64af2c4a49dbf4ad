//! Weights as floats again, a panel of outputs at a time: for products of so many rows that arithmetic is the limit, where
//! instructions of the processor's own for dense tiles win.

use half::{bf16, f16};

use super::matrix::{Packed, QUADS, TILE, Tile, TileScales, UNIT, Vector};
use crate::element::{Element, ValuesMut};
use crate::isa::Isa;
use crate::pool::Pool;

/// Where a panel goes.
#[derive(Clone, Copy)]
struct Panel<T>(*mut T);

// SAFETY: tasks write disjoint rows, and the slice behind the pointer is borrowed for the whole call.
unsafe impl<T> Sync for Panel<T> {}

impl<T> Panel<T> {
    /// From value `at` on.
    ///
    /// # Safety
    /// The panel has that many values.
    unsafe fn from(&self, at: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(at) }
    }
}

impl Packed {
    /// What outputs `from` to `from + y.len() / in` mean, `[outputs, in]`, rounded to the format of `y`, on all threads of
    /// `pool`. `from` begins a tile.
    ///
    /// # Panics
    /// When those are not outputs of the matrix, or `from` is no multiple of [`TILE`].
    pub fn dequantize_panel(&self, pool: &Pool, from: usize, y: ValuesMut) {
        self.dequantize_panel_with(Isa::detect(), pool, from, y);
    }

    /// [`dequantize_panel`](Self::dequantize_panel) with chosen instructions.
    ///
    /// # Panics
    /// As there, and when the processor lacks the instructions.
    pub fn dequantize_panel_with(&self, isa: Isa, pool: &Pool, from: usize, y: ValuesMut) {
        isa.assert_available();
        match y {
            ValuesMut::F32(y) => self.panel::<f32>(isa, pool, from, y),
            ValuesMut::Bf16(y) => self.panel::<bf16>(isa, pool, from, y),
            ValuesMut::F16(y) => self.panel::<f16>(isa, pool, from, y),
        }
    }

    fn panel<T: Element>(&self, isa: Isa, pool: &Pool, from: usize, y: &mut [T]) {
        let input = self.input();
        assert!(from.is_multiple_of(TILE), "output {from} begins no tile");
        assert!(
            y.len().is_multiple_of(input) && from + y.len() / input <= self.out(),
            "{} values from output {from} on are not outputs of [{}, {input}]",
            y.len(),
            self.out()
        );
        let outputs = y.len() / input;
        let to = Panel(y.as_mut_ptr());
        let bits = self.bits();
        pool.run(outputs.div_ceil(TILE), &|task| {
            let tile = self.tile(from / TILE + task);
            let n = TILE.min(outputs - task * TILE);
            // SAFETY: this task alone writes its outputs, which the panel has.
            let to = unsafe { std::slice::from_raw_parts_mut(to.from(task * TILE * input), n * input) };
            match isa {
                Isa::Scalar => write(bits, tile, input, to),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has the instructions, as was asserted.
                Isa::Avx2 => unsafe { write_avx2(bits, tile, input, to) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx512 => unsafe { write_avx512(bits, tile, input, to) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("the instructions were asserted"),
            }
        });
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn write_avx2<T: Element>(bits: u32, tile: Tile, input: usize, to: &mut [T]) {
    write(bits, tile, input, to);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn write_avx512<T: Element>(bits: u32, tile: Tile, input: usize, to: &mut [T]) {
    write(bits, tile, input, to);
}

#[inline(always)]
fn write<T: Element>(bits: u32, tile: Tile, input: usize, to: &mut [T]) {
    match bits {
        2 => write_bits::<2, T>(tile, input, to),
        3 => write_bits::<3, T>(tile, input, to),
        4 => write_bits::<4, T>(tile, input, to),
        _ => write_bits::<8, T>(tile, input, to),
    }
}

/// A tile's outputs, as many as `to` holds.
#[inline(always)]
fn write_bits<const BITS: u32, T: Element>(tile: Tile, input: usize, to: &mut [T]) {
    let mut codes = [[0u8; UNIT]; TILE];
    for (unit, vectors) in tile.stream.chunks_exact(BITS as usize).enumerate() {
        for j in 0..QUADS {
            let quad = quad::<BITS>(vectors, j);
            for (r, codes) in codes.iter_mut().enumerate() {
                codes[4 * j..4 * j + 4].copy_from_slice(&quad[4 * r..4 * r + 4]);
            }
        }
        let at = unit / tile.group * TILE;
        let first = unit * UNIT;
        let n = UNIT.min(input - first);
        for (r, (codes, to)) in codes.iter().zip(to.chunks_exact_mut(input)).enumerate() {
            let zero = f32::from(tile.zeros[at + r]);
            let scale = match tile.scales {
                TileScales::F16(s) => s[at + r].to_f32(),
                TileScales::F32(s) => s[at + r],
            };
            let value = |q: u8| T::from_f32((f32::from(q) - zero) * scale);
            let to = &mut to[first..first + n];
            if let Ok(to) = <&mut [T; UNIT]>::try_from(&mut *to) {
                for (to, q) in to.iter_mut().zip(codes) {
                    *to = value(*q);
                }
            } else {
                for (to, q) in to.iter_mut().zip(codes) {
                    *to = value(*q);
                }
            }
        }
    }
}

/// The codes of quad `j` of a unit, as [`code`](super::matrix::code) has them one by one.
#[inline(always)]
fn quad<const BITS: u32>(unit: &[Vector], j: usize) -> [u8; 64] {
    let mut codes = [0u8; 64];
    match BITS {
        2 => {
            let by = 2 * (j % 4);
            codes.iter_mut().zip(&unit[j / 4].0).for_each(|(q, b)| *q = b >> by & 3);
        }
        3 if j >= 6 => {
            let bytes = unit[j - 6].0.iter().zip(&unit[2].0);
            codes.iter_mut().zip(bytes).for_each(|(q, (low, high))| *q = low >> 6 | (high >> j & 1) << 2);
        }
        3 => {
            let by = 3 * (j % 2);
            codes.iter_mut().zip(&unit[j / 2].0).for_each(|(q, b)| *q = b >> by & 7);
        }
        4 => {
            let by = 4 * (j % 2);
            codes.iter_mut().zip(&unit[j / 2].0).for_each(|(q, b)| *q = b >> by & 15);
        }
        _ => codes = unit[j].0,
    }
    codes
}
