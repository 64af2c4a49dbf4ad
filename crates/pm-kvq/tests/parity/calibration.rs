//! Sensitivity, largest keys, folding and the search of exponents on the folder's models.

use nics_core::cache::NoCache;
use nics_core::models::{Decoder, Model, read};
use nics_core::seam::SeqId;
use pm_kvq::Bits;
use pm_kvq::calibrate::max_keys::max_keys;
use pm_kvq::calibrate::search::{Search, alpha};
use pm_kvq::calibrate::sensitivity::sensitivity;
use pm_kvq::calibrate::{ALPHAS, GradOrder, MaxMode, Samples, Scales, fold};
use pm_kvq::quantize::default_group;
use serde_json::Value;
use tch::Tensor;

use crate::kit::{Case, assert_near, cases};
use crate::models::model_of;

fn samples(case: &Case) -> Samples {
    Samples::new(case.field("calib_input_ids")).unwrap()
}

/// `[1, kv_heads, 1, d / 2]`, as the reference keeps it.
fn stored(t: &Tensor) -> Tensor {
    t.unsqueeze(1).unsqueeze(0)
}

fn numbers(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn sensitivities() {
    for case in cases("09_") {
        let model = model_of(&case);
        let group = case.field("group_size");
        for (name, run) in case.json["results"].as_object().unwrap() {
            let effective = run["effective_len"].as_u64().map(|n| n as usize);
            for (key, order) in
                [("official_mirrored", GradOrder::Mirrored), ("layer_aligned", GradOrder::Aligned)]
            {
                let found = sensitivity(&model, &samples(&case), effective, group, order).unwrap();
                for (side, of) in [("k", 0), ("v", 1)] {
                    for (bits, expected) in run[key][side].as_object().unwrap() {
                        let both = &found.bits[&bits.parse().unwrap()];
                        let found = if of == 0 { &both.k } else { &both.v };
                        for (f, e) in found.iter().zip(numbers(expected)) {
                            assert!(
                                (f - e).abs() <= 5e-3 * e,
                                "{name} {key} {side} {bits}: {f}, expected {e}"
                            );
                        }
                        assert_eq!(found.len(), numbers(expected).len());
                    }
                }
            }
        }
    }
}

fn parameter(model: &mut Decoder, wanted: &str) -> Option<Tensor> {
    let mut found = None;
    model
        .visit_parameters(&mut |key, t| {
            if key.ends_with(wanted) {
                found = Some(t.shallow_clone());
            }
            Ok(())
        })
        .unwrap();
    found
}

#[test]
fn largest_keys_and_folding() {
    for case in cases("10_") {
        let mut model = model_of(&case);
        let effective = case.field("effective_len");
        let samples = samples(&case);
        let mut stretched = None;
        for (name, effective) in [("max_keys", None), ("max_keys_pi", Some(effective))] {
            let found = max_keys(&model, &samples, effective, MaxMode::Rotated).unwrap();
            for (l, m) in found.layers.iter().enumerate() {
                assert_near(&stored(m), case.tensor(&format!("{name}.layer{l}")), 1e-4, name);
            }
            // No position exceeds the radius of a pair, and it is at most √2 times the larger channel.
            let radius = max_keys(&model, &samples, effective, MaxMode::Hypot).unwrap();
            for (m, r) in found.layers.iter().zip(&radius.layers) {
                assert!(m.le_tensor(&(r + 1e-4)).all().int64_value(&[]) == 1);
                assert!(r.le_tensor(&(m * 2f64.sqrt() + 1e-4)).all().int64_value(&[]) == 1);
            }
            stretched = Some(found.layers);
        }
        let stretched = stretched.unwrap();
        let exponent: f64 = case.field("alpha");
        let scales = Scales::of(&stretched, &vec![exponent; stretched.len()]).unwrap();
        fold(&mut model, &scales).unwrap();
        for (name, key) in [
            ("q_proj", "layers.0.self_attn.q_proj.weight"),
            ("k_proj", "layers.0.self_attn.k_proj.weight"),
            ("q_bias", "layers.0.self_attn.q_proj.bias"),
            ("k_bias", "layers.0.self_attn.k_proj.bias"),
        ] {
            let expected = case.tensors.get(&format!("rep_a{exponent}.{name}.layer0"));
            let found = parameter(&mut model, key);
            assert_eq!(found.is_some(), expected.is_some(), "{key}");
            if let (Some(found), Some(expected)) = (found, expected) {
                assert_near(&found, expected, 1e-4, name);
            }
        }
        let ids: Vec<u32> = case.field("input_ids");
        let _no_grad = tch::no_grad_guard();
        let hidden = read(&model, &mut NoCache::new(), &[(SeqId(0), 0, &ids)]).unwrap();
        let logits = model.logits(&hidden).unwrap();
        assert_near(&logits, case.tensor(&format!("rep_a{exponent}.logits_full")), 1e-2, "logits");
    }
}

#[test]
fn exponents() {
    for case in cases("11_") {
        let mut model = model_of(&case);
        let dims = model.dims().clone();
        let samples = samples(&case);
        let effective_len = case.field("effective_len");
        let keys = max_keys(&model, &samples, effective_len, MaxMode::Rotated).unwrap();
        assert_eq!(case.field::<usize>("grid"), ALPHAS);
        for (n, expected) in numbers(&case.json["alphas"]).into_iter().enumerate() {
            assert!((alpha(n) - expected).abs() < 1e-12);
        }
        for (bits, expected) in case.json["results"].as_object().unwrap() {
            let widths = vec![Bits::try_from(bits.parse::<u32>().unwrap()).unwrap(); dims.layers];
            let search = Search {
                max_keys: &keys.layers,
                widths: &widths,
                group: default_group(dims.head_dim),
                effective_len,
            };
            let found = search.run(&mut model, &samples).unwrap();
            for l in 0..dims.layers {
                let losses = numbers(&expected["loss_by_layer_grid"][l]);
                assert_eq!(losses.len(), ALPHAS);
                for (f, e) in found.losses[l].iter().zip(&losses) {
                    assert!((f - e).abs() <= 1e-2 * e, "{bits} bits, layer {l}: loss {f}, expected {e}");
                }
                let best = expected["best_alpha"][l].as_f64().unwrap();
                if (found.alphas[l] - best).abs() > 1e-9 {
                    // Allowed only where both exponents are as good as each other.
                    let of = |a: f64| losses[((1.0 - a) * ALPHAS as f64).round() as usize];
                    let (own, theirs) = (of(found.alphas[l]), of(best));
                    assert!(
                        own - theirs <= 1e-3 * theirs,
                        "{bits} bits, layer {l}: α {} for {best}",
                        found.alphas[l]
                    );
                    continue;
                }
                let scale = case.tensor(&format!("rep_scales.b{bits}.layer{l}"));
                let found = stored(&found.scales.layers()[l]);
                let relative = ((&found - scale) / scale).abs().max().double_value(&[]);
                assert!(relative <= 1e-4, "{bits} bits, layer {l}: scales off by {relative}");
            }
        }
    }
}
