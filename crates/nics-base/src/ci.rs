//! Confidence intervals of result rows, all at 95 %.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// 97.5 % quantile of the standard normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's score interval of a proportion (Wilson, 1927): `successes` of `n`.
///
/// Unlike the textbook interval it stays within `[0, 1]` and means something at 0 and at `n` successes. Without
/// trials nothing is known: `[0, 1]`.
///
/// ```
/// let [low, high] = nics_base::ci::wilson(8, 10);
/// assert!((low - 0.4902).abs() < 1e-4 && (high - 0.9433).abs() < 1e-4);
/// ```
pub fn wilson(successes: u64, n: u64) -> [f64; 2] {
    if n == 0 {
        return [0.0, 1.0];
    }
    let total = n as f64;
    let p = successes.min(n) as f64 / total;
    let z2 = Z * Z;
    let centre = p + z2 / (2.0 * total);
    let spread = Z * (p * (1.0 - p) / total + z2 / (4.0 * total * total)).sqrt();
    let scale = 1.0 + z2 / total;
    // At the ends centre and spread cancel but for rounding.
    let low = if successes == 0 { 0.0 } else { ((centre - spread) / scale).max(0.0) };
    let high = if successes >= n { 1.0 } else { ((centre + spread) / scale).min(1.0) };
    [low, high]
}

/// Percentile bootstrap interval of a mean (Efron, 1979): the 2.5 % and 97.5 % quantiles of the means of `resamples`
/// samples drawn from `values` with replacement.
///
/// `None` without values or resamples, or when a value is not finite. The same seed gives the same interval on every
/// machine.
pub fn bootstrap_mean(values: &[f64], resamples: usize, seed: u64) -> Option<[f64; 2]> {
    if values.is_empty() || resamples == 0 || values.iter().any(|v| !v.is_finite()) {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n = values.len();
    let mut means: Vec<f64> = (0..resamples)
        .map(|_| (0..n).map(|_| values[rng.random_range(0..n as u64) as usize]).sum::<f64>() / n as f64)
        .collect();
    means.sort_by(f64::total_cmp);
    Some([quantile(&means, 0.025), quantile(&means, 0.975)])
}

/// Linear interpolation between the two nearest of the sorted values.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: [f64; 2], expected: [f64; 2], tolerance: f64) {
        for (f, e) in found.into_iter().zip(expected) {
            assert!((f - e).abs() < tolerance, "{found:?}, expected {expected:?}");
        }
    }

    #[test]
    fn wilson_known_values() {
        // Newcombe (1998), table I, method 3.
        close(wilson(81, 263), [0.2553, 0.3662], 5e-5);
        close(wilson(15, 148), [0.0624, 0.1605], 5e-5);
        close(wilson(0, 20), [0.0, 0.1611], 5e-5);
        close(wilson(1, 29), [0.0061, 0.1718], 5e-5);
    }

    #[test]
    fn wilson_stays_inside_and_is_symmetric() {
        for n in 0..60 {
            for k in 0..=n {
                let [low, high] = wilson(k, n);
                assert!(0.0 <= low && low <= high && high <= 1.0);
                close(wilson(n - k, n), [1.0 - high, 1.0 - low], 1e-12);
            }
        }
    }

    #[test]
    fn the_bootstrap_matches_the_normal_interval_of_many_values() {
        let values: Vec<f64> = (0..1000).map(|i| f64::from(i % 10)).collect();
        // Mean 4.5, standard deviation 2.8723, standard error 0.09083.
        close(bootstrap_mean(&values, 4000, 7).unwrap(), [4.5 - 0.1780, 4.5 + 0.1780], 0.01);
    }

    #[test]
    fn the_bootstrap_is_seeded() {
        let values = [1.0, 5.0, 2.5, 9.0, 3.0];
        assert_eq!(bootstrap_mean(&values, 200, 3), bootstrap_mean(&values, 200, 3));
        assert_ne!(bootstrap_mean(&values, 200, 3), bootstrap_mean(&values, 200, 4));
    }

    #[test]
    fn the_bootstrap_has_no_interval_for_nothing() {
        assert_eq!(bootstrap_mean(&[], 100, 0), None);
        assert_eq!(bootstrap_mean(&[1.0, f64::NAN], 100, 0), None);
        assert_eq!(bootstrap_mean(&[2.0], 100, 0), Some([2.0, 2.0]));
    }
}
