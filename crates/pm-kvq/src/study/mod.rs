//! The study of nano models: the same texts written through every cache.
//!
//! ```text
//! calibrate   sensitivity, largest keys and scales of a model, as trained and with outliers in its keys
//! evaluate    every cache on texts of the test split: how far they are right, and what it takes
//! report      over all seeds: tables at equal peak and at equal average bytes, with intervals
//! ```
//!
//! Texts of the three splits are disjoint by construction: models are trained and calibrated on the train split, figures
//! come from the test split.

mod equal;
mod evaluate;
mod figures;
mod model;
mod point;
mod settings;
mod variants;

pub use nics_base::study::Output;

pub use evaluate::{Inputs, evaluate};
pub use figures::{About, Claim, Claims, Difference, figures};
pub use model::{Basis, SCALES_AT, Subject, Weights};
pub use point::Point;
pub use settings::Study;
pub use variants::{Kind, Table, Variant, variants};

/// What a study of nano models does not show, for whoever reads its figures.
pub const LIMITS: &str = "\
Limits: the models are tiny and their task is arithmetic; texts have 120 tokens, so a layer's cache is 45 KB at most and
scales weigh more than in heads of 128 channels; baselines simulate their formats and count the bytes that those take; the
ring is a local task, which page-wise shrinking suits; intervals are over texts, for the models of these seeds.";
