//! LiveCodeBench (Jain et al., 2024): programming problems with the day of their contest, and tests that decide whether a
//! program solves one.
//!
//! A [`Problem`] is read without its tests, which are gigabytes for a release: [`Problem::tests`] goes back to the file for
//! them. [`Judge`] runs a program on them in a [`Sandbox`](nics_base::sandbox::Sandbox), one process a test.
//!
//! ```no_run
//! use nics_base::hub::Hub;
//! use nics_base::sandbox::Limits;
//! use nics_datasets::live_code_bench::{self, Judge, Window};
//!
//! let source = Hub::from_env().resolve_dataset(live_code_bench::HUB_ID)?;
//! let window = Window { from: Some(live_code_bench::day("2024-08-01")?), to: None };
//! let problems = live_code_bench::load(&source, &"v4_v5".parse()?, window)?;
//! let judge = Judge::open("python3".as_ref(), Limits::default())?;
//! let verdict = judge.judge("print(sum(map(int, input().split())))", &problems[0].tests()?)?;
//! println!("{} of {} tests", verdict.passed, verdict.tests);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod compare;
mod judge;
mod pickled;
mod problem;
mod python;
mod release;
mod tests;

pub use judge::{Fault, Judge, JudgeError, Verdict};
pub use problem::{Problem, load, load_file};
pub use release::{Release, Window, day};
pub use tests::{Test, Tests};
pub use time::Date;

/// Where the hub has it.
pub const HUB_ID: &str = "livecodebench/code_generation_lite";
