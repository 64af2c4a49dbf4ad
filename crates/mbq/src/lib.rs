//! MBQ (arXiv 2412.19509): modality-balanced post-training quantization of the language model in a vision-language model.
//!
//! Quantization of weights, or of weights and activations, is made easier by scaling the input channels of each linear layer
//! and folding the inverse into what stands before it. The scales are searched layer by layer: those are taken whose error
//! in the layer's output is least. An error on a vision token, though, reacts on the training loss about ten times less than
//! one on an answer token. MBQ measures that with one backward pass and weighs the errors by it.
//!
//! | step | here |
//! |---|---|
//! | a question about images as a model reads it | [`prompt`] |
//! | captions to embedded samples with masks | [`data`], [`batch`] |
//! | what each modality weighs | [`sensitivity`] |
//! | the loss, the candidates, the search of a layer | [`loss`], [`candidates`], [`search`] |
//! | all layers, resumable, and the files | [`calibrate`], [`artefact`] |
//! | scales that the official code saved | [`official`] |
//! | folding and rounding | [`fold`], [`quantize`], [`apply`] |
//! | rivals, and MBQ, behind one trait | [`methods`] with [`clip`], [`gptq`], [`smooth`] |
//! | files that engines load, from one layout to another | [`layout`], [`export`], [`convert`] |
//! | such files read, and models run from them, also in other binaries | [`stored`], [`packed`], [`plugin`] |
//! | which layers of a model are quantized | [`inventory`] |
//! | how a model is measured and answers are scored | [`evaluation`] |
//! | tiny models, and what they show | [`nano`], [`study`] |

pub mod apply;
pub mod artefact;
pub mod batch;
pub mod bench;
pub mod calibrate;
pub mod candidates;
pub mod clip;
pub mod convert;
pub mod data;
mod error;
pub mod evaluation;
pub mod export;
pub mod fold;
pub mod gptq;
pub mod inventory;
pub mod language;
pub mod layer;
pub mod layout;
pub mod loss;
pub mod memory;
pub mod methods;
pub mod nano;
pub mod official;
pub mod operators;
pub mod packed;
pub mod plugin;
mod progress;
pub mod prompt;
pub mod quantize;
pub mod run;
pub mod search;
pub mod sensitivity;
pub mod smooth;
pub mod stored;
pub mod study;

pub use error::{Error, Result};
pub use progress::PROGRESS;
pub use quantize::{QuantSpec, ZeroRange};

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
