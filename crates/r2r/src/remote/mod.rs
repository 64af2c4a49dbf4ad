//! The large model on a server: vLLM, SGLang, or this project's own.
//!
//! Token ids alone cross the wire. A text would be encoded anew by the server, which changes ids, breaks its prefix cache
//! and lets the two models drift apart in silence. A call gives the server all ids of a sequence and asks for one more
//! token; what it still has of them in its prefix cache is its business, and [`Traffic`](crate::decode::Traffic) counts
//! how much that was.
//!
//! | file | what is there |
//! |---|---|
//! | `spec` | `local:PATH`, `vllm:URL`, `sglang:URL`, `nics:URL` |
//! | `settings` | time limits, retries, batches, what is read ahead |
//! | `protocol`, `completions`, `sglang` | what is asked and how replies are read |
//! | `client`, `fault` | one call: connections that are kept, what can go wrong |
//! | `pool` | threads that call, again where it helps, while the decoder goes on |
//! | `handshake` | whether the server's model and tokenizer are the right ones |
//! | `large` | all of it as a [`LargeModel`](crate::decode::LargeModel) |
//!
//! A call that failed is made again with the same seed, which belongs to the request and the position, so that it gives the
//! token that the first would have given. Request bodies are not compressed: neither vLLM nor SGLang unpacks them.

pub(crate) mod client;
mod completions;
mod fault;
mod handshake;
mod large;
mod pool;
mod protocol;
mod settings;
mod sglang;
mod spec;

pub use fault::Fault;
pub use handshake::{PROBES, ServerFacts};
pub use large::RemoteLarge;
pub use settings::RemoteSettings;
pub use spec::{Engine, LargeSpec};
