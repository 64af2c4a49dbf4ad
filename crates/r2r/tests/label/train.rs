//! `train`, `threshold` and `router` on labels that `label` made.

use nics_base::hash;
use r2r::checkpoint::{Official, load, read_card};
use r2r::router::{Architecture, Features, Storage};
use tch::{Device, Kind, Tensor};

use crate::kit::*;

pub const RECIPE: &str = r"
    [router]
    top_k = 8
    hidden_dims = [16, 16]
    expansion_factor = 2
    [labels]
    held_out = 0.25
    split_seed = 3
    [training]
    lr = 3e-3
    batch = 64
    epochs = 5
    patience = 5
    save_every = 2
";

fn labelled(n: u64) -> tempfile::TempDir {
    let dir = inputs(n);
    std::fs::write(dir.path().join("router.toml"), RECIPE).unwrap();
    label(dir.path(), "labels", "").ok();
    dir
}

#[test]
fn labels_become_a_router_with_a_threshold() {
    let dir = labelled(60);
    let at = |name: &str| dir.path().join(name);
    say(dir.path(), "train --config router.toml --labels labels --small SMALL --out router").ok();
    let card = read_card(&at("router")).unwrap();
    assert_eq!((card.slm.as_deref(), card.llm.as_deref()), (Some("small"), Some("large")));
    assert_eq!(card.common_args.input_type, ["hidden_states", "token", "logits"]);
    let statistics = card.labels.clone().unwrap();
    assert!(statistics.train > statistics.validation && statistics.validation > 0, "{statistics:?}");
    assert!(statistics.divergent > 0 && statistics.mismatch > statistics.divergent);
    assert_eq!(card.validation_curve.len(), 100);
    let model = Model::open(&small());
    card.check_tokenizer("small", &model.tokenizer).unwrap();
    assert_eq!(read_lines(&at("router.training/train_log.jsonl")).len(), 5);
    // The router knows more than chance: at its threshold it catches what it should without asking for everything.
    let point =
        card.validation_curve.iter().find(|p| (p.threshold - card.common_args.threshold).abs() < 1e-9);
    let point = point.unwrap();
    assert!(point.recall >= 0.95 && point.positive_rate < 0.9, "{point:?}");

    // Thresholds, from the documents that were held out.
    let threshold = |more: &str| -> serde_json::Value {
        let words = format!("threshold --router router --labels labels --slm SMALL --json {more}");
        serde_json::from_str(&say(dir.path(), &words).ok()).unwrap()
    };
    let found = threshold("");
    assert_eq!(found["threshold"].as_f64(), Some(card.common_args.threshold));
    assert_eq!(found["rows"].as_u64(), Some(statistics.validation));
    let rate = threshold("--target-rate 0.1");
    assert!(rate["positive_rate"].as_f64().unwrap() <= 0.1 && rate["met"] == true);
    assert_eq!(threshold("--all")["rows"].as_u64(), Some(statistics.validation + statistics.train));
    threshold("--objective f1");
    threshold("--max-false-positives 0.2 --min-recall 0.5 --window");
    let hash = hash::file(at("router/router.safetensors")).unwrap();
    threshold("--target-rate 0.1 --write");
    let moved = read_card(&at("router")).unwrap();
    assert_eq!(Some(moved.common_args.threshold), rate["threshold"].as_f64());
    assert_eq!(
        (hash::file(at("router/router.safetensors")).unwrap(), &moved.weights_hash),
        (hash, &card.weights_hash)
    );
    let said = say(dir.path(), "threshold --router router --labels labels").refused();
    assert!(said.contains("--small"), "{said}");
    let said =
        say(dir.path(), "threshold --router router --labels labels --min-recall 0.9 --target-rate 0.1");
    assert_eq!(said.code, Some(2));

    // Other columns, other inputs, other labels to validate on.
    say(
        dir.path(),
        "train --config router.toml --labels labels --small SMALL --out mismatch --column mismatch --seed 4",
    )
    .ok();
    let other = read_card(&at("mismatch")).unwrap();
    assert_eq!(other.model_specific_args["recipe"]["labels"]["column"], "mismatch");
    assert_eq!(other.labels.unwrap().train, statistics.train);
    let ablation = RECIPE.replace("top_k", "architecture = \"LogitsClassifier\"\n top_k");
    std::fs::write(at("ablation.toml"), ablation).unwrap();
    say(dir.path(), "train --config ablation.toml --labels labels --validation labels --out logits").ok();
    let other = read_card(&at("logits")).unwrap();
    assert_eq!(other.model_type, Architecture::Logits);
    assert_eq!(
        other.labels.map(|l| (l.train, l.validation)).unwrap().0,
        statistics.train + statistics.validation
    );

    // What is wrong is said before anything is trained.
    let said = say(dir.path(), "train --config router.toml --labels labels --out other").refused();
    assert!(said.contains("--small"), "{said}");
    let said =
        say(dir.path(), "train --config router.toml --labels labels --small LARGE --out other").refused();
    assert!(said.contains("another small model"), "{said}");
    std::fs::write(at("wide.toml"), RECIPE.replace("top_k = 8", "top_k = 13")).unwrap();
    let said =
        say(dir.path(), "train --config wide.toml --labels labels --small SMALL --out other").refused();
    assert!(said.contains("top_k") && said.contains("12"), "{said}");
    let said = say(dir.path(), "train --config router.toml --labels . --small SMALL --out other").refused();
    assert!(said.contains("holds no labels"), "{said}");
    assert!(!at("other").exists());
}

