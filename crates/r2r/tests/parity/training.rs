//! Thresholds, losses, training.

use r2r::losses::{Loss, class_cross_entropy, class_weights, positive_weight};
use r2r::router::{Router, Storage};
use r2r::thresholds::{Objective, Scored, Simulation};
use r2r::training::{Hooks, Rows, TrainingConfig, train};
use tch::Tensor;

use crate::kit::{Case, assert_close, cases, floats, ints};

/// The fixtures' README: sweep values within 1e-12.
const EXACT: f64 = 1e-12;

fn scored(case: &Case, probability: &str) -> Scored {
    let probability = Vec::<f32>::try_from(case.tensor(probability)).unwrap();
    Scored::new(probability, ints(case.tensor("in.label")).iter().map(|&l| l == 1).collect()).unwrap()
}

/// `name(a=1,b=2)` or `name=1`: the name and its numbers.
fn parse(key: &str) -> (&str, Vec<f64>) {
    let name = key.split(['(', '=']).next().unwrap();
    let numbers =
        key[name.len()..].split(['(', ')', '=', ',']).filter_map(|part| part.parse().ok()).collect();
    (name, numbers)
}

#[test]
fn thresholds() {
    for case in cases("thresholds") {
        let scored = scored(&case, "in.prob");
        for (key, expected) in case.json["results"].as_object().unwrap() {
            let (name, numbers) = parse(key);
            let near = |what: &str, found: f64, expected: &serde_json::Value| {
                let expected = expected.as_f64().unwrap();
                assert!((found - expected).abs() <= EXACT, "{key} {what}: {found}, expected {expected}");
            };
            match name {
                // The filter drops rows without a label, of which there is none here.
                "min_recall" | "filtered" | "unreachable" => {
                    let rows = if name == "unreachable" {
                        self::scored(&case, "in.prob_unreachable")
                    } else {
                        scored.clone()
                    };
                    let found = rows.at_recall(numbers[0]);
                    near("threshold", found.threshold, &expected[0]);
                    assert_eq!(found.met, expected[1].as_bool().unwrap(), "{key}");
                }
                "objective_f1" => near("threshold", scored.best(Objective::F1).threshold, expected),
                "objective_precision" => {
                    near("threshold", scored.best(Objective::Precision).threshold, expected);
                }
                "optimizer" | "hysteresis" => {
                    let simulation = match numbers.get(2) {
                        Some(window) => Simulation::Hysteresis(*window as usize),
                        None => Simulation::Plain,
                    };
                    let found = scored.at_false_positives(numbers[0], numbers[1], simulation);
                    near("threshold", found.threshold, &expected["threshold"]);
                    near("recall", found.metrics.recall, &expected["recall"]);
                    near("false positives", found.metrics.false_positives, &expected["fp_rate"]);
                    assert_eq!(found.met, found.metrics.false_positives <= numbers[0]);
                }
                other => panic!("no rule {other}"),
            }
        }
        let mut seen = 0;
        for (key, expected) in case.json.as_object().unwrap() {
            let Some(threshold) = key.strip_prefix("metrics_at_") else { continue };
            let found = scored.metrics(threshold.parse().unwrap());
            for (name, found) in [
                ("accuracy", found.accuracy),
                ("precision", found.precision),
                ("recall", found.recall),
                ("f1", found.f1),
                ("positive_rate", found.positive_rate),
            ] {
                let expected = expected[name].as_f64().unwrap();
                assert!((found - expected).abs() <= EXACT, "{name}: {found}, expected {expected}");
                seen += 1;
            }
        }
        assert!(seen > 0);
        // A share can be asked for instead.
        let at_rate = scored.at_rate(0.3);
        assert!(at_rate.met && at_rate.metrics.positive_rate <= 0.3);
        assert_eq!(scored.curve().len(), 100);
    }
}

