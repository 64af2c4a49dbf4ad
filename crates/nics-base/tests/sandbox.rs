//! Programs that do what they must not, in the sandbox: this test binary itself, told what to do by a variable.

#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nics_base::sandbox::{End, Limits, Ran, Run, Sandbox, SandboxError};

const DEED: &str = "DEED";
/// The name of a file that is none of the program's business.
const SECRET: &str = "SECRET";
const LIMITS: Limits = Limits { seconds: 10, memory: 1 << 30, output: 1 << 20, threads: 16 };

fn sandbox() -> Sandbox {
    Sandbox::new(LIMITS).expect("these tests need a kernel with seccomp filters")
}

/// Beside this test's own file, which a program may read.
fn secret() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")
}

/// Runs [`inside`] with a deed to do, in a folder that holds the file `mine`.
fn run(sandbox: &Sandbox, deed: &str, folder: &Path) -> Ran {
    fs::write(folder.join("mine"), "as it was").unwrap();
    let exe = std::env::current_exe().unwrap();
    let args = ["--exact", "inside", "--ignored", "--nocapture", "--test-threads=1"].map(Into::into);
    let secret = secret();
    let env = [(DEED, deed), (SECRET, secret.to_str().unwrap())];
    let run = Run { program: &exe, args: &args, env: &env, folder, reads: &[], input: b"some input" };
    let ran = sandbox.run(&run).unwrap();
    assert_eq!(fs::read_to_string(folder.join("mine")).unwrap(), "as it was", "{deed}");
    assert_eq!(fs::read_dir(folder).unwrap().count(), 1, "{deed}");
    ran
}

fn ran(deed: &str) -> Ran {
    run(&sandbox(), deed, tempfile::tempdir().unwrap().path())
}

fn said(ran: &Ran) -> String {
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// The program in the sandbox.
#[test]
#[ignore = "run in the sandbox by the other tests"]
fn inside() {
    let Ok(deed) = std::env::var(DEED) else { return };
    let tried = |what: io::Result<()>| match what {
        Ok(()) => println!("<could>"),
        Err(e) => println!("<{:?}>", e.kind()),
    };
    match deed.as_str() {
        "say" => {
            let mut input = String::new();
            io::stdin().read_to_string(&mut input).unwrap();
            eprintln!("to stderr");
            println!("<{input}>");
        }
        "environment" => println!("<{:?}>", std::env::vars().map(|(k, _)| k).collect::<Vec<_>>()),
        "status" => {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            for name in ["CapEff", "CapPrm", "NoNewPrivs", "Seccomp"] {
                println!("<{}>", status.lines().find(|l| l.starts_with(&format!("{name}:"))).unwrap());
            }
        }
        "files" => println!("<{}>", fs::read_dir("/proc/self/fd").unwrap().count()),
        "read elsewhere" => tried(fs::read(std::env::var(SECRET).unwrap()).map(drop)),
        "list elsewhere" => tried(fs::read_dir("/root").or_else(|_| fs::read_dir("/tmp")).map(drop)),
        "read of the parent" => {
            let parent = rustix::process::getppid().unwrap().as_raw_nonzero();
            tried(fs::read(format!("/proc/{parent}/environ")).map(drop));
        }
        "open its input" => println!("<{}>", fs::read_to_string("/dev/stdin").unwrap()),
        "read" => tried(fs::read("mine").map(drop)),
        "create" => tried(File::create("new").map(drop)),
        "create elsewhere" => tried(File::create("/tmp/nics-sandbox-test").map(drop)),
        "empty" => tried(File::create("mine").map(drop)),
        "append" => tried(OpenOptions::new().append(true).open("mine").map(drop)),
        "change" => tried(OpenOptions::new().write(true).open("mine").map(drop)),
        "delete" => tried(fs::remove_file("mine")),
        "rename" => tried(fs::rename("mine", "yours")),
        "link" => tried(fs::hard_link("mine", "yours")),
        "symbolic link" => tried(std::os::unix::fs::symlink("mine", "yours")),
        "folder" => tried(fs::create_dir("folder")),
        "permissions" => tried(fs::set_permissions("mine", fs::Permissions::from_mode(0o777))),
        "connect" => tried(std::net::TcpStream::connect("127.0.0.1:9").map(drop)),
        "listen" => tried(std::net::TcpListener::bind("127.0.0.1:0").map(drop)),
        "datagram" => tried(std::net::UdpSocket::bind("127.0.0.1:0").map(drop)),
        "local socket" => tried(std::os::unix::net::UnixStream::connect("/run/docker.sock").map(drop)),
        "process" => tried(std::process::Command::new("/bin/true").spawn().map(drop)),
        "signal" => {
            let parent = rustix::process::getppid().unwrap();
            tried(rustix::process::kill_process(parent, rustix::process::Signal::TERM).map_err(Into::into));
        }
        "thread" => println!("<{}>", std::thread::spawn(|| 6 * 7).join().unwrap()),
        "sleep" => std::thread::sleep(Duration::from_secs(60)),
        "spin" => loop {
            std::hint::black_box(0);
        },
        "memory" => {
            let mut all = Vec::new();
            loop {
                all.push(vec![1u8; 64 << 20]);
            }
        }
        "threads" => {
            for _ in 0..200 {
                // Memory may end before it has all of them.
                let _ = std::thread::Builder::new().spawn(|| std::thread::sleep(Duration::from_secs(60)));
            }
            std::thread::sleep(Duration::from_secs(60));
        }
        "flood" => loop {
            io::stdout().write_all(&[b'x'; 4096]).unwrap();
        },
        "flood of errors" => {
            for _ in 0..1000 {
                io::stderr().write_all(&[b'x'; 4096]).unwrap();
            }
            eprintln!("the end");
        }
        "crash" => std::process::abort(),
        "exit" => std::process::exit(7),
        other => panic!("{other}"),
    }
}

#[test]
fn a_program_reads_computes_and_writes() {
    let spoke = ran("say");
    assert_eq!(spoke.end, End::Exited(0));
    assert!(said(&spoke).contains("<some input>"), "{}", said(&spoke));
    assert!(String::from_utf8_lossy(&spoke.stderr).contains("to stderr"));
    assert!(said(&ran("open its input")).contains("<some input>"));
    assert!(said(&ran("read")).contains("<could>"));
    assert!(said(&ran("thread")).contains("<42>"));
    assert_eq!(ran("exit").end, End::Exited(7));
}

#[test]
fn files_network_and_processes_are_out_of_reach() {
    let sandbox = sandbox();
    let folder = tempfile::tempdir().unwrap();
    for deed in [
        "create",
        "create elsewhere",
        "empty",
        "append",
        "change",
        "delete",
        "rename",
        "link",
        "symbolic link",
        "folder",
        "permissions",
        "connect",
        "listen",
        "datagram",
        "local socket",
        "process",
        "signal",
    ] {
        let ran = run(&sandbox, deed, folder.path());
        assert!(said(&ran).contains("<PermissionDenied>"), "{deed}: {}", said(&ran));
    }
    assert!(!Path::new("/tmp/nics-sandbox-test").exists());
}

#[test]
fn reading_is_confined_where_the_kernel_can() {
    let confined = sandbox().confines_reads();
    for deed in ["read elsewhere", "list elsewhere", "read of the parent"] {
        let said = said(&ran(deed));
        let expected = if confined { "<PermissionDenied>" } else { "<could>" };
        assert!(said.contains(expected), "{deed}: {said}");
    }
}

#[test]
fn nothing_is_inherited() {
    let said_of = |deed| said(&ran(deed));
    assert!(
        said_of("environment").contains(&format!("<[{DEED:?}, {SECRET:?}]>")),
        "{}",
        said_of("environment")
    );
    let status = said_of("status");
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(&format!("<{line}>")), "{status}");
    }
    // The three standard ones and the folder that is being read.
    assert!(said_of("files").contains("<4>"), "{}", said_of("files"));
}

