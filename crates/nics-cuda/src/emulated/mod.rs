//! Kernels on the processor, for tests where there is no GPU (feature `emulated`).
//!
//! The compiler of C++ compiles a kernel's source as it stands, with CUDA's words as `emulation.h` has them, and every thread
//! of CUDA's is run. What that shows is that the source computes the right thing with the arguments and the grid that it is
//! launched with; how a GPU orders memory, and how fast it is, it does not show. Instructions in `asm` become calls of
//! functions of their names: one that `emulation.h` lacks is an error of the compiler.

use std::fmt::Write as _;
use std::process::Command;
use std::sync::Mutex;

use libloading::os::unix::{Library, RTLD_NOW, Symbol};

use crate::{Argument, Grid, Source};

type Launch = unsafe extern "C" fn(u32, *const u32, u32, *const u64);

/// A compiled source.
#[derive(Debug)]
pub struct Emulated {
    kernels: Vec<String>,
    /// Its blocks share memory: one launch at a time.
    library: Mutex<Library>,
}

impl Emulated {
    /// Compiles `source` with `CXX` (or `c++`), and these of its kernels to be launched.
    ///
    /// # Panics
    /// When it does not compile.
    pub fn compile(source: &Source, kernels: &[&str]) -> Self {
        let mut text = String::new();
        let _ = writeln!(text, "{}", include_str!("emulation.h"));
        for (name, value) in source.defines {
            let _ = writeln!(text, "#define {name} {value}");
        }
        // In a namespace without a name: the shared memory of a template would else be that of all libraries of the process.
        let _ = writeln!(text, "namespace {{\n{}\n}}", with_calls(source.text));
        for (i, kernel) in kernels.iter().enumerate() {
            let _ = writeln!(text, "static void emulated_{i}() {{ emulation::call({kernel}); }}");
        }
        let all: Vec<String> = (0..kernels.len()).map(|i| format!("emulated_{i}")).collect();
        let _ = write!(
            text,
            r#"
extern "C" void launch(unsigned kernel, const unsigned* blocks, unsigned threads, const unsigned long long* given) {{
    void (*const all[])() = {{{}}};
    emulation::arguments = given;
    for (blockIdx.z = 0; blockIdx.z < blocks[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < blocks[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < blocks[0]; blockIdx.x++) emulation::run(threads, all[kernel]);
}}
"#,
            all.join(", ")
        );
        let library = Mutex::new(built(source.name, &text));
        Self { kernels: kernels.iter().map(|&kernel| kernel.into()).collect(), library }
    }

    /// Runs a kernel to its end.
    ///
    /// # Panics
    /// When it is none of those that were named, or asks for dynamic shared memory, which is not emulated.
    ///
    /// # Safety
    /// As for [`Function::launch`](crate::Function::launch), with addresses of the processor.
    pub unsafe fn launch(&self, kernel: &str, grid: Grid, arguments: &[Argument]) {
        let at = self.kernels.iter().position(|own| own == kernel);
        let at = at.unwrap_or_else(|| panic!("the kernel {kernel:?} was not compiled"));
        assert_eq!(grid.shared, 0, "dynamic shared memory");
        let words: Vec<u64> = arguments
            .iter()
            .map(|argument| match *argument {
                Argument::Pointer(x) | Argument::Unsigned(x) => x,
                Argument::Int(x) => u64::from(x.cast_unsigned()),
                Argument::Float(x) => u64::from(x.to_bits()),
            })
            .collect();
        let library = self.library.lock().unwrap();
        // SAFETY: the type of `launch` above; the arguments are the caller's.
        unsafe {
            let launch: Symbol<Launch> = library.get(b"launch\0").unwrap();
            launch(at as u32, grid.blocks.as_ptr(), grid.threads, words.as_ptr());
        }
    }
}

fn built(name: &str, text: &str) -> Library {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
    std::fs::write(&from, text).unwrap();
    let cxx = std::env::var("CXX").ok().filter(|cxx| !cxx.trim().is_empty()).unwrap_or("c++".into());
    let mut words = cxx.split_whitespace();
    let output = Command::new(words.next().unwrap_or("c++"))
        .args(words)
        // Sums of products in one rounding or two: both hold.
        .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-o"])
        .arg(&to)
        .arg(&from)
        .output()
        .unwrap_or_else(|e| panic!("{cxx}: {e}"));
    assert!(output.status.success(), "{name} by {cxx}: {}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: our own code, whose initialisers do nothing. The file may go once it is mapped.
    unsafe { Library::open(Some(&to), RTLD_NOW) }.unwrap()
}

/// `asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));` becomes `cvt_f32_f16((x), (h));`.
fn with_calls(source: &str) -> String {
    let mut out = String::new();
    let mut rest = source;
    while let Some((before, statement)) = rest.split_once("asm(") {
        out += before;
        let end = statement.find(");").unwrap_or(statement.len());
        let (statement, after) = statement.split_at(end);
        // Odd parts lie between quotation marks: texts of the instruction first, then constraints.
        let parts: Vec<&str> = statement.split('"').collect();
        let instruction = parts.get(1).and_then(|text| text.split_whitespace().next()).unwrap_or_default();
        out += &instruction.replace('.', "_");
        let operands: String = parts.iter().step_by(2).copied().collect();
        out.push('(');
        out += operands.trim_start().trim_start_matches(':').replace(':', ",").as_str();
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_become_calls() {
        let text = with_calls(
            r#"float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h)); asm("a.b {%0}, " "%1;" : "+f"(c[0]) : "n"(3));"#,
        );
        assert_eq!(text, "float x; cvt_f32_f16( (x) , (h)); a_b( (c[0]) , (3));");
    }

    #[test]
    fn threads_wait_for_each_other() {
        let source = Source {
            name: "turned",
            text: r#"extern "C" __global__ void turned(float* x, int n, float by) {
                __shared__ float all[64];
                all[threadIdx.x] = x[blockIdx.x * N + threadIdx.x] + __shfl_xor_sync(~0u, float(threadIdx.x), 1);
                __syncthreads();
                x[blockIdx.x * N + threadIdx.x] = all[n - 1 - threadIdx.x] * by;
            }"#,
            defines: &[("N", 64)],
        };
        let emulated = Emulated::compile(&source, &["turned"]);
        let mut x: Vec<f32> = (0..128u8).map(|i| f32::from(i) * 100.0).collect();
        let grid = Grid { blocks: [2, 1, 1], threads: 64, shared: 0 };
        let arguments = [Argument::Pointer(x.as_mut_ptr() as u64), Argument::Int(64), Argument::Float(0.5)];
        // SAFETY: 128 floats lie there.
        unsafe { emulated.launch("turned", grid, &arguments) };
        let of = |i: usize| 0.5 * ((i / 64 * 64 + 63 - i % 64) * 100 + ((63 - i % 64) ^ 1)) as f32;
        assert_eq!(x, (0..128).map(of).collect::<Vec<f32>>());
    }
}
