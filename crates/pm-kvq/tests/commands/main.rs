//! The commands of `pm-kvq`, as a user calls them.

#![cfg(feature = "cli")]

mod bad_input;
mod calibrate;
mod eval;
mod kit;
mod memory;
