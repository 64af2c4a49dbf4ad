//! The rules by which labels are made, as functions of plain values.
//!
//! A response of the large model is read by the small one ([`prefill_features`]). Where the small model would have written
//! another token ([`mismatches`]), the large model continues from that token for a sentence or two ([`stops`]), a judge
//! compares the sentence with what the large model wrote itself ([`sentences`], [`judge`]), and its word becomes the label
//! of the row that predicted the token ([`assemble`]).

mod assemble;
mod features;
pub mod judge;
mod mismatch;
mod punkt;
pub mod sentences;
pub mod stops;
mod types;

pub use assemble::{Label, Score, assemble};
pub use features::{PrefillFeatures, prefill_features};
pub use mismatch::{Document, Mismatch, mismatches};
pub use types::{ThinkTokens, TokenType, token_types};
