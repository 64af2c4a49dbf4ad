//! The paged cache: what it stores, what attention gives, and that nothing is lost or left over.

#[path = "cache/kit.rs"]
mod kit;
#[path = "cache/model.rs"]
mod model;
#[path = "cache/numbers.rs"]
mod numbers;
#[path = "cache/soak.rs"]
mod soak;
#[path = "cache/state.rs"]
mod state;
#[path = "cache/wrong.rs"]
mod wrong;
