//! The study of nano pairs: labels, routers, every policy and baseline on held-out problems, figures with intervals.
//!
//! ```text
//! queries    problems for the label pipeline, and the synonyms for its rule      then `label run` and `train`, as for any pair
//! evaluate   every policy over a sweep of its threshold, every baseline, on test problems
//! report     over all seeds: accuracy against the large model's share, and what follows from the curves
//! ```
//!
//! Problems of the three splits are disjoint by construction: routers are trained on the train split, thresholds are chosen
//! on the validation split, figures come from the test split. What every policy is given alike: its thresholds are those at
//! which given shares of the validation rows would go to the large model.

mod evaluate;
mod figures;
mod models;
mod oracle;
mod point;
mod queries;
mod rivals;
mod routers;
mod settings;
mod sweeps;

pub use nics_base::study::Output;

pub use evaluate::{Inputs, evaluate};
pub use figures::{About, Claims, Estimate, figures};
pub use models::Models;
pub use point::Point;
pub use queries::{Part, SYNONYMS_FILE, write_queries};
pub use routers::{Kind, Measures};
pub use settings::Study;

/// What a study of nano pairs does not show, for whoever reads its figures.
pub const LIMITS: &str = "\
Limits: the models are tiny and their task is arithmetic; the judge is a rule, not a language model; one wrong number spoils
every later step, so errors add up faster than in prose; the router has as many parameters as it takes here, not the paper's
few per cent of the small model; intervals are over problems, for the pairs of these seeds.";
