//! `mbq calibrate` killed at random moments.

use std::path::Path;
use std::time::{Duration, Instant};

use mbq::artefact::{REPORT, SCALES};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::args;
use crate::kit::{FAMILIES, command};

const KILLS: usize = 20;

#[test]
#[ignore = "long: twenty calibrations, killed and resumed"]
fn twenty_kills_resume_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let (model, data) = (family.model(dir.path()), family.captions(dir.path()));
    let calibrate = |out: &Path| {
        let mut command = command(args![
            "calibrate",
            "--model",
            model,
            "--data",
            data,
            "--samples",
            "24",
            "--chunk",
            "3",
            "--quant",
            "w3g16",
            "--distort",
            "--grid",
            "40",
            "--out",
            out
        ]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command.spawn().unwrap()
    };
    let bytes = |out: &Path| [SCALES, REPORT].map(|f| std::fs::read(out.join(f)).unwrap());
    let whole = dir.path().join("whole");
    let begun = Instant::now();
    assert!(calibrate(&whole).wait().unwrap().success());
    let whole_run = begun.elapsed();
    let expected = bytes(&whole);
    let mut rng = ChaCha8Rng::seed_from_u64(20);
    let (mut early, mut between, mut late) = (0, 0, 0);
    for n in 0..KILLS {
        let out = dir.path().join(format!("broken-{n}"));
        let mut child = calibrate(&out);
        std::thread::sleep(whole_run.mul_f64(rng.random::<f64>()));
        child.kill().unwrap();
        child.wait().unwrap();
        // Nothing is there in halves.
        match (out.join(mbq::PROGRESS).exists(), out.join(REPORT).exists()) {
            (_, true) => late += 1,
            (true, false) => between += 1,
            (false, false) => early += 1,
        }
        let begun = Instant::now();
        assert!(calibrate(&out).wait().unwrap().success(), "after kill {n}");
        assert!(begun.elapsed() < 20 * whole_run + Duration::from_secs(60));
        assert!(bytes(&out) == expected, "after kill {n}");
    }
    println!("killed before the first progress {early} times, between {between}, after the end {late}");
    assert!(between >= KILLS / 4, "only {between} kills fell into the calibration");
}
