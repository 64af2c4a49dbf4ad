//! What `--dataset` names.

use std::path::Path;
use std::str::FromStr;

use anyhow::Result;
use nics_base::hub::{Hub, Source};
use nics_datasets::Reasoning;
use nics_datasets::live_code_bench::{self, Problem, Release, Window};
use r2r::evaluation::{Question, programs, questions};

/// A benchmark of answers, or the one of programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    Reasoning(Reasoning),
    LiveCodeBench,
}

/// What is asked.
pub struct Asked {
    pub questions: Vec<Question>,
    /// The problems behind the questions, where programs answer them.
    pub problems: Vec<Problem>,
}

const LIVE_CODE_BENCH: &str = "livecodebench";

impl Set {
    pub fn name(self) -> &'static str {
        match self {
            Self::Reasoning(set) => set.name(),
            Self::LiveCodeBench => LIVE_CODE_BENCH,
        }
    }

    /// Its first `limit` questions, from where `--source` says.
    pub fn load(
        self,
        source: Option<&str>,
        release: &Release,
        window: Window,
        limit: Option<usize>,
    ) -> Result<Asked> {
        let limit = limit.unwrap_or(usize::MAX);
        let from = |hub_id: &str| match source {
            Some(given) if Path::new(given).is_dir() => Ok(Source::folder(given)),
            given => Hub::from_env().resolve_dataset(given.unwrap_or(hub_id)),
        };
        match self {
            Self::Reasoning(set) => {
                let mut questions = questions(set, &set.load(&from(set.hub_id())?)?)?;
                questions.truncate(limit);
                Ok(Asked { questions, problems: Vec::new() })
            }
            Self::LiveCodeBench => {
                let mut problems = match source.map(Path::new) {
                    Some(file) if file.is_file() => live_code_bench::load_file(file, window)?,
                    _ => live_code_bench::load(&from(live_code_bench::HUB_ID)?, release, window)?,
                };
                problems.truncate(limit);
                Ok(Asked { questions: programs(&problems), problems })
            }
        }
    }
}

impl FromStr for Set {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            LIVE_CODE_BENCH => Ok(Self::LiveCodeBench),
            _ => text.parse().map(Self::Reasoning).map_err(|e: String| format!("{e}, {LIVE_CODE_BENCH}")),
        }
    }
}
