//! Statistics over the positions that are compared, and both together.

use mbq::batch::Seating;
use mbq::calibrate::{BalanceMode, CalibConfig};
use mbq::candidates::Over;
use mbq::clip::ClipConfig;
use mbq::methods::{Mbq, Method, Task};
use mbq::operators::Tap;
use mbq::run;
use nics_base::interrupt::Interrupt;
use nics_core::tch::{self, Kind, Tensor};

use crate::kit::{Asked, batch, calibrated, config, decoder, names, off, origin};

fn over(over: Over, balance: BalanceMode) -> CalibConfig {
    let mut config = config();
    (config.search.over, config.balance, config.search.grid) = (over, balance, 6);
    config
}

#[test]
fn balanced_is_the_mean_over_what_is_compared() {
    let batch = batch();
    let balanced = over(Over::Balanced, BalanceMode::Fixed(0.25));
    let found = calibrated(&mut decoder(2, Kind::Float), &batch, &balanced, &Asked::default()).unwrap();
    // By hand, of the first layer's normed rows.
    let decoder_ = decoder(2, Kind::Float);
    let x = {
        let _no_grad = tch::no_grad_guard();
        let seats = Seating::of(&decoder_, &batch).unwrap().seats(0, batch.samples()).unwrap();
        let taps = run::layer(&decoder_.layers[0], &seats, &batch.embeds().flatten(0, 1)).unwrap();
        taps.input(Tap::Attention).abs()
    };
    let weights: Tensor = batch.answers().unwrap().to_kind(Kind::Float)
        + batch.modalities()[0].mask.to_kind(Kind::Float) * 0.25;
    let weights = weights.reshape([-1, 1]);
    let expected = (x * &weights).sum_dim_intlist(0i64, false, Kind::Float) / weights.sum(Kind::Float);
    assert!(off(&found.layers[0][0].statistic, &expected) < 1e-5);
    // In pieces too.
    let asked = Asked { chunk: Some(3), ..Asked::default() };
    let pieces = calibrated(&mut decoder(2, Kind::Float), &batch, &balanced, &asked).unwrap();
    for (a, b) in found.layers.iter().flatten().zip(pieces.layers.iter().flatten()) {
        assert!(off(&a.statistic, &b.statistic) < 1e-5, "{:?}", a.linears);
    }
    // Padding and prompts count in the published statistic.
    let all = over(Over::All, BalanceMode::Fixed(0.25));
    let published = calibrated(&mut decoder(2, Kind::Float), &batch, &all, &Asked::default()).unwrap();
    assert!(off(&published.layers[0][0].statistic, &expected) > 1e-3);
    // Without balance all positions are compared.
    for one in [Over::Balanced, Over::Union] {
        let plain = over(one, BalanceMode::Off);
        let plain = calibrated(&mut decoder(2, Kind::Float), &batch, &plain, &asked).unwrap();
        assert!(off(&plain.layers[0][0].statistic, &published.layers[0][0].statistic) < 1e-5);
    }
}

#[test]
fn the_union_is_as_good_as_the_better_of_both_and_resumes() {
    let batch = batch();
    let of = |one, asked: &Asked| {
        calibrated(&mut decoder(4, Kind::Float), &batch, &over(one, BalanceMode::Auto), asked)
    };
    let [all, balanced] = [Over::All, Over::Balanced].map(|one| of(one, &Asked::default()).unwrap());
    let union = of(Over::Union, &Asked::default()).unwrap();
    // The first layer sees the same inputs whatever was chosen before.
    for ((u, a), b) in union.layers[0].iter().zip(&all.layers[0]).zip(&balanced.layers[0]) {
        assert_eq!(u.losses, [a.losses.clone(), b.losses.clone()].concat(), "{:?}", u.linears);
        let least = |l: &[f64]| l.iter().copied().fold(f64::INFINITY, f64::min);
        let better = if least(&a.losses) <= least(&b.losses) { a } else { b };
        assert!((u.exponent - better.exponent).abs() < 1e-12);
        assert!(off(&u.scales, &better.scales) < 1e-6 && off(&u.statistic, &better.statistic) < 1e-6);
    }
    let dir = tempfile::tempdir().unwrap();
    let stopped = Asked { out: Some(dir.path()), stop_at: Some(6), ..Asked::default() };
    of(Over::Union, &stopped).unwrap_err();
    let resumed = of(Over::Union, &Asked { out: Some(dir.path()), ..Asked::default() }).unwrap();
    for (a, b) in union.layers.iter().flatten().zip(resumed.layers.iter().flatten()) {
        assert!((a.exponent - b.exponent).abs() < 1e-12 && off(&a.scales, &b.scales) < 1e-6);
    }
}

#[test]
fn clipping_behind_the_search() {
    let batch = batch();
    let interrupt = Interrupt::never();
    let of = |clip: Option<ClipConfig>| {
        let mut decoder = decoder(2, Kind::Float);
        let names = names(&decoder);
        let mut progress = |_| {};
        let running = mbq::calibrate::Running {
            out: None,
            chunk: Some(2),
            max_memory: None,
            interrupt: &interrupt,
            progress: &mut progress,
        };
        let origin = origin();
        let task = Task { names: &names, batch: Some(&batch), origin: &origin, running };
        Mbq { config: config(), clip }.quantize(&mut decoder, task).unwrap().rounded.codes
    };
    let (plain, clipped) = (of(None), of(Some(ClipConfig::default())));
    let mut changed = 0;
    for ((role, a), (_, b)) in plain.iter().flatten().zip(clipped.iter().flatten()) {
        let (a, b) = (a.dequantize().unwrap(), b.dequantize().unwrap());
        let same = off(&a, &b) < 1e-9;
        // Queries and keys are left alone.
        assert!(same || !matches!(role, mbq::layer::Role::Q | mbq::layer::Role::K), "{role:?}");
        // A range is never widened.
        assert!(f64::try_from(b.abs().max()).unwrap() <= 1.2 * f64::try_from(a.abs().max()).unwrap());
        changed += usize::from(!same);
    }
    assert!(changed > 0);
}
