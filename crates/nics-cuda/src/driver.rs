//! Devices, modules and launches, through the driver API.
//!
//! A device is used by its primary context, which libtorch uses as well, so that addresses of its tensors mean the same
//! here. Kernels are launched on the legacy default stream: the one that libtorch's operations run on unless somebody
//! changes it, which nothing in this workspace does.

use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};

use crate::{Arch, Error, Result};

/// The current context of a thread is made this device's at each call, so that several devices mix.
#[derive(Debug)]
struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: the driver's contexts may be used from any thread.
unsafe impl Send for Context {}
unsafe impl Sync for Context {}

impl Context {
    fn enter(&self) -> Result<()> {
        // SAFETY: retained until this is dropped.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| refused("use the device", e))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once. There is nobody to tell that it failed.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A CUDA device.
#[derive(Debug, Clone)]
pub struct Device {
    context: Arc<Context>,
    arch: Arch,
}

impl Device {
    /// Opens the device of this index, counted as libtorch counts.
    ///
    /// # Errors
    /// No driver, or no such device.
    pub fn open(index: usize) -> Result<Self> {
        // SAFETY: looks for libcuda. Every other function of `sys` would panic without it.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver);
        }
        result::init().map_err(|e| refused("start", e))?;
        let count = result::device::get_count().map_err(|e| refused("count devices", e))? as usize;
        if index >= count {
            return Err(Error::NoDevice { index, count });
        }
        let device = result::device::get(index as i32).map_err(|e| refused("find the device", e))?;
        // SAFETY: a device that the driver has just named.
        let capability = |attribute| unsafe { result::device::get_attribute(device, attribute) };
        let [major, minor] = [
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        ]
        .map(capability);
        let arch = |x: Result<i32, DriverError>| {
            x.map(|x| x as u32).map_err(|e| refused("tell the device's kind", e))
        };
        let arch = Arch { major: arch(major)?, minor: arch(minor)? };
        // SAFETY: as above; released by `Context`.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(|e| refused("open the device", e))?;
        Ok(Self { context: Arc::new(Context { device, context }), arch })
    }

    /// Its architecture.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Its name, e.g. `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> Result<String> {
        result::device::get_name(self.context.device).map_err(|e| refused("tell the device's name", e))
    }

    /// Loads compiled code.
    pub fn load(&self, code: &[u8]) -> Result<Module> {
        self.context.enter()?;
        // SAFETY: the driver checks the code, which it has copied when this returns.
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
        let module = module.map_err(|e| refused("load compiled code", e))?;
        Ok(Module(Arc::new(Loaded { module, context: Arc::clone(&self.context) })))
    }
}

#[derive(Debug)]
struct Loaded {
    module: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: as for contexts.
unsafe impl Send for Loaded {}
unsafe impl Sync for Loaded {}

impl Drop for Loaded {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: loaded once, unloaded once; functions keep it alive.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// Code on a device.
#[derive(Debug, Clone)]
pub struct Module(Arc<Loaded>);

impl Module {
    /// The kernel of this name.
    pub fn function(&self, name: &str) -> Result<Function> {
        self.0.context.enter()?;
        let text = CString::new(name).map_err(|_| Error::Driver {
            action: format!("find the kernel {name:?}"),
            reason: "no name has a zero byte".into(),
        })?;
        // SAFETY: the module is loaded.
        let kernel = unsafe { result::module::get_function(self.0.module, text) };
        let kernel = kernel.map_err(|e| refused(&format!("find the kernel {name:?}"), e))?;
        Ok(Function { kernel, name: name.into(), module: Arc::clone(&self.0) })
    }
}

/// A kernel on a device.
#[derive(Debug, Clone)]
pub struct Function {
    kernel: sys::CUfunction,
    name: String,
    module: Arc<Loaded>,
}

// SAFETY: as for contexts.
unsafe impl Send for Function {}
unsafe impl Sync for Function {}

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x, y, z.
    pub blocks: [u32; 3],
    /// Threads of a block, along x.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// What a kernel is given, in the order of its parameters.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    /// An address on the device.
    Pointer(u64),
    /// An `unsigned long long`.
    Unsigned(u64),
    /// An `int`.
    Int(i32),
    /// A `float`.
    Float(f32),
}

impl Function {
    /// Queues the kernel behind what the default stream has to do; returns at once. Without blocks nothing is queued.
    ///
    /// # Errors
    /// The driver refuses. What goes wrong on the device later is told by later calls, of this crate or of libtorch.
    ///
    /// # Safety
    /// `arguments` are of the number and types that the kernel takes; it reads and writes only what is on this device and
    /// lives until it has run.
    pub unsafe fn launch(&self, grid: Grid, arguments: &[Argument]) -> Result<()> {
        let Grid { blocks, threads, shared } = grid;
        if blocks.contains(&0) {
            return Ok(());
        }
        self.module.context.enter()?;
        let mut pointers: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Pointer(x) | Argument::Unsigned(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Argument::Int(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Argument::Float(x) => std::ptr::from_ref(x).cast_mut().cast(),
            })
            .collect();
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        let queued = unsafe {
            result::launch_kernel(
                self.kernel,
                blocks.into(),
                (threads, 1, 1),
                shared,
                null_mut(),
                &mut pointers,
            )
        };
        queued.map_err(|e| refused(&format!("launch {} ({grid:?})", self.name), e))
    }
}

fn refused(action: &str, e: DriverError) -> Error {
    let name =
        e.error_name().map_or_else(|_| format!("{:?}", e.0), |name| name.to_string_lossy().into_owned());
    let text =
        e.error_string().map_or_else(|_| String::new(), |text| format!(" ({})", text.to_string_lossy()));
    Error::Driver { action: action.into(), reason: format!("{name}{text}") }
}
