//! Reading and writing of sound checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nics_base::hub::Hub;
use nics_core::checkpoint::{Checkpoint, CheckpointError, DEFAULT_SHARD_BYTES, Dtype, TensorPath, save};
use serde_json::json;
use tch::{Device, Kind, Tensor};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(name)
}

fn values(t: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(t.flatten(0, -1).to_kind(Kind::Double)).unwrap()
}

fn config() -> serde_json::Value {
    json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4})
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const KINDS: [(Kind, Dtype); 10] = [
    (Kind::Double, Dtype::F64),
    (Kind::Float, Dtype::F32),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Int64, Dtype::I64),
    (Kind::Int, Dtype::I32),
    (Kind::Int16, Dtype::I16),
    (Kind::Int8, Dtype::I8),
    (Kind::Uint8, Dtype::U8),
    (Kind::Bool, Dtype::BOOL),
];

fn of_every_dtype() -> Vec<(String, Tensor)> {
    let base = Tensor::from_slice(&[0.0f64, 1.0, 2.0, 3.0, 0.0, 5.0]).reshape([2, 3]);
    KINDS.iter().map(|(kind, _)| (format!("t.{kind:?}"), base.to_kind(*kind))).collect()
}

#[test]
fn every_dtype_comes_back_in_one_file_and_in_shards() {
    for max_shard in [DEFAULT_SHARD_BYTES, 40, 1] {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        save(&target, of_every_dtype(), &config(), max_shard).unwrap();
        let checkpoint = Checkpoint::open_dir(&target).unwrap();
        assert_eq!(checkpoint.names().count(), KINDS.len());
        let root = checkpoint.root(Device::Cpu, Kind::Float);
        for ((kind, dtype), (name, tensor)) in KINDS.iter().zip(of_every_dtype()) {
            assert_eq!(checkpoint.dtype(&name), Some(*dtype));
            assert_eq!(checkpoint.shape(&name), Some([2, 3].as_slice()));
            let stored = root.stored(&name).unwrap();
            assert_eq!((stored.kind(), stored.size()), (*kind, vec![2, 3]));
            assert_eq!(values(&stored), values(&tensor));
        }
        let shards = names(&target).iter().filter(|n| n.ends_with(".safetensors")).count();
        match max_shard {
            1 => assert_eq!(shards, KINDS.len()),
            40 => assert!((2..KINDS.len()).contains(&shards)),
            _ => assert_eq!(names(&target), ["config.json", "model.safetensors"]),
        }
    }
}

#[test]
fn floats_are_converted_on_reading() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let fine = Tensor::from_slice(&[1.0f64, 1.0 + 1e-3, -0.1]);
    let tensors =
        [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16].map(|k| (format!("{k:?}"), fine.to_kind(k)));
    save(&target, tensors, &config(), DEFAULT_SHARD_BYTES).unwrap();
    let root = Checkpoint::open_dir(&target).unwrap().root(Device::Cpu, Kind::Float);
    for from in [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16] {
        for to in [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16] {
            let got = root.tensor_as(&format!("{from:?}"), &[3], to).unwrap();
            assert_eq!(got.kind(), to);
            assert_eq!(values(&got), values(&fine.to_kind(from).to_kind(to)), "{from:?} to {to:?}");
        }
    }
}

#[test]
fn what_was_read_outlives_the_checkpoint_and_owns_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let weights = [("w".to_owned(), Tensor::from_slice(&[1.0f32, 2.0]))];
    save(&target, weights, &config(), DEFAULT_SHARD_BYTES).unwrap();
    let read =
        |kind| Checkpoint::open_dir(&target).unwrap().root(Device::Cpu, kind).tensor("w", &[2]).unwrap();
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        let mut t = read(kind);
        let _ = t.fill_(7.0);
        assert_eq!(values(&t), [7.0, 7.0]);
        assert_eq!(values(&read(kind)), [1.0, 2.0]);
    }
}

