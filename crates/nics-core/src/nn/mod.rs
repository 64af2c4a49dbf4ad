//! Building blocks that every model family shares: linear layers, normalisation, rotary tables.

mod linear;
pub mod memory;
mod norm;
mod rope;

pub use linear::Linear;
pub use norm::RmsNorm;
pub use rope::{Rope, RopeConfig, RopeScaling, Rotary};
