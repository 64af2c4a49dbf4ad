//! The `mbq` binary on tiny models that see.

mod bench;
mod eval;
mod eval_quantized;
mod extras;
mod generate;
mod import;
mod kills;
mod kit;
mod packed;
mod prepare;
mod refusals;
mod sensitivity;
mod transformers;
mod whole;
