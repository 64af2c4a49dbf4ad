//! R2R ("Roads to Rome", arXiv 2505.21600): a small language model writes, and a trained router calls the large one for
//! the few tokens that would change the path of reasoning.
//!
//! At each position the small model proposes a token. A router of some 56 million parameters reads what the small model
//! computed there (last hidden state, the token's embedding, its 100 largest logits) and gives the probability that the
//! token leaves the path which the large model would take. Below a threshold the token stands; otherwise the large
//! model, fed with the same accepted tokens, supplies the token instead. Nothing is ever rolled back: both caches only
//! grow, and a call of the large model is a short extension by the tokens since its last one. Of the tokens that small
//! and large model would choose differently, half differ in wording alone; the router is trained on a judge's word on
//! which ones matter. In the paper 11 to 15 % of the tokens come from a 32B model beside one of 1.5B, which then keeps
//! 92 % of the large one's accuracy at 2.8 times its speed.
//!
//! | module | what it holds |
//! |---|---|
//! | [`router`] | the router's architectures, in f32, bf16 or int8 |
//! | [`checkpoint`] | official `.pt` files, read without running them; our own format |
//! | [`labels`] | the rules by which labels are made, the steps from queries to labels, judges |
//! | [`thresholds`] | from probabilities and labels to a threshold |
//! | [`losses`], [`training`] | what a router is trained to make small; training with early stopping and exact resume |
//! | [`policy`] | who chooses a token: the router, measures of uncertainty, a budget, a coin, an oracle |
//! | [`decode`] | the loop over two models: ragged extensions, events with source and score, usage |
//! | [`remote`] | the large model on a server: vLLM, SGLang, this project's own |
//! | [`bench`](mod@bench) | what a pair costs on this machine, and whether routing can pay |
//! | [`baselines`] | what routing is held against: speculative decoding, routing of whole queries |
//! | [`nano`], [`study`] | pairs of tiny models on a task of their own, and what they show |
//! | [`sampling`] | the small model's token |
//! | `serve` | OpenAI's API over both models (feature `serve`) |
//! | [`evaluation`] | prompts, answers, pass@k |

pub mod baselines;
pub mod bench;
pub mod checkpoint;
pub mod decode;
mod error;
pub mod evaluation;
pub mod labels;
pub mod losses;
pub mod nano;
pub mod policy;
pub mod remote;
pub mod router;
pub mod sampling;
#[cfg(feature = "serve")]
pub mod serve;
pub mod study;
pub mod thresholds;
pub mod training;

pub use error::{Error, Result};
pub use router::{Router, RouterConfig};