#[test]
fn time_memory_threads_and_output_are_limited() {
    let hasty = Sandbox::new(Limits { seconds: 1, ..LIMITS }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for deed in ["sleep", "spin"] {
        let begun = Instant::now();
        assert_eq!(run(&hasty, deed, folder.path()).end, End::Slow, "{deed}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{deed}");
    }
    // Rust aborts where there is no memory.
    let memory = ran("memory");
    assert!(matches!(memory.end, End::Crashed(_)), "{memory:?}");
    assert!(String::from_utf8_lossy(&memory.stderr).contains("memory allocation"));
    let lonely = Sandbox::new(Limits { threads: 4, ..LIMITS }).unwrap();
    assert_eq!(run(&lonely, "threads", folder.path()).end, End::TooManyThreads);
    let flood = ran("flood");
    assert_eq!((flood.end, flood.stdout.len()), (End::TooMuchOutput, LIMITS.output));
    let errors = ran("flood of errors");
    assert_eq!(errors.end, End::Exited(0));
    assert!(errors.stderr.ends_with(b"the end\n") && errors.stderr.len() <= 8 << 10);
    assert!(matches!(ran("crash").end, End::Crashed(_)));
}

#[test]
fn many_run_at_once() {
    let sandbox = &sandbox();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(move || {
                let folder = tempfile::tempdir().unwrap();
                assert!(said(&run(sandbox, "say", folder.path())).contains("<some input>"));
            });
        }
    });
}

#[test]
fn what_is_no_program_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run {
        program: Path::new("/nowhere/python3"),
        args: &[],
        env: &[],
        folder: folder.path(),
        reads: &[],
        input: b"",
    };
    let error = sandbox().run(&run).unwrap_err();
    assert!(matches!(error, SandboxError::Start { .. }));
    assert!(error.to_string().contains("/nowhere/python3"), "{error}");
}
