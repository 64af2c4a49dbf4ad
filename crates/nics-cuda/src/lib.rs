//! CUDA kernels from source: compiled at run time by NVRTC, kept on disk, launched through the driver API.
//!
//! Both libraries are looked for when they are used and not before, so a machine without CUDA builds and runs everything
//! that depends on this crate; what is missing is an [`enum@Error`] that names it. No tensors here: a kernel takes raw device
//! addresses ([`Argument::Pointer`]), and what lies there is its caller's business.
//!
//! ```no_run
//! use nics_cuda::{Argument, Device, Grid, Source, compiled};
//!
//! # fn main() -> nics_cuda::Result<()> {
//! let source = Source {
//!     name: "double",
//!     text: r#"extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }"#,
//!     defines: &[("FACTOR", 2)],
//! };
//! let device = Device::open(0)?;
//! let module = device.load(&compiled(&source, device.arch(), None)?)?;
//! let twice = module.function("twice")?;
//! # let address = 0u64;
//! // SAFETY: 32 floats lie at `address` on this device.
//! unsafe { twice.launch(Grid { blocks: [1, 1, 1], threads: 32, shared: 0 }, &[Argument::Pointer(address)])? };
//! # Ok(())
//! # }
//! ```

mod compiled;
mod driver;
#[cfg(feature = "emulated")]
mod emulated;
mod error;
mod nvrtc;
pub mod packed;

pub use compiled::{Arch, Source, compiled};
pub use driver::{Argument, Device, Function, Grid, Module};
#[cfg(feature = "emulated")]
pub use emulated::Emulated;
pub use error::{Error, Result};
pub use nvrtc::{LOCATION, Nvrtc};
