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

/// A figure with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Its interval, low and high.
    pub interval: [f64; 2],
}

/// A value for each item of each group, e.g. for each text of each seed.
pub type Grouped = Vec<Vec<f64>>;

/// What is drawn in a bootstrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drawn {
    /// Items of each group: the interval is for these groups.
    Items,
    /// Groups, and items of each: the interval is for groups like these.
    GroupsAndItems,
}

/// How often each item of each group counts in one sample of a bootstrap.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights(Grouped);

impl Weights {
    /// A mean over groups of means over items, each item counted so often.
    pub fn mean(&self, values: &Grouped) -> f64 {
        let one = |(values, weights): (&Vec<f64>, &Vec<f64>)| {
            let sum: f64 = values.iter().zip(weights).map(|(v, w)| v * w).sum();
            sum / weights.len().max(1) as f64
        };
        values.iter().zip(&self.0).map(one).sum::<f64>() / values.len().max(1) as f64
    }
}

/// The samples of a bootstrap over grouped items, drawn once, so that everything that is estimated with them is compared on
/// the same items: differences are paired.
///
/// ```
/// use nics_base::ci::{Drawn, Draws};
///
/// let draws = Draws::new(&[4, 4], Drawn::Items, 1000, 0);
/// let (a, b) = (vec![vec![1.0, 2.0, 3.0, 4.0]; 2], vec![vec![0.5, 1.5, 2.5, 3.5]; 2]);
/// let difference = draws.estimate(|w| w.mean(&a) - w.mean(&b));
/// assert_eq!(difference.interval, [0.5, 0.5]);
/// ```
#[derive(Debug, Clone)]
pub struct Draws(Vec<Weights>);

impl Draws {
    /// So many samples of groups of so many items. The same seed gives the same samples on every machine.
    pub fn new(items: &[usize], drawn: Drawn, resamples: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut below = |n: usize| rng.random_range(0..n as u64) as usize;
        let mut draw = || {
            let mut counts: Grouped = items.iter().map(|&n| vec![0.0; n]).collect();
            for i in 0..items.len() {
                let group = match drawn {
                    Drawn::Items => i,
                    Drawn::GroupsAndItems => below(items.len()),
                };
                for _ in 0..items[group] {
                    counts[group][below(items[group])] += 1.0;
                }
            }
            Weights(counts)
        };
        let whole = Weights(items.iter().map(|&n| vec![1.0; n]).collect());
        Self(std::iter::once(whole).chain((0..resamples).map(|_| draw())).collect())
    }

    /// A figure on all items once, with its percentile interval (Efron, 1979).
    pub fn estimate(&self, of: impl Fn(&Weights) -> f64) -> Estimate {
        let all: Vec<f64> = self.0.iter().map(of).collect();
        let mut samples = all[1..].to_vec();
        samples.sort_by(f64::total_cmp);
        let at = |q: f64| {
            let last = samples.len().max(1) - 1;
            samples.get((q * last as f64).round() as usize).copied().unwrap_or(all[0])
        };
        Estimate { value: all[0], interval: [at(0.025), at(0.975)] }
    }
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
    fn grouped_draws_know_what_varies() {
        // Groups differ and items within them hardly do: only drawing groups sees that.
        let values: Grouped =
            (0..10).map(|g| (0..50).map(|i| f64::from(g) + f64::from(i % 2)).collect()).collect();
        let width = |drawn| {
            let found = Draws::new(&[50; 10], drawn, 2000, 1).estimate(|w| w.mean(&values));
            assert!((found.value - 5.0).abs() < 1e-9);
            assert!(found.interval[0] <= found.value && found.value <= found.interval[1]);
            found.interval[1] - found.interval[0]
        };
        // Standard errors: 0.5 / sqrt(500) of items, 2.872 / sqrt(10) of groups.
        assert!((width(Drawn::Items) - 2.0 * Z * 0.02236).abs() < 0.01);
        assert!((width(Drawn::GroupsAndItems) - 2.0 * Z * 0.9083).abs() < 0.3);
    }

    #[test]
    fn the_bootstrap_has_no_interval_for_nothing() {
        assert_eq!(bootstrap_mean(&[], 100, 0), None);
        assert_eq!(bootstrap_mean(&[1.0, f64::NAN], 100, 0), None);
        assert_eq!(bootstrap_mean(&[2.0], 100, 0), Some([2.0, 2.0]));
    }
}
