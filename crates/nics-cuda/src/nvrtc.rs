//! NVIDIA's run-time compiler, opened where it is used.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::{Arch, Error, Result, Source};

/// The variable that names the folder, or the file, of libnvrtc.
pub const LOCATION: &str = "NICS_NVRTC";
/// Names of the library, those of the versions that this crate was tried with first.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

type Program = *mut c_void;

/// The compiler.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    path: PathBuf,
}

impl Nvrtc {
    /// Looks where [`LOCATION`] points; without it beside the CUDA libraries that this process has loaded (libtorch's own
    /// set has them together), then where the system looks.
    ///
    /// # Errors
    /// [`Error::NoNvrtc`] with the places that were tried.
    pub fn open() -> Result<Self> {
        match std::env::var_os(LOCATION).filter(|path| !path.is_empty()) {
            Some(path) => Self::open_at(Path::new(&path)),
            None => Self::first(candidates(&beside_loaded())),
        }
    }

    /// Opens the library at `path`, or in the folder `path`.
    pub fn open_at(path: &Path) -> Result<Self> {
        if path.is_dir() {
            Self::first(candidates(&[path.to_owned()]))
        } else {
            Self::first([path.to_owned()])
        }
    }

    fn first(candidates: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let mut tried = Vec::new();
        for path in candidates {
            match load(&path) {
                Ok(library) => {
                    let compiler = Self { library, path };
                    compiler.call::<unsafe extern "C" fn(Program, *mut c_char) -> c_int>(c"nvrtcGetCUBIN")?;
                    return Ok(compiler);
                }
                Err(why) => tried.push(why),
            }
        }
        Err(Error::NoNvrtc { tried: tried.join("; ") })
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version, e.g. 13.0.
    pub fn version(&self) -> Result<(i32, i32)> {
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = self.call(c"nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two numbers to write to.
        self.check("tell its version", unsafe { version(&raw mut major, &raw mut minor) })?;
        Ok((major, minor))
    }

    /// Machine code (a cubin) of `source` for `arch`.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's messages; an architecture that it does not know is one of them.
    pub fn compile(&self, source: &Source, arch: Arch) -> Result<Vec<u8>> {
        type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
        type Bytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
        let create: unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int = self.call(c"nvrtcCreateProgram")?;
        let destroy: unsafe extern "C" fn(*mut Program) -> c_int = self.call(c"nvrtcDestroyProgram")?;
        let compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int =
            self.call(c"nvrtcCompileProgram")?;
        let (log_size, log): (Size, Bytes) =
            (self.call(c"nvrtcGetProgramLogSize")?, self.call(c"nvrtcGetProgramLog")?);
        let (code_size, code): (Size, Bytes) =
            (self.call(c"nvrtcGetCUBINSize")?, self.call(c"nvrtcGetCUBIN")?);

        let text = |text: &str| {
            CString::new(text).map_err(|_| Error::Nvrtc {
                action: "take the source",
                reason: "it holds a zero byte".into(),
            })
        };
        let (body, name) = (text(source.text)?, text(source.name)?);
        let options = source.options(arch).iter().map(|o| text(o)).collect::<Result<Vec<_>>>()?;
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let read = |program: Program, size: Size, bytes: Bytes, action| -> Result<Vec<u8>> {
            let mut n = 0;
            // SAFETY: a program of this library, and room of the size that it asks for.
            unsafe {
                self.check(action, size(program, &raw mut n))?;
                let mut all = vec![0u8; n];
                self.check(action, bytes(program, all.as_mut_ptr().cast()))?;
                Ok(all)
            }
        };
        let mut program = std::ptr::null_mut();
        // SAFETY: the texts live until the program is destroyed; `options` points to live texts.
        unsafe {
            let made = create(&raw mut program, body.as_ptr(), name.as_ptr(), 0, null(), null());
            self.check("take the source", made)?;
            let compiled = compile(program, options.len() as c_int, options.as_ptr());
            let outcome = if compiled == 0 {
                read(program, code_size, code, "hand out the code")
            } else {
                let log = read(program, log_size, log, "hand out its messages").unwrap_or_default();
                let log = String::from_utf8_lossy(&log).trim_matches(['\0', '\n', ' ']).to_owned();
                let log = if log.is_empty() { self.reason(compiled) } else { log };
                Err(Error::Compile { name: source.name.into(), arch: arch.to_string(), log })
            };
            destroy(&raw mut program);
            outcome
        }
    }

    /// A function of the library. Every type asked for here is the one of NVRTC's header.
    fn call<F: Copy>(&self, name: &'static CStr) -> Result<F> {
        // SAFETY: the caller names the function's type; the library is never unloaded before `self`.
        let symbol = unsafe { self.library.get::<F>(name.to_bytes_with_nul()) };
        symbol.map(|symbol| *symbol).map_err(|e| Error::NotNvrtc { path: self.path.clone(), reason: why(&e) })
    }

    fn check(&self, action: &'static str, code: c_int) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(Error::Nvrtc { action, reason: self.reason(code) }) }
    }

    fn reason(&self, code: c_int) -> String {
        let text = self.call::<unsafe extern "C" fn(c_int) -> *const c_char>(c"nvrtcGetErrorString");
        // SAFETY: NVRTC answers with a constant for any number.
        text.map_or_else(
            |_| code.to_string(),
            |text| unsafe { CStr::from_ptr(text(code)) }.to_string_lossy().into(),
        )
    }
}

/// The paths to try: in each folder, then by name alone.
fn candidates(folders: &[PathBuf]) -> Vec<PathBuf> {
    let inside = folders.iter().flat_map(|dir| NAMES.iter().map(move |name| dir.join(name)));
    let inside = inside.filter(|path| path.exists());
    inside.chain(NAMES.iter().map(PathBuf::from)).collect()
}

/// Folders of the CUDA libraries of this process.
fn beside_loaded() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    folders_of(&maps, &["libcudart.so", "libcublas.so", "libnvrtc.so", "libtorch_cuda.so"])
}

/// A line of `maps` ends in the mapped file: `7f..-7f.. r-xp 00000000 08:01 42    /usr/lib/libcudart.so.13`.
fn folders_of(maps: &str, names: &[&str]) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    for path in maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..]))) {
        let named = path.file_name().is_some_and(|file| {
            let file = file.to_string_lossy();
            names.iter().any(|name| file.starts_with(name))
        });
        if let Some(folder) = path.parent().filter(|f| named && !folders.iter().any(|known| known == f)) {
            folders.push(folder.to_owned());
        }
    }
    folders
}

