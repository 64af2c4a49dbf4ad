//! The study of nano models: every method on every width, and how far the quantized model is from the float one.
//!
//! ```text
//! evaluate    a model under several conditions, quantized by every method to every width: answers to the same problems
//! report      over all models: divergence and accuracy with intervals, and differences between methods on the same answers
//! ```
//!
//! Problems of the three splits are disjoint by construction: models are trained and calibrated on the train split, figures
//! come from the test split.

mod claims;
mod evaluate;
mod figures;
mod point;
mod settings;
mod subject;
mod variants;

pub use nics_base::study::Output;

pub use claims::{Claim, Claims};
pub use evaluate::{Inputs, evaluate};
pub use figures::{About, Comparison, Comparisons, figures};
pub use point::Point;
pub use settings::{CalibrationSettings, Condition, EvaluationSettings, Study};
pub use subject::Subject;
pub use variants::{How, Variant, variants};

/// What a study of nano models does not show, for whoever reads its figures.
pub const LIMITS: &str = "\
Limits: the models are tiny, their pictures are 36 tokens that all look alike, and one task is all they know; widths are
simulated in float32; groups have 32 weights, since layers are 96 wide; the metric is how far the quantized model's answers
are from the float model's.";
