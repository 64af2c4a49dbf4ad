//! Evaluation: prompts, what counts as an answer, and when it is right.
//!
//! The rules are the reference implementation's, its oddities included, since published figures depend on them: the first
//! `\boxed{…}` counts and ends at its first `}`.

mod extract;
mod mersenne;
mod prompts;
mod set;

pub use extract::{AnswerKind, boxed, choice, fenced_code, graded_part, is_correct, lone_letter};
pub use mersenne::{OptionShuffle, SHUFFLE_SEED};
pub use nics_datasets::grading::{last_fenced_code, pass_at_k};
pub use prompts::{aime, gpqa, live_code_bench, mmlu_pro};
pub use set::{Question, programs, questions};