#[test]
fn views_and_shared_memory_are_written_in_full() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let base = Tensor::arange(12, (Kind::Float, Device::Cpu)).reshape([3, 4]).set_requires_grad(true);
    let tensors = vec![
        ("turned".to_owned(), base.transpose(0, 1)),
        ("row".to_owned(), base.get(1)),
        ("base".to_owned(), base.shallow_clone()),
        ("scalar".to_owned(), base.get(2).get(3)),
        ("empty".to_owned(), Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))),
    ];
    save(&target, tensors, &config(), DEFAULT_SHARD_BYTES).unwrap();
    let root = Checkpoint::open_dir(&target).unwrap().root(Device::Cpu, Kind::Float);
    assert_eq!(values(&root.tensor("turned", &[4, 3]).unwrap())[..4], [0.0, 4.0, 8.0, 1.0]);
    assert_eq!(values(&root.tensor("row", &[4]).unwrap()), [4.0, 5.0, 6.0, 7.0]);
    assert_eq!(values(&root.tensor("scalar", &[]).unwrap()), [11.0]);
    assert_eq!(root.tensor("empty", &[0, 3]).unwrap().size(), [0, 3]);
    assert!(!root.tensor("base", &[3, 4]).unwrap().requires_grad());
}

#[test]
fn saving_into_a_folder_replaces_the_weights_and_keeps_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let two = || [("a", 1.0f32), ("b", 2.0)].map(|(n, v)| (n.to_owned(), Tensor::from_slice(&[v])));
    save(dir.path(), two(), &config(), 4).unwrap();
    assert_eq!(names(dir.path()).len(), 5);
    save(dir.path(), two(), &config(), DEFAULT_SHARD_BYTES).unwrap();
    assert_eq!(names(dir.path()), ["config.json", "model.safetensors", "tokenizer.json"]);
    save(dir.path(), two(), &config(), 4).unwrap();
    assert!(!names(dir.path()).contains(&"model.safetensors".to_owned()));
    assert!(Checkpoint::open_dir(dir.path()).is_ok());
}

#[test]
fn what_cannot_be_saved() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let t = || Tensor::from_slice(&[1.0f32]);
    let refused = |tensors: Vec<(String, Tensor)>, config: &serde_json::Value| {
        let e = save(&target, tensors, config, DEFAULT_SHARD_BYTES).unwrap_err();
        assert!(matches!(e, CheckpointError::Unsavable { .. }), "{e}");
        e.to_string()
    };
    assert!(refused(vec![], &config()).ends_with("there are no tensors"));
    assert!(refused(vec![("a".into(), t()), ("a".into(), t())], &config()).contains("given twice"));
    assert!(refused(vec![("__metadata__".into(), t())], &config()).contains("reserved"));
    assert!(refused(vec![("a".into(), t())], &json!([])).contains("not a JSON object"));
    let complex = Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu));
    assert!(refused(vec![("a".into(), complex)], &config()).contains("ComplexFloat"));
    assert!(!target.exists());
    let in_the_way = dir.path().join("file");
    std::fs::write(&in_the_way, "x").unwrap();
    assert!(save(&in_the_way, [("a".to_owned(), t())], &config(), DEFAULT_SHARD_BYTES).is_err());
    assert!(
        save(&in_the_way.join("deeper"), [("a".to_owned(), t())], &config(), DEFAULT_SHARD_BYTES).is_err()
    );
}

#[test]
fn a_checkpoint_written_by_transformers() {
    let checkpoint = Checkpoint::open_dir(&golden("qwen2")).unwrap();
    assert_eq!(checkpoint.name(), "qwen2");
    assert_eq!(checkpoint.architecture().unwrap(), "Qwen2ForCausalLM");
    assert_eq!(checkpoint.model_type(), Some("qwen2"));
    assert!(checkpoint.generation_config().unwrap().is_none());
    assert!(checkpoint.try_file("cases.json").unwrap().is_some());
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    assert!(root.has("model.norm.weight") && !root.has("lm_head.weight"));
    let layer = root.at("model").at("layers").at(0).at("");
    assert_eq!(layer.path(), "model.layers.0");
    assert!(layer.at("self_attn.q_proj").tensor("bias", &[48]).is_ok());
    let unread = layer.unread();
    assert!(unread.contains(&"model.layers.0.self_attn.q_proj.weight".to_owned()));
    assert!(!unread.contains(&"model.layers.0.self_attn.q_proj.bias".to_owned()));
    assert!(unread.iter().all(|n| n.starts_with("model.layers.0.")));
    layer.skip("self_attn.q_proj.weight");
    assert_eq!(layer.unread().len(), unread.len() - 1);
    let megrez = Checkpoint::open_dir(&golden("megrez")).unwrap();
    assert_eq!(megrez.generation_config().unwrap().unwrap()["eos_token_id"], json!([285, 280]));
}

