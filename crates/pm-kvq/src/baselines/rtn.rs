//! Rounding to the nearest code, every row by itself: the plainest baseline, and with another [`Format`](super::Format) what
//! engines do.

use nics_core::models::ModelDims;
use tch::Tensor;

use super::cache::{Arrived, Method};
use super::format::Coders;
use super::rows::Rows;
use crate::Result;

/// When a row is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before it attends: new rows see themselves as they read back, as in an engine that writes its cache first.
    Before,
    /// After it has attended: new rows, the prompt among them, see themselves exactly.
    After,
}

/// Every row is stored when it comes, by itself.
#[derive(Debug)]
pub struct Rtn {
    coders: Coders,
    when: When,
}

impl Rtn {
    /// Rows of these formats.
    pub fn new(coders: impl Into<Coders>, when: When) -> Self {
        Self { coders: coders.into(), when }
    }
}

impl Method for Rtn {
    fn name(&self) -> String {
        let when = if self.when == When::Before { "before" } else { "after" };
        format!("rtn-{when}:{}", self.coders.name())
    }

    fn check(&self, dims: &ModelDims) -> Result<()> {
        self.coders.check(dims)
    }

    fn bytes(&self, dims: &ModelDims, stored: usize, exact: usize) -> usize {
        self.coders.bytes(dims, stored, exact)
    }

    fn stands_alone(&self) -> bool {
        true
    }

    fn before(&self, new: &Arrived, rows: &mut Rows) -> Result<()> {
        if self.when == When::Before { self.coders.store(rows, &new.rows()) } else { Ok(()) }
    }

    fn after(&self, new: &Arrived, rows: &mut Rows, _received: Option<&Tensor>) -> Result<()> {
        if self.when == When::After { self.coders.store(rows, &new.rows()) } else { Ok(()) }
    }
}
