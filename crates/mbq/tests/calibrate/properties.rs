//! What must hold whatever the numbers are.

use mbq::QuantSpec;
use mbq::apply::{fold_scales, round};
use mbq::calibrate::BalanceMode;
use mbq::candidates::{GRID, candidate, magnitude};
use mbq::layer::LayerWeights;
use mbq::loss::{Balance, LossKind, Losses, Part};
use mbq::quantize::fake_quant_group;
use mbq::sensitivity::sensitivity;
use nics_core::tch::{Device, Kind, Tensor};

use crate::kit::{Asked, batch, batch_of, calibrated, config, decoder, logits, names, normal, off};

#[test]
fn folding_keeps_what_a_model_computes() {
    for kv in [2, 4] {
        let (mut decoder, batch) = (decoder(kv, Kind::Float), batch());
        let before = logits(&decoder, &batch);
        let scales = calibrated(&mut decoder, &batch, &config(), &Asked::default()).unwrap();
        // The search leaves the model as it was.
        assert!(logits(&decoder, &batch).equal(&before));
        assert_eq!(scales.layers[0].len(), if kv == 4 { 4 } else { 3 });
        let names = names(&decoder);
        fold_scales(&mut decoder, &names, &scales.layers).unwrap();
        let after = logits(&decoder, &batch);
        assert!(off(&after, &before) < 5e-4, "{}", off(&after, &before));
        // Scales of one layer too few are refused, and nothing is changed.
        fold_scales(&mut decoder, &names, &scales.layers[1..]).unwrap_err();
        assert!(logits(&decoder, &batch).equal(&after));
    }
}

#[test]
fn searched_scales_are_better_than_plain_rounding() {
    let (batch, spec) = (batch(), QuantSpec::weights(3, 16));
    let float = logits(&decoder(2, Kind::Float), &batch);
    let error = |scaled: bool| {
        let mut decoder = decoder(2, Kind::Float);
        let names = names(&decoder);
        if scaled {
            let mut config = config();
            config.balance = BalanceMode::Off;
            let scales = calibrated(&mut decoder, &batch, &config, &Asked::default()).unwrap();
            fold_scales(&mut decoder, &names, &scales.layers).unwrap();
        }
        round(&mut decoder, &names, &spec).unwrap();
        (logits(&decoder, &batch) - &float).square().mean(Kind::Double).double_value(&[])
    };
    let (plain, scaled) = (error(false), error(true));
    assert!(scaled < plain, "{scaled} {plain}");
}

#[test]
fn exponent_zero_is_plain_rounding() {
    let a = magnitude(&normal(&[9, 32], 1)).unwrap();
    let s = candidate(&a, None, 0.0).unwrap();
    assert!(s.equal(&s.ones_like()));
}

#[test]
fn without_a_weight_vision_counts_for_nothing_but_the_number_of_values() {
    let batch = batch();
    let rows = batch.samples() * batch.positions();
    let target = normal(&[rows, 8], 2);
    let output = &target + normal(&[rows, 8], 3) * 0.1;
    let loss = |parts: Vec<Part>, kind| {
        let balance = Balance::of(parts).unwrap();
        let mut losses = Losses::new(kind, &balance, 1);
        let piece = losses.piece(0, batch.samples(), &target).unwrap();
        losses.add(0, &piece, &output).unwrap();
        losses.finish()[0]
    };
    let answers = || Part { mask: batch.answers().unwrap(), weight: 1.0 };
    let vision = || Part { mask: batch.modalities()[0].mask.shallow_clone(), weight: 0.0 };
    let counts = batch.counts().unwrap();
    let share = counts[0].1 as f64 / (counts[0].1 + counts[1].1) as f64;
    let mae = |parts| loss(parts, LossKind::Mae);
    assert!((mae(vec![answers(), vision()]) - share * mae(vec![answers()])).abs() < 1e-12);
    let mse = |parts| loss(parts, LossKind::Mse);
    assert!((mse(vec![answers(), vision()]) - mse(vec![answers()])).abs() < 1e-12);
}

#[test]
fn ranges_that_hold_zero_do_not_saturate() {
    let w = Tensor::linspace(0.5, 1.5, 16, (Kind::Float, Device::Cpu)).view([1, 16]);
    let worst = |zero_range| {
        let spec = QuantSpec { zero_range, ..QuantSpec::weights(3, 16) };
        off(&fake_quant_group(&w, &spec).unwrap(), &w)
    };
    assert!(worst(mbq::ZeroRange::Keep) > 0.49);
    assert!(worst(mbq::ZeroRange::Extend) < 0.11);
}

#[test]
fn vision_of_the_last_layer_is_lifted_by_the_median() {
    let (mut decoder, batch) = (decoder(2, Kind::Float), batch());
    let found = sensitivity(&decoder, &batch).unwrap();
    // Vision stands before every answer, so that its last outputs cannot reach the loss.
    assert!(found.modalities[1].mlp[2].abs() < f64::EPSILON);
    let scales = calibrated(&mut decoder, &batch, &config(), &Asked::default()).unwrap();
    assert_eq!(scales.sensitivity.as_ref(), Some(&found));
    let mut sorted = scales.ratios[0].mlp.clone();
    sorted.sort_by(f64::total_cmp);
    assert!((scales.ratios[0].mlp[2] - sorted[0]).abs() < f64::EPSILON && sorted[0] > 0.0);
}

#[test]
fn models_in_half_precision_are_searched_in_float32() {
    let batch = batch_of(&["pvvvvppaaa", "vvvvppaaaa"]);
    let mut half = decoder(4, Kind::BFloat16);
    let scales = calibrated(&mut half, &batch, &config(), &Asked::default()).unwrap();
    assert!(scales.layers.iter().flatten().all(|op| op.scales.kind() == Kind::Float));
    assert!(scales.layers.iter().flatten().all(|op| op.losses.len() == GRID));
    let names = names(&half);
    fold_scales(&mut half, &names, &scales.layers).unwrap();
    round(&mut half, &names, &QuantSpec::with_activations(4, 8)).unwrap();
    let kind = LayerWeights::of(&mut half.layers[0]).unwrap().linears()[0].1.weight.kind();
    assert_eq!(kind, Kind::Float); // as the search reads it
    assert_eq!(half.layers[0].input_layernorm.weight.kind(), Kind::BFloat16);
    assert!(logits(&half, &batch).isfinite().all().int64_value(&[]) == 1);
}
