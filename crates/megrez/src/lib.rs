//! Megrez-3B (arXiv 2502.15803): chat, generation, evaluation and training.
pub mod vocabulary;
mod model;
pub use model::load_decoder;
