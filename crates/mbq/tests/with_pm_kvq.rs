//! `--kv pm-kvq:SETTINGS` of the binary, which the feature `with-pm-kvq` gives it: images in a quantized cache of a model with packed
//! weights.

#[path = "commands/kit.rs"]
#[allow(dead_code)]
mod kit;

use serde_json::Value;

use crate::kit::{FAMILIES, run};

#[test]
fn packed_weights_and_pages() {
    let dir = tempfile::tempdir().unwrap();
    // Positions along three axes, and along one.
    for family in [&FAMILIES[2], &FAMILIES[3]] {
        let model = family.model(dir.path());
        let packed = model.with_extension("packed");
        let all =
            args!["quantize", "--model", model, "--method", "rtn", "--quant", "w4row", "--layout", "packed"];
        run(all.iter().chain(&args!["--out", packed])).ok();
        let answer = |kv: &[&str]| -> Value {
            let all = args!["generate", "--model", packed, "--greedy", "--max-new-tokens", "8", "--json"];
            let shown = args!["--image", family.image(), "--prompt", "w3 w4 w5"];
            let kv = kv.iter().map(std::ffi::OsString::from).collect::<Vec<_>>();
            serde_json::from_str(&run(all.iter().chain(&shown).chain(&kv)).ok()).unwrap()
        };
        let dense = answer(&[]);
        assert_eq!(answer(&["--kv", "pm-kvq:exact=f32"])["tokens"], dense["tokens"], "{}", family.name);
        let low = answer(&["--kv", "pm-kvq:window=8,min-bits=4,max-len=4096"]);
        assert_eq!(low["tokens"].as_array().unwrap().len(), 8);
        // A prompt that fills the budget leaves room for what it says.
        let tokens = dense["prompt_tokens"].as_u64().unwrap();
        let cut = answer(&["--kv", &format!("pm-kvq:window=8,min-bits=4,max-len={}", tokens + 3)]);
        assert_eq!(cut["finish"], "cache_exhausted", "{cut}");
    }
    run(args![
        "generate",
        "--model",
        dir.path().join(FAMILIES[2].name),
        "--prompt",
        "w1",
        "--kv",
        "pm-kvq:depth=3"
    ])
    .refused(1, "`depth` is no setting");
}
