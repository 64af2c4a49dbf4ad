//! Labels from queries to a trained router, through the library and the binary.

mod bad_input;
mod judges;
mod kit;
mod live;
mod memory;
mod pipeline;
mod resume;
mod train;
