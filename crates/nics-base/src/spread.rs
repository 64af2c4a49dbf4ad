//! The middle of what was measured over some rounds, and how far it spreads.

use serde::Serialize;

/// A measured value over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle value.
    pub median: f64,
    /// The first quartile, or the lowest value.
    pub low: f64,
    /// The third quartile, or the highest value.
    pub high: f64,
}

impl Spread {
    /// Median and quartiles of these values; `None` without any.
    pub fn of(values: &[f64]) -> Option<Self> {
        Self::between(values, 0.25, 0.75)
    }

    /// Median, lowest and highest of these values; `None` without any.
    pub fn range(values: &[f64]) -> Option<Self> {
        Self::between(values, 0.0, 1.0)
    }

    fn between(values: &[f64], low: f64, high: f64) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let at = |q: f64| {
            let place = q * last as f64;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Some(Self { median: at(0.5), low: at(low), high: at(high) })
    }

    /// The same in another unit.
    #[must_use]
    pub fn scaled(self, by: f64) -> Self {
        Self { median: self.median * by, low: self.low * by, high: self.high * by }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated_and_a_range_has_the_ends() {
        let values = [4.0, 1.0, 3.0, 2.0];
        let spread = Spread::of(&values).unwrap();
        assert_eq!((spread.low, spread.median, spread.high), (1.75, 2.5, 3.25));
        assert_eq!(Spread::range(&values), Some(Spread { median: 2.5, low: 1.0, high: 4.0 }));
        assert_eq!(Spread::range(&[3.0, 1.0, 2.0]).unwrap().scaled(2.0).median.to_bits(), 4f64.to_bits());
        assert_eq!((Spread::of(&[]), Spread::range(&[])), (None, None));
    }
}
