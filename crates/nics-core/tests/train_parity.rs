//! Optimiser, clipping, schedule and loss against torch and transformers (`golden/train/train.py`).

use nics_core::tch::{Device, Kind, Tensor};
use nics_core::train::{
    AdamW, AdamWOptions, Schedule, TrainError, clip_coefficient, global_norm, masked_cross_entropy,
};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/train/train.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn tensor(value: &Value, shape: &[i64]) -> Tensor {
    Tensor::from_slice(&numbers(value)).to_kind(Kind::Float).reshape(shape)
}

/// Within float32 rounding of a few operations: 1e-6 of the largest number in the tensor.
fn assert_close(found: &Tensor, expected: &Value, what: &str) {
    let expected = numbers(expected);
    let found = Vec::<f64>::try_from(found.to_kind(Kind::Double).reshape([-1])).unwrap();
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
    for (f, e) in found.iter().zip(&expected) {
        assert!((f - e).abs() <= 1e-6 * scale, "{what}: {f}, torch has {e}");
    }
}

#[test]
fn adamw_makes_the_steps_of_torch() {
    let golden = &golden()["adamw"];
    let names: Vec<&String> = golden["shapes"].as_object().unwrap().keys().collect();
    let shape =
        |name: &str| -> Vec<i64> { numbers(&golden["shapes"][name]).into_iter().map(|n| n as i64).collect() };
    let params = names
        .iter()
        .map(|name| {
            let start = tensor(&golden["start"][name.as_str()], &shape(name));
            ((*name).clone(), start.set_requires_grad(true))
        })
        .collect();
    let field = |name: &str| golden[name].as_f64().unwrap();
    let options = AdamWOptions {
        betas: [field("beta1"), field("beta2")],
        eps: field("eps"),
        weight_decay: field("weight_decay"),
    };
    let mut optimizer = AdamW::new(params, options).unwrap();
    let steps = golden["steps"].as_array().unwrap();
    assert!(steps.len() >= 5);
    for (i, step) in steps.iter().enumerate() {
        let grads: Vec<_> = names
            .iter()
            .map(|name| {
                Some(&step["grads"][name.as_str()]).filter(|g| !g.is_null()).map(|g| tensor(g, &shape(name)))
            })
            .collect();
        optimizer.step(&grads, step["lr"].as_f64().unwrap()).unwrap();
        for (at, name) in names.iter().enumerate() {
            let name = name.as_str();
            assert_close(
                &optimizer.params()[at].detach(),
                &step["params"][name],
                &format!("step {i}, {name}"),
            );
            assert_close(&optimizer.moments()[at].m, &step["m"][name], &format!("step {i}, m of {name}"));
            assert_close(&optimizer.moments()[at].v, &step["v"][name], &format!("step {i}, v of {name}"));
        }
    }
    // The fixture leaves one parameter without gradient once; its count must not have moved.
    let updates: Vec<u64> = optimizer.moments().iter().map(|m| m.updates).collect();
    let expected: Vec<u64> = names
        .iter()
        .map(|name| steps.iter().filter(|s| !s["grads"][name.as_str()].is_null()).count() as u64)
        .collect();
    assert_eq!(updates, expected);
    assert_ne!(updates[0], updates[1]);
}

#[test]
fn clipping_is_torchs() {
    for case in golden()["clip"].as_array().unwrap() {
        let grads: Vec<Option<Tensor>> =
            case["grads"].as_array().unwrap().iter().map(|g| Some(tensor(g, &[-1]))).chain([None]).collect();
        let norm = global_norm(&grads).unwrap();
        assert!((norm / case["norm"].as_f64().unwrap() - 1.0).abs() < 1e-6);
        let scale = clip_coefficient(norm, case["max_norm"].as_f64().unwrap());
        for (grad, clipped) in grads.iter().flatten().zip(case["clipped"].as_array().unwrap()) {
            assert_close(&(grad * scale), clipped, "a clipped gradient");
        }
    }
    assert!((clip_coefficient(1e9, 0.0) - 1.0).abs() < f64::EPSILON, "0 is no limit");
}

#[test]
fn the_schedule_is_transformers() {
    for case in golden()["schedule"].as_array().unwrap() {
        let int = |name: &str| case[name].as_u64().unwrap();
        let schedule =
            Schedule { steps: int("steps"), warmup: int("warmup"), floor: case["floor"].as_f64().unwrap() };
        for (step, factor) in numbers(&case["factors"]).into_iter().enumerate() {
            let found = schedule.factor(step as u64);
            assert!(
                (found - factor).abs() < 1e-12,
                "{schedule:?} at {step}: {found}, transformers has {factor}"
            );
        }
    }
}

#[test]
fn cross_entropy_sums_over_the_rows_that_count() {
    let case = &golden()["cross_entropy"];
    let shape: Vec<i64> = numbers(&case["shape"]).into_iter().map(|n| n as i64).collect();
    let logits = tensor(&case["logits"], &shape).set_requires_grad(true);
    let labels = Tensor::from_slice(&numbers(&case["labels"])).to_kind(Kind::Int64);
    let loss = masked_cross_entropy(&logits, &labels).unwrap();
    assert_eq!(loss.tokens, case["tokens"].as_i64().unwrap());
    assert_close(&loss.sum.detach().reshape([1]), &Value::Array(vec![case["sum"].clone()]), "the sum");
    loss.sum.backward();
    assert_close(&logits.grad(), &case["grad"], "the gradient");
}

#[test]
fn labels_and_logits_that_do_not_fit_are_refused() {
    let logits = Tensor::zeros([2, 5], (Kind::Float, Device::Cpu));
    let refused = |logits: &Tensor, labels: Tensor, part: &str| {
        let e = masked_cross_entropy(logits, &labels).unwrap_err();
        assert!(matches!(e, TrainError::Input(_)));
        assert!(e.to_string().contains(part), "{e}");
    };
    refused(&logits, Tensor::from_slice(&[1i64, 5]), "label 5 is neither below the vocabulary of 5 nor -100");
    refused(&logits, Tensor::from_slice(&[-1i64, 1]), "label -1");
    refused(&logits, Tensor::from_slice(&[1i64, 2, 3]), "shape [3]");
    refused(&logits, Tensor::from_slice(&[1i32, 2]), "Int");
    refused(&logits.reshape([10]), Tensor::from_slice(&[1i64, 2]), "[rows, vocab]");
    let none = masked_cross_entropy(&logits, &Tensor::from_slice(&[-100i64, -100])).unwrap();
    assert_eq!((none.tokens, none.sum.double_value(&[])), (0, 0.0));
}
