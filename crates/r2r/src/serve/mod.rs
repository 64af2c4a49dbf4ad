//! Two models behind OpenAI's API: an [`Engine`](nics_core::server::Engine) over the [`Decoder`](crate::decode::Decoder)
//! and its front end, for the server in [`nics_core::server`].
//!
//! | file | what is there |
//! |---|---|
//! | `engine` | jobs to sequences and back; memory for keys and values of both models |
//! | `fields` | the request's own fields: `threshold`, `target_llm_ratio`, `return_sources` |
//! | `frontend` | conversations to token ids; which sampling both models can do; the reply's `usage` |
//!
//! # Sampling
//! A request has one set of sampling fields for both models. `temperature`, `top_k`, `top_p` and `seed` hold for both, but
//! the small model's top-p is the reference implementation's, stricter than the large one's (see [`crate::sampling`]): with
//! `top_p` below 1 the two keep different tokens of one distribution. `logprobs`, `min_p` and `repetition_penalty` are
//! refused: the small model's rules have none of them, and the probability of a token that either of two models may have
//! chosen is neither's.

mod engine;
mod fields;
mod frontend;

pub use engine::{LargeMemory, PairEngine, PairSettings};
pub use fields::OwnFields;
pub use frontend::PairFrontend;

pub use crate::decode::Sizes;

use crate::Error;

/// An error of this crate as the server knows it.
fn served(error: Error) -> nics_core::Error {
    match error {
        Error::Core(e) => e,
        Error::Setting { field, found, expected } => {
            let message = format!("{field} is {found}, expected {expected}");
            nics_core::Error::Field { field, message }
        }
        other => nics_core::Error::Input(other.to_string()),
    }
}
