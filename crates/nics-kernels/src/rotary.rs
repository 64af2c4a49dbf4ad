//! Rotary position embedding (Su et al., 2021), half-split: `[x1, x2] -> x cos + [-x2, x1] sin`.

use crate::element::Element;

/// Rotates the heads of one row: `x` and `y` are `[heads, d]`, `cos` and `sin` `[d]`, `y` is in f32 and scaled by `scale`.
///
/// # Panics
/// When lengths do not fit.
pub fn rotate<T: Element>(x: &[T], cos: &[f32], sin: &[f32], scale: f32, y: &mut [f32]) {
    let d = cos.len();
    assert!(d > 0 && d.is_multiple_of(2) && sin.len() == d, "cos has {d} values, sin {}", sin.len());
    assert!(x.len() == y.len() && x.len().is_multiple_of(d), "{} values are no heads of {d}", x.len());
    let half = d / 2;
    for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
        for i in 0..half {
            let (a, b) = (x[i].to_f32(), x[i + half].to_f32());
            y[i] = (a * cos[i] - b * sin[i]) * scale;
            y[i + half] = (b * cos[i + half] + a * sin[i + half]) * scale;
        }
    }
}
