//! Calibration data: which samples, in which order, put together how, with which masks.

pub mod captions;
pub mod coco;
pub mod collate;
pub mod conversation;
pub mod format;
pub mod order;
pub mod prepare;
