//! Towers and projectors at the seams: every projection and parameter is found by its checkpoint key and can be replaced;
//! checkpoints under other names are the same model.

use std::collections::{BTreeSet, HashMap};

use nics_core::Result;
use nics_core::cache::NoCache;
use nics_core::checkpoint::{Checkpoint, TensorPath};
use nics_core::models::llava_onevision;
use nics_core::models::{Batch, Embedded, Input, Model, Vlm, load_vlm, load_vlm_at};
use nics_core::nn::Linear;
use nics_core::seam::{LayerHook, Point, Ragged, Reduced, Rows, SeqId};
use nics_core::vision::{Processor, TokenKind};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::kit::{Fixture, assert_relative, fixture, fixtures};
use super::parity::hidden;

fn logits(model: &Vlm, f: &Fixture) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let case = &f.cases.prompts[0];
    let embedded = model.embed_prompt(&f.prompt(case)).unwrap();
    model.logits(&hidden(model, &[(SeqId(0), &embedded)])).unwrap()
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

/// Keeps rows that `keep` names before the first layer.
struct Keep(Vec<usize>);

impl LayerHook for Keep {
    fn at(&mut self, p: Point, rows: &Rows, _scores: Option<&[Tensor]>) -> Result<Option<Reduced>> {
        if p != Point::Embeddings {
            // Positions in time, height and width go with their rows.
            assert_eq!(rows.ragged.planes().map(<[_]>::len), Some(self.0.len()));
            return Ok(None);
        }
        let kept: Vec<i64> = self.0.iter().map(|&row| row as i64).collect();
        let x = rows.x.f_index_select(0, &Tensor::from_slice(&kept))?;
        Ok(Some(Reduced { x, kept: vec![self.0.clone()] }))
    }
}

#[test]
fn a_hook_shortens_what_stands_in_time_and_space() {
    let _no_grad = tch::no_grad_guard();
    for name in ["qwen2-vl", "qwen2.5-vl"] {
        let f = fixture(name);
        let embedded = f.model.embed_prompt(&f.prompt(&f.cases.prompts[0])).unwrap();
        let kept: Vec<usize> = (0..embedded.ids.len()).filter(|row| row % 3 != 1).collect();
        let (all, x) = Embedded::batch(&[(SeqId(0), &embedded)]).unwrap();
        let batch = Batch::new(all, Input::Embeds(&x));
        let shortened = f.model.forward(&batch, &mut NoCache::new(), Some(&mut Keep(kept.clone()))).unwrap();

        let planes = &embedded.rotary.as_ref().unwrap().planes;
        let positions = kept.iter().map(|&row| row as i64).collect();
        let few = Ragged::new(vec![(SeqId(0), positions)])
            .with_planes(kept.iter().map(|&row| planes[row]).collect())
            .unwrap();
        let index: Vec<i64> = kept.iter().map(|&row| row as i64).collect();
        let x = embedded.embeddings.index_select(0, &Tensor::from_slice(&index));
        let alone = f.model.forward(&Batch::new(few, Input::Embeds(&x)), &mut NoCache::new(), None).unwrap();
        assert_relative(name, &shortened.hidden, &alone.hidden, 1e-6);
        assert_eq!(shortened.rows.planes().unwrap().len(), kept.len());
    }
}

#[test]
fn half_precision_is_near() {
    for f in fixtures() {
        let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
        let model = load_vlm(&checkpoint, Device::Cpu, Kind::BFloat16).unwrap();
        let (near, exact) = (logits(&model, &f), logits(&f.model, &f));
        assert_eq!(near.kind(), Kind::BFloat16);
        assert_relative(&f.name, &near, &exact, 0.1);
    }
}

#[test]
fn gradients_reach_towers_and_projectors() {
    for mut f in fixtures() {
        let mut parameters = Vec::new();
        f.model
            .visit_parameters(&mut |key, tensor| {
                *tensor = tensor.copy().set_requires_grad(true);
                parameters.push((key.to_owned(), tensor.shallow_clone()));
                Ok(())
            })
            .unwrap();
        let embedded = f.model.embed_prompt(&f.prompt(&f.cases.prompts[0])).unwrap();
        f.model
            .logits(&hidden(&f.model, &[(SeqId(0), &embedded)]))
            .unwrap()
            .square()
            .sum(Kind::Float)
            .backward();
        for (key, tensor) in parameters {
            assert!(tensor.grad().defined(), "{}: {key}", f.name);
        }
    }
}

