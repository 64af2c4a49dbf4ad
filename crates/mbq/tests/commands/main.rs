//! The `mbq` binary on tiny models that see.

mod eval;
mod extras;
mod kills;
mod kit;
mod prepare;
mod refusals;
mod sensitivity;
mod transformers;
mod whole;
