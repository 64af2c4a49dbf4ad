//! Random tensors in memory as weights have it.

use anyhow::Result;
use nics_kernels::memory::prefer_huge_pages;
use tch::{Device, Kind, Tensor};

/// Bytes that a turn goes through at least: several times what caches hold, the large ones of servers included.
pub const WORKING_SET: usize = 1 << 30;

/// Values between -1 and 1, in huge pages where the system has them. Along the first axis all parts are equal: drawing
/// gigabytes would take longer than measuring.
pub fn random(size: &[i64], kind: Kind, seed: u64) -> Result<Tensor> {
    let tensor = Tensor::f_empty(size, (kind, Device::Cpu))?;
    prefer_huge_pages(tensor.data_ptr().cast_const().cast(), tensor.numel() * kind.elt_size_in_bytes());
    let part: i64 = size[1..].iter().product();
    let values: Vec<f32> = draws(part as usize, seed).collect();
    let values = Tensor::f_from_slice(&values)?.f_view(&size[1..])?.f_to_kind(kind)?;
    let mut filled = tensor.shallow_clone();
    filled.f_copy_(&values)?; // Broadcast along the first axis.
    Ok(tensor)
}

fn draws(n: usize, seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n).map(move |_| {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}
