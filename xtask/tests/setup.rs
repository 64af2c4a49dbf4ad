//! `cargo xtask setup` and `doctor` with every tool of the machine replaced by a script: which error each missing or
//! broken thing gets, and that nothing half-done is ever used.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use support::{Sandbox, VERSION_HEADER, ends_with, lines, own_libtorch, stderr, wait_until, with_compiler};

/// Tools of the system that the scripts need.
fn with_coreutils(sandbox: &Sandbox) {
    for tool in ["cat", "mkdir", "touch", "sleep", "chmod", "printf", "echo", "sh", "rm"] {
        let found =
            ["/bin", "/usr/bin"].iter().map(|d| format!("{d}/{tool}")).find(|p| fs::metadata(p).is_ok());
        symlink(found.unwrap(), sandbox.path(&format!("bin/{tool}"))).unwrap();
    }
}

/// A Python whose pip runs `download` (with `$dir` to download into) and whose zipfile unpacks the smallest libtorch.
fn with_python(sandbox: &Sandbox, download: &str) {
    let count = sandbox.path("downloads").display().to_string();
    let header = sandbox.write("version.h", VERSION_HEADER).display().to_string();
    sandbox.program(
        "python3",
        &format!(
            r#"
if [ "$1" = -c ]; then
    wheel=$3; pattern=$4; into=$5
    [ "$(cat $wheel)" = whole ] || {{ echo "damaged wheel" >&2; exit 1; }}
    case $pattern in
        torch/lib*) mkdir -p $into; touch $into/libtorch_cpu.so $into/libc10.so;;
        torch/include*) mkdir -p $into/ATen/core $into/torch/headeronly
            touch $into/ATen/core/Tensor.h; cat {header} > $into/torch/headeronly/version.h;;
    esac
    exit 0
fi
[ "$3" = --version ] && exit 0
echo x >> {count}
while [ $# -gt 1 ]; do if [ "$1" = -d ]; then dir=$2; fi; shift; done
mkdir -p $dir
{download}
"#
        ),
    );
}

const GOOD: &str = "printf whole > $dir/torch-2.11.0-cp311-cp311-linux.whl";

fn machine() -> Sandbox {
    let sandbox = Sandbox::new();
    with_coreutils(&sandbox);
    with_compiler(&sandbox, "2.11.0 6");
    with_python(&sandbox, GOOD);
    sandbox
}

/// No libtorch is linked, none is in the cache, and no half one lies about.
#[track_caller]
fn nothing_usable(sandbox: &Sandbox) {
    assert!(!sandbox.root().join(".libtorch").exists());
    for entry in fs::read_dir(sandbox.cache()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.contains("libtorch"), "{name} was left in the cache");
    }
}

#[test]
fn the_second_call_needs_nothing() {
    let sandbox = machine();
    ends_with(&mut sandbox.bare(&["setup"]), 0);
    let link = sandbox.root().join(".libtorch");
    assert!(link.join("lib/libtorch_cpu.so").exists() && link.join("include/ATen/core/Tensor.h").exists());
    assert!(!sandbox.cache().join("wheels.tmp").exists(), "wheels are removed in the end");
    for tool in ["c++", "python3"] {
        fs::remove_file(sandbox.path(&format!("bin/{tool}"))).unwrap();
    }
    ends_with(&mut sandbox.bare(&["setup"]), 0);
    assert_eq!(lines(&sandbox.path("downloads")), 1);
}

#[test]
fn a_second_workspace_uses_the_same_cache() {
    let sandbox = machine();
    ends_with(&mut sandbox.bare(&["setup"]), 0);
    fs::create_dir(sandbox.path("other")).unwrap();
    ends_with(sandbox.bare(&["setup"]).env("NICS_ROOT", sandbox.path("other")), 0);
    assert!(sandbox.path("other/.libtorch/lib/libtorch_cpu.so").exists());
    assert_eq!(lines(&sandbox.path("downloads")), 1);
}

