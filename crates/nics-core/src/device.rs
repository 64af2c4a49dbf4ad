//! Device, dtype and threads: what a computation runs on, chosen by the caller and handed down as arguments.
//!
//! A program that links `libtorch_cpu` alone has no CUDA until `libtorch_cuda.so` is loaded, so [`DeviceSpec::open`]
//! loads it when a CUDA device is asked for. libtorch looks for its CUDA half once and remembers the answer: open the
//! device before anything else asks libtorch about CUDA (`tch::Cuda::is_available`, `tch::manual_seed`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{Error, Result};

/// A device as a person writes it: `cpu`, `cuda`, `cuda:1`, or `auto` (CUDA when it can be used, else the CPU).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum DeviceSpec {
    /// The processor.
    #[default]
    Cpu,
    /// The CUDA device of this index.
    Cuda(usize),
    /// The first CUDA device when one can be used, else the processor.
    Auto,
}

impl DeviceSpec {
    /// Makes the device usable and returns it.
    ///
    /// # Errors
    /// [`Error::Device`] when a CUDA device is asked for by name and cannot be used: it names the missing library, the
    /// missing driver or the devices that there are. `auto` falls back to the processor instead.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(index) => {
                let count = open_cuda()?;
                if index < count {
                    return Ok(Device::Cuda(index));
                }
                let have =
                    if count == 1 { "there is one, cuda:0".into() } else { format!("there are {count}") };
                Err(Error::Device(format!(
                    "no CUDA device cuda:{index}: {have} (CUDA_VISIBLE_DEVICES counts)"
                )))
            }
            Self::Auto => match open_cuda() {
                Ok(_) => Ok(Device::Cuda(0)),
                Err(why) => {
                    tracing::debug!("auto chose the CPU: {why}");
                    Ok(Device::Cpu)
                }
            },
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            "auto" => return Ok(Self::Auto),
            _ => {}
        }
        s.strip_prefix("cuda:")
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .map(Self::Cuda)
            .ok_or_else(|| Error::Device(format!("unknown device {s:?}: give cpu, cuda, cuda:INDEX or auto")))
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl From<DeviceSpec> for String {
    fn from(spec: DeviceSpec) -> Self {
        spec.to_string()
    }
}

impl TryFrom<String> for DeviceSpec {
    type Error = Error;

    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

/// The name of an opened device as [`DeviceSpec`] writes it, for result rows.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Mps => "mps".into(),
        Device::Vulkan => "vulkan".into(),
    }
}

/// Loads libtorch's CUDA half and returns the number of devices, at least one.
fn open_cuda() -> Result<usize> {
    let library = loaded_folder("libtorch_cpu.so").map(|folder| folder.join("libtorch_cuda.so"));
    // A program linked to the whole of libtorch has it loaded already; loading it again is then a no-op.
    let library = library.unwrap_or_else(|| PathBuf::from("libtorch_cuda.so"));
    if library.is_absolute() && !library.exists() {
        return Err(Error::Device(format!(
            "CUDA was asked for, but {} does not exist: this libtorch is built for the CPU only; run \
             `cargo xtask setup --cuda`, or point LIBTORCH at a libtorch with CUDA, or use --device cpu",
            library.display()
        )));
    }
    load_for_good(&library).map_err(|why| {
        Error::Device(format!(
            "CUDA was asked for, but {} cannot be loaded: {why}; run `cargo xtask setup --cuda` to complete libtorch, \
             or use --device cpu",
            library.display()
        ))
    })?;
    if tch::Cuda::is_available() {
        return Ok(tch::Cuda::device_count().max(1) as usize);
    }
    // Nothing to keep: the driver is probed for the message alone.
    let mend = match load_for_good(Path::new("libcuda.so.1")) {
        Err(why) => format!("the NVIDIA driver is missing ({why}); install it"),
        Ok(()) => "the NVIDIA driver reports no usable device; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, and open \
                   the device before other uses of libtorch"
            .into(),
    };
    Err(Error::Device(format!("CUDA was asked for, but {mend}, or use --device cpu")))
}

/// Loads a shared library with its symbols visible to all, never to be unloaded.
fn load_for_good(library: &Path) -> std::result::Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: loading runs the library's initialisers. These are libtorch's own second half and the NVIDIA driver,
    // made to be loaded into a running process; the handle is leaked, so no symbol of theirs can dangle.
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) };
    loaded.map(std::mem::forget).map_err(|e| {
        use std::error::Error as _;
        e.source().map_or_else(|| e.to_string(), ToString::to_string)
    })
}

/// The folder from which this process has loaded the shared library `name`.
fn loaded_folder(name: &str) -> Option<PathBuf> {
    folder_in_maps(&std::fs::read_to_string("/proc/self/maps").ok()?, name)
}

/// A line of `maps` ends in the mapped file: `7f..-7f.. r-xp 00000000 08:01 42    /usr/lib/libtorch_cpu.so`.
fn folder_in_maps(maps: &str, name: &str) -> Option<PathBuf> {
    maps.lines()
        .filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])))
        .find(|path| path.file_name().is_some_and(|file| file == name))
        .and_then(|path| path.parent().map(Path::to_owned))
}

