//! Plain Rust: what the other instruction sets are held against.

use super::activations::Activations;
use super::matrix::{TILE, Tile, TileScales, UNIT, code};

/// Sums of a tile's products with rows `first ..` of the activations, `[rows, 16]`.
pub(super) fn tile<const BITS: u32>(tile: Tile, x: &Activations, first: usize, y: &mut [[f32; TILE]]) {
    for (row, y) in y.iter_mut().enumerate() {
        *y = [0.0; TILE];
        for chunk in 0..tile.chunks() {
            let (scale, sum) = x.of(first + row, chunk);
            let at = tile.parameters_of(chunk);
            let from = chunk * tile.chunk;
            for (r, y) in y.iter_mut().enumerate() {
                let mut acc = 0i32;
                for unit in from..from + tile.units_of(chunk) {
                    let vectors = &tile.stream[unit * BITS as usize..][..BITS as usize];
                    for k in 0..UNIT {
                        acc += i32::from(code(BITS, vectors, r, k)) * x.get(first + row, unit * UNIT + k);
                    }
                }
                let own = match tile.scales {
                    TileScales::F16(s) => s[at + r].to_f32(),
                    TileScales::F32(s) => s[at + r],
                };
                *y += (acc - i32::from(tile.zeros[at + r]) * sum) as f32 * (own * scale);
            }
        }
    }
}
