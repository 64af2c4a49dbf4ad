//! Loaders of public benchmarks and generators of the synthetic tasks behind the nano checkpoints.
//!
//! - [`adding_ring`]: lines of digits, each made from the one before it, and the first to be recalled at the end.
//! - [`ring`]: arithmetic modulo a number, worked in words that have synonyms, generated without end from a seed.
//! - [`symbol_grid`]: pictures of noisy symbols, of which a row or column is to be read, generated without end from a seed.
//! - [`word_problems`]: bilingual arithmetic word problems with worked steps, generated without end from a seed.
//! - [`Benchmark`]: MMLU, C-Eval and CMMLU as [`Choice`]s.
//! - [`Reasoning`]: AIME, GPQA, MMLU-Pro and MMLU-Redux.
//! - [`Visual`]: questions about images, of MMMU, SEED-Bench, OCRBench, VizWiz-VQA, ScienceQA and TextVQA.
//! - [`live_code_bench`]: programming problems, and the judge that runs programs on their tests.
//! - [`gsm8k`], [`arithmetic()`]: GSM8K and tables in its form as [`Arithmetic`] problems.
//!
//! A benchmark is read from a local folder or from the hub ([`nics_base::hub::Source`]), in JSONL, parquet or CSV and
//! in the layouts that it is found in:
//!
//! ```no_run
//! use nics_base::hub::Hub;
//! use nics_datasets::{Benchmark, Part};
//!
//! let source = Hub::from_env().resolve_dataset(Benchmark::Ceval.hub_id())?;
//! let shots = Benchmark::Ceval.load(&source, Part::Dev, &["logic".into()])?;
//! let questions = Benchmark::Ceval.load(&source, Part::Validation, &["logic".into()])?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod adding_ring;
mod arithmetic;
mod choice;
mod error;
pub mod grading;
mod layout;
pub mod live_code_bench;
mod pictures;
mod reasoning;
pub mod ring;
pub mod symbol_grid;
mod table;
mod visual;
pub mod word_problems;

pub use arithmetic::{Arithmetic, GSM8K_HUB_ID, arithmetic, gsm8k};
pub use choice::{Benchmark, Choice};
pub use error::{DatasetError, Result};
pub use layout::Part;
pub use pictures::Picture;
pub use reasoning::{Reasoned, Reasoning};
pub use visual::{Gold, Visual, VisualQuestion, VisualSet};
