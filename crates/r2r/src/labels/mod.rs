//! Labels: the rules by which they are made, as functions of plain values, and the [`pipeline`] that makes them.
//!
//! A response of the large model is read by the small one ([`prefill_features`]). Where the small model would have written
//! another token ([`mismatches`]), the large model continues from that token for a sentence or two ([`stops`]), a judge
//! compares the sentence with what the large model wrote itself ([`sentences`], [`judge`]), and its word becomes the label
//! of the row that predicted the token ([`assemble`]). [`judges`] are who can be asked,
//! and [`live`] follows their word while both models write.

mod assemble;
mod features;
pub mod judge;
pub mod judges;
pub mod live;
mod mismatch;
pub mod pipeline;
mod punkt;
pub mod sentences;
pub mod stops;
mod types;

pub use assemble::{Label, Score, assemble};
pub use features::{PrefillFeatures, prefill_features};
pub use mismatch::{Document, Mismatch, mismatches};
pub use types::{ThinkTokens, TokenType, token_types};
