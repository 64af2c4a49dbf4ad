//! From the Python package index to a libtorch folder.
//!
//! pip finds and checks the wheels (they are zip files), Python's `zipfile` takes them apart. Which interpreter does
//! that plays no role: the wheels of one fixed Python version are asked for, and nothing is installed into it, so that
//! an "externally managed" distribution Python is as good as any.

use std::env;
use std::fs;
use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nics_base::exit::TryAgain;
use nics_base::interrupt::Interrupt;

use super::{Kind, VERSION};
use crate::process::{ended, run};
use crate::workspace::{free_bytes, gigabytes, which};

/// Wheels wait here until the set-up is done, so that an interrupted one need not fetch them again.
pub const WHEELS: &str = "wheels.tmp";
/// The small CUDA libraries that `libtorch_cpu.so` is linked to, with the wheels that torch 2.11.0 pins.
const BESIDE: [(&str, &str); 2] =
    [("libcudart.so.13", "nvidia-cuda-runtime==13.0.96"), ("libcupti.so.13", "nvidia-cuda-cupti==13.0.85")];
/// The compiler of CUDA kernels that torch 2.11.0 pins, and its library.
pub const NVRTC: (&str, &str) = ("libnvrtc.so.13", "nvidia-cuda-nvrtc==13.0.88");
/// Libraries of the wheel that a CPU does not use: CUDA's, Python's, and helpers of Python's multiprocessing.
const NOT_FOR_CPU: [&str; 6] = ["cuda", "nvrtc", "nvshmem", "python", "libshm", "global_deps"];

/// Knows wheels for glibc by version (`manylinux_2_28`), and several platforms at once.
const OLDEST_PIP: u32 = 21;

/// Space for wheels and unpacked folder at once.
fn space_needed(kind: Kind) -> u64 {
    match kind {
        Kind::Cpu => 1_300_000_000,
        Kind::Cuda => 9_000_000_000,
    }
}

/// Looks at the free space before anything is downloaded.
pub fn check_space(cache: &Path, kind: Kind) -> Result<()> {
    check_bytes(cache, space_needed(kind))
}

/// As [`check_space`], for so many bytes.
pub fn check_bytes(cache: &Path, needed: u64) -> Result<()> {
    let Some(free) = free_bytes(cache) else { return Ok(()) };
    enough_space(cache, free, needed)
}

fn enough_space(cache: &Path, free: u64, needed: u64) -> Result<()> {
    if free >= needed {
        return Ok(());
    }
    bail!(
        "not enough disk: set-up needs {} in {}, and {} are free; make room, or set NICS_CACHE to a folder \
         on another disk",
        gigabytes(needed),
        cache.display(),
        gigabytes(free)
    )
}

/// The Python whose pip will download.
pub fn find_python() -> Result<PathBuf> {
    let mend = "or install libtorch yourself and point LIBTORCH at it";
    let Some(python) = which(&["python3", "python"]) else {
        bail!(
            "no Python found (looked for python3 and python on PATH), which set-up needs to download libtorch; \
               `apt install python3 python3-pip` (dnf: python3-pip), {mend}"
        );
    };
    let pip = Command::new(&python).args(["-m", "pip", "--version"]).stdin(Stdio::null()).output();
    let Some(pip) = pip.ok().filter(|o| o.status.success()) else {
        bail!(
            "{} has no pip, which set-up needs to download libtorch; `apt install python3-pip` (dnf: python3-pip) \
               or `python3 -m ensurepip`, {mend}",
            python.display()
        );
    };
    let printed = String::from_utf8_lossy(&pip.stdout).into_owned();
    if pip_major(&printed).is_some_and(|major| major < OLDEST_PIP) {
        bail!(
            "{} has {}, which does not know the names of torch's wheels; {OLDEST_PIP} or newer is needed: \
             `python3 -m pip install --user --upgrade pip`, {mend}",
            python.display(),
            printed.trim()
        );
    }
    Ok(python)
}

/// The 21 of `pip 21.3.1 from /usr/lib/…`.
fn pip_major(printed: &str) -> Option<u32> {
    printed.strip_prefix("pip ")?.split('.').next()?.parse().ok()
}

/// The folder of the installed torch that `LIBTORCH_USE_PYTORCH=1` stands for.
pub fn pytorch_of_python() -> Result<PathBuf> {
    let python =
        which(&["python3", "python"]).context("LIBTORCH_USE_PYTORCH is 1, but there is no Python on PATH")?;
    let code = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])";
    let output = Command::new(&python).args(["-c", code]).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!(
            "LIBTORCH_USE_PYTORCH is 1, but {} has no torch; `pip install torch=={VERSION}` or unset the variable",
            python.display()
        );
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// Space for the wheel of [`NVRTC`] and its libraries at once.
pub const NVRTC_SPACE: u64 = 400_000_000;

