//! The commands: parse, call, print.

pub mod bench;
pub mod calibrate;
pub mod data;
pub mod eval;
pub mod generate;
pub mod import;
pub mod inspect;
pub mod opened;
pub mod pack;
pub mod prepare_data;
pub mod quantize;
pub mod sensitivity;
pub mod study;
pub mod train;
