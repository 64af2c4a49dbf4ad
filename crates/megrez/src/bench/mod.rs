//! How fast a model writes: the vendor's throughput protocol, in this process or against a server.
//!
//! A prompt of `hi` repeated, 128 tokens in and 128 out, 8 sequences at once, end tokens ignored. Prefill (from the first
//! row to the last sequence's first token) and decode (the tokens after it) are measured separately. A first run that
//! does not count warms up memory, threads and files.

mod local;
mod remote;

use std::time::Duration;

use serde::Serialize;

pub use local::{Run, measure};
pub use remote::{ClientRun, Target, measure_server};

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Protocol {
    /// Tokens of a prompt; at least 1.
    pub input_len: usize,
    /// Tokens of a reply; at least 1.
    pub output_len: usize,
    /// Sequences of a run.
    pub seqs: usize,
    /// Sequences that are written at a time; a server's concurrent clients.
    pub batch: usize,
}

impl Default for Protocol {
    /// The vendor's.
    fn default() -> Self {
        Self { input_len: 128, output_len: 128, seqs: 8, batch: 8 }
    }
}

/// A measured value over the runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle value.
    pub median: f64,
    /// The lowest.
    pub low: f64,
    /// The highest.
    pub high: f64,
}

impl Spread {
    /// The spread of these values; `None` without any.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut all: Vec<f64> = values.into_iter().collect();
        all.sort_by(f64::total_cmp);
        let (low, high) = (*all.first()?, *all.last()?);
        let middle = all.len() / 2;
        let median = if all.len().is_multiple_of(2) {
            f64::midpoint(all[middle - 1], all[middle])
        } else {
            all[middle]
        };
        Some(Self { median, low, high })
    }

    /// The same in another unit.
    #[must_use]
    pub fn scaled(self, by: f64) -> Self {
        Self { median: self.median * by, low: self.low * by, high: self.high * by }
    }
}

/// `amount` per second.
fn rate(amount: usize, time: Duration) -> f64 {
    amount as f64 / time.as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_even_number_lies_between_two() {
        let spread = |v: &[f64]| Spread::of(v.iter().copied());
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, low: 1.0, high: 3.0 }));
        assert_eq!(spread(&[4.0, 1.0]).unwrap().median.to_bits(), 2.5f64.to_bits());
        assert_eq!(spread(&[]), None);
    }
}
