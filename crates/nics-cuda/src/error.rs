//! What can go wrong, one variant for each thing that a caller could act on differently.

use std::path::PathBuf;

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a kernel's source and its launch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no NVRTC.
    #[error(
        "libnvrtc.so, which compiles CUDA kernels, was not found ({tried}); run `cargo xtask setup --cuda`, or `pip \
         install nvidia-cuda-nvrtc` and point NICS_NVRTC at the folder that holds it"
    )]
    NoNvrtc {
        /// Where it was looked for, and what came of that.
        tried: String,
    },
    /// A library that is not the one it should be.
    #[error("{} is no NVRTC: {reason}; point NICS_NVRTC at another one", path.display())]
    NotNvrtc {
        /// The library.
        path: PathBuf,
        /// What it lacks.
        reason: String,
    },
    /// There is no driver.
    #[error("libcuda.so.1, the NVIDIA driver, was not found; install the driver, or compute on the CPU")]
    NoDriver,
    /// The driver has no such device.
    #[error("no CUDA device {index}: the driver reports {count} (CUDA_VISIBLE_DEVICES counts)")]
    NoDevice {
        /// The device that was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A source that does not compile.
    #[error("{name} does not compile for {arch}:\n{log}")]
    Compile {
        /// The source.
        name: String,
        /// The architecture, e.g. `sm_90`.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// NVRTC failed at something else than the source.
    #[error("NVRTC cannot {action}: {reason}")]
    Nvrtc {
        /// What was tried.
        action: &'static str,
        /// Its answer.
        reason: String,
    },
    /// The driver refused.
    #[error("the CUDA driver cannot {action}: {reason}")]
    Driver {
        /// What was tried.
        action: String,
        /// Its answer.
        reason: String,
    },
    /// A matrix that the kernels of [`packed`](crate::packed) do not take.
    #[error("no kernel takes this matrix: {0}")]
    Matrix(String),
    /// The cache of compiled code.
    #[error(transparent)]
    Base(#[from] nics_base::Error),
}
