//! Root-mean-square normalisation (Zhang & Sennrich, 2019).

use crate::element::{Element, Values, ValuesMut};

/// `y = x / rms(x) * weight` for each row of `x` (`[rows, weight.len()]`), in one pass over the row.
///
/// The statistics are in f32, the normalised value is rounded to the format of `x` before it is multiplied, as the
/// reference models do.
///
/// # Panics
/// When lengths or formats do not fit: all three share one format.
pub fn rms_norm(x: Values, weight: Values, eps: f32, y: ValuesMut) {
    match (x, weight, y) {
        (Values::F32(x), Values::F32(w), ValuesMut::F32(y)) => rows(x, w, eps, y),
        (Values::Bf16(x), Values::Bf16(w), ValuesMut::Bf16(y)) => rows(x, w, eps, y),
        (Values::F16(x), Values::F16(w), ValuesMut::F16(y)) => rows(x, w, eps, y),
        (x, w, y) => panic!("formats differ: x {:?}, weight {:?}, y {:?}", x.kind(), w.kind(), y.kind()),
    }
}

fn rows<T: Element>(x: &[T], weight: &[T], eps: f32, y: &mut [T]) {
    const LANES: usize = 16;
    let n = weight.len();
    assert!(
        n > 0 && x.len() == y.len() && x.len().is_multiple_of(n),
        "{} values are no rows of {n}",
        x.len()
    );
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
        let mut sums = [0f32; LANES];
        let chunks = x.chunks_exact(LANES);
        let rest = chunks.remainder();
        for part in chunks {
            for (sum, x) in sums.iter_mut().zip(part) {
                *sum += x.to_f32() * x.to_f32();
            }
        }
        for (sum, x) in sums.iter_mut().zip(rest) {
            *sum += x.to_f32() * x.to_f32();
        }
        let scale = 1.0 / (sums.iter().sum::<f32>() / n as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = T::from_f32(T::from_f32(x.to_f32() * scale).to_f32() * w.to_f32());
        }
    }
}
