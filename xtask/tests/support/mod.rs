//! A workspace of its own for each test, and fake programs on its `PATH`.

// Each test file uses its part.
#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A temporary workspace with a cache and a folder of programs beside it.
pub struct Sandbox {
    dir: tempfile::TempDir,
}

impl Sandbox {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for part in ["ws/crates", "bin", "cache"] {
            fs::create_dir_all(dir.path().join(part)).unwrap();
        }
        Self { dir }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("ws").canonicalize().unwrap()
    }

    pub fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// Writes a file of the sandbox, with its folders.
    pub fn write(&self, relative: &str, text: &str) -> PathBuf {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// Puts a shell script on the `PATH` of [`bare`](Self::bare).
    pub fn program(&self, name: &str, script: &str) {
        let path = self.write(&format!("bin/{name}"), &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// xtask with the `PATH` of whoever runs the tests.
    pub fn xtask(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command
            .args(args)
            .current_dir(self.root())
            .env("NICS_ROOT", self.root())
            .env("NICS_CACHE", self.cache());
        for variable in ["LIBTORCH", "LIBTORCH_USE_PYTORCH", "CXX", "NICS_PROGRESS"] {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// xtask on a machine that has nothing but the sandbox's programs.
    pub fn bare(&self, args: &[&str]) -> Command {
        let mut command = self.xtask(args);
        command.env("PATH", self.path("bin"));
        command
    }
}

/// What a command printed on stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a command that must end with `code`, and gives its stderr.
#[track_caller]
pub fn ends_with(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{}{text}", String::from_utf8_lossy(&output.stdout));
    text
}

/// Waits until `done`, with a deadline against hanging.
#[track_caller]
pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited a minute until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The lines of a file; none when it does not exist.
pub fn lines(path: &Path) -> usize {
    fs::read_to_string(path).unwrap_or_default().lines().count()
}

/// The part of a libtorch that says what it is.
pub const VERSION_HEADER: &str =
    "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 11\n#define TORCH_VERSION_PATCH 0\n";

/// A C++ compiler that "links" a program which prints `printed`.
pub fn with_compiler(sandbox: &Sandbox, printed: &str) {
    let count = sandbox.path("compiled").display().to_string();
    sandbox.program(
        "c++",
        &format!(
            "echo x >> {count}\nwhile [ $# -gt 0 ]; do if [ \"$1\" = -o ]; then out=$2; fi; shift; done\n\
             printf '#!/bin/sh\\necho {printed}\\n' > $out; chmod +x $out"
        ),
    );
}

/// The smallest folder that passes for a libtorch, with a header of its own.
pub fn own_libtorch(sandbox: &Sandbox, version_header: &str) -> PathBuf {
    for file in ["lib/libtorch_cpu.so", "lib/libc10.so", "include/ATen/core/Tensor.h"] {
        sandbox.write(&format!("own/{file}"), "");
    }
    sandbox.write("own/include/torch/headeronly/version.h", version_header);
    sandbox.path("own")
}