#[test]
fn the_old_rotary_table_is_no_unread_tensor() {
    let t = || Tensor::from_slice(&[1.0f32]);
    let tensors = HashMap::from(["l.rotary_emb.inv_freq", "w"].map(|n| (n.to_owned(), t())));
    assert_eq!(TensorPath::from_tensors(tensors).unread(), ["w"]);
}

#[test]
fn explicit_files() {
    let folder = golden("llama");
    let checkpoint =
        Checkpoint::open_files(&folder.join("config.json"), &[folder.join("model.safetensors")]).unwrap();
    assert!(checkpoint.names().any(|n| n == "model.norm.weight"));
    assert_eq!(checkpoint.dir(), folder);
    let none = Checkpoint::open_files(&folder.join("config.json"), &[]);
    assert!(matches!(none, Err(CheckpointError::NoWeights { .. })));
}

#[test]
fn a_model_in_the_cache_of_the_hub() {
    let cache = tempfile::tempdir().unwrap();
    let repo = cache.path().join("models--org--tiny");
    let snapshot = repo.join("snapshots/0123456789012345678901234567890123456789");
    save(&snapshot, [("w".to_owned(), Tensor::from_slice(&[1.0f32]))], &config(), 1).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), "0123456789012345678901234567890123456789").unwrap();
    let cached = cache.path().display().to_string();
    let hub = Hub::from_vars(|name| match name {
        "HF_HUB_CACHE" => Some(cached.clone()),
        "HF_HUB_OFFLINE" => Some("1".to_owned()),
        _ => None,
    });
    let checkpoint = Checkpoint::open_source(hub.resolve_model("org/tiny").unwrap()).unwrap();
    assert_eq!((checkpoint.name(), checkpoint.dir()), ("org/tiny", snapshot.as_path()));
    assert!(checkpoint.try_file("tokenizer.json").unwrap().is_none());
    let e = checkpoint.file("tokenizer.json").unwrap_err().to_string();
    assert_eq!(e, "org/tiny has no tokenizer.json");
    let e = Checkpoint::open_source(hub.resolve_model("org/other").unwrap()).unwrap_err();
    assert!(matches!(e, CheckpointError::Hub(_)), "{e}");
    assert!(e.to_string().contains("HF_HUB_OFFLINE is set"), "{e}");
    let e = Checkpoint::open("neither folder nor id").unwrap_err().to_string();
    assert!(e.starts_with("cannot use `neither folder nor id` as a model or dataset"), "{e}");
}

#[test]
fn the_architecture_hash_sees_the_architecture_alone() {
    let hash = |config: serde_json::Value| {
        let dir = tempfile::tempdir().unwrap();
        save(&dir.path().join("x"), [("w".to_owned(), Tensor::from_slice(&[1.0f32]))], &config, 1).unwrap();
        Checkpoint::open_dir(&dir.path().join("x")).unwrap().arch_hash()
    };
    let base = hash(json!({"hidden_size": 4, "rope_theta": 10000.0, "vision_config": {"depth": 2}}));
    assert_eq!(base.len(), 64);
    let same = json!({
        "vision_config": {"depth": 2, "torch_dtype": "bfloat16"}, "rope_theta": 1e4, "hidden_size": 4,
        "torch_dtype": "float16", "dtype": "float32", "transformers_version": "9", "_name_or_path": "x",
        "use_cache": false, "quantization_config": {"bits": 4}, "rope_scaling": null, "eos_token_id": [1, 2],
    });
    assert_eq!(base, hash(same));
    assert_eq!(base, hash(json!({"hidden_size": 4, "rope_theta": 10000, "vision_config": {"depth": 2}})));
    assert_ne!(base, hash(json!({"hidden_size": 5, "rope_theta": 10000.0, "vision_config": {"depth": 2}})));
    assert_ne!(base, hash(json!({"hidden_size": 4, "rope_theta": 10000.5, "vision_config": {"depth": 2}})));
    assert_ne!(base, hash(json!({"hidden_size": 4, "rope_theta": 10000.0, "vision_config": {"depth": 3}})));
}

