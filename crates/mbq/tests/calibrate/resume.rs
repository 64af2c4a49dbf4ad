//! A stopped or killed calibration ends with the bytes of an unbroken one.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mbq::artefact::{REPORT, SCALES, Scales};
use mbq::{Error, PROGRESS};
use nics_core::tch::Kind;

use crate::kit::{Asked, SAMPLES, batch, calibrated, config, decoder, origin};

fn bytes(dir: &Path) -> [Vec<u8>; 2] {
    [SCALES, REPORT].map(|name| std::fs::read(dir.join(name)).unwrap())
}

fn run(dir: &Path, distort: bool, stop_at: Option<usize>) -> mbq::Result<Scales> {
    let mut config = config();
    config.search.distort = distort;
    let asked = Asked { out: Some(dir), chunk: Some(3), stop_at, ..Asked::default() };
    let begun = Instant::now();
    loop {
        match calibrated(&mut decoder(2, Kind::Float), &batch(), &config, &asked) {
            // A process that another test starts holds every open lock until it has become another program.
            Err(Error::Base(nics_base::Error::Busy(_))) if begun.elapsed() < Duration::from_secs(60) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            done => return done,
        }
    }
}

#[test]
fn after_a_stop_at_every_step() {
    for distort in [false, true] {
        let whole = tempfile::tempdir().unwrap();
        run(whole.path(), distort, None).unwrap();
        let broken = tempfile::tempdir().unwrap();
        let mut stops = 0;
        while let Err(e) = run(broken.path(), distort, Some(1)) {
            assert!(matches!(e, Error::Base(nics_base::Error::Interrupted)), "{e}");
            stops += 1;
            assert!(stops < 50);
        }
        // Each run takes one step: a sample or a layer.
        assert!(stops >= SAMPLES as usize + 2, "{stops}");
        assert!(bytes(whole.path()) == bytes(broken.path()), "distort {distort}");
        // A finished run is not repeated, and gives the same again.
        run(broken.path(), distort, None).unwrap();
        assert!(bytes(whole.path()) == bytes(broken.path()));
    }
}

/// What the killed process runs.
#[test]
#[ignore = "run by the test below in a process of its own"]
fn child() {
    if let Some(dir) = std::env::var_os("MBQ_TEST_DIR") {
        run(Path::new(&dir), true, None).unwrap();
    }
}

#[test]
fn after_a_kill() {
    let whole = tempfile::tempdir().unwrap();
    run(whole.path(), true, None).unwrap();
    let broken = tempfile::tempdir().unwrap();
    let child = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "resume::child"])
            .env("MBQ_TEST_DIR", broken.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let begun = Instant::now();
    let mut killed = child();
    while !broken.path().join(PROGRESS).exists() && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(child().wait().unwrap().success());
    assert!(bytes(whole.path()) == bytes(broken.path()));
}

#[test]
fn scales_are_read_back_for_their_model_alone() {
    let dir = tempfile::tempdir().unwrap();
    let found = run(dir.path(), false, None).unwrap();
    let read = Scales::read(dir.path(), &origin()).unwrap();
    assert_eq!((&read.config, &read.names), (&found.config, &found.names));
    assert_eq!(read.ratios.len(), found.ratios.len());
    for (a, b) in read.ratios.iter().zip(&found.ratios) {
        // JSON is read to within the last bit.
        let all = a.attention.iter().chain(&a.mlp).zip(b.attention.iter().chain(&b.mlp));
        assert!(a.modality == b.modality && all.into_iter().all(|(a, b)| (a - b).abs() < 1e-12));
    }
    for (a, b) in read.layers.iter().flatten().zip(found.layers.iter().flatten()) {
        assert!(a.scales.equal(&b.scales));
        assert_eq!((&a.linears, &a.previous), (&b.linears, &b.previous));
    }
    for (what, other) in [
        ("architecture", mbq::artefact::Origin { arch_hash: "c".into(), ..origin() }),
        ("weights", mbq::artefact::Origin { weights_hash: "c".into(), ..origin() }),
    ] {
        let e = Scales::read(dir.path(), &other).unwrap_err();
        assert!(matches!(e, Error::ScaleModelMismatch { .. }) && e.to_string().contains(what), "{e}");
    }
    // Two files that do not belong together.
    let tensors = dir.path().join(SCALES);
    let mut other = std::fs::read(&tensors).unwrap();
    *other.last_mut().unwrap() ^= 1;
    std::fs::write(&tensors, other).unwrap();
    assert!(matches!(Scales::read(dir.path(), &origin()), Err(Error::ScaleModelMismatch { .. })));
    std::fs::write(dir.path().join(REPORT), "{").unwrap();
    assert!(matches!(Scales::read(dir.path(), &origin()), Err(Error::Artefact { .. })));
}

#[test]
fn progress_of_another_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), false, Some(2)).unwrap_err();
    let e = run(dir.path(), true, None).unwrap_err();
    assert!(e.to_string().contains("other settings"), "{e}");
}
