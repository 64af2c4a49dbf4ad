//! Megrez-3B (arXiv 2502.15803), a bilingual language model for phones and PCs: chat, generation, evaluation and
//! training of Megrez-3B-Instruct.
//!
//! | module | what it holds |
//! |---|---|
//! | [`model`] | which checkpoints are Megrez; loading one with tokenizer, template and defaults |
//! | [`prompt`] | conversations to token ids; special tokens in user text are plain text |
//! | [`tools`] | tools and their calls in a conversation |
//! | [`prompts`] | the texts around a search, replaceable |
//! | `agent` (feature `agent`) | a model that searches the web and cites what it finds |
//! | `serve` (feature `serve`) | Megrez behind OpenAI's API |
//! | `bench` (feature `bench`) | how fast a model or a server is |
//! | [`chat`] | a conversation that stays within the context |
//! | [`eval`] | multiple choice and arithmetic, resumable and shard-native |
//! | [`train`] | training from scratch and fine-tuning, exactly resumable |
//! | [`labels`] | which tokens are trained on |
//! | [`vocabulary`] | training of the byte-level BPE |
//!
//! The language model itself is a Llama and lives in [`nics_core::models`].
//!
//! ```no_run,standalone_crate
//! use megrez::Megrez;
//! use nics_core::{cache::DenseCache, checkpoint::Checkpoint, generate::{Generator, Request, collect}};
//! use nics_core::template::Message;
//! use nics_core::tch::{Device, Kind};
//!
//! # fn main() -> nics_core::Result<()> {
//! let checkpoint = Checkpoint::open("datasets/nano/megrez-text")?;
//! let megrez = Megrez::load(&checkpoint, Device::Cpu, Kind::Float)?;
//! let prompt = megrez.prompter.encode(&[Message::new("user", "Tom has 3 apples and buys 4. How many has he?")], true)?;
//! let mut cache = DenseCache::new();
//! let mut generator = Generator::new(&megrez.decoder, &mut cache);
//! let reply = collect(&mut generator, [Request::greedy(prompt, 96, &megrez.eos)], 1)?.remove(0);
//! println!("{}", megrez.prompter.tokenizer.decode(&reply, true)?);
//! # Ok(()) }
//! ```

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "bench")]
pub mod bench;
pub mod chat;
pub mod eval;
pub mod labels;
pub mod model;
pub mod prompt;
pub mod prompts;
#[cfg(feature = "serve")]
pub mod serve;
#[cfg(any(feature = "agent", feature = "bench"))]
pub mod sse;
pub mod tools;
pub mod train;
pub mod vocabulary;

pub use model::{Megrez, Replies, decoder_config, load_decoder};
