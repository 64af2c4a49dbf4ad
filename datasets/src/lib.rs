//! Loaders of public benchmarks and generators of the synthetic tasks behind the nano checkpoints.
//!
//! - [`word_problems`]: bilingual arithmetic word problems with worked steps, generated without end from a seed.

pub mod word_problems;
