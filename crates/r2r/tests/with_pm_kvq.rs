//! `--kv pm-kvq:SETTINGS` of the binary, which the feature `with-pm-kvq` gives it.

use std::path::Path;
use std::process::Command;

/// Exit code, standard output, standard error of `r2r generate` with one tiny model in both places.
fn generate(kv: Option<&str>) -> (Option<i32>, String, String) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/megrez");
    let mut command = Command::new(env!("CARGO_BIN_EXE_r2r"));
    command.env("OMP_NUM_THREADS", "1").env("HF_HUB_OFFLINE", "1").env_remove("NICS_LOG");
    command.args([
        "generate",
        "--prompt",
        "abc def",
        "--raw",
        "--greedy",
        "--max-new-tokens",
        "40",
        "--json",
    ]);
    command.args(["--policy", "random", "--target-rate", "0.3", "--seed", "1", "--dtype", "f32"]);
    command.arg("--small").arg(&model).arg("--large").arg(&model);
    command.args(kv.map(|kv| ["--kv", kv]).into_iter().flatten());
    let ran = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (ran.status.code(), text(ran.stdout), text(ran.stderr))
}

#[test]
fn both_models_keep_their_rows_in_the_methods_cache() {
    let (code, dense, errors) = generate(None);
    assert_eq!(code, Some(0), "{errors}");
    // Nothing is quantized without a budget, so both models write what they write with dense caches.
    let (code, paged, errors) = generate(Some("pm-kvq:exact=f32,window=8"));
    assert_eq!(code, Some(0), "{errors}");
    let reply = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap()["tokens"].clone();
    let ids = |tokens: serde_json::Value| -> Vec<u64> {
        tokens.as_array().unwrap().iter().map(|t| t["token"].as_u64().unwrap()).collect()
    };
    assert_eq!(ids(reply(&paged)), ids(reply(&dense)));
    let (code, low, errors) = generate(Some("pm-kvq:window=8,min-bits=2,max-len=64"));
    assert_eq!(code, Some(0), "{errors}");
    assert_eq!(ids(reply(&low)).len(), ids(reply(&dense)).len());
}

#[test]
fn what_is_wrong_is_said() {
    let (code, _, errors) = generate(Some("pm-kvq:depth=3"));
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains("`depth` is no setting"), "{errors}");
    // A budget that the text does not fit is an error that names it.
    let (code, _, errors) = generate(Some("pm-kvq:window=8,min-bits=4,max-len=24"));
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains("the budget is full"), "{errors}");
}
