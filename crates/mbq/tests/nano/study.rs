//! The study in miniature.

use std::path::Path;

use mbq::study::{About, Claim, Claims, Inputs, Output, Point, Study, evaluate, figures, variants};
use nics_base::interrupt::Interrupt;
use nics_base::shard::{Shard, merge};

use crate::embedded;

const SMALL: &str = r#"
    quant = ["w2g32", "w4a4"]
    evaluation = { samples = 24, seed = 0 }
    calibration = { samples = 3, seed = 5000 }

    [[condition]]
    name = "as trained"
    nuisance = { pixels = 32, std = 3.0 }

    [[condition]]
    name = "rescaled"
    log_std = 0.7
    nuisance = { pixels = 32, std = 3.0 }
"#;

fn settings(text: &str, dir: &Path) -> Study {
    let file = dir.join("study.toml");
    std::fs::write(&file, text).unwrap();
    Study::read(&file).unwrap()
}

fn run(study: &Study, seed: u64, dir: &Path, shard: Shard, stop: Option<usize>) -> mbq::Result<Vec<Point>> {
    std::fs::create_dir_all(dir).unwrap();
    let interrupt = Interrupt::never();
    let mut report = |done: usize, _: usize, _: &str| {
        if stop == Some(done) {
            interrupt.request();
        }
    };
    let model = embedded(seed);
    let inputs = Inputs { model: &model, study, seed };
    Ok(evaluate(&inputs, Output { dir, shard, interrupt: &interrupt, report: &mut report })?.1)
}

/// Points without what depends on the clock; numbers may lose their last bit on the way through a file.
fn timeless(points: Vec<Point>) -> Vec<Point> {
    let rounded = |r: &[f64; 2]| r.map(|v| (v * 1e12).round());
    let one = |p: Point| Point { seconds: 0.0, ratios: p.ratios.iter().map(rounded).collect(), ..p };
    points.into_iter().map(one).collect()
}

#[test]
fn every_method_is_measured_shards_and_stops_change_nothing_and_claims_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let study = settings(SMALL, dir.path());
    let all = run(&study, 0, &dir.path().join("whole"), Shard::new(0, 1).unwrap(), None).unwrap();
    assert_eq!(all.len(), variants(&study).unwrap().len());
    let of = |condition: &str, quant: &str, method: &str| {
        all.iter().find(|p| p.key() == (condition, quant, method)).unwrap()
    };
    let mean = |p: &Point| p.kl.iter().map(|v| f64::from(*v)).sum::<f64>() / p.kl.len() as f64;
    // Other weights, the same function; rounding sees the difference.
    let (plain, rescaled) = (of("as trained", "float", "float"), of("rescaled", "float", "float"));
    assert_eq!(plain.right, rescaled.right);
    assert!(mean(plain).abs() < 1e-6);
    let rtn = |condition| mean(of(condition, "w2g32", "RTN"));
    assert!(rtn("as trained") > 0.01 && rtn("rescaled") > rtn("as trained"));
    for point in all.iter().filter(|p| p.quant != "float") {
        assert!(mean(point).is_finite() && mean(point) > 0.0, "{:?}", point.key());
    }
    // Errors on pictures weigh less than those on answers, in the last layer what the others do.
    let weights = &of("as trained", "w2g32", "MBQ, MAE").ratios;
    assert_eq!(weights.len(), 3);
    assert!(weights.iter().flatten().all(|w| *w > 0.0 && *w < 1.0), "{weights:?}");

    // Stopped and gone on with, in shards: the same points.
    let parts = dir.path().join("parts");
    let mut files = Vec::new();
    for shard in [Shard::new(0, 2).unwrap(), Shard::new(1, 2).unwrap()] {
        assert!(run(&study, 0, &parts, shard, Some(3)).is_err());
        run(&study, 0, &parts, shard, None).unwrap();
        files = std::fs::read_dir(&parts).unwrap().map(|e| e.unwrap().path()).collect();
    }
    files.retain(|f| f.extension().is_some_and(|e| e == "jsonl"));
    files.sort();
    let merged = dir.path().join("points.jsonl");
    merge(&files, &merged).unwrap();
    assert!(timeless(nics_base::jsonl::read(&merged).unwrap()) == timeless(all.clone()), "shards differ");

    // Figures of two models with intervals; a claim that does not hold is named.
    let other = run(&study, 1, &dir.path().join("other"), Shard::new(0, 1).unwrap(), None).unwrap();
    let seeds = vec![(0, all), (1, other)];
    let (rows, comparisons) = figures(&study, &Claims::default(), &About::default(), &seeds).unwrap();
    assert!(rows.iter().all(|r| r.validate().is_ok() && r.value.is_finite()));
    let row = rows.iter().find(|r| r.variant == "RTN" && r.metric.ends_with("w2g32")).unwrap();
    assert!(row.ci.unwrap()[0] <= row.value && row.value <= row.ci.unwrap()[1] && row.n == Some(48));
    comparisons.check().unwrap();
    let check = |method: &str, over: &str| {
        let claim = Claim {
            condition: "rescaled".into(),
            quant: "w2g32".into(),
            method: method.into(),
            over: over.into(),
        };
        figures(&study, &Claims { claim: vec![claim] }, &About::default(), &seeds).unwrap().1.check()
    };
    let searched = "all tokens alike, MSE (AWQ)";
    check(searched, "RTN").unwrap();
    let error = check("RTN", searched).unwrap_err().to_string();
    assert!(error.contains("RTN") && error.contains("rescaled") && error.contains("w2g32"), "{error}");

    // A model that lacks a point is named.
    let mut seeds = seeds;
    seeds[1].1.retain(|p| p.method != "GPTQ");
    let error = figures(&study, &Claims::default(), &About::default(), &seeds).unwrap_err().to_string();
    assert!(error.contains("GPTQ is missing for seed 1"), "{error}");
}

#[test]
fn claims_about_what_is_not_measured_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let study = settings(SMALL, dir.path());
    let file = dir.path().join("claims.toml");
    let claim =
        "[[claim]]\ncondition = \"as trained\"\nquant = \"w4a4\"\nmethod = \"GPTQ\"\nover = \"RTN\"\n";
    std::fs::write(&file, claim).unwrap();
    let error = Claims::read(&file, &study).unwrap_err().to_string();
    assert!(error.contains("GPTQ") && error.contains("claims.toml"), "{error}");
}
