//! The exponential as vector code.

/// `eˣ` for x up to 0 within two units of the last place; 0 below -87. Free of branches, so that loops over it become
/// vector code. NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, so that the remainder is exact.
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    // The whole number stands in the low bits of the shifted value.
    let power = f32::from_bits((shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23);
    let e = (p * r * r + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { e }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn the_exponential_is_close_down_to_zero() {
        for i in 0..200_000 {
            let x = -f64::from(i) * 5e-4;
            let (got, expected) = (f64::from(exp(x as f32)), f64::from(x as f32).exp());
            assert!((got - expected).abs() <= 3e-7 * expected + 2e-38, "{x}: {got}, expected {expected}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, 0.0));
    }
}
