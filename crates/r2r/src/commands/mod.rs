//! The subcommands: parse, call the library, print.

pub mod bench;
pub mod chat;
pub mod eval;
pub mod generate;
pub mod label;
mod large;
mod opened;
pub mod pair;
pub mod router;
#[cfg(feature = "serve")]
pub mod serve;
pub mod study;
pub mod threshold;
pub mod train;
mod written;
