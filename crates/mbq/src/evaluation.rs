//! How answers are scored: the prompts and rules of the benchmarks that MBQ is measured on, as the common harness has them.

pub mod choice;
pub mod ocr;
pub mod open;
pub mod prompts;
pub mod vqa;

/// Which state of the harness: some rules were mended after the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rules {
    /// As the paper measured, December 2024.
    #[default]
    Paper,
    /// As mended since.
    Mended,
}
