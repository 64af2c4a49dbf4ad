//! How answers are scored, and a model is measured: the prompts and rules of the benchmarks that MBQ is measured on, as the
//! common harness has them.
//!
//! | step | here |
//! |---|---|
//! | a question as it is put to a model, the longest reply, the score of a reply | [`task`], by the rules of [`choice`], [`open`], [`ocr`], [`vqa`] with [`prompts`] |
//! | replies, resumable and in shards | [`reply`] |
//! | accuracies with intervals, result rows, `eval.json` | [`figures`] |

pub mod choice;
pub mod figures;
pub mod ocr;
pub mod open;
pub mod prompts;
pub mod reply;
pub mod task;
pub mod vqa;

use serde::{Deserialize, Serialize};

/// Which state of the harness: some rules were mended after the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Rules {
    /// As the paper measured, December 2024.
    #[default]
    #[serde(rename = "2024")]
    Paper,
    /// As mended since.
    #[serde(rename = "fixed")]
    Mended,
}