#[test]
fn losses() {
    for case in cases("losses") {
        let (abs, rel) = (case.number("tol_abs"), case.number("tol_rel"));
        let (logit, label) = (case.tensor("in.logit"), case.tensor("in.label"));
        let divergent = floats(label).iter().filter(|l| **l > 0.5).count();
        let total = label.numel();
        let weight = positive_weight(divergent, total, case.number("recall_factor")).unwrap();
        assert!((weight - case.number("pos_weight")).abs() < EXACT);
        let check = |name: &str, loss: Loss| {
            let found = loss.of(logit, label).unwrap();
            assert_close(name, &found, case.tensor(name), abs, rel);
        };
        let bce = Loss::Bce { positive_weight: weight };
        check("out.bce", bce);
        check("out.bce_class", bce);
        for (name, key) in [("out.focal", "focal"), ("out.focal_default", "focal_default")] {
            let constant = |field: &str| case.json[key][field].as_f64().unwrap();
            check(name, Loss::Focal { alpha: constant("alpha"), gamma: constant("gamma") });
        }
        let dpo = &case.json["dpo"];
        let share = dpo["positive_prob"].as_f64().unwrap();
        check("out.dpo", Loss::Dpo { beta: dpo["beta"].as_f64().unwrap(), positive_share: share });

        let leaf = logit.copy().set_requires_grad(true);
        let gradient = Tensor::run_backward(&[bce.of(&leaf, label).unwrap()], &[&leaf], false, false);
        assert_close("gradient", &gradient[0], case.tensor("out.bce_grad"), abs, rel);

        let class = case.tensor("in.label3");
        let mut counts = [0; 3];
        for c in ints(class) {
            counts[c as usize] += 1;
        }
        let weights: Vec<f64> = serde_json::from_value(case.json["ce_weight"].clone()).unwrap();
        let weights = [weights[0], weights[1], weights[2]];
        let found = class_cross_entropy(case.tensor("in.logit3"), class, weights).unwrap();
        assert_close("three classes", &found, case.tensor("out.ce"), abs, rel);
        let [matches, neutral, divergent] = counts.map(|c| c as f64);
        let own = class_weights(counts, 2.0).unwrap();
        assert!(
            (own[1] - matches / neutral).abs() < EXACT && (own[2] - 2.0 * matches / divergent).abs() < EXACT
        );
    }
}

fn rows(case: &Case, set: &str) -> Rows {
    let get = |name: &str| Some(case.tensors.get(&format!("{set}.{name}"))?.shallow_clone());
    Rows::new(get("hidden_states"), get("token"), get("logits"), None, case.tensor(&format!("{set}.label")))
        .unwrap()
}

#[test]
fn training() {
    for case in cases("training") {
        let mut router_config = case.config("init_args");
        // The fixture has dropout 0, which its arguments leave out.
        router_config.args.dropout_rate = 0.0;
        let mut router = Router::load(router_config, &case.path("init."), None, Storage::F32).unwrap();
        let whole = |key: &str| case.json[key].as_u64().unwrap() as usize;
        let config = TrainingConfig {
            lr: case.number("lr"),
            weight_decay: case.number("weight_decay"),
            betas: serde_json::from_value(case.json["betas"].clone()).unwrap(),
            eps: case.number("eps"),
            batch: whole("batch_size"),
            epochs: whole("epochs"),
            patience: whole("patience"),
            shuffle: false,
            ..TrainingConfig::default()
        };
        let (train_rows, validation) = (rows(&case, "train"), rows(&case, "val"));
        let divergent = floats(&train_rows.divergent).iter().sum::<f64>() as usize;
        let weight = positive_weight(divergent, train_rows.len(), 1.0).unwrap();
        assert!((weight - case.number("pos_weight")).abs() < 1e-6);
        let mut batch_losses = Vec::new();
        let mut step = |_, _, _, loss: f64| batch_losses.push(loss);
        let hooks = Hooks { step: Some(&mut step), ..Hooks::default() };
        let outcome = train(&mut router, &train_rows, &validation, &config, None, hooks).unwrap();

        let tol = case.number("tol_loss");
        let near = |key: &str, found: &[f64], tol: f64| {
            let expected: Vec<f64> = serde_json::from_value(case.json[key].clone()).unwrap();
            assert_eq!(found.len(), expected.len(), "{key}");
            for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                assert!((f - e).abs() <= tol, "{key}, {i}: {f}, expected {e}");
            }
        };
        near("batch_losses", &batch_losses, tol);
        let column = |of: fn(&r2r::training::Epoch) -> f64| outcome.epochs.iter().map(of).collect::<Vec<_>>();
        near("val_loss", &column(|e| e.validation_loss), tol);
        near("train_loss", &column(|e| e.train_loss), tol);
        near("val_accuracy", &column(|e| e.accuracy), 1e-9);
        near("val_recall", &column(|e| e.recall), 1e-9);
        near("val_f1", &column(|e| e.f1), 1e-9);
        near("val_pos_rate_percent", &column(|e| 100.0 * e.positive_rate), 1e-9);
        assert_eq!(outcome.best_epoch, whole("best_epoch"));
        let abs = case.number("tol_abs");
        let expected = case.under("final.");
        let trained = router.parameters().unwrap();
        assert_eq!(trained.len(), expected.len());
        for (name, found) in trained {
            assert!(!found.requires_grad());
            assert_close(&name, &found, &expected[&name], abs, 0.0);
        }
    }
}
