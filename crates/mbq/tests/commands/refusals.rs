//! Bad input ends in one line that says what is wrong.

use crate::args;
use crate::kit::{FAMILIES, run};

#[test]
fn one_line_each() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[0];
    let (model, data) = (family.model(dir.path()), family.captions(dir.path()));
    let out = dir.path().join("out");
    let calibrate = |data: &std::path::Path, more: &[&str]| {
        let mut all =
            args!["calibrate", "--model", model, "--data", data, "--samples", "2", "--out", out].to_vec();
        all.extend(more.iter().map(Into::into));
        run(all)
    };
    // Known before a sample is read.
    calibrate(&data, &["--quant", "w3g128"]).refused(1, "groups of 128 weights do not divide");
    calibrate(&data, &["--quant", "w9g16"]).refused(2, "w9g16");
    calibrate(&data, &["--quant", "w3g16", "--balance", "half"])
        .refused(2, "expected auto, off or fixed=NUMBER");
    calibrate(&data, &["--quant", "w3g16", "--max-memory", "1KiB"]).refused(1, "a limit of 1024 bytes");
    calibrate(&data, &["--quant", "w3g16", "--max-len", "3"]).refused(1, "at most 3 are allowed");
    calibrate(&data, &["--quant", "w3g16", "--images-of", "coco"]).refused(1, "\"coco\"");
    let bad = dir.path().join("bad.jsonl");
    let good = std::fs::read_to_string(&data).unwrap();
    std::fs::write(&bad, format!("{good}\n{{\"image\": 1}}\n")).unwrap();
    calibrate(&bad, &["--quant", "w3g16"]).refused(1, "bad.jsonl, line 5");
    std::fs::write(&bad, good.replace(".png", ".gone")).unwrap();
    calibrate(&bad, &["--quant", "w3g16"]).refused(1, ".gone");
    std::fs::write(&bad, "").unwrap();
    calibrate(&bad, &["--quant", "w3g16"]).refused(1, "has no item");

    // Scales of one model are not another's.
    calibrate(&data, &["--quant", "w3g16"]).ok();
    let other = FAMILIES[1].model(dir.path());
    let to = dir.path().join("to");
    run(args!["quantize", "--model", other, "--scales", out, "--out", to]).refused(1, "model's architecture");
    run(args!["quantize", "--model", model, "--scales", out, "--layout", "autoawq", "--out", to])
        .refused(1, "autoawq holds 4 bits alone");
    run(args!["quantize", "--model", model, "--method", "rtn", "--quant", "w3g16", "--out", model])
        .refused(1, "is there already");
    run(args!["quantize", "--model", model, "--method", "gptq", "--quant", "w4a8", "--out", to])
        .refused(2, "rounds weights alone");
    run(args!["quantize", "--model", model, "--quant", "w3g16", "--out", to])
        .refused(1, "give --data or --texts");
    run(args!["inspect", dir.path()]).refused(1, "scales.json");
}