#[test]
fn configurations_of_other_releases_are_the_same_model() {
    for name in ["qwen2-vl", "qwen2.5-vl"] {
        let f = fixture(name);
        let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
        let root = checkpoint.root(Device::Cpu, Kind::Float);
        let stored = checkpoint.config_json();
        // The hub's files: the language model's fields at the top.
        let mut flat = stored.clone();
        let Some(Value::Object(text)) = flat.remove("text_config") else { panic!("no text_config") };
        flat.extend(text.into_iter().filter(|(field, _)| field != "model_type"));
        flat["rope_scaling"] = json!({"type": "mrope", "mrope_section": [1, 2, 1]});
        // From version 5 on: everything about the rope in one place.
        let mut newer = stored.clone();
        let text = newer["text_config"].as_object_mut().unwrap();
        let (theta, _) = (text.remove("rope_theta").unwrap(), text.remove("rope_scaling"));
        let rope = json!({"rope_theta": theta, "rope_type": "default", "mrope_section": [1, 2, 1]});
        text.insert("rope_parameters".into(), rope);
        for json in [flat, newer] {
            let model = load_vlm_at(&json, &root).unwrap();
            assert!(logits(&model, &f).equal(&logits(&f.model, &f)), "{name}");
        }
    }
    // A language model of another line behind InternViT.
    let f = fixture("internvl2");
    let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
    let mut json = checkpoint.config_json().clone();
    json["llm_config"]["architectures"] = json!(["LlamaForCausalLM"]);
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    let names: HashMap<String, Tensor> = checkpoint
        .names()
        .flat_map(|name| {
            let t = root.stored(name).unwrap();
            let llama = name
                .replace("tok_embeddings", "embed_tokens")
                .replace("attention_norm", "input_layernorm")
                .replace("ffn_norm", "post_attention_layernorm")
                .replace("attention.wo", "self_attn.o_proj")
                .replace("feed_forward.w1", "mlp.gate_proj")
                .replace("feed_forward.w3", "mlp.up_proj")
                .replace("feed_forward.w2", "mlp.down_proj")
                .replace("language_model.output", "language_model.lm_head");
            let Some(at) = llama.strip_suffix("attention.wqkv.weight") else { return vec![(llama, t)] };
            // 2 key/value heads of 8 channels, each with 2 query heads in front.
            let heads = t.view([2, 4, 8, 32]);
            let part = |from: i64, n: i64| heads.narrow(1, from, n).reshape([-1, 32]);
            vec![
                (format!("{at}self_attn.q_proj.weight"), part(0, 2)),
                (format!("{at}self_attn.k_proj.weight"), part(2, 1)),
                (format!("{at}self_attn.v_proj.weight"), part(3, 1)),
            ]
        })
        .collect();
    let model = load_vlm_at(&json, &TensorPath::from_tensors(names)).unwrap();
    assert_relative("llama behind InternViT", &logits(&model, &f), &logits(&f.model, &f), 1e-5);
}

/// The authors' own configuration and names: the same images, and videos with newlines in a grid.
#[test]
fn the_authors_files_of_llava_onevision() {
    let _no_grad = tch::no_grad_guard();
    let f = fixture("llava-onevision");
    let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
    let stored = checkpoint.config_json();
    let mut json = stored["text_config"].as_object().unwrap().clone();
    json.extend([
        ("architectures".to_owned(), json!(["LlavaQwenForCausalLM"])),
        ("model_type".to_owned(), json!("llava_qwen")),
        ("vision_config".to_owned(), stored["vision_config"].clone()),
        ("mm_vision_select_layer".to_owned(), json!(-1)),
        ("mm_spatial_pool_mode".to_owned(), json!("average")),
        ("mm_newline_position".to_owned(), json!("grid")),
        ("image_aspect_ratio".to_owned(), json!("anyres_max_3")),
        ("image_grid_pinpoints".to_owned(), json!("(1x1),...,(2x2)")),
        ("image_token_index".to_owned(), stored["image_token_index"].clone()),
    ]);
    let root = renamed(&f, |name| {
        name.replace("language_model.", "")
            .replace("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model.")
            .replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
            .replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")
            .replace("image_newline", "model.image_newline")
    });
    let model = load_vlm_at(&json, &root).unwrap();
    assert!(root.unread().is_empty(), "{:?}", root.unread());
    assert!(logits(&model, &f).equal(&logits(&f.model, &f)));

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), Value::Object(json).to_string()).unwrap();
    std::fs::copy(f.dir.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let processor = Processor::open(&Checkpoint::open_dir(folder.path()).unwrap()).unwrap();
    let image = processor.placeholders().image;
    // Without preprocessor_config.json: SigLIP's preparation.
    let of_image = processor.prompt(&f.cases.prompts[0].ids, &f.media(&f.cases.prompts[0])).unwrap();
    let expected = f.prompt(&f.cases.prompts[0]);
    assert!(of_image.media[0].media.pixels.equal(&expected.media[0].media.pixels));
    assert_eq!(of_image.ids, expected.ids);
    // Three frames of 3 x 3 features, of which halving by means leaves one, with a newline each.
    let video = f.cases.prompts.iter().find(|c| c.name == "video").unwrap();
    let prompt = processor.prompt(&[1, image, 2], &f.media(video)).unwrap();
    assert_eq!(prompt.kinds[1..7], [TokenKind::Video; 6]);
    assert_eq!(model.embed_prompt(&prompt).unwrap().embeddings.size()[0], 8);

    let real = json!({
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_newline_position": "grid", "image_grid_pinpoints": "(1x1),...,(6x6)",
    });
    let config = llava_onevision::Config::parse(real.as_object().unwrap()).unwrap();
    assert_eq!((config.video_tokens(64), config.image_grid_pinpoints.len()), (13_440, 36));
    for (field, value) in [
        ("mm_vision_tower", json!("openai/clip")),
        ("mm_newline_position", json!("somewhere")),
        ("mm_spatial_pool_mode", json!("median")),
        ("mm_spatial_pool_stride", json!(3)),
        ("mm_projector_type", json!("linear")),
        ("image_grid_pinpoints", json!("(6x6),...,(1x1)")),
        ("image_aspect_ratio", json!("square")),
    ] {
        let mut wrong = real.as_object().unwrap().clone();
        wrong.insert(field.into(), value);
        let e = llava_onevision::Config::parse(&wrong).unwrap_err().to_string();
        assert!(e.contains(field), "{field}: {e}");
    }
}
