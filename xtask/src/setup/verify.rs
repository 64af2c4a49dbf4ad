//! Whether a folder is a libtorch that this workspace can build against and run with.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nics_base::interrupt::Interrupt;

use super::{SERIES, VERSION};
use crate::process::{ended, start};
use crate::workspace::which;

/// Small headers only: this compiles in a few seconds, `torch/torch.h` takes half a minute.
const PROGRAM: &str = r#"
#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>
#include <torch/headeronly/version.h>
#include <cstdio>
int main() { std::printf("%s %.0f\n", TORCH_VERSION, at::ones({2, 3}).sum().item<double>()); }
"#;

/// The C++ compiler that building tch will use: `$CXX`, else `c++`.
pub fn compiler() -> Result<PathBuf> {
    if let Some(cxx) = env::var("CXX").ok().filter(|v| !v.trim().is_empty()) {
        // `CXX="ccache g++"` is common; the last word is the compiler.
        let program = cxx.split_whitespace().last().unwrap_or(&cxx);
        return which(&[program])
            .with_context(|| format!("CXX is {cxx:?}, which is not on PATH; correct it or unset it"));
    }
    if let Some(found) = which(&["c++"]) {
        return Ok(found);
    }
    if let Some(other) = which(&["g++", "clang++"]) {
        bail!("there is no `c++`, but {}; run again with CXX={0} set", other.display());
    }
    bail!(
        "no C++ compiler found (looked for $CXX, c++, g++ and clang++ on PATH); install one: \
         `apt install g++`, `dnf install gcc-c++` or `pacman -S gcc`"
    )
}

/// The version that a libtorch folder claims, from its headers or its `build-version` file.
pub fn version_of(folder: &Path) -> Option<String> {
    let headers = ["include/torch/headeronly/version.h", "include/torch/csrc/api/include/torch/version.h"];
    let from_header = headers.iter().find_map(|header| {
        let text = fs::read_to_string(folder.join(header)).ok()?;
        let part = |name: &str| {
            let rest =
                text.lines().find_map(|l| l.strip_prefix(&format!("#define TORCH_VERSION_{name} ")))?;
            rest.trim().parse::<u32>().ok()
        };
        Some(format!("{}.{}.{}", part("MAJOR")?, part("MINOR")?, part("PATCH")?))
    });
    from_header.or_else(|| {
        let text = fs::read_to_string(folder.join("build-version")).ok()?;
        Some(text.trim().split('+').next()?.to_owned())
    })
}

/// Version, headers, libraries; then compiles, links and runs a program.
pub fn verify(folder: &Path, compiler: &Path, interrupt: &Interrupt) -> Result<()> {
    let at = folder.display();
    for needed in ["lib/libtorch_cpu.so", "lib/libc10.so", "include/ATen/core/Tensor.h"] {
        if !folder.join(needed).exists() {
            bail!(
                "{at} is no libtorch: {needed} is missing; point LIBTORCH at a folder with include/ and lib/, \
                 or unset it and run `cargo xtask setup --force`"
            );
        }
    }
    let version =
        version_of(folder).with_context(|| format!("{at} does not say which version of libtorch it is"))?;
    if version != SERIES && !version.starts_with(&format!("{SERIES}.")) {
        bail!(
            "{at} is libtorch {version}, but this workspace needs {SERIES}.x; install {VERSION} there, \
             or unset LIBTORCH and run `cargo xtask setup`"
        );
    }
    let work = env::temp_dir().join(format!("nics-verify-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let outcome = build_and_run(folder, compiler, &work, interrupt);
    let _ = fs::remove_dir_all(&work);
    let printed = outcome?;
    if printed.trim() != format!("{version} 6") {
        bail!("a program built against {at} printed {:?}, expected \"{version} 6\"", printed.trim());
    }
    Ok(())
}

fn build_and_run(folder: &Path, compiler: &Path, work: &Path, interrupt: &Interrupt) -> Result<String> {
    let at = folder.display();
    let (source, program) = (work.join("verify.cpp"), work.join("verify"));
    fs::write(&source, PROGRAM).with_context(|| format!("cannot write {}", source.display()))?;
    let lib = folder.join("lib");
    let mut build = Command::new(compiler);
    build.args(["-std=c++17", "-O0", "-w", "-I"]).arg(folder.join("include"));
    build.arg("-I").arg(folder.join("include/torch/csrc/api/include")).arg(&source).arg("-o").arg(&program);
    build.arg("-L").arg(&lib).args(["-ltorch_cpu", "-lc10"]).arg(format!("-Wl,-rpath,{}", lib.display()));
    let (ok, output) = capture(&mut build, work, interrupt)?;
    if !ok {
        bail!(
            "{} cannot build a program against {at}:\n{}\nthe compiler must know C++17 and match the libraries; \
             set CXX to another one, or run `cargo xtask setup --force` if the folder is damaged",
            compiler.display(),
            first_lines(&output)
        );
    }
    let (ok, output) = capture(&mut Command::new(&program), work, interrupt)?;
    if !ok {
        bail!(
            "a program linked against {at} does not run:\n{}\nthe folder is damaged or needs a newer system \
             (glibc 2.28); try `cargo xtask setup --force`",
            first_lines(&output)
        );
    }
    Ok(output)
}

/// Runs a short command to its end; both output streams together.
fn capture(command: &mut Command, work: &Path, interrupt: &Interrupt) -> Result<(bool, String)> {
    let path = work.join("output");
    let file = fs::File::create(&path)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let (status, _) = crate::process::wait(start(command)?, interrupt)?;
    let mut output = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
    if output.trim().is_empty() && !status.success() {
        output = ended(status);
    }
    Ok((status.success(), output))
}

fn first_lines(text: &str) -> String {
    text.lines()
        .filter(|l| !l.trim().is_empty())
        .take(8)
        .map(|l| format!("  {l}"))
        .collect::<Vec<_>>()
        .join("\n")
}
