//! Uncertainty, policies over a sequence, the small model's filters.

use std::sync::{Arc, Mutex};

use r2r::policy::uncertainty::{Evidence, entropy};
use r2r::policy::{
    DuoRolling, Entropy, Immediate, Momentum, NeuralRolling, Policy, Rolling, Sequence, StepView,
};
use r2r::router::{Architecture, Features, Router, RouterConfig, Storage, largest_logits};
use r2r::sampling::SmallSampling;
use tch::{Kind, Tensor};

use crate::kit::{Case, assert_close, cases, floats, ints};

#[test]
fn measures() {
    for case in cases("uncertainty") {
        let logits = case.tensor("in.logits");
        let (abs, rel) = (case.number("tol_abs"), case.number("tol_rel"));
        // The fixtures' README allows 1e-3 where digamma is involved.
        let digamma = 1e-3;
        assert_close("entropy", &entropy(logits).unwrap(), case.tensor("out.entropy"), abs, rel);
        let evidence = Evidence::of(logits, case.json["topk"].as_i64().unwrap()).unwrap();
        assert_close("aleatoric", &evidence.aleatoric, case.tensor("out.aleatoric"), digamma, digamma);
        assert_close("epistemic", &evidence.epistemic, case.tensor("out.epistemic"), abs, rel);
        let reliability = evidence.reliability().unwrap();
        assert_close("reliability", &reliability, case.tensor("out.reliability"), digamma, digamma);
        for (name, expected) in case.under("out.aleatoric_k") {
            let evidence = Evidence::of(logits, name.parse().unwrap()).unwrap();
            assert_close("aleatoric", &evidence.aleatoric, &expected, digamma, digamma);
            let expected = case.tensor(&format!("out.epistemic_k{name}"));
            assert_close("epistemic", &evidence.epistemic, expected, abs, rel);
        }
    }
}

fn neural(case: &Case) -> Router {
    let params = &case.json["params"]["neural_rolling"];
    let mut args = params.as_object().unwrap().clone();
    args.retain(|key, _| !matches!(key.as_str(), "threshold" | "window_size"));
    let config = RouterConfig::from_json(Architecture::Logits, &args).unwrap();
    Router::load(config, &case.path("nr."), None, Storage::F32).unwrap()
}

fn policy(case: &Case, name: &str) -> Box<dyn Policy> {
    let params = &case.json["params"][name];
    let number = |key: &str| params[key].as_f64();
    let need = |key: &str| number(key).unwrap_or_else(|| panic!("{name} has no {key}"));
    let window = || params["window_size"].as_u64().unwrap() as usize;
    match name {
        "immediate_default" => Box::new(Immediate::default()),
        _ if name.starts_with("immediate") => Box::new(Immediate {
            aleatoric: number("aleatoric_threshold"),
            epistemic: number("epistemic_threshold"),
            entropy: number("entropy_threshold"),
        }),
        "entropy" => Box::new(Entropy::new(need("entropy_threshold")).unwrap()),
        "momentum" => {
            let bounds = (need("quick_to_ref_threshold"), need("ref_to_quick_threshold"));
            let (aleatoric, factor) = (need("aleatoric_threshold"), need("momentum_factor"));
            Box::new(Momentum::new(aleatoric, factor, bounds.0, bounds.1).unwrap())
        }
        "rolling" => {
            let (aleatoric, entropy) = (need("aleatoric_threshold"), need("entropy_threshold"));
            Box::new(Rolling::new(aleatoric, entropy, window()).unwrap())
        }
        "duo_rolling" => Box::new(DuoRolling::new(need("aleatoric_threshold"), window()).unwrap()),
        "neural_rolling" => {
            let router = Arc::new(Mutex::new(neural(case)));
            Box::new(NeuralRolling::new(router, need("threshold"), window()).unwrap())
        }
        other => panic!("no policy {other}"),
    }
}

/// Decisions of one sequence, a step at a time, as row `row` of a batch of `batch`.
fn decisions(policy: &mut dyn Policy, logits: &Tensor, batch: i64) -> Vec<i64> {
    let (steps, _) = logits.size2().unwrap();
    let sequences: Vec<Sequence> = (0..batch).map(|i| Sequence(i as u64)).collect();
    let hidden = Tensor::zeros([batch, 4], (Kind::Float, tch::Device::Cpu));
    let token = Tensor::zeros([batch], (Kind::Int64, tch::Device::Cpu));
    (0..steps)
        .map(|t| {
            // Other rows of the batch see other steps, and must not matter.
            let rows: Vec<Tensor> = (0..batch).map(|b| logits.get((t + 3 * b) % steps)).collect();
            let logits = Tensor::stack(&rows, 0);
            let view = StepView { logits: &logits, hidden: &hidden, token: &token };
            i64::from(policy.decide(&view, &sequences).unwrap()[0].large)
        })
        .collect()
}

#[test]
fn sequences_of_decisions() {
    for case in cases("strategies") {
        let logits = case.tensor("in.logits");
        assert_close("entropy", &entropy(logits).unwrap(), case.tensor("mid.entropy"), 1e-4, 1e-4);
        let evidence = Evidence::of(logits, 10).unwrap();
        assert_close("aleatoric", &evidence.aleatoric, case.tensor("mid.aleatoric"), 1e-3, 1e-3);
        assert_close("epistemic", &evidence.epistemic, case.tensor("mid.epistemic"), 1e-4, 1e-4);
        let router = neural(&case);
        let largest = largest_logits(logits, router.config().top_k().unwrap()).unwrap();
        let found = router.probability(&Features { logits: Some(&largest), ..Features::default() }).unwrap();
        assert_close("probability", &found, case.tensor("mid.nr_prob"), 2e-5, 2e-5);
        for (name, expected) in case.under("out.") {
            for batch in [1, 4] {
                let found = decisions(&mut *policy(&case, &name), logits, batch);
                assert_eq!(found, ints(&expected), "{name} in a batch of {batch}");
            }
            // Closed, a sequence starts anew.
            let mut policy = policy(&case, &name);
            decisions(&mut *policy, logits, 1);
            policy.close(Sequence(0));
            assert_eq!(decisions(&mut *policy, logits, 1), ints(&expected), "{name} again");
        }
    }
}

#[test]
fn filters() {
    for case in cases("sampling") {
        let rows: Vec<Vec<f32>> = Vec::<Vec<f32>>::try_from(case.tensor("in.logits")).unwrap();
        for (index, combo) in case.json["combos"].as_object().unwrap() {
            let sampling = SmallSampling {
                temperature: combo["temperature"].as_f64().unwrap(),
                top_k: combo["top_k"].as_i64().unwrap().max(0) as usize,
                top_p: combo["top_p"].as_f64().unwrap(),
            };
            let found: Vec<f32> = rows.iter().flat_map(|row| sampling.probabilities(row)).collect();
            let expected = case.tensor(&format!("out.{index}.probs"));
            let found = Tensor::from_slice(&found).reshape(expected.size());
            assert_close(index, &found, expected, case.number("tol_abs"), 0.0);
        }
        for (name, temperature) in [("out.greedy", 0.0), ("out.greedy_1e-6", 1e-6)] {
            let sampling = SmallSampling { temperature, ..SmallSampling::default() };
            for (row, expected) in rows.iter().zip(floats(case.tensor(name))) {
                let found =
                    sampling.choose(row, &mut rand_chacha::rand_core::SeedableRng::seed_from_u64(0)).unwrap();
                assert!((f64::from(found) - expected).abs() < 0.5, "{name}");
            }
        }
    }
}
