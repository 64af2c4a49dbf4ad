//! Towers and projectors at the seams: every projection and parameter is found by its checkpoint key and can be replaced;
//! checkpoints under other names are the same model.

use std::collections::{BTreeSet, HashMap};

use nics_core::cache::NoCache;
use nics_core::checkpoint::{Checkpoint, TensorPath};
use nics_core::models::{Batch, Input, Model, Vlm, load_vlm_at};
use nics_core::nn::Linear;
use nics_core::seam::SeqId;
use tch::{Device, Kind, Tensor};

use super::kit::{Fixture, assert_relative, fixture, fixtures};
use super::parity::rows;

fn logits(model: &Vlm, f: &Fixture) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let case = &f.cases.prompts[0];
    let embedded = model.embed_prompt(&f.prompt(case)).unwrap();
    let batch = Batch::new(rows(&embedded, SeqId(0)), Input::Embeds(&embedded.embeddings));
    let out = model.forward(&batch, &mut NoCache::new(), None).unwrap();
    model.logits(&out.hidden).unwrap()
}

#[test]
fn parameters_are_the_checkpoints_tensors() {
    for mut f in fixtures() {
        let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
        let mut found = BTreeSet::new();
        f.model
            .visit_parameters(&mut |key, tensor| {
                assert_eq!(
                    checkpoint.shape(key).map(|s| s.iter().map(|&n| n as i64).collect::<Vec<_>>()),
                    Some(tensor.size()),
                    "{}: {key}",
                    f.name
                );
                assert!(found.insert(key.to_owned()), "{}: {key} twice", f.name);
                Ok(())
            })
            .unwrap();
        // What no feature needs: behind the last layer that is looked at.
        let unused = |key: &str| {
            key.contains("post_layernorm") || f.name == "llava" && key.contains("encoder.layers.2.")
        };
        for name in checkpoint.names().filter(|name| !unused(name)) {
            assert!(found.contains(name), "{}: {name} is not visited", f.name);
        }
    }
}

#[test]
fn projections_are_replaced_by_path() {
    for mut f in fixtures() {
        let before = logits(&f.model, &f);
        let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
        let mut paths = Vec::new();
        f.model
            .visit_projections(&mut |path, projection| {
                paths.push(path.to_owned());
                let copy = Linear::new(projection.dense()?.copy(), projection.bias().map(|b| b.copy()));
                *projection = Box::new(copy);
                Ok(())
            })
            .unwrap();
        for path in paths.iter().filter(|p| !p.ends_with("lm_head")) {
            assert!(checkpoint.shape(&format!("{path}.weight")).is_some(), "{}: {path}", f.name);
        }
        assert!(
            paths.iter().any(|p| p.contains("attn") && !p.contains("language") && !p.starts_with("model"))
        );
        assert!(logits(&f.model, &f).equal(&before), "{}: copies give the same", f.name);

        // A tower's projection at zero changes what the language model sees.
        let mut first = true;
        f.model
            .visit_projections(&mut |_, projection| {
                if std::mem::take(&mut first) {
                    let zeros = projection.dense()?.zeros_like();
                    *projection = Box::new(Linear::new(zeros, None));
                }
                Ok(())
            })
            .unwrap();
        assert!(!logits(&f.model, &f).equal(&before), "{}", f.name);
    }
}

/// A checkpoint's tensors under other names.
fn renamed(f: &Fixture, rename: impl Fn(&str) -> String) -> TensorPath {
    let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    let tensors: HashMap<String, Tensor> =
        checkpoint.names().map(|name| (rename(name), root.stored(name).unwrap())).collect();
    TensorPath::from_tensors(tensors)
}

type Rename<'a> = &'a dyn Fn(&str) -> String;

#[test]
fn other_names_are_the_same_model() {
    let in_memory = |name: &str| {
        if let Some(rest) = name.strip_prefix("language_model.model.") {
            return format!("model.language_model.{rest}");
        }
        if let Some(rest) = name.strip_prefix("language_model.lm_head.") {
            return format!("lm_head.{rest}");
        }
        format!("model.{name}")
    };
    let without_a_level = |name: &str| name.replace("vision_tower.vision_model.", "vision_tower.");
    let original = |name: &str| {
        name.replace("language_model.", "")
            .replace("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model.")
            .replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
            .replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")
            .replace("image_newline", "model.image_newline")
    };
    let qwen = |name: &str| match name.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None if name.starts_with("visual.") => format!("model.{name}"),
        None => name.to_owned(),
    };
    let styles: [(&str, &str, Rename); 8] = [
        ("llava", "in memory", &in_memory),
        ("llava", "without a level", &without_a_level),
        ("llava", "both", &|name| in_memory(&without_a_level(name))),
        ("llava", "original", &original),
        ("llava-onevision", "in memory", &in_memory),
        ("llava-onevision", "original", &original),
        ("qwen2-vl", "in memory", &qwen),
        ("qwen2.5-vl", "in memory", &qwen),
    ];
    for (name, style, rename) in styles {
        let f = fixture(name);
        let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
        let root = renamed(&f, rename);
        let model =
            load_vlm_at(checkpoint.config_json(), &root).unwrap_or_else(|e| panic!("{name}, {style}: {e}"));
        assert!(root.unread().is_empty(), "{name}, {style}: {:?}", root.unread());
        assert_relative(&format!("{name}, {style}"), &logits(&model, &f), &logits(&f.model, &f), 1e-6);
    }
}

#[test]
fn nothing_of_a_checkpoint_is_left_unread() {
    for f in fixtures() {
        let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
        let root = checkpoint.root(Device::Cpu, Kind::Float);
        load_vlm_at(checkpoint.config_json(), &root).unwrap();
        assert!(root.unread().is_empty(), "{}: {:?}", f.name, root.unread());
    }
}
