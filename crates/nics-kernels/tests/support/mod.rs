//! Random tensors in every format.
#![allow(dead_code)] // Each test uses its part.

use half::{bf16, f16};
use nics_kernels::{Element, Kind, Values, ValuesMut};

/// Values of a seed, spread around zero.
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub fn rounded<T: Element>(x: &[f32]) -> Vec<T> {
    x.iter().map(|x| T::from_f32(*x)).collect()
}

/// A tensor in one of the formats, owned.
pub enum Owned {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Owned {
    pub fn new(kind: Kind, x: &[f32]) -> Self {
        match kind {
            Kind::F32 => Self::F32(x.to_vec()),
            Kind::Bf16 => Self::Bf16(rounded(x)),
            Kind::F16 => Self::F16(rounded(x)),
        }
    }
    pub fn values(&self) -> Values<'_> {
        match self {
            Self::F32(x) => Values::F32(x),
            Self::Bf16(x) => Values::Bf16(x),
            Self::F16(x) => Values::F16(x),
        }
    }
    pub fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Self::F32(x) => ValuesMut::F32(x),
            Self::Bf16(x) => ValuesMut::Bf16(x),
            Self::F16(x) => ValuesMut::F16(x),
        }
    }
    pub fn widened(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.values().len()];
        self.values().widen(&mut out);
        out
    }
}

pub const KINDS: [Kind; 3] = [Kind::F32, Kind::Bf16, Kind::F16];

/// Half a unit in the last place of a format.
pub fn epsilon(kind: Kind) -> f64 {
    match kind {
        Kind::F32 => 0.0,
        Kind::Bf16 => 2f64.powi(-8),
        Kind::F16 => 2f64.powi(-11),
    }
}
