//! ggml, called as its own users do: a graph of products over weights in its k-quants, on its CPU back-end with a pool of
//! threads that is there beforehand. Its two libraries are opened at run time, from the folder that `NICS_GGML` names.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use libloading::Library;

/// The environment variable with the folder of `libggml-base.so` and `libggml-cpu.so`.
pub const FOLDER: &str = "NICS_GGML";

/// An object of ggml's.
type Object = *mut c_void;

/// `struct ggml_init_params`.
#[repr(C)]
struct InitParams {
    mem_size: usize,
    mem_buffer: Object,
    no_alloc: bool,
}

/// `struct ggml_threadpool_params`; ggml fills it.
#[repr(C)]
struct ThreadpoolParams {
    cpumask: [bool; 512],
    n_threads: c_int,
    prio: c_int,
    poll: u32,
    strict_cpu: bool,
    paused: bool,
}

/// `enum ggml_type`.
const F32: c_int = 0;

/// Gives the buffer types of a device beside its ordinary one, and the name by which it is asked for.
type Extra = unsafe extern "C" fn(Object) -> *mut Object;
const EXTRA: &CStr = c"ggml_backend_dev_get_extra_bufts";

/// A format of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 3.4 bits a weight.
    Q3K,
    /// 4.5 bits.
    Q4K,
    /// The same in interleaved rows, as its back-end keeps it when asked.
    Q4KInterleaved,
}

impl Format {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q3K => "ggml Q3_K",
            Self::Q4K => "ggml Q4_K",
            Self::Q4KInterleaved => "ggml Q4_K interleaved",
        }
    }

    /// `enum ggml_type`.
    fn number(self) -> c_int {
        match self {
            Self::Q3K => 11,
            Self::Q4K | Self::Q4KInterleaved => 12,
        }
    }
}

/// Declares the functions that are called, and how they are found in the two libraries.
macro_rules! functions {
    ($($library:ident $name:ident $symbol:literal ($($argument:ty),*) $(-> $result:ty)?;)*) => {
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Functions {
            fn of(base: &Library, cpu: &Library) -> Result<Self> {
                let library = |name: &str| if name == "base" { base } else { cpu };
                Ok(Self {
                    // SAFETY: these are the signatures of ggml's public headers.
                    $($name: *unsafe { library(stringify!($library)).get($symbol) }
                        .with_context(|| format!("ggml lacks {}", String::from_utf8_lossy($symbol)))?,)*
                })
            }
        }
    };
}

functions! {
    base init b"ggml_init" (InitParams) -> Object;
    base free b"ggml_free" (Object);
    base tensor_overhead b"ggml_tensor_overhead" () -> usize;
    base graph_overhead b"ggml_graph_overhead_custom" (usize, bool) -> usize;
    base new_tensor_2d b"ggml_new_tensor_2d" (Object, c_int, i64, i64) -> Object;
    base mul_mat b"ggml_mul_mat" (Object, Object, Object) -> Object;
    base new_graph b"ggml_new_graph_custom" (Object, usize, bool) -> Object;
    base expand b"ggml_build_forward_expand" (Object, Object);
    base row_size b"ggml_row_size" (c_int, i64) -> usize;
    base quantize_chunk b"ggml_quantize_chunk" (c_int, *const f32, Object, i64, i64, i64, *const f32) -> usize;
    base threadpool_params b"ggml_threadpool_params_init" (*mut ThreadpoolParams, c_int);
    base default_buffers b"ggml_backend_get_default_buffer_type" (Object) -> Object;
    base alloc_tensors b"ggml_backend_alloc_ctx_tensors_from_buft" (Object, Object) -> Object;
    base buffer_free b"ggml_backend_buffer_free" (Object);
    base tensor_set b"ggml_backend_tensor_set" (Object, *const c_void, usize, usize);
    base tensor_get b"ggml_backend_tensor_get" (Object, *mut c_void, usize, usize);
    base compute b"ggml_backend_graph_compute" (Object, Object) -> c_int;
    base device b"ggml_backend_reg_dev_get" (Object, usize) -> Object;
    base procedure b"ggml_backend_reg_get_proc_address" (Object, *const c_char) -> Object;
    base backend_free b"ggml_backend_free" (Object);
    cpu registry b"ggml_backend_cpu_reg" () -> Object;
    cpu cpu_init b"ggml_backend_cpu_init" () -> Object;
    cpu set_threads b"ggml_backend_cpu_set_n_threads" (Object, c_int);
    cpu set_threadpool b"ggml_backend_cpu_set_threadpool" (Object, Object);
    cpu threadpool_new b"ggml_threadpool_new" (*mut ThreadpoolParams) -> Object;
    cpu threadpool_free b"ggml_threadpool_free" (Object);
}

