//! Sources, and their compiled code on disk.

use std::fmt;
use std::path::Path;

use nics_base::artefact::{cache_dir, write_atomic};
use nics_base::hash;

use crate::{Nvrtc, Result};

/// A CUDA source that stands for itself: no header is there to be included.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// By which messages name it.
    pub name: &'a str,
    /// CUDA C++17.
    pub text: &'a str,
    /// Numbers that it is compiled for, as `#define`s.
    pub defines: &'a [(&'a str, i64)],
}

impl Source<'_> {
    /// Command line of the compiler.
    pub(crate) fn options(&self, arch: Arch) -> Vec<String> {
        let defines = self.defines.iter().map(|(name, value)| format!("--define-macro={name}={value}"));
        [format!("--gpu-architecture={arch}"), "--std=c++17".into()].into_iter().chain(defines).collect()
    }
}

/// An architecture of NVIDIA's: the compute capability of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    /// 9 of 9.0.
    pub major: u32,
    /// 0 of 9.0.
    pub minor: u32,
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// Machine code of `source` for `arch`, from `folder` (without one, `cuda` in the [cache of nics](cache_dir)) when it was
/// compiled there before, with the same text, numbers and architecture; then NVRTC is not needed.
///
/// # Errors
/// NVRTC is missing, or the source does not compile. A cache that cannot be written is none.
pub fn compiled(source: &Source, arch: Arch, folder: Option<&Path>) -> Result<Vec<u8>> {
    let own = if folder.is_none() { cache_dir().map(|dir| dir.join("cuda")) } else { None };
    let file = folder.or(own.as_deref()).map(|dir| {
        let key = hash::bytes([source.text, "\0", &source.options(arch).join("\0")].concat());
        dir.join(format!("{}-{arch}-{}.cubin", source.name, &key[..16]))
    });
    if let Some(code) = file.as_ref().and_then(|file| std::fs::read(file).ok()).filter(|code| is_elf(code)) {
        return Ok(code);
    }
    let compiler = Nvrtc::open()?;
    tracing::debug!("{} is compiled for {arch} by {}", source.name, compiler.path().display());
    let code = compiler.compile(source, arch)?;
    if let Some(file) = file
        && let Err(e) = write_atomic(&file, &code)
    {
        tracing::warn!("compiled code cannot be kept: {e}");
    }
    Ok(code)
}

/// A cubin is an ELF file.
fn is_elf(code: &[u8]) -> bool {
    code.starts_with(b"\x7fELF")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compiled_code_is_found_by_text_numbers_and_architecture() {
        let dir = tempfile::tempdir().unwrap();
        let source = Source { name: "one", text: "text", defines: &[("DIM", 128)] };
        let arch = Arch { major: 9, minor: 0 };
        let key = hash::bytes("text\0--gpu-architecture=sm_90\0--std=c++17\0--define-macro=DIM=128");
        let file = dir.path().join(format!("one-sm_90-{}.cubin", &key[..16]));
        std::fs::write(file, b"\x7fELF code").unwrap();
        assert_eq!(compiled(&source, arch, Some(dir.path())).unwrap(), b"\x7fELF code");
    }
}
