//! CPU kernels of `nics`, without libtorch.
//!
//! Decoding reads every weight once for a handful of rows, so its limit is memory bandwidth, not arithmetic. The kernels
//! here are made for that case; large products stay with libtorch.
//!
//! | module | what it holds |
//! |---|---|
//! | [`pool`] | threads that spin briefly, then park; one pool for each thread that computes |
//! | [`isa`] | which instructions the processor has |
//! | [`gemv`] | matrix times a few vectors, f32, bf16 and f16 |
//! | [`packed`] | the same with weights of 2, 3, 4 or 8 bits, and any number of rows |
//! | [`attention`] | attention of one new row over dense keys and values, each read once for its group of query heads |
//! | [`norm`], [`rotary`], [`gate`] | root-mean-square norm, rotary embedding, the gate of an MLP |
//! | [`largest`](mod@largest) | the largest logits of a vocabulary |
//! | [`lanes`], [`exp`](mod@exp) | what kernels are written in, for kernels elsewhere |
//! | [`memory`] | huge pages, and the read bandwidth that is the limit |
//!
//! Every kernel has a scalar version and is held against it by tests over random shapes. A row's result does not depend
//! on how many other rows are computed in the same call, nor on the number of threads: not even in its last bit.

// Vector code gets its instructions by being inlined into a function that has them; indices keep its loops over registers.
#![allow(clippy::inline_always, clippy::needless_range_loop)]

pub mod attention;
pub mod element;
pub mod exp;
pub mod gate;
pub mod gemv;
pub mod isa;
pub mod lanes;
pub mod largest;
pub mod memory;
pub mod norm;
pub mod packed;
pub mod pool;
pub mod rotary;

pub use element::{Element, Kind, Values, ValuesMut};
pub use isa::{Isa, has_bf16_products};
pub use pool::Pool;
