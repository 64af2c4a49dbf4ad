//! Programs under judgement. They need a Python, python3 on PATH or the one that NICS_PYTHON names: the long tier.

use std::num::NonZero;
use std::path::{Path, PathBuf};

use nics_base::hub::Source;
use nics_base::interrupt::Interrupt;
use nics_base::sandbox::Limits;
use nics_datasets::live_code_bench::{Fault, Judge, JudgeError, Tests, Verdict, Window, load};

fn judge(limits: Limits) -> Judge {
    let named = std::env::var_os("NICS_PYTHON").filter(|v| !v.is_empty());
    let python = named.map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    Judge::open(&python, limits).expect("these tests need a Python: name one with NICS_PYTHON")
}

/// The tests of the fixtures' problems: sum of a line, longest word, half, scale.
fn tests() -> Vec<Tests> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/live-code-bench");
    let problems = load(&Source::folder(folder), &"v1_v2".parse().unwrap(), Window::default()).unwrap();
    problems.iter().map(|p| p.tests().unwrap()).collect()
}

const SUM: &str = "print(sum(map(int, input().split())))";

#[test]
#[ignore = "long: needs python3 on PATH, or NICS_PYTHON"]
fn right_and_wrong_programs() {
    let judge = judge(Limits::default());
    let tests = tests();
    let [sum, longest, half, scale] = &tests[..] else { unreachable!() };
    let check = |program: &str, tests: &Tests, passed: usize, fault: Option<Fault>| {
        let verdict = judge.judge(program, tests).unwrap();
        assert_eq!(verdict, Verdict { passed, tests: tests.all().len(), fault }, "{program}");
    };
    check(SUM, sum, 3, None);
    // The program is the main one, with everything that is usually imported, and may say goodbye as it likes.
    check(
        "def main():\n    print(sum(map(int, stdin.readline().split())))\nif __name__ == '__main__':\n    main()\n    exit(1)",
        sum,
        3,
        None,
    );
    check(
        "import sys\nprint(*accumulate(map(int, sys.stdin.read().split())), sep='\\n', file=sys.stderr)\nprint(0)",
        sum,
        0,
        Some(Fault::WrongAnswer),
    );
    check("print(10)", sum, 0, Some(Fault::WrongAnswer));
    check("print(6 if input() == '1 2 3' else 10)", sum, 2, Some(Fault::WrongAnswer));
    check("print(int(input()) / 2)", half, 2, None);
    check(" \n", sum, 0, Some(Fault::NoProgram));
    check("print(nothing)", sum, 0, Some(Fault::Error("NameError: name 'nothing' is not defined".into())));
    let syntax = judge.judge("print(", sum).unwrap().fault;
    assert!(matches!(&syntax, Some(Fault::Error(text)) if text.starts_with("SyntaxError")), "{syntax:?}");
    check("import ctypes\nctypes.string_at(0)", sum, 0, Some(Fault::Crash(11)));

    let solution = "class Solution:\n    def longestWord(self, words: List[str]) -> str:\n        print('noise')\n        return max(words, key=len)";
    check(solution, longest, 3, None);
    check("def longestWord(words):\n    return max(words, key=len)", longest, 3, None);
    check(
        "def longestWord(words):\n    return max(words, key=lambda w: (len(w), w))[::-1]",
        longest,
        0,
        Some(Fault::WrongAnswer),
    );
    check("def longest(words): ...", longest, 0, Some(Fault::Error("KeyError: 'longestWord'".into())));
    // A tuple is a list; 1 is 1.0; two arguments.
    check(
        "class Solution:\n    def scale(self, n, f):\n        return tuple(x * f for x in n)",
        scale,
        3,
        None,
    );
    check(
        "def scale(n, f):\n    return {f}",
        scale,
        0,
        Some(Fault::Error("AttributeError: 'set' object has no attribute 'item'".into())),
    );
    // The same in every run: hashes and random numbers.
    check(
        "print(6 if (hash('a') % 97, random.random()) == (hash('a') % 97, random.Random(0).random()) else 0)",
        sum,
        1,
        Some(Fault::WrongAnswer),
    );
}

