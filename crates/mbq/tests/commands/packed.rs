//! Our own layout on the command line: made in every way, shown, and written in the layouts of others.

use std::path::Path;

use serde_json::Value;

use crate::args;
use crate::kit::{FAMILIES, run};

fn same(a: &Path, b: &Path) {
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn packed_and_exported() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let (model, data) = (family.model(dir.path()), family.captions(dir.path()));
    let at = |name: &str| dir.path().join(name);
    let scales = at("scales");
    run(args![
        "calibrate",
        "--model",
        model,
        "--data",
        data,
        "--samples",
        "2",
        "--quant",
        "w4row",
        "--out",
        scales
    ])
    .ok();
    // Scales become the same file in both ways.
    let (by_quantize, by_pack) = (at("by-quantize"), at("by-pack"));
    let said = run(args![
        "quantize",
        "--model",
        model,
        "--scales",
        scales,
        "--layout",
        "packed",
        "--out",
        by_quantize
    ])
    .ok();
    assert!(said.contains("w4row, stored as packed"), "{said}");
    run(args!["pack", model, "--scales", scales, "--out", by_pack]).ok();
    same(&by_quantize, &by_pack);
    let shown = run(args!["inspect", by_pack]).ok();
    assert!(shown.contains("14 linear layers of 4 bits in whole rows"), "{shown}");
    assert!(shown.contains("by mbq from qwen2-vl; the tensors are those that were written"), "{shown}");
    let line: Value = serde_json::from_str(&run(args!["inspect", by_pack, "--json"]).ok()).unwrap();
    assert_eq!(
        (&line["layout"], &line["bits"], &line["verified"]),
        (&"packed".into(), &4.into(), &true.into())
    );

    // Out, in again, and out again.
    for layout in ["autoawq", "compressed-tensors", "dense"] {
        let (out, back, again) =
            (at(&format!("out-{layout}")), at(&format!("in-{layout}")), at(&format!("again-{layout}")));
        let said = run(args!["export", by_pack, "--to", layout, "--out", out]).ok();
        assert!(said.contains(&format!("stored as packed before, as {layout} now")), "{said}");
        if layout == "dense" {
            run(args!["pack", out, "--out", back]).refused(1, "is not quantized");
            continue;
        }
        run(args!["pack", out, "--out", back]).ok();
        run(args!["export", back, "--to", layout, "--out", again]).ok();
        same(&out, &again);
    }
    run(args!["pack", by_pack, "--out", at("x")]).refused(1, "is stored as packed already");
    run(args!["export", by_pack, "--to", "awq", "--out", at("x")]).refused(2, "autoawq");
    run(args!["export", by_pack, "--to", "autoawq", "--out", by_quantize]).refused(1, "is there already");
    run(args!["export", at("nowhere"), "--to", "autoawq", "--out", at("x")]).refused(1, "nowhere");
    run(args!["quantize", "--model", by_pack, "--method", "rtn", "--quant", "w4row", "--out", at("x")])
        .refused(1, "the weights are quantized (mbq)");
    // Outputs of 16 fill no words of three bits.
    let three = at("three");
    let quantize =
        args!["quantize", "--model", model, "--method", "rtn", "--quant", "w3row", "--layout", "packed"];
    run(quantize.iter().chain(&args!["--out", three])).ok();
    run(args!["export", three, "--to", "gptq", "--out", at("x")]).refused(1, "do not fill words of 32");
    run(args!["export", three, "--to", "autoawq", "--out", at("x")]).refused(1, "autoawq holds 4 bits alone");
    let file = three.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    run(args!["inspect", three]).refused(1, "are not those that were written");
}
