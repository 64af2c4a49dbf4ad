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
pub use nics_base::spread::Spread;
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

/// `amount` per second.
fn rate(amount: usize, time: Duration) -> f64 {
    amount as f64 / time.as_secs_f64().max(1e-9)
}