#[test]
#[ignore = "long: needs python3 on PATH, or NICS_PYTHON"]
fn programs_that_mean_harm() {
    let limits = Limits { seconds: 3, memory: 1 << 30, output: 1 << 20, threads: 16 };
    let judge = judge(limits);
    let sum = &tests()[0];
    let fault = |program: &str| judge.judge(program, sum).unwrap().fault;
    let outside = tempfile::tempdir().unwrap();
    let file = outside.path().join("file");
    std::fs::write(&file, "as it was").unwrap();
    let (folder, path) = (outside.path().display(), file.display());

    assert_eq!(fault("while True: pass"), Some(Fault::Slow));
    assert_eq!(fault("import time\ntime.sleep(60)"), Some(Fault::Slow));
    assert_eq!(
        fault(
            "import signal\nsignal.alarm(0)\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        ),
        Some(Fault::Slow)
    );
    assert_eq!(fault("x = bytearray(4 << 30)"), Some(Fault::Error("MemoryError".into())));
    assert_eq!(
        fault("x = []\nwhile True: x.append(bytes(1 << 20))"),
        Some(Fault::Error("MemoryError".into()))
    );
    assert_eq!(fault("while True: print('x' * 4096)"), Some(Fault::TooMuchOutput));
    assert_eq!(
        fault(
            "import threading, time\nthreading.stack_size(1 << 16)\nfor i in range(1000):\n    threading.Thread(target=time.sleep, args=(60,)).start()"
        ),
        Some(Fault::TooManyThreads)
    );
    for deed in [
        "import os\nwhile True: os.fork()".to_owned(),
        "import subprocess\nsubprocess.run(['true'])".to_owned(),
        "import os\nos.system('true') == 0 or os.kill(os.getppid(), 9)".to_owned(),
        "import os\nos.kill(-1, 9)".to_owned(),
        "import socket\nsocket.create_connection(('127.0.0.1', 9))".to_owned(),
        "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')".to_owned(),
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')".to_owned(),
        "open('here', 'w')".to_owned(),
        "open('program.py', 'a')".to_owned(),
        format!("open('{folder}/there', 'w')"),
        format!("open('{path}', 'r+')"),
        format!("import os\nos.truncate('{path}', 0)"),
        format!("import os\nos.unlink('{path}')"),
        format!("import os\nos.chmod('{path}', 0)"),
        format!("import shutil\nshutil.rmtree('{folder}')"),
        "import ctypes\nif ctypes.CDLL(None).syscall(41, 2, 1, 0) < 0: raise OSError('refused')".to_owned(),
    ] {
        match fault(&deed) {
            Some(Fault::Error(text)) => assert!(
                ["not permitted", "denied", "refused"].iter().any(|w| text.contains(w)),
                "{deed}: {text}"
            ),
            other => panic!("{deed}: {other:?}"),
        }
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "as it was");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    // The judge is none the worse.
    assert_eq!(fault(SUM), None);
}

#[test]
#[ignore = "long: needs python3 on PATH, or NICS_PYTHON"]
fn many_programs_at_once() {
    let judge = judge(Limits::default());
    let sum = &tests()[0];
    let program = |n: usize| if n.is_multiple_of(3) { "print(0)".to_owned() } else { SUM.to_owned() };
    let mut correct = [None; 20];
    let workers = NonZero::new(4).unwrap();
    judge
        .judge_all::<JudgeError>(
            correct.len(),
            workers,
            &Interrupt::never(),
            |n| Ok((program(n), sum.clone())),
            |n, verdict| {
                assert_eq!(correct[n].replace(verdict.correct()), None, "twice");
                Ok(())
            },
        )
        .unwrap();
    assert!(correct.iter().enumerate().all(|(n, right)| *right == Some(!n.is_multiple_of(3))), "{correct:?}");
    // It stops at the first that says so.
    let mut told = 0;
    let stop = judge.judge_all(
        1000,
        workers,
        &Interrupt::never(),
        |n| Ok((program(n), sum.clone())),
        |_, _| {
            told += 1;
            Err(JudgeError::Open("stop".into()))
        },
    );
    assert!(stop.is_err());
    assert_eq!(told, 1);
    // Whoever asks to stop does not wait for the rest.
    let asked = Interrupt::never();
    asked.request();
    let stopped = judge.judge_all(1000, workers, &asked, |n| Ok((program(n), sum.clone())), |_, _| Ok(()));
    assert!(matches!(stopped, Err(JudgeError::Stopped(_))), "{stopped:?}");
}

#[test]
fn what_is_no_python_is_said() {
    for named in ["/nowhere/python3", "/bin/true", "/bin/false"] {
        let error = Judge::open(named.as_ref(), Limits::default()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{named} is no Python")), "{error}");
    }
}
