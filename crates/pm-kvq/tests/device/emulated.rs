//! The kernels' source as C++ on the processor: the compiler that builds tch compiles it, with CUDA's words as
//! `emulation.h` has them, and every thread of CUDA's is run.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use libloading::os::unix::{Library, Symbol};
use pm_kvq::device::{Layout, SOURCE, defines};

/// What calls the kernels; arguments are 64-bit words, in the kernels' order.
const CALLS: &str = r#"
static const u64* arguments;
template <class T> T* address(int i) { return reinterpret_cast<T*>(arguments[i]); }
static void attend_thread() {
    float factor;
    std::memcpy(&factor, &arguments[5], 4);
    attend(address<float>(0), address<float>(1), address<Segment>(2), address<Chunk>(3), int(arguments[4]), factor);
}
static void combine_thread() { combine(address<float>(0), address<float>(1), address<u64>(2), int(arguments[3])); }
static void quantize_thread() { quantize(address<Halved>(0), arguments[1], arguments[2]); }
static void halve_8_thread() { halve_8(address<Halved>(0), arguments[1], arguments[2]); }
static void halve_4_thread() { halve_4(address<Halved>(0), arguments[1], arguments[2]); }
extern "C" void launch(int kernel, unsigned x, unsigned y, unsigned threads, const u64* given) {
    void (*const all[])() = {attend_thread, combine_thread, quantize_thread, halve_8_thread, halve_4_thread};
    arguments = given;
    for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++) {
        for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) emulation::run(threads, all[kernel]);
    }
}
"#;

type Launch = unsafe extern "C" fn(i32, u32, u32, u32, *const u64);

/// A kernel, by its place in [`CALLS`].
#[derive(Debug, Clone, Copy)]
pub enum Kernel {
    Attend,
    Combine,
    Quantize,
    Halve8,
    Halve4,
}

/// The kernels of one layout.
pub struct Emulated(Library);

impl Emulated {
    pub fn compile(layout: &Layout, folder: &Path) -> Self {
        let mut source = String::new();
        for (name, value) in defines(layout) {
            writeln!(source, "#define {name} {value}").unwrap();
        }
        source += include_str!("emulation.h");
        // The one instruction that is written as such.
        let convert = r#"asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));"#;
        assert!(SOURCE.contains(convert), "the instruction to replace is gone");
        source += &SOURCE.replace(convert, "x = emulated_half(h);");
        source += CALLS;
        let (from, to) = (folder.join("kernels.cpp"), folder.join("kernels.so"));
        std::fs::write(&from, source).unwrap();
        let cxx = std::env::var("CXX").ok().filter(|cxx| !cxx.trim().is_empty()).unwrap_or("c++".into());
        let mut words = cxx.split_whitespace();
        let built = Command::new(words.next().unwrap())
            .args(words)
            // Sums of products in one rounding or two: both hold.
            .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-o"])
            .arg(&to)
            .arg(&from)
            .output()
            .unwrap();
        assert!(built.status.success(), "{cxx}: {}", String::from_utf8_lossy(&built.stderr));
        // SAFETY: our own code, whose initialisers do nothing.
        Self(unsafe { Library::open(Some(&to), libloading::os::unix::RTLD_NOW) }.unwrap())
    }

    /// # Safety
    /// As for a launch on a device.
    pub unsafe fn launch(&self, kernel: Kernel, blocks: [u32; 2], threads: u32, arguments: &[u64]) {
        unsafe {
            let launch: Symbol<Launch> = self.0.get(b"launch\0").unwrap();
            launch(kernel as i32, blocks[0], blocks[1], threads, arguments.as_ptr());
        }
    }
}
