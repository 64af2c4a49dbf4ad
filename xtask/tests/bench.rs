//! `cargo xtask bench` from the command line to its rows, over tiny shapes.

use std::process::Command;

use nics_base::row;

/// Builds the suites in release, which takes minutes where they are not built yet.
#[test]
#[ignore = "long"]
fn a_run_in_miniature_writes_rows() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["bench", "--miniature", "--rows"])
        .arg(&rows)
        .env_remove("NICS_PYTHON")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert!(out.contains("decode/bf16/batch 1/context 16: ours "), "{out}");
    let rows = row::read(&rows).unwrap();
    for suite in ["decode", "prefill", "serve", "gemv", "attention"] {
        let times =
            rows.iter().filter(|r| r.dataset.starts_with(suite) && r.metric.starts_with("seconds per "));
        assert!(times.clone().any(|r| r.variant == "libtorch" || r.variant == "generator"), "{suite}");
        assert!(times.clone().all(|r| r.value > 0.0), "{suite}");
    }
    assert!(rows.iter().any(|r| r.dataset == "read bandwidth" && r.value > 1e6));

    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["bench", "--miniature", "no such case"])
        .env_remove("NICS_PYTHON")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("\"no such case\"") && err.contains("decode/bf16"), "{err}");
}