/// A dtype as a person writes it: `f32`, `bf16`, `f16`, or `auto` for the dtype of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeSpec {
    /// The checkpoint's own dtype.
    #[default]
    Auto,
    /// 32-bit floating point.
    F32,
    /// bfloat16: the range of float32 with 8 bits of precision.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl DtypeSpec {
    /// The dtype to compute in, given the checkpoint's.
    pub fn resolve(self, checkpoint: Kind) -> Kind {
        match self {
            Self::Auto => checkpoint,
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }
}

impl FromStr for DtypeSpec {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "f16" | "float16" => Ok(Self::F16),
            _ => Err(Error::input(format!("unknown dtype {s:?}: give auto, f32, bf16 or f16"))),
        }
    }
}

impl fmt::Display for DtypeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// The name of a dtype as [`DtypeSpec`] writes it where it has one, for result rows.
pub fn dtype_name(kind: Kind) -> String {
    match kind {
        Kind::Float => "f32".into(),
        Kind::BFloat16 => "bf16".into(),
        Kind::Half => "f16".into(),
        Kind::Double => "f64".into(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// The most threads that a request may name: a typing mistake should not start a million.
const MAX_THREADS: usize = 4096;

/// Sets the threads for operations called from *this* thread, libtorch's and those of our own kernels, and returns how
/// many there are.
///
/// `None` takes what the allocation allows: `OMP_NUM_THREADS`, else `SLURM_CPUS_PER_TASK`, else the processors that
/// affinity and control group leave to this process. libtorch keeps the count per calling thread, so call this on the
/// thread that computes. Its second pool (between operations) serves TorchScript alone and is left as it is.
///
/// Results on the CPU are the same bit for bit at an equal count; another count sums in another order.
pub fn set_threads(threads: Option<usize>) -> Result<usize> {
    let n = match threads {
        None => threads_allowed(),
        Some(n @ 1..=MAX_THREADS) => n,
        Some(n) => return Err(Error::input(format!("{n} threads: give 1 to {MAX_THREADS}"))),
    };
    tch::set_num_threads(n as i32);
    nics_kernels::pool::set_threads(n)
        .map_err(|e| Error::Input(format!("{n} threads: the system refuses one: {e}")))?;
    Ok(n)
}

/// Keeps libtorch's operations of this thread on one thread until it is dropped.
///
/// For the operations between our own kernels: they are too small to share, and libtorch's threads, which spin for a
/// while after each, would take the cores from the kernels' own.
#[derive(Debug)]
pub struct OneThread(i32);

impl OneThread {
    /// From now on, when `when` is true; nothing changes otherwise.
    pub fn when(when: bool) -> Self {
        let before = if when { tch::get_num_threads() } else { 1 };
        if before > 1 {
            tch::set_num_threads(1);
        }
        Self(before)
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        if self.0 > 1 {
            tch::set_num_threads(self.0);
        }
    }
}

/// How many threads the allocation of this process allows; see [`set_threads`].
pub fn threads_allowed() -> usize {
    let available = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    allowed(|name| std::env::var(name).ok(), available)
}

/// An unreadable or senseless value of a variable counts as unset.
fn allowed(variable: impl Fn(&str) -> Option<String>, available: usize) -> usize {
    ["OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"]
        .into_iter()
        .filter_map(variable)
        // OMP_NUM_THREADS may list a count for each level of nesting: the first is ours.
        .filter_map(|value| value.split(',').next().and_then(|n| n.trim().parse().ok()))
        .find(|n| (1..=MAX_THREADS).contains(n))
        .unwrap_or(available)
        .clamp(1, MAX_THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_is_found_in_a_map_of_the_process() {
        let maps = "55d0-55d1 r--p 00000000 08:01 1    /usr/bin/prog\n\
                    7f00-7f01 rw-p 00000000 00:00 0 \n\
                    7f02-7f03 r-xp 00000000 08:01 42    /opt/my torch/lib/libtorch_cpu.so\n";
        assert_eq!(folder_in_maps(maps, "libtorch_cpu.so"), Some(PathBuf::from("/opt/my torch/lib")));
        assert_eq!(folder_in_maps(maps, "libtorch_cuda.so"), None);
    }

    #[test]
    fn threads_follow_openmp_then_slurm_then_the_processors() {
        let with = |omp: Option<&'static str>, slurm: Option<&'static str>| {
            allowed(|name| if name.starts_with("OMP") { omp } else { slurm }.map(str::to_owned), 12)
        };
        assert_eq!(with(Some("3"), Some("8")), 3);
        assert_eq!(with(Some("4,2"), None), 4);
        assert_eq!(with(None, Some("8")), 8);
        assert_eq!(with(Some("many"), Some("0")), 12);
        assert_eq!(with(None, None), 12);
    }
}
