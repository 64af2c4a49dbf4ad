//! Evaluation: multiple choice and arithmetic, one JSON line per item, resumable and shard-native.

pub mod extract;
mod run;
mod summary;
mod task;

pub use run::{Output, Record, Settings, answer};
pub use summary::rows;
pub use task::{Gold, Item, Mode, Selection, Task, items, word_problem_items};