/// The back-end with its threads.
pub struct Ggml {
    call: Functions,
    backend: Object,
    threads: Object,
    /// The functions live in them.
    _libraries: [Library; 2],
}

impl Ggml {
    /// The one whose folder [`FOLDER`] names, if it is set, on so many threads.
    pub fn find(threads: usize) -> Result<Option<Arc<Self>>> {
        let folder = std::env::var_os(FOLDER).filter(|v| !v.is_empty()).map(PathBuf::from);
        folder.map(|folder| Self::open(&folder, threads).map(Arc::new)).transpose()
    }

    fn open(folder: &Path, threads: usize) -> Result<Self> {
        let open = |name: &str| {
            let path = folder.join(name);
            // SAFETY: whoever sets the variable answers for what the libraries do when they are loaded.
            unsafe { Library::new(&path) }
                .with_context(|| format!("{FOLDER}: cannot open {}", path.display()))
        };
        let (base, cpu) = (open("libggml-base.so")?, open("libggml-cpu.so")?);
        let call = Functions::of(&base, &cpu)?;
        let count = c_int::try_from(threads)?;
        let mut params = ThreadpoolParams {
            cpumask: [false; 512],
            n_threads: 0,
            prio: 0,
            poll: 0,
            strict_cpu: false,
            paused: false,
        };
        // SAFETY: the arguments are what the headers ask for; the pool outlives the back-end's use of it.
        let (backend, threads) = unsafe {
            let backend = (call.cpu_init)();
            (call.threadpool_params)(&raw mut params, count);
            // Waiting for the next graph they would spin into the next contender's turn.
            params.poll = 0;
            let threads = (call.threadpool_new)(&raw mut params);
            if !backend.is_null() && !threads.is_null() {
                (call.set_threads)(backend, count);
                (call.set_threadpool)(backend, threads);
            }
            (backend, threads)
        };
        if backend.is_null() || threads.is_null() {
            bail!("ggml's CPU back-end did not start");
        }
        Ok(Self { call, backend, threads, _libraries: [base, cpu] })
    }

    /// Where weights of a format go.
    fn buffers(&self, format: Format) -> Result<Object> {
        if format != Format::Q4KInterleaved {
            // SAFETY: the back-end lives as long as `self`.
            return Ok(unsafe { (self.call.default_buffers)(self.backend) });
        }
        // SAFETY: the registry has one device, the CPU, and the procedure of this name this signature; it gives a list
        // that ends with a null.
        let first = unsafe {
            let registry = (self.call.registry)();
            let found = (self.call.procedure)(registry, EXTRA.as_ptr());
            if found.is_null() {
                null_mut()
            } else {
                let extra: Extra = std::mem::transmute::<Object, Extra>(found);
                let all = extra((self.call.device)(registry, 0));
                if all.is_null() { null_mut() } else { *all }
            }
        };
        if first.is_null() {
            bail!("this build of ggml has no interleaved weights");
        }
        Ok(first)
    }
}

impl Drop for Ggml {
    fn drop(&mut self) {
        // SAFETY: both were made in `open`; layers hold an `Arc` of us and are gone.
        unsafe {
            (self.call.backend_free)(self.backend);
            (self.call.threadpool_free)(self.threads);
        }
    }
}

