//! What a calibration refuses, each with an error of its own.

use mbq::batch::CalibBatch;
use mbq::calibrate::BalanceMode;
use mbq::{Error, QuantSpec};
use nics_core::models::Model;
use nics_core::tch::{Device, Kind, Tensor};

use crate::kit::{Asked, HIDDEN, POSITIONS, batch, batch_of, calibrated, config, decoder};

#[test]
fn groups_that_do_not_divide() {
    let mut config = config();
    config.search.spec = QuantSpec::weights(3, 24);
    let e = calibrated(&mut decoder(2, Kind::Float), &batch(), &config, &Asked::default()).unwrap_err();
    assert!(matches!(&e, Error::GroupDoesNotDivide { group: 24, input: 32, .. }), "{e}");
    assert!(e.to_string().contains("model.layers.0.self_attn.q_proj"), "{e}");
}

#[test]
fn settings_out_of_range() {
    for spec in [QuantSpec::weights(1, 16), QuantSpec::weights(3, 0), QuantSpec::with_activations(4, 9)] {
        let mut config = config();
        config.search.spec = spec;
        let e = calibrated(&mut decoder(2, Kind::Float), &batch(), &config, &Asked::default()).unwrap_err();
        assert!(matches!(e, Error::Setting { .. }), "{e}");
    }
    let mut config = config();
    config.balance = BalanceMode::Fixed(-1.0);
    let e = calibrated(&mut decoder(2, Kind::Float), &batch(), &config, &Asked::default()).unwrap_err();
    assert!(matches!(e, Error::Setting { field: "balance", .. }), "{e}");
    for (text, fine) in
        [("w3g128", true), ("w4a8", true), ("w2row+extend", true), ("w3", false), ("3g8", false)]
    {
        assert_eq!(text.parse::<QuantSpec>().is_ok(), fine, "{text}");
        if let Ok(spec) = text.parse::<QuantSpec>() {
            assert_eq!(spec.to_string(), text);
        }
    }
}

#[test]
fn values_that_are_not_finite() {
    let broken = |layer: usize| {
        let mut decoder = decoder(2, Kind::Float);
        decoder
            .visit_parameters(&mut |key, t| {
                if key == format!("model.layers.{layer}.mlp.up_proj.weight") {
                    let _ = t.get(0).fill_(f64::INFINITY);
                }
                Ok(())
            })
            .unwrap();
        decoder
    };
    let mut config = config();
    config.balance = BalanceMode::Off;
    let e = calibrated(&mut broken(1), &batch(), &config, &Asked::default()).unwrap_err();
    let Error::NonFinite { layer, tensor, sample } = &e else { panic!("{e}") };
    assert_eq!((*layer, *sample), (1, 0));
    assert!(tensor.contains("down_proj"), "{e}");

    let embeds = Tensor::zeros([2, POSITIONS, HIDDEN], (Kind::Float, Device::Cpu));
    let _ = embeds.get(1).get(3).fill_(f64::NAN);
    let mask = Tensor::ones([2, POSITIONS], (Kind::Bool, Device::Cpu));
    let labels = Tensor::zeros([2, POSITIONS], (Kind::Int64, Device::Cpu));
    let e = CalibBatch::new(&embeds, mask, labels, vec![]).unwrap_err();
    assert!(matches!(e, Error::NonFinite { sample: 1, .. }), "{e}");
}

#[test]
fn samples_without_answers() {
    let config = config();
    let none = batch_of(&["pvvvvppp", "vvvvpppp"]);
    let e = calibrated(&mut decoder(2, Kind::Float), &none, &config, &Asked::default()).unwrap_err();
    assert!(matches!(e, Error::AllLabelsIgnored { samples: 2 }), "{e}");
    // One of two is left out.
    let one = batch_of(&["pvvvvppp", "vvvvppaa"]);
    let found = calibrated(&mut decoder(2, Kind::Float), &one, &config, &Asked::default()).unwrap();
    let sensitivity = found.sensitivity.unwrap();
    assert_eq!(sensitivity.without_answer, 1);
    assert!(sensitivity.modalities.iter().all(|m| m.samples == 1));
}

#[test]
fn samples_without_vision() {
    let config = config();
    // One of two: the mean is over the other.
    let some = batch_of(&["pvvvvpaa", "ppppppaa"]);
    let found = calibrated(&mut decoder(2, Kind::Float), &some, &config, &Asked::default()).unwrap();
    let modalities = found.sensitivity.unwrap().modalities;
    assert_eq!((modalities[0].samples, modalities[1].samples), (2, 1));
    assert!(found.ratios[0].attention.iter().all(|r| r.is_finite()));
    // All: nothing is balanced.
    let none = batch_of(&["ppppppaa", "pppppaaa"]);
    let found = calibrated(&mut decoder(2, Kind::Float), &none, &config, &Asked::default()).unwrap();
    assert!(found.sensitivity.is_none() && found.ratios.is_empty());
    let mut off = config;
    off.balance = BalanceMode::Off;
    let plain = calibrated(&mut decoder(2, Kind::Float), &none, &off, &Asked::default()).unwrap();
    for (a, b) in found.layers.iter().flatten().zip(plain.layers.iter().flatten()) {
        assert_eq!(a.losses, b.losses);
    }
}

#[test]
fn memory_that_does_not_suffice() {
    let (mut decoder, batch, config) = (decoder(2, Kind::Float), batch(), config());
    let asked = |max_memory| Asked { max_memory: Some(max_memory), ..Asked::default() };
    let e = calibrated(&mut decoder, &batch, &config, &asked(1000)).unwrap_err();
    let Error::OutOfMemoryBudget { limit: 1000, needed } = e else { panic!("{e}") };
    // What it says is needed is enough.
    let tight = calibrated(&mut decoder, &batch, &config, &asked(needed)).unwrap();
    let free = calibrated(&mut decoder, &batch, &config, &Asked::default()).unwrap();
    for (a, b) in tight.layers.iter().flatten().zip(free.layers.iter().flatten()) {
        assert!((a.exponent - b.exponent).abs() < 1e-12);
        for (x, y) in a.losses.iter().zip(&b.losses) {
            assert!((x - y).abs() <= 1e-6 * y, "{x} {y}");
        }
    }
}
