//! The gate of a gated MLP: `y = silu(gate) * up` (Shazeer, 2020).

use crate::element::{Element, Values, ValuesMut};
use crate::exp::exp;
use crate::isa::Isa;
use crate::pool::Pool;

/// Values that a task takes.
const TASK: usize = 8192;

/// `silu(gate) * up`, value by value. As in the reference models, `silu(gate)` is rounded to the format before it is
/// multiplied.
///
/// # Panics
/// When lengths or formats do not fit: all three share one format.
pub fn silu_mul(pool: &Pool, gate: Values, up: Values, y: ValuesMut) {
    assert!(
        gate.len() == up.len() && up.len() == y.len(),
        "lengths {}, {}, {}",
        gate.len(),
        up.len(),
        y.len()
    );
    match (gate, up, y) {
        (Values::F32(g), Values::F32(u), ValuesMut::F32(y)) => tasks(pool, g, u, y),
        (Values::Bf16(g), Values::Bf16(u), ValuesMut::Bf16(y)) => tasks(pool, g, u, y),
        (Values::F16(g), Values::F16(u), ValuesMut::F16(y)) => tasks(pool, g, u, y),
        (g, u, y) => panic!("formats differ: gate {:?}, up {:?}, y {:?}", g.kind(), u.kind(), y.kind()),
    }
}

struct Shared<T>(*mut T);

// SAFETY: tasks write disjoint ranges.
unsafe impl<T> Sync for Shared<T> {}

fn tasks<T: Element>(pool: &Pool, gate: &[T], up: &[T], y: &mut [T]) {
    let (len, to) = (y.len(), Shared(y.as_mut_ptr()));
    let isa = Isa::detect();
    pool.run(len.div_ceil(TASK), &|task| {
        let range = task * TASK..len.min((task + 1) * TASK);
        let to = &to;
        // SAFETY: the range is inside `y` and belongs to this task alone.
        let y = unsafe { std::slice::from_raw_parts_mut(to.0.add(range.start), range.len()) };
        let (gate, up) = (&gate[range.clone()], &up[range]);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has these instructions.
            Isa::Avx512 => unsafe { part_avx512(gate, up, y) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has these instructions.
            Isa::Avx2 => unsafe { part_avx2(gate, up, y) },
            _ => part(gate, up, y),
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn part_avx2<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    part(gate, up, y);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn part_avx512<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    part(gate, up, y);
}

#[inline(always)]
fn part<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        let g = gate.to_f32();
        // Of the two forms of the sigmoid the one whose exponential cannot overflow.
        let e = exp(-g.abs());
        let sigmoid = if g < 0.0 { e } else { 1.0 } / (1.0 + e);
        *y = T::from_f32(T::from_f32(g * sigmoid).to_f32() * up.to_f32());
    }
}
