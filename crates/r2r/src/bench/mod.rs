//! What a pair of models costs on this machine, and whether routing can pay.
//!
//! Per token the loop takes `t_S + t_R + r t_L(1/r)`: a step of the small model, the router, and for a share `r` of the
//! tokens the large model reading the `1/r` tokens since its last call. Beside it stands `t_L(1)`, the large model alone.
//! [`Costs`] are measured, [`Costs::predict`] is that formula, and [`race`] runs the real loop at a forced share beside the
//! large model alone, taking turns.

mod costs;
mod predict;
mod race;

use serde::Serialize;

pub use costs::{Costs, Measured, measure};
pub use predict::{Prediction, Verdict};
pub use race::{Lap, Race, race};

/// A measured value over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle value.
    pub median: f64,
    /// The first quartile.
    pub low: f64,
    /// The third.
    pub high: f64,
}

impl Spread {
    /// The spread of these values; `None` without any.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let at = |q: f64| {
            let place = q * last as f64;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Some(Self { median: at(0.5), low: at(0.25), high: at(0.75) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((spread.low, spread.median, spread.high), (1.75, 2.5, 3.25));
        assert_eq!(Spread::of(&[]), None);
    }
}