/// Copies of one layer and a graph that multiplies by each.
pub struct Layers {
    ggml: Arc<Ggml>,
    /// Of weights; of inputs and results.
    contexts: [Object; 2],
    buffers: [Object; 2],
    graph: Object,
    x: Object,
    ys: Vec<Object>,
    /// Values of a result.
    values: usize,
}

impl Layers {
    /// `copies` of `weights` (`[output, input]`) for `rows` rows of x.
    pub fn new(
        ggml: &Arc<Ggml>,
        format: Format,
        weights: &[f32],
        [input, output]: [usize; 2],
        rows: usize,
        copies: usize,
    ) -> Result<Self> {
        let call = &ggml.call;
        let (wide, high) = (input as i64, output as i64);
        // SAFETY: contexts hold descriptions alone and have room for them; tensors get memory from buffers that live as
        // long as `Self`; `data` has the bytes that ggml says a row takes.
        unsafe {
            let mut data = vec![0u8; output * (call.row_size)(format.number(), wide)];
            (call.quantize_chunk)(
                format.number(),
                weights.as_ptr(),
                data.as_mut_ptr().cast(),
                0,
                high,
                wide,
                std::ptr::null(),
            );
            let context = |tensors: usize, graph: usize| {
                let mem_size = tensors * (call.tensor_overhead)() + graph;
                (call.init)(InitParams { mem_size, mem_buffer: null_mut(), no_alloc: true })
            };
            let contexts =
                [context(copies, 0), context(1 + copies, (call.graph_overhead)(2 * copies + 2, false))];
            if contexts.iter().any(|c| c.is_null()) {
                bail!("ggml has no memory for its contexts");
            }
            let ws: Vec<Object> =
                (0..copies).map(|_| (call.new_tensor_2d)(contexts[0], format.number(), wide, high)).collect();
            let x = (call.new_tensor_2d)(contexts[1], F32, wide, rows as i64);
            let ys: Vec<Object> = ws.iter().map(|w| (call.mul_mat)(contexts[1], *w, x)).collect();
            let graph = (call.new_graph)(contexts[1], 2 * copies + 2, false);
            for y in &ys {
                (call.expand)(graph, *y);
            }
            let buffers = [
                (call.alloc_tensors)(contexts[0], ggml.buffers(format)?),
                (call.alloc_tensors)(contexts[1], ggml.buffers(Format::Q3K)?),
            ];
            if buffers.iter().any(|b| b.is_null()) {
                bail!("ggml has no memory for {copies} layers");
            }
            for w in ws {
                (call.tensor_set)(w, data.as_ptr().cast(), 0, data.len());
            }
            Ok(Self { ggml: ggml.clone(), contexts, buffers, graph, x, ys, values: rows * output })
        }
    }

    /// Copies that there are.
    pub fn len(&self) -> usize {
        self.ys.len()
    }

    /// x, `[rows, input]`.
    pub fn set(&self, x: &[f32]) {
        // SAFETY: the tensor was made for so many values.
        unsafe { (self.ggml.call.tensor_set)(self.x, x.as_ptr().cast(), 0, size_of_val(x)) };
    }

    /// All products.
    pub fn compute(&self) -> Result<()> {
        // SAFETY: graph and back-end are whole.
        let status = unsafe { (self.ggml.call.compute)(self.ggml.backend, self.graph) };
        if status != 0 {
            bail!("ggml failed with status {status}");
        }
        Ok(())
    }

    /// What the first copy gave, `[rows, output]`.
    pub fn first(&self) -> Vec<f32> {
        let mut y = vec![0f32; self.values];
        // SAFETY: the result has so many values.
        unsafe {
            (self.ggml.call.tensor_get)(self.ys[0], y.as_mut_ptr().cast(), 0, size_of_val(&y[..]));
        }
        y
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        // SAFETY: they were made in `new` and nobody else has them.
        unsafe {
            for buffer in self.buffers {
                (self.ggml.call.buffer_free)(buffer);
            }
            for context in self.contexts {
                (self.ggml.call.free)(context);
            }
        }
    }
}
