//! The subcommands: parse, call the library, print.

pub mod bench;
pub mod chat;
pub mod generate;
mod large;
mod opened;
pub mod pair;
#[cfg(feature = "serve")]
pub mod serve;
pub mod study;
mod written;