#[test]
fn the_weights_hash_sees_names_dtypes_shapes_and_values_but_no_shards() {
    let hash = |tensors: Vec<(&str, Tensor)>, max_shard| {
        let dir = tempfile::tempdir().unwrap();
        let tensors = tensors.into_iter().map(|(n, t)| (n.to_owned(), t));
        save(&dir.path().join("x"), tensors, &config(), max_shard).unwrap();
        Checkpoint::open_dir(&dir.path().join("x")).unwrap().weights_hash().unwrap()
    };
    let a = || Tensor::from_slice(&[1.0f32, 2.0]);
    let b = || Tensor::from_slice(&[3.0f32]);
    let base = hash(vec![("a", a()), ("b", b())], DEFAULT_SHARD_BYTES);
    assert_eq!(base, hash(vec![("b", b()), ("a", a())], 1));
    assert_ne!(base, hash(vec![("a", a()), ("c", b())], 1));
    assert_ne!(base, hash(vec![("a", a().reshape([2, 1])), ("b", b())], 1));
    assert_ne!(base, hash(vec![("a", a()), ("b", b().to_kind(Kind::Double))], 1));
    assert_ne!(base, hash(vec![("a", a()), ("b", b() + 1.0)], 1));
}

#[test]
fn random_tensors_depend_on_seed_and_name_alone() {
    let root = |seed| TensorPath::random(seed, 0.02, Device::Cpu, Kind::Float);
    let read = |root: &TensorPath, name: &str| values(&root.tensor(name, &[64, 32]).unwrap());
    let (one, other) = (root(1), root(1));
    let a = read(&one.at("layers.0"), "weight");
    let b = read(&one.at("layers.1"), "weight");
    assert_eq!(b, read(&other.at("layers.1"), "weight"));
    assert_eq!(a, read(&other.at("layers.0"), "weight"));
    assert_ne!(a, b);
    assert_ne!(a, read(&root(2).at("layers.0"), "weight"));
    let mean = a.iter().sum::<f64>() / a.len() as f64;
    let std = (a.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
    assert!(mean.abs() < 0.002 && (std - 0.02).abs() < 0.002, "{mean} {std}");
    assert!(one.has("anything") && one.unread().is_empty());
    for ones in ["model.norm.weight", "input_layernorm.weight", "self_attn.q_norm.weight", "ln_1.weight"] {
        assert_eq!(values(&one.tensor(ones, &[2]).unwrap()), [1.0, 1.0]);
    }
    assert_eq!(values(&one.tensor("q_proj.bias", &[2]).unwrap()), [0.0, 0.0]);
    let half = one.to(Device::Cpu, Kind::BFloat16).at("layers.0").tensor("weight", &[64, 32]).unwrap();
    assert_eq!(half.kind(), Kind::BFloat16);
    assert_eq!(values(&half)[..1], values(&Tensor::from_slice(&[a[0]]).to_kind(Kind::BFloat16)));

    // Large tensors are drawn a piece at a time, from the same numbers.
    let large = values(&one.tensor("w.weight", &[3, 1 << 19]).unwrap());
    assert_eq!(large[..5], values(&one.tensor("w.weight", &[5]).unwrap()));
    let (before, after) = large.split_at(1 << 20);
    assert!(after.iter().all(|v| v.is_finite() && v.abs() < 0.2) && after != &before[..after.len()]);
}

#[test]
fn tensors_in_memory_are_copied() {
    let held = Tensor::from_slice(&[1.0f32, 2.0]);
    let root = TensorPath::from_tensors(HashMap::from([
        ("a.w".to_owned(), held.shallow_clone()),
        ("n".to_owned(), Tensor::from_slice(&[f32::NAN])),
    ]));
    let mut read = root.at("a").tensor("w", &[2]).unwrap();
    let _ = read.fill_(9.0);
    assert_eq!(values(&held), [1.0, 2.0]);
    assert!(matches!(root.tensor("n", &[1]), Err(CheckpointError::NotFinite { .. })));
    let e = root.tensor("a.w", &[3]).unwrap_err().to_string();
    assert_eq!(e, "a.w in the tensors in memory has shape [2], but the model asks for [3]");
    let e = root.tensor("b", &[3]).unwrap_err().to_string();
    assert_eq!(e, "the tensors in memory has no tensor b");
}

#[test]
fn transforms_apply_in_order_and_keep_the_shape() {
    let root =
        TensorPath::from_tensors(HashMap::from([("w".to_owned(), Tensor::from_slice(&[1.0f32, 2.0]))]));
    let plus = root.with_transform(Arc::new(|name, t| {
        assert_eq!(name, "w");
        Ok(t + 1.0)
    }));
    let then_doubled = plus.with_transform(Arc::new(|_, t| Ok(t * 2.0)));
    assert_eq!(values(&then_doubled.tensor("w", &[2]).unwrap()), [4.0, 6.0]);
    assert_eq!(values(&root.tensor("w", &[2]).unwrap()), [1.0, 2.0]);
    let shape = root.with_transform(Arc::new(|_, t| Ok(t.reshape([1, 2]))));
    assert!(matches!(shape.tensor("w", &[2]), Err(CheckpointError::Transform { .. })));
    let refuses = root.with_transform(Arc::new(|name, _| {
        Err(CheckpointError::Transform { key: name.to_owned(), reason: "no".to_owned() })
    }));
    assert_eq!(refuses.tensor("w", &[2]).unwrap_err().to_string(), "the transform of w failed: no");
}

#[test]
fn checkpoints_and_places_move_between_threads() {
    fn send<T: Send>() {}
    send::<Checkpoint>();
    send::<TensorPath>();
    let root = Checkpoint::open_dir(&golden("llama")).unwrap().root(Device::Cpu, Kind::Float);
    let read = std::thread::spawn(move || root.tensor("model.norm.weight", &[48]).map(|t| t.size()));
    assert_eq!(read.join().unwrap().unwrap(), [48]);
}

/// What is saved here loads in transformers with the same logits. Needs the variable `NICS_PYTHON`: a Python with
/// transformers.
#[test]
#[ignore = "long"]
fn transformers_loads_what_is_saved() {
    let Ok(python) = std::env::var("NICS_PYTHON") else {
        panic!("set NICS_PYTHON to a Python that has transformers");
    };
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open_dir(&golden("qwen3")).unwrap();
    let root = source.root(Device::Cpu, Kind::Float);
    let tensors: Vec<_> = source.names().map(|n| (n.to_owned(), root.stored(n).unwrap())).collect();
    let config = serde_json::Value::Object(source.config_json().clone());
    for (name, max_shard) in [("single", DEFAULT_SHARD_BYTES), ("shards", 100_000)] {
        let copies = tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone()));
        save(&dir.path().join(name), copies, &config, max_shard).unwrap();
    }
    let script = "import sys, torch\nfrom transformers import AutoModelForCausalLM as A\n\
        m = [A.from_pretrained(p, dtype=torch.float32)(torch.tensor([[1, 2, 3]])).logits for p in sys.argv[1:]]\n\
        assert torch.equal(m[0], m[1]) and torch.equal(m[0], m[2])";
    let status = std::process::Command::new(python)
        .args(["-c", script])
        .arg(golden("qwen3"))
        .args([dir.path().join("single"), dir.path().join("shards")])
        .status()
        .unwrap();
    assert!(status.success());
}