#[test]
fn no_compiler() {
    let sandbox = machine();
    fs::remove_file(sandbox.path("bin/c++")).unwrap();
    let e = ends_with(&mut sandbox.bare(&["setup"]), 1);
    assert!(e.contains("no C++ compiler found") && e.contains("apt install g++"), "{e}");
    let e = ends_with(sandbox.bare(&["setup"]).env("CXX", "icpx"), 1);
    assert!(e.contains("CXX is \"icpx\", which is not on PATH"), "{e}");
    sandbox.program("clang++", "");
    let e = ends_with(&mut sandbox.bare(&["setup"]), 1);
    assert!(e.contains("run again with CXX=") && e.contains("bin/clang++ set"), "{e}");
    nothing_usable(&sandbox);
}

#[test]
fn no_python_or_no_pip() {
    let sandbox = machine();
    sandbox.program("python3", "exit 1");
    let e = ends_with(&mut sandbox.bare(&["setup"]), 1);
    assert!(e.contains("has no pip") && e.contains("ensurepip") && e.contains("LIBTORCH"), "{e}");
    sandbox.program("python3", "echo 'pip 20.0.2 from /usr/lib/python3/dist-packages/pip (python 3.8)'");
    let e = ends_with(&mut sandbox.bare(&["setup"]), 1);
    assert!(e.contains("has pip 20.0.2") && e.contains("21 or newer is needed"), "{e}");
    fs::remove_file(sandbox.path("bin/python3")).unwrap();
    let e = ends_with(&mut sandbox.bare(&["setup"]), 1);
    assert!(
        e.contains("no Python found") && e.contains("apt install python3") && e.contains("LIBTORCH"),
        "{e}"
    );
    nothing_usable(&sandbox);
}

#[test]
fn a_download_that_dies_can_be_tried_again() {
    let sandbox = machine();
    with_python(
        &sandbox,
        "printf wh > $dir/torch-2.11.0-cp311-cp311-linux.whl; echo 'connection lost' >&2; exit 2",
    );
    let e = ends_with(&mut sandbox.bare(&["setup"]), 75);
    assert!(
        e.contains("connection lost") && e.contains("pip could not download torch==2.11.0 (exit code 2"),
        "{e}"
    );
    nothing_usable(&sandbox);
    with_python(&sandbox, GOOD);
    ends_with(&mut sandbox.bare(&["setup"]), 0);
}

#[test]
fn a_killed_set_up_is_cleaned_and_repeated() {
    let sandbox = machine();
    with_python(
        &sandbox,
        &format!(
            "printf wh > $dir/torch-2.11.0-half.whl; touch {}; sleep 60",
            sandbox.path("asleep").display()
        ),
    );
    let mut child = sandbox.bare(&["setup"]).spawn().unwrap();
    wait_until("pip is downloading", || sandbox.path("asleep").exists());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!sandbox.root().join(".libtorch").exists());
    with_python(&sandbox, GOOD);
    ends_with(&mut sandbox.bare(&["setup"]), 0);
    let mut left: Vec<_> = fs::read_dir(sandbox.cache())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["libtorch-2.11.0-cpu", "setup.lock"]);
}

#[test]
fn ctrl_c_ends_with_130_and_leaves_nothing() {
    let sandbox = machine();
    with_python(&sandbox, &format!("touch {}; sleep 60", sandbox.path("asleep").display()));
    let child = sandbox.bare(&["setup"]).spawn().unwrap();
    wait_until("pip is downloading", || sandbox.path("asleep").exists());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    nothing_usable(&sandbox);
}

