//! The cache's pages on any device of libtorch, and attention over them.
//!
//! [`Pages`] are the pages of one layer of one sequence, byte for byte as the cache keeps them in the processor's memory.
//! [`Attention`] attends over them and halves their width, in one of two ways ([`Way`]):
//!
//! - *kernels* on a CUDA device, `kernels.cu`, compiled at run time for the layer's shape: a warp takes 128 tokens of one
//!   key head for all its query heads, reads their codes once and keeps a softmax of its own; the warps of a block, and
//!   then the blocks, are put together. Codes are halved where they lie.
//! - *operations* of libtorch everywhere else: codes are unpacked by masks and shifts, a piece of pages at a time, with
//!   the softmax put together piece by piece.
//!
//! The kernels have not run on a GPU yet, and no speed is claimed for them. Their source is held against the operations on
//! the processor, compiled as C++ with every thread of CUDA's run (`tests/device.rs`), and compiled by NVRTC; on a device
//! the two ways are compared by `tests/device_gpu.rs`, which is ready to run.

mod kernels;
mod ops;
mod pages;

use tch::{Device, Kind, Tensor};

pub use kernels::{SOURCE, Segments, defines, unsupported};
pub use pages::{Layout, Page, Pages};

use crate::{Bits, Error, Result};

/// How a layer's pages are computed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// By CUDA kernels.
    Kernels,
    /// By libtorch's operations.
    Operations {
        /// Why not by kernels.
        why: String,
    },
}

/// Attention over pages of one layout on one device.
#[derive(Debug)]
pub struct Attention {
    layout: Layout,
    device: Device,
    way: std::result::Result<kernels::Kernels, String>,
}

impl Attention {
    /// Kernels where they can be had: on a CUDA device with NVRTC, for heads that fill them ([`unsupported`]). Compiling takes
    /// some seconds, and is done once for a layout and a kind of device, for all runs of this user.
    ///
    /// # Errors
    /// A layout that makes no sense. What stands in the way of kernels is no error; [`way`](Self::way) tells it.
    pub fn new(layout: Layout, device: Device) -> Result<Self> {
        layout.check()?;
        let way = match device {
            Device::Cuda(index) => match unsupported(&layout) {
                Some(why) => Err(why),
                None => kernels::Kernels::compile(&layout, index).map_err(|e| e.to_string()),
            },
            other => Err(format!("there are kernels for CUDA devices alone, not for {other:?}")),
        };
        if let (Err(why), Device::Cuda(_)) = (&way, device) {
            tracing::warn!(
                "pages are attended by libtorch's operations, which are slower than kernels: {why}"
            );
        }
        Ok(Self { layout, device, way })
    }

    /// By libtorch's operations wherever it is.
    ///
    /// # Errors
    /// A layout that makes no sense.
    pub fn by_operations(layout: Layout, device: Device) -> Result<Self> {
        layout.check()?;
        Ok(Self { layout, device, way: Err("operations were asked for".into()) })
    }

    /// How it computes.
    pub fn way(&self) -> Way {
        match &self.way {
            Ok(_) => Way::Kernels,
            Err(why) => Way::Operations { why: why.clone() },
        }
    }

    /// Decode attention: softmax of `scale · q kᵀ` over all tokens of the pages, times `v`; one row for each of `sequences`.
    ///
    /// # Shapes
    /// `q`: `[sequences, query heads, head_dim]`, rotated, on the device. Result: the same, of the same kind.
    ///
    /// # Errors
    /// Queries or pages of another shape or on another device, a sequence without a token, and what the device reports.
    pub fn attend(&self, q: &Tensor, scale: f64, sequences: &[&Pages]) -> Result<Tensor> {
        let Layout { queries, head_dim, .. } = self.layout;
        let expected = [sequences.len() as i64, queries as i64, head_dim as i64];
        if q.size() != expected || q.device() != self.device {
            return Err(Error::Input(format!(
                "the queries are {:?} on {:?}, expected {expected:?} (sequences, query heads, head_dim) on {:?}",
                q.size(),
                q.device(),
                self.device
            )));
        }
        for (s, pages) in sequences.iter().enumerate() {
            self.own(pages)?;
            if pages.tokens() == 0 {
                return Err(Error::Input(format!("sequence {s} has no token to attend to")));
            }
        }
        if sequences.is_empty() {
            return Ok(q.f_zeros_like()?);
        }
        let wide = q.f_to_kind(Kind::Float)?.f_contiguous()?;
        let out = match &self.way {
            Ok(kernels) => kernels.attend(&self.layout, &wide, scale, sequences)?,
            Err(_) => ops::attend(&self.layout, &wide, scale, sequences)?,
        };
        Ok(out.f_to_kind(q.kind())?)
    }

    /// Halves the width of pages: exact rows to codes of 8 bits, codes by the equivalent right shift ([`crate::shrink`]). What
    /// each page gives back is free for libtorch when this returns.
    ///
    /// # Errors
    /// Pages of another layout or device, pages that are not there or have 2 bits (nothing is changed then), and what the
    /// device reports.
    pub fn halve(&self, pages: &mut Pages, which: std::ops::Range<usize>) -> Result<()> {
        self.own(pages)?;
        let count = pages.all.len();
        let Some(pages) = pages.all.get_mut(which.clone()) else {
            return Err(Error::Input(format!("pages {which:?} are to be halved, and there are {count}")));
        };
        if let Some(i) = pages.iter().position(|page| page.bits() == Bits::B2) {
            return Err(Error::Input(format!("page {} has 2 bits, which are not halved", which.start + i)));
        }
        match &self.way {
            Ok(kernels) => kernels.halve(&self.layout, pages),
            Err(_) => pages.iter_mut().try_for_each(|page| ops::halve(&self.layout, page)),
        }
    }

    fn own(&self, pages: &Pages) -> Result<()> {
        if pages.layout() == self.layout && pages.device() == self.device {
            return Ok(());
        }
        Err(Error::Input(format!(
            "pages of {:?} on {:?}, expected {:?} on {:?}",
            pages.layout(),
            pages.device(),
            self.layout,
            self.device
        )))
    }
}
