//! Routers, decisions, and the official checkpoint.

use r2r::checkpoint::{self, Official};
use r2r::router::{Features, Router, Storage, largest_logits, route};
use tch::{Device, Kind};

use crate::kit::{assert_close, cases, floats, golden, ints};

const ROUTERS: [&str; 9] = [
    "router_hidden",
    "router_hidden_lmhead_topk",
    "router_hidden_logits",
    "router_hidden_token",
    "router_logits",
    "router_logits_pos",
    "router_main",
    "router_main_normalized",
    "router_multi_logits",
];

#[test]
fn routers() {
    for case in ROUTERS.into_iter().flat_map(cases) {
        let router = Router::load(case.config("init_args"), &case.path("w."), None, Storage::F32).unwrap();
        let features = Features {
            hidden: case.tensors.get("in.hidden_states"),
            token: case.tensors.get("in.token"),
            logits: case.tensors.get("in.logits"),
            positions: case.tensors.get("in.position_ids"),
        };
        let (abs, rel) = (case.number("tol_abs"), case.number("tol_rel"));
        let logit = router.logits(&features).unwrap();
        assert_close(&case.name, &logit, case.tensor("out.logit"), abs, rel);
        let probability = router.probability(&features).unwrap().unsqueeze(1);
        assert_close(&case.name, &probability, case.tensor("out.prob"), abs, rel);
        // Many rows go through libtorch instead of the kernels.
        let repeat = |t: Option<&tch::Tensor>| t.map(|t| tch::Tensor::cat(&[t; 8], 0));
        let many = [features.hidden, features.token, features.logits, features.positions].map(repeat);
        let [hidden, token, logits, positions] = many.each_ref().map(Option::as_ref);
        let many = router.logits(&Features { hidden, token, logits, positions }).unwrap();
        let rows = logit.size()[0];
        assert_close(&case.name, &many.narrow(0, 7 * rows, rows), case.tensor("out.logit"), abs, rel);
    }
}

#[test]
fn routers_in_fewer_bits_stay_near() {
    for case in ROUTERS.into_iter().flat_map(cases) {
        for (storage, allowed) in [(Storage::Bf16, 0.02), (Storage::Int8, 0.03)] {
            let router = Router::load(case.config("init_args"), &case.path("w."), None, storage).unwrap();
            let features = Features {
                hidden: case.tensors.get("in.hidden_states"),
                token: case.tensors.get("in.token"),
                logits: case.tensors.get("in.logits"),
                positions: case.tensors.get("in.position_ids"),
            };
            let found = router.probability(&features).unwrap().unsqueeze(1);
            assert_close(
                &format!("{} {storage:?}", case.name),
                &found,
                case.tensor("out.prob"),
                allowed,
                0.0,
            );
        }
    }
}

#[test]
fn decisions() {
    for case in ["route_fp32", "route_bf16"].into_iter().flat_map(cases) {
        let router = Router::load(case.config("init_args"), &case.path("w."), None, Storage::F32).unwrap();
        let (threshold, tol) = (case.number("threshold"), case.number("tol_abs"));
        let (logits, hidden) = (case.tensor("in.logits"), case.tensor("in.hidden"));
        let last = |t: &tch::Tensor| t.select(1, t.size()[1] - 1);
        let k = router.config().top_k().unwrap();
        let largest = largest_logits(&last(logits), k).unwrap();
        assert_close(&case.name, &largest, case.tensor("mid.topk"), 0.0, 0.0);
        let token = last(case.tensor("in.token"));
        let routed = route(&router, &last(logits), &last(hidden), &token, threshold).unwrap();
        let expected = floats(case.tensor("out.prob"));
        let choices = ints(case.tensor("out.choice"));
        let mut compared = 0;
        for ((&found, &expected), (&large, &choice)) in
            routed.probability.iter().zip(&expected).zip(routed.large.iter().zip(&choices))
        {
            assert!(
                (f64::from(found) - expected).abs() <= tol,
                "{}: {found}, expected {expected}",
                case.name
            );
            assert_eq!(large, f64::from(found) >= threshold);
            if (expected - threshold).abs() >= tol {
                assert_eq!(large, choice == 1, "{}", case.name);
                compared += 1;
            } else {
                // A probability that equals the threshold asks the large model.
                assert_eq!(choice, 1);
            }
        }
        assert!(compared > 0, "{}: no decision away from the threshold", case.name);
        // The router's own probability as threshold is reached.
        let own = f64::from(routed.probability[0]);
        assert!(route(&router, &last(logits), &last(hidden), &token, own).unwrap().large[0]);
    }
}

#[test]
fn official_checkpoints() {
    let golden = golden();
    let names = golden.cases("router_ckpt").unwrap();
    for name in names.iter().filter_map(|n| n.strip_suffix(".pt")) {
        let json = golden.json(&format!("{name}.json")).unwrap();
        let expected = golden.tensors(&format!("{name}.safetensors")).unwrap();
        let official = Official::open(&golden.path(&format!("{name}.pt"))).unwrap();
        assert_eq!(official.config.architecture.name(), json["model_type"]);
        for (key, value) in json["init_args"].as_object().unwrap() {
            assert_eq!(serde_json::to_value(&official.config.args).unwrap()[key], *value, "{key}");
        }
        assert_eq!(serde_json::to_value(&official.common).unwrap(), json["common_args"]);
        assert_eq!(serde_json::to_value(&official.specific).unwrap(), json["model_specific_args"]);
        assert_eq!(official.tensors.len(), json["tensors"].as_array().unwrap().len());
        for (tensor, value) in &expected {
            assert!(official.tensors[tensor].equal(value), "{tensor}");
        }

        // Without its embedding it cannot be used; with one it can, and our own format brings the same back.
        let error = official.router(None, Storage::F32, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(json["init_args"]["pretrained_model_name"].as_str().unwrap()), "{error}");
        let width = official.config.args.hidden_states_size.unwrap();
        let embedding = tch::Tensor::ones([50, width], (Kind::BFloat16, Device::Cpu));
        let router = official.router(Some(&embedding), Storage::F32, Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("router");
        checkpoint::save(&dir, &router, &official.card()).unwrap();
        let (again, card) = checkpoint::load(&dir, Some(&embedding), Storage::F32, Device::Cpu).unwrap();
        assert_eq!(again.config(), router.config());
        assert_eq!(card.common_args, official.common);
        for ((name, a), (other, b)) in router.tensors().unwrap().iter().zip(again.tensors().unwrap()) {
            assert!(*name == other && a.equal(&b), "{name}");
        }
    }
}