/// Downloads what `kind` needs and lays it out in `into` as `include/` and `lib/`.
pub fn fill(python: &Path, kind: Kind, wheels: &Path, into: &Path, interrupt: &Interrupt) -> Result<()> {
    let scratch = emptied(wheels)?;
    let pip = Pip { python, wheels, scratch: &scratch, interrupt };
    match kind {
        Kind::Cpu => fill_cpu(&pip, into),
        Kind::Cuda => fill_cuda(&pip, into),
    }
}

/// Downloads NVRTC and lays its libraries out in `into`.
pub fn fill_nvrtc(python: &Path, wheels: &Path, into: &Path, interrupt: &Interrupt) -> Result<()> {
    let (library, requirement) = NVRTC;
    let scratch = emptied(wheels)?;
    let pip = Pip { python, wheels, scratch: &scratch, interrupt };
    eprintln!("downloading {requirement} (0.1 GB)");
    let wheel = pip.download(requirement)?;
    // The wheel holds everything twice, the second time built for older processors.
    pip.unpack(&wheel, "*/libnvrtc*.so*", into, true, &[".alt.".into()])?;
    if !into.join(library).exists() {
        bail!("{} holds no {library}; report this, and set NICS_NVRTC to go on", wheel.display());
    }
    Ok(())
}

/// The folder of pip's unfinished files; the finished wheels beside it stay.
fn emptied(wheels: &Path) -> Result<PathBuf> {
    let scratch = wheels.join("pip");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    Ok(scratch)
}

fn fill_cpu(pip: &Pip, into: &Path) -> Result<()> {
    eprintln!("downloading torch {VERSION} (0.5 GB)");
    let wheel = pip.download(&format!("torch=={VERSION}"))?;
    let (lib, include) = (into.join("lib"), into.join("include"));
    let excluded: Vec<String> = NOT_FOR_CPU.iter().map(|s| (*s).to_owned()).collect();
    eprintln!("unpacking");
    // Vendored libraries stand in `torch.libs/` of some wheels; the loader finds them beside libtorch_cpu.so as well.
    pip.unpack(&wheel, "torch/lib/*.so*", &lib, true, &excluded)?;
    pip.unpack(&wheel, "torch.libs/*.so*", &lib, true, &[])?;
    pip.unpack(&wheel, "torch/include/*", &include, false, &[])?;
    let main = fs::read(lib.join("libtorch_cpu.so"))
        .with_context(|| format!("{} holds no torch/lib/libtorch_cpu.so", wheel.display()))?;
    for (library, requirement) in BESIDE {
        // Wheels of some platforms are built without CUDA.
        if !names_library(&main, library) {
            continue;
        }
        eprintln!("downloading {requirement}");
        let wheel = pip.download(requirement)?;
        pip.unpack(&wheel, &format!("*/{library}"), &lib, true, &[])?;
        if !lib.join(library).exists() {
            bail!("{} holds no {library}; report this, and set LIBTORCH to go on", wheel.display());
        }
    }
    Ok(())
}

/// The whole of torch as pip lays it out. `libtorch_cuda.so` finds NVIDIA's libraries relative to itself, so the
/// packages stay together under `site/` and `include`, `lib` lead into them.
fn fill_cuda(pip: &Pip, into: &Path) -> Result<()> {
    eprintln!("downloading torch {VERSION} with CUDA (2.5 GB)");
    let site = into.join("site");
    let mut command = pip.command("install");
    command.args(["--no-compile", "--target"]).arg(&site).arg(format!("torch=={VERSION}"));
    pip.run(&mut command, &format!("torch=={VERSION} with CUDA"))?;
    for part in ["include", "lib"] {
        std::os::unix::fs::symlink(Path::new("site/torch").join(part), into.join(part))?;
    }
    if !into.join("lib/libtorch_cuda.so").exists() {
        bail!(
            "the torch {VERSION} wheel of this platform comes without CUDA; install libtorch with CUDA yourself \
               and point LIBTORCH at it"
        );
    }
    Ok(())
}

/// Whether an ELF file names `library`, as it does to need it. Names in its string table end with a zero.
fn names_library(elf: &[u8], library: &str) -> bool {
    let name = [library.as_bytes(), b"\0"].concat();
    elf.windows(name.len()).any(|w| w == name)
}

struct Pip<'a> {
    python: &'a Path,
    wheels: &'a Path,
    scratch: &'a Path,
    interrupt: &'a Interrupt,
}

