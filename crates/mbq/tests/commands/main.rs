//! The `mbq` binary on tiny models that see.

mod kit;
mod refusals;
mod transformers;
mod whole;
