//! What a pair of models costs on this machine, and whether routing can pay.
//!
//! Per token the loop takes `t_S + t_R + r t_L(1/r)`: a step of the small model, the router, and for a share `r` of the
//! tokens the large model reading the `1/r` tokens since its last call. Beside it stands `t_L(1)`, the large model alone.
//! [`Costs`] are measured, [`Costs::predict`] is that formula, and [`race`] runs the real loop at a forced share beside the
//! large model alone, taking turns.

mod costs;
mod predict;
mod race;

pub use nics_base::spread::Spread;

pub use costs::{Costs, Measured, measure};
pub use predict::{Prediction, Verdict};
pub use race::{Lap, Race, race};
