//! Caches side by side on the same tokens: what each takes, and how far its model is from the one with a dense cache.
//!
//! A reply that the dense cache has led to is read again, token by token, by every cache at once. So all of them answer the
//! same questions, and only the logits of one token have to be kept. [`matched`] finds the budget with which the method takes
//! as much memory, averaged over the tokens, as another cache.

mod lockstep;
mod matched;

pub use lockstep::{Bin, Measured, Rival, Text, lockstep};
pub use matched::matched;
