//! PM-KVQ (arXiv 2505.18610): progressive mixed-precision quantization of the KV cache, for models that write long chains
//! of thought.
//!
//! A layer's cache starts at 16 bits. Whenever its budget is full, what it stores is halved in width in place
//! (16, 8, 4, 2 bits) by an equivalent right shift of the codes, so that early steps see an almost lossless cache and the
//! low width is paid for only when memory is short. How low each layer may go is chosen by a small integer program from
//! a first-order sensitivity; outliers of the keys are moved into the queries by scales that are calibrated with
//! stretched positions. No weight is trained again.

pub mod allocate;
pub mod answers;
pub mod baselines;
pub mod bits;
pub mod budget;
pub mod cache;
pub mod calibrate;
pub mod compare;
pub mod device;
mod error;
pub mod evaluation;
pub mod kernel;
pub mod ledger;
pub mod nano;
pub mod pack;
pub mod plugin;
pub mod quantize;
pub mod shrink;
pub mod study;
pub mod watch;

pub use bits::Bits;
pub use error::{Error, Result};
