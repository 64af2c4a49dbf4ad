//! Sensitivities without a search.

use std::path::Path;

use serde_json::Value;

use crate::args;
use crate::kit::{FAMILIES, command, run};

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn it_is_what_a_calibration_measures_first_and_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let (model, data) = (family.model(dir.path()), family.captions(dir.path()));
    let common = |command: &str, out: &Path| {
        args![command, "--model", model, "--data", data, "--samples", "4", "--out", out].to_vec()
    };
    let out = dir.path().join("sensitivity");
    let said = run(common("sensitivity", &out)).ok();
    for branch in ["attention", "mlp"] {
        for modality in ["answer", "image"] {
            assert!(said.contains(&format!("layer   1  {branch:<10} {modality:<8} gradient ")), "{said}");
        }
    }
    let found = json(&out.join("sensitivity.json"));
    let scales = dir.path().join("scales");
    run([common("calibrate", &scales), args!["--quant", "w4g16"].to_vec()].concat()).ok();
    let report = json(&scales.join("scales.json"));
    assert_eq!(found["modalities"], report["sensitivity"]["modalities"]);
    assert_eq!(found["weights"], report["ratios"]);
    assert_eq!((&found["arch_hash"], &found["data_hash"]), (&report["arch_hash"], &report["data_hash"]));
    // Images do not reach the loss behind the last layer's attention; the median lifts their weight there.
    assert_eq!(found["ratios"][0]["mlp"][1].as_f64(), Some(0.0));
    assert!(found["weights"][0]["mlp"][1].as_f64().unwrap() > 0.0);
    // Killed at once, and run again.
    let broken = dir.path().join("broken");
    let mut killed =
        command(common("sensitivity", &broken)).stdout(std::process::Stdio::null()).spawn().unwrap();
    while !broken.join(mbq::PROGRESS).exists() && killed.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let lines = run([common("sensitivity", &broken), args!["--json"].to_vec()].concat()).ok();
    assert_eq!(lines.lines().filter(|l| serde_json::from_str::<Value>(l).is_ok()).count(), 8);
    assert_eq!(json(&broken.join("sensitivity.json")), found);
    // Other data, and too little memory.
    run([common("sensitivity", &out), args!["--format", "few-shot"].to_vec()].concat())
        .refused(1, "other settings, data");
    let small = dir.path().join("small");
    run([common("sensitivity", &small), args!["--max-memory", "1KiB"].to_vec()].concat())
        .refused(1, "a limit of 1024 bytes");
}