#[test]
fn a_damaged_wheel_is_not_kept() {
    let sandbox = machine();
    with_python(&sandbox, "printf broken > $dir/torch-2.11.0-cp311-cp311-linux.whl");
    let e = ends_with(&mut sandbox.bare(&["setup"]), 1);
    assert!(e.contains("damaged wheel") && e.contains("cannot unpack"), "{e}");
    nothing_usable(&sandbox);
    with_python(&sandbox, GOOD);
    ends_with(&mut sandbox.bare(&["setup"]), 0);
    assert_eq!(lines(&sandbox.path("downloads")), 2);
}

#[test]
fn a_program_that_does_not_run_right_is_not_accepted() {
    for (printed, why) in [("2.11.0 7", "printed \"2.11.0 7\""), ("x; exit 127", "does not run")] {
        let sandbox = machine();
        with_compiler(&sandbox, printed);
        let e = ends_with(&mut sandbox.bare(&["setup"]), 1);
        assert!(e.contains(why), "{e}");
        nothing_usable(&sandbox);
    }
}

#[test]
fn two_set_ups_at_once_download_once() {
    let sandbox = machine();
    with_python(&sandbox, &format!("sleep 0.5; {GOOD}"));
    let both: Vec<_> = (0..2).map(|_| sandbox.bare(&["setup"]).spawn().unwrap()).collect();
    for child in both {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(lines(&sandbox.path("downloads")), 1);
}

#[test]
fn force_downloads_again() {
    let sandbox = machine();
    ends_with(&mut sandbox.bare(&["setup"]), 0);
    ends_with(&mut sandbox.bare(&["setup", "--force"]), 0);
    assert_eq!(lines(&sandbox.path("downloads")), 2);
    assert!(sandbox.root().join(".libtorch/lib/libtorch_cpu.so").exists());
}

#[test]
fn a_libtorch_of_the_users_is_verified_once_and_linked() {
    let sandbox = machine();
    let own = own_libtorch(&sandbox, VERSION_HEADER);
    for _ in 0..2 {
        ends_with(sandbox.bare(&["setup"]).env("LIBTORCH", &own), 0);
    }
    assert_eq!(fs::read_link(sandbox.root().join(".libtorch")).unwrap(), own);
    assert_eq!(lines(&sandbox.path("downloads")), 0);
    assert_eq!(lines(&sandbox.path("compiled")), 1);
    // What cargo itself sets for `cargo xtask` is our own link, not the user's choice.
    let link = sandbox.root().join(".libtorch");
    fs::remove_file(&link).unwrap();
    ends_with(sandbox.bare(&["setup"]).env("LIBTORCH", &link), 0);
    assert_eq!(lines(&sandbox.path("downloads")), 1);
}

#[test]
fn a_wrong_libtorch_of_the_users_is_refused() {
    let sandbox = machine();
    let own = own_libtorch(&sandbox, &VERSION_HEADER.replace("11", "5"));
    let refuse = |command: &mut Command, why: &str| {
        let e = ends_with(command, 1);
        assert!(e.contains(why), "{e}");
        assert_eq!(lines(&sandbox.path("downloads")), 0, "nothing is downloaded behind the user's back");
    };
    refuse(
        sandbox.bare(&["setup"]).env("LIBTORCH", &own),
        "own is libtorch 2.5.0, but this workspace needs 2.11.x",
    );
    refuse(sandbox.bare(&["setup"]).env("LIBTORCH", "/no/such/folder"), "which is no folder");
    fs::remove_file(own.join("lib/libc10.so")).unwrap();
    refuse(sandbox.bare(&["setup"]).env("LIBTORCH", &own), "lib/libc10.so is missing");
    own_libtorch(&sandbox, VERSION_HEADER);
    sandbox.program("c++", "echo 'Tensor.h: no such header' >&2; exit 1");
    refuse(sandbox.bare(&["setup"]).env("LIBTORCH", &own), "Tensor.h: no such header");
    refuse(sandbox.bare(&["setup"]).env("LIBTORCH_USE_PYTORCH", "1"), "LIBTORCH_USE_PYTORCH is 1");
}

#[test]
fn doctor_names_what_is_missing() {
    let sandbox = machine();
    let output = sandbox.bare(&["doctor"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", stderr(&output));
    assert!(text.contains("not set up yet; `cargo xtask setup`"), "{text}");
    fs::remove_file(sandbox.path("bin/c++")).unwrap();
    let output = sandbox.bare(&["doctor"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1));
    let line = text.lines().find(|l| l.contains("C++ compiler")).unwrap();
    assert!(line.starts_with("MEND") && line.contains("apt install g++"), "{line}");
}

/// `cargo xtask doctor | head -1` is no error.
#[test]
fn a_reader_that_closes_the_pipe_is_no_error() {
    let sandbox = machine();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = sandbox.bare(&["doctor"]).stdout(writer).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
}

#[test]
fn an_unknown_crate_is_named_before_anything_is_downloaded() {
    let sandbox = machine();
    sandbox.write("ws/crates/megrez/Cargo.toml", "[package]\nname = \"megrez\"\n");
    let e = ends_with(&mut sandbox.bare(&["install", "nope"]), 1);
    assert!(e.contains("there is no crate \"nope\"; the crates are: megrez"), "{e}");
    nothing_usable(&sandbox);
}

/// The wheel of NVRTC, and what its libraries are; every other wheel is torch's.
fn with_nvrtc(sandbox: &Sandbox, download: &str) {
    let count = sandbox.path("downloads").display().to_string();
    sandbox.program(
        "python3",
        &format!(
            r#"
if [ "$1" = -c ]; then mkdir -p $5; touch $5/libnvrtc.so.13 $5/libnvrtc-builtins.so.13.0; exit 0; fi
[ "$3" = --version ] && exit 0
echo x >> {count}
while [ $# -gt 1 ]; do if [ "$1" = -d ]; then dir=$2; fi; shift; done
mkdir -p $dir
{download}
"#
        ),
    );
}

/// `check` with a libtorch that is there, and a cargo that writes down what it is asked and where NVRTC is.
fn checked(sandbox: &Sandbox, code: i32) -> (String, String) {
    let asked = sandbox.path("asked");
    sandbox.program("cargo", &format!("echo \"$1 $2 $3 $4 NVRTC=$NICS_NVRTC\" >> {}", asked.display()));
    let own = own_libtorch(sandbox, VERSION_HEADER);
    let mut check = sandbox.bare(&["check"]);
    check.env("LIBTORCH", own).env("CARGO", sandbox.path("bin/cargo")).env_remove("NICS_NVRTC");
    (ends_with(&mut check, code), fs::read_to_string(asked).unwrap())
}

#[test]
fn check_fetches_nvrtc_once_and_compiles_cuda_sources_with_it() {
    let sandbox = machine();
    with_nvrtc(&sandbox, "printf whole > $dir/nvidia_cuda_nvrtc-13.0.88-py3-none-linux.whl");
    for _ in 0..2 {
        let (_, asked) = checked(&sandbox, 0);
        let folder = sandbox.cache().join("nvidia-cuda-nvrtc-13.0.88");
        for test in ["nvrtc", "packed", "device"] {
            let line = format!("test --workspace --test {test} NVRTC={}", folder.display());
            assert!(asked.lines().any(|l| l == line), "{asked}");
        }
        assert!(folder.join("libnvrtc.so.13").exists());
    }
    assert_eq!(lines(&sandbox.path("downloads")), 1);
}

#[test]
fn check_fails_where_nvrtc_cannot_be_had() {
    let sandbox = machine();
    with_nvrtc(&sandbox, "exit 1");
    let (e, asked) = checked(&sandbox, 1);
    assert!(
        e.contains("1 of the checks failed: CUDA sources were not compiled: pip could not download"),
        "{e}"
    );
    assert!(asked.starts_with("fmt") && !asked.contains("test "), "{asked}");
    assert!(!sandbox.cache().join("nvidia-cuda-nvrtc-13.0.88").exists());
}
