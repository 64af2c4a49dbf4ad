//! The commands: parse, call, print.

pub mod calibrate;
pub mod data;
pub mod inspect;
pub mod opened;
pub mod quantize;
