//! How much to measure, of what, and with whom.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nics_core::device::set_threads;

use crate::figure;

/// Seed of weights and inputs.
pub const SEED: u64 = 1;

/// How much to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Everything.
    Full,
    /// A look at the main cases in a few minutes.
    Quick,
    /// The whole chain over tiny shapes in seconds: a test of the suites, no measurement.
    Miniature,
}

/// What the command line and the environment say.
#[derive(Debug)]
pub struct Settings {
    /// How much to measure.
    pub size: Size,
    /// Threads of every contender.
    pub threads: usize,
    /// A Python with torch and transformers.
    pub python: Option<PathBuf>,
    /// Where cases are appended as lines of JSON.
    pub out: Option<PathBuf>,
    /// Whether `cargo test` runs us.
    pub is_test: bool,
    filter: Option<String>,
    suite: Option<String>,
}

impl Settings {
    /// Reads them. Without cargo's `--bench` this is `cargo test`: everything in miniature, whatever else was given.
    pub fn read() -> Result<Self> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let threads = set_threads(None)?;
        let mut settings = Self {
            size: Size::Miniature,
            threads,
            python: None,
            out: variable(figure::OUT),
            is_test: true,
            filter: None,
            suite: None,
        };
        if !args.iter().any(|a| a == "--bench") {
            return Ok(settings);
        }
        settings.is_test = false;
        // candle computes on threads of its own.
        let candles = candle_core::utils::get_num_threads();
        if candles != threads {
            bail!(
                "candle would compute on {candles} threads and the others on {threads}: set RAYON_NUM_THREADS={threads} \
                 (`cargo xtask bench` does)"
            );
        }
        (settings.size, settings.python) = (Size::Full, variable("NICS_PYTHON"));
        let mut args = args.into_iter().filter(|a| a != "--bench");
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--suite" => settings.suite = Some(args.next().context("--suite: which?")?),
                "--quick" => settings.size = Size::Quick,
                "--miniature" => settings.size = Size::Miniature,
                flag if flag.starts_with('-') => {
                    bail!(
                        "unknown flag {flag}: expected --quick, --miniature, --suite NAME or part of a case's name"
                    )
                }
                _ if settings.filter.is_some() => bail!("two filters: expected one part of a case's name"),
                _ => settings.filter = Some(arg),
            }
        }
        Ok(settings)
    }

    /// Whether a case is wanted; `id` as of [`figure::id`]. A filter that ends with `$` is the end of a name.
    pub fn wants(&self, id: &str) -> bool {
        self.filter.as_deref().is_none_or(|part| match part.strip_suffix('$') {
            Some(end) => id.ends_with(end),
            None => id.contains(part),
        })
    }

    /// The one suite that is wanted.
    pub fn suite(&self) -> Option<&str> {
        self.suite.as_deref()
    }

    /// One of three values by size.
    pub fn pick<T>(&self, full: T, quick: T, miniature: T) -> T {
        match self.size {
            Size::Full => full,
            Size::Quick => quick,
            Size::Miniature => miniature,
        }
    }

    /// How long to measure a case.
    pub fn budget(&self) -> Budget {
        self.pick(
            Budget { rounds: 10..=40, time: Duration::from_secs(10) },
            Budget { rounds: 3..=10, time: Duration::from_secs(2) },
            Budget { rounds: 2..=2, time: Duration::ZERO },
        )
    }

    /// How long to measure a case of a suite with many.
    pub fn short_budget(&self) -> Budget {
        self.pick(
            Budget { rounds: 10..=30, time: Duration::from_secs(2) },
            Budget { rounds: 3..=10, time: Duration::from_secs(1) },
            Budget { rounds: 2..=2, time: Duration::ZERO },
        )
    }

    /// A folder that goes away with the value, for files that peers read.
    pub fn scratch() -> Result<tempfile::TempDir> {
        tempfile::tempdir().context("cannot make a temporary folder for the peers' weights")
    }
}

/// How many rounds to measure: at least and at most so many, and between the two until the time is up.
#[derive(Debug, Clone)]
pub struct Budget {
    /// The bounds.
    pub rounds: std::ops::RangeInclusive<usize>,
    /// The time.
    pub time: Duration,
}
