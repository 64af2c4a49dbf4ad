//! A packed model computes what its rounded weights mean.

use mbq::export::Layout;
use mbq::packed::{Act, open};
use nics_core::checkpoint::Checkpoint;
use nics_core::models::Model;
use nics_core::nn::PackedLinear;
use nics_core::seam::Projection;
use nics_core::tch::Kind;
use nics_kernels::packed::Rounding;

use crate::kit::{FAMILIES, load, logits, model, quantized, relative};

/// How many projections are packed, of how many.
fn counted(model: &mut mbq::language::Language) -> (usize, usize) {
    let (mut packed, mut all) = (0, 0);
    let mut one = |_: &str, p: &mut Box<dyn Projection>| {
        packed += usize::from(p.as_packed().is_some());
        all += 1;
        Ok(())
    };
    model.model_mut().visit_projections(&mut one).unwrap();
    (packed, all)
}

#[test]
fn every_family() {
    for family in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let from = model(family, Kind::Float, dir.path());
        for (spec, acts) in [
            // Scales are float16: weights are off by up to 2^-11, logits of two layers by little more.
            (
                "w4g32",
                &[(Some(Act::Dense), 2e-3), (Some(Act::Bits16), 2e-3), (None, 2e-3), (Some(Act::Bits8), 0.1)]
                    [..],
            ),
            ("w3g32", &[(None, 2e-3)]),
            ("w2row", &[(None, 2e-3)]),
            // Inputs are rounded in both, and fall on the other side of a tie here and there.
            ("w8a8", &[(None, 2e-2)]),
            ("w4a8", &[(None, 2e-2)]),
            // No kernel has such activations, such widths, such groups.
            ("w4a6", &[(None, 0.1)]),
            ("w5g32", &[(None, 2e-3)]),
            ("w4g16", &[(None, 2e-3)]),
        ] {
            let to = dir.path().join(spec);
            let expected = logits(&mut quantized(&from, spec, Layout::Packed, &to), 9);
            for (act, most) in acts {
                let checkpoint = open(Checkpoint::open_dir(&to).unwrap(), *act).unwrap();
                assert!(checkpoint.config_json().get("quantization_config").is_none());
                let mut packed = load(&checkpoint);
                let names = packed.names().unwrap();
                let (found, all) = counted(&mut packed);
                let inside = packed.quantized(&names).len();
                assert!(all > inside, "{family}");
                match spec {
                    "w4g16" | "w4a6" => assert_eq!(found, 0, "{family} {spec}"),
                    _ => assert_eq!(found, inside, "{family} {spec}"),
                }
                let off = relative(&logits(&mut packed, 9), &expected);
                assert!(off < *most, "{family} {spec} {act:?}: {off}");
            }
        }
    }
}

#[test]
fn in_half_precision_too() {
    let dir = tempfile::tempdir().unwrap();
    let from = model("qwen2", Kind::BFloat16, dir.path());
    let to = dir.path().join("packed");
    let expected = logits(&mut quantized(&from, "w4g32", Layout::Packed, &to), 20);
    let checkpoint = open(Checkpoint::open_dir(&to).unwrap(), None).unwrap();
    let mut packed = load(&checkpoint);
    assert_eq!(packed.decoder().dims().kind, Kind::BFloat16);
    let off = relative(&logits(&mut packed, 20), &expected);
    assert!(off < 0.03, "{off}");
}

#[test]
fn inputs_are_rounded_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let from = model("llama", Kind::Float, dir.path());
    for (spec, act, expected) in [
        ("w4g32", None, Some(Rounding::A16)),
        ("w4g32", Some(Act::Bits8), Some(Rounding::A8)),
        ("w4g32", Some(Act::Dense), None),
        ("w4a8", None, Some(Rounding::A8Row)),
        ("w4a8", Some(Act::Bits8), Some(Rounding::A8Row)),
        ("w4a8", Some(Act::Bits16), Some(Rounding::A16)),
    ] {
        let to = dir.path().join(format!("{spec}-{act:?}"));
        quantized(&from, spec, Layout::Packed, &to);
        let mut packed = load(&open(Checkpoint::open_dir(&to).unwrap(), act).unwrap());
        let mut one = |path: &str, p: &mut Box<dyn Projection>| {
            if let Some(layer) = p.as_packed() {
                assert_eq!(PackedLinear::rounding(layer), expected, "{path}");
            }
            Ok(())
        };
        packed.model_mut().visit_projections(&mut one).unwrap();
    }
    assert!("4".parse::<Act>().unwrap_err().to_string().contains("8, 16 or dense"));
}
