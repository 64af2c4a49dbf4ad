//! Systems without a sandbox.

use std::convert::Infallible;
use std::process::Command;

use super::{Limits, SandboxError};

/// Nobody has one.
#[derive(Debug)]
pub(super) struct Wall(Infallible);

pub(super) const SIGXCPU: i32 = 24;

impl Wall {
    pub(super) fn new() -> Result<Self, SandboxError> {
        let here = format!("this is {} on {}", std::env::consts::OS, std::env::consts::ARCH);
        Err(SandboxError::Unsupported(here))
    }

    pub(super) fn confine(&self, _: &mut Command, _: Limits) {
        match self.0 {}
    }
}

pub(super) fn threads(_: u32) -> usize {
    0
}