impl Pip<'_> {
    /// `python -m pip VERB` for the wheels of one Python version on this architecture.
    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(self.python);
        command.args(["-m", "pip", verb, "--disable-pip-version-check", "--no-input", "--only-binary=:all:"]);
        command.args([
            "--python-version",
            "3.11",
            "--implementation",
            "cp",
            "--abi",
            "cp311",
            "--abi",
            "abi3",
        ]);
        command.args(["--abi", "none"]);
        for tag in ["2_28", "2_27", "2_26", "2_25", "2_24", "2_18", "2_17", "2014"] {
            let name = if tag == "2014" { "manylinux2014".to_owned() } else { format!("manylinux_{tag}") };
            command.args(["--platform", &format!("{name}_{}", env::consts::ARCH)]);
        }
        command.args(["--progress-bar", if stderr().is_terminal() { "on" } else { "off" }]);
        // Unfinished files go where the next run removes them.
        command.env("TMPDIR", self.scratch);
        command
    }

    fn run(&self, command: &mut Command, what: &str) -> Result<()> {
        command.stdout(Stdio::from(stderr()));
        let status = run(command, self.interrupt)?;
        if status.success() {
            return Ok(());
        }
        let message = format!(
            "pip could not download {what} ({}; its messages are above); nothing half-done is used: run \
             `cargo xtask setup` again once the network is there, or point LIBTORCH at a libtorch of your own",
            ended(status)
        );
        Err(TryAgain(message).into())
    }

    /// The wheel of `requirement`, downloaded or kept from an interrupted run.
    fn download(&self, requirement: &str) -> Result<PathBuf> {
        // `nvidia-cuda-cupti==13.0.85` comes as `nvidia_cuda_cupti-13.0.85-py3-none-….whl`.
        let stem = requirement.replace('-', "_").replace("==", "-");
        // Downloaded apart and renamed: a wheel in `wheels` is whole.
        let fresh = self.scratch.join("fresh");
        let find = |dir: &Path| {
            let entries = fs::read_dir(dir).ok()?;
            let named = |p: &PathBuf| {
                let name = p.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
                name.starts_with(&stem) && p.extension().is_some_and(|e| e == "whl")
            };
            entries.flatten().map(|e| e.path()).find(named)
        };
        if let Some(kept) = find(self.wheels) {
            return Ok(kept);
        }
        let mut command = self.command("download");
        // We keep the wheels ourselves; twice would be half a gigabyte too much.
        command.args(["--no-cache-dir", "--no-deps", "-d"]).arg(&fresh).arg(requirement);
        self.run(&mut command, requirement)?;
        let wheel = find(&fresh).with_context(|| format!("pip downloaded no wheel of {requirement}"))?;
        let kept = self.wheels.join(wheel.file_name().unwrap_or_default());
        fs::rename(&wheel, &kept).with_context(|| format!("cannot move {}", wheel.display()))?;
        Ok(kept)
    }

    /// Unpacks the members that match `pattern` into `into`; `flat` drops their folders, otherwise those of the
    /// pattern's fixed part go. Names with one of `excluded` in them stay out. Python checks each member's checksum.
    fn unpack(
        &self,
        wheel: &Path,
        pattern: &str,
        into: &Path,
        flat: bool,
        excluded: &[String],
    ) -> Result<()> {
        const CODE: &str = r"
import fnmatch, os, shutil, sys, zipfile
wheel, pattern, into, flat, *excluded = sys.argv[1:]
start = len(pattern.rsplit('/', 1)[0]) + 1
with zipfile.ZipFile(wheel) as archive:
    for info in archive.infolist():
        name = info.filename
        base = name.rsplit('/', 1)[-1]
        if info.is_dir() or not fnmatch.fnmatch(name, pattern) or any(e in base for e in excluded):
            continue
        if flat == '1' and pattern[0] != '*' and '/' in name[start:]:
            continue
        relative = base if flat == '1' else name[start:]
        if '..' in relative.split('/'):
            sys.exit('unsafe name in the wheel: ' + name)
        target = os.path.join(into, relative)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with archive.open(info) as source, open(target, 'wb') as out:
            shutil.copyfileobj(source, out, 1 << 20)
";
        let mut command = Command::new(self.python);
        command.args(["-c", CODE]).arg(wheel).arg(pattern).arg(into).arg(if flat { "1" } else { "0" });
        command.args(excluded);
        let status = run(&mut command, self.interrupt)?;
        if !status.success() {
            // A damaged wheel must not be kept for the next run.
            let _ = fs::remove_file(wheel);
            bail!(
                "cannot unpack {} ({}; Python's message is above); the file was removed, run `cargo xtask setup` again",
                wheel.display(),
                ended(status)
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_before_the_download() {
        enough_space(Path::new("/c"), 10, 10).unwrap();
        let e = enough_space(Path::new("/home/me/.cache/nics"), 400_000_000, space_needed(Kind::Cpu))
            .unwrap_err();
        assert_eq!(
            e.to_string(),
            "not enough disk: set-up needs 1.3 GB in /home/me/.cache/nics, and 0.4 GB are free; make room, or set \
             NICS_CACHE to a folder on another disk"
        );
    }

    #[test]
    fn needed_libraries_are_found_by_whole_names() {
        let elf = b"\0libc10.so\0libcupti.so.13\0";
        assert!(names_library(elf, "libcupti.so.13"));
        assert!(!names_library(elf, "libcupti.so.1"));
        assert!(!names_library(elf, "libcudart.so.13"));
    }
}
