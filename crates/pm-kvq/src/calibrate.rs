//! Calibration: what is measured on a model once, offline, from samples of text.
//!
//! | module | what it gives |
//! |---|---|
//! | [`samples`] | token ids to calibrate with, and their stretched positions |
//! | [`sensitivity`] | how much the loss changes when a layer's cache is stored at a width |
//! | [`max_keys`] | the largest key of each head and rotary pair |
//! | [`search`] | the exponent α of each layer's key scales |
//! | [`scales`], [`mod@fold`], [`runtime`] | key scales; in the weights, or at run time where that is impossible |
//! | [`artefact`] | the files that all of this is kept in |
//! | [`all`] | every stage in two passes over the samples, resumable |
//!
//! Everything works on the core's seams: no module knows a family of models.

pub mod all;
pub mod artefact;
pub mod fold;
pub mod max_keys;
pub(crate) mod record;
pub mod runtime;
pub mod samples;
pub mod scales;
pub mod search;
pub mod sensitivity;

pub use all::{Calibrated, Progress, Settings, Stage, calibrate};
pub use artefact::Origin;
pub use fold::fold;
pub use max_keys::{MaxKeys, MaxMode};
pub use runtime::Scaled;
pub use samples::{Cut, Samples};
pub use scales::Scales;
pub use search::{ALPHAS, Found};
pub use sensitivity::{GradOrder, Sensitivity};