#[test]
fn routers_are_converted_and_inspected() {
    let dir = labelled(24);
    let at = |name: &str| dir.path().join(name);
    say(dir.path(), "train --config router.toml --labels labels --small SMALL --out router").ok();
    say(dir.path(), "router convert router --out router.pt").ok();
    say(dir.path(), "router convert router.pt --out back --slm SMALL").ok();
    say(dir.path(), "router convert router --out half --storage bf16").ok();
    say(dir.path(), "router convert router --out byte --storage int8").ok();
    let table = Tensor::randn([40, 16], (Kind::Float, Device::Cpu));
    let open = |name: &str, storage| load(&at(name), Some(&table), storage, Device::Cpu).unwrap().0;
    let router = open("router", Storage::F32);
    let features = |rows: i64| {
        let hidden = Tensor::randn([rows, 16], (Kind::Float, Device::Cpu));
        let logits = Tensor::randn([rows, 8], (Kind::Float, Device::Cpu)).sort(1, true).0;
        (hidden, Tensor::arange(rows, (Kind::Int64, Device::Cpu)), logits)
    };
    let (hidden, token, logits) = features(20);
    let features =
        Features { hidden: Some(&hidden), token: Some(&token), logits: Some(&logits), positions: None };
    let of = |router: &r2r::Router| router.logits(&features).unwrap();
    let expected = of(&router);
    let official = Official::open(&at("router.pt")).unwrap();
    let from_pt = official.router(Some(&table), Storage::F32, Device::Cpu).unwrap();
    assert!(of(&from_pt).equal(&expected) && of(&open("back", Storage::F32)).equal(&expected));
    let threshold = read_card(&at("router")).unwrap().common_args.threshold;
    assert_eq!(official.common.threshold.to_bits(), threshold.to_bits());
    assert!(read_card(&at("back")).unwrap().tokenizer_hash.is_some());
    // A smaller file, read in its own storage, is the whole one read so.
    for (name, storage) in [("half", Storage::Bf16), ("byte", Storage::Int8)] {
        let difference = of(&open(name, storage)) - of(&open("router", storage));
        assert!(difference.abs().max().double_value(&[]) < 1e-5, "{name}");
        let size = |folder: &str| at(folder).join("router.safetensors").metadata().unwrap().len();
        assert!(size(name) < size("router"));
    }
    let said = say(dir.path(), "router inspect byte").ok();
    for part in ["HiddenStatesTokenLMHeadLogitsClassifier", "parameters", "Int8", "small", "threshold"] {
        assert!(said.contains(part), "{said}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&say(dir.path(), "router inspect router.pt --json").ok()).unwrap();
    assert_eq!(json["init_args"]["logits_size"], 8);
    for (words, why) in [
        ("router inspect router.toml", "not a sound zip archive"),
        ("router inspect nothing", "nothing"),
        ("router convert router --out x.pt --storage bf16", "float32"),
        ("router convert router --out x --slm LARGE", "width"),
    ] {
        let said = say(dir.path(), words).refused();
        assert!(said.contains(why), "{said}");
    }
}
