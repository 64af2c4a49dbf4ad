//! What the method is compared with: the rivals of the paper and the formats that users pick today.

pub mod everyday;
pub mod hadamard;

pub use everyday::{Block, fp8};
pub use hadamard::Hadamard;