/// Loads NVRTC, and before it the library of built-ins beside it, which NVRTC opens by name alone.
fn load(path: &Path) -> Result<Library, String> {
    // SAFETY: loading runs the libraries' initialisers; these are made to be loaded into a running process.
    let open = |path: &Path| unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let entries = folder.and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so")) {
        // Nothing to keep: closing it again would take it from NVRTC.
        let _ = open(&entry.path()).map(std::mem::forget);
    }
    open(path).map_err(|e| why(&e))
}

fn why(e: &libloading::Error) -> String {
    use std::error::Error as _;
    e.source().map_or_else(|| e.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_loaded_libraries_are_named_once() {
        let maps = "55d0-55d1 r--p 00000000 08:01 1    /usr/bin/prog\n\
                    7f02-7f03 r-xp 00000000 08:01 42    /opt/my cuda/lib/libcudart.so.13\n\
                    7f03-7f04 rw-p 00000000 08:01 42    /opt/my cuda/lib/libcudart.so.13\n\
                    7f05-7f06 rw-p 00000000 08:01 43    /usr/lib/libcuda.so.1\n";
        assert_eq!(folders_of(maps, &["libcudart.so"]), [PathBuf::from("/opt/my cuda/lib")]);
    }

    #[test]
    fn what_was_tried_and_the_mend_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("libnvrtc.so.13");
        std::fs::write(&file, "no library").unwrap();
        let e = Nvrtc::open_at(&file).unwrap_err().to_string();
        assert!(e.contains("libnvrtc.so.13: ") && e.contains("point NICS_NVRTC at the folder"), "{e}");
    }
}
