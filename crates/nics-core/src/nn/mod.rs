//! Building blocks that every model family shares: linear layers, normalisation, activations, rotary tables.

mod activation;
mod layer_norm;
mod linear;
pub mod memory;
mod norm;
mod packed;
mod rope;

pub use activation::Activation;
pub use layer_norm::{LayerNorm, Norm};
pub use linear::{Linear, projection};
pub use norm::RmsNorm;
pub use packed::{DeviceWeight, PackedLinear, by_panels};
pub use rope::{Rope, RopeConfig, RopeScaling, Rotary};
