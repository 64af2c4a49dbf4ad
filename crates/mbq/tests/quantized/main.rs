//! Quantized checkpoints of every layout: written, run packed, and written again.

mod kit;
mod models;
mod refusals;
mod round_trips;
