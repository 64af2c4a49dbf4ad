//! What is wrong is one clear error each.

use std::collections::HashMap;

use nics_core::Error;
use nics_core::cache::NoCache;
use nics_core::checkpoint::{Checkpoint, CheckpointError, TensorPath};
use nics_core::models::{Batch, Input, Model, VLM_ARCHITECTURES, load_vlm_at};
use nics_core::nn::RopeConfig;
use nics_core::seam::{Ragged, SeqId};
use nics_core::vision::{Media, Processor, RgbImage, VisionError, picture, smart_resize};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::kit::{fixture, fixtures, root};

fn vision(e: Error) -> VisionError {
    match e {
        Error::Vision(e) => e,
        Error::InFile { error, .. } => vision(*error),
        other => panic!("not an error of vision: {other}"),
    }
}

#[test]
fn images_that_are_none() {
    let path = root().join("llava/wide.png");
    let bytes = std::fs::read(&path).unwrap();
    assert!(picture::decode(&bytes).is_ok());
    for cut in [0, 1, 7, 20, 40, bytes.len() / 2, bytes.len() - 20] {
        let e = picture::decode(&bytes[..cut]).unwrap_err();
        assert!(matches!(e, VisionError::Decode { .. }), "{cut}: {e}");
    }
    let mut damaged = bytes.clone();
    for byte in damaged.iter_mut().skip(60).step_by(50) {
        *byte ^= 0x55;
    }
    assert!(picture::decode(&damaged).is_err());
    assert!(picture::decode(b"this is a text").is_err());

    let folder = tempfile::tempdir().unwrap();
    let e = picture::open(folder.path().join("none.png")).unwrap_err();
    assert!(matches!(e, VisionError::Read { .. }) && e.to_string().contains("none.png"), "{e}");
    assert!(picture::open(folder.path()).is_err(), "a folder");
    let cut = folder.path().join("cut.png");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    assert!(picture::open(&cut).unwrap_err().to_string().contains("cut.png"), "the file is named");
}

#[test]
fn data_urls() {
    use base64::Engine as _;
    let bytes = std::fs::read(root().join("llava/small.png")).unwrap();
    let image = picture::decode(&bytes).unwrap();
    let body = base64::engine::general_purpose::STANDARD.encode(&bytes);
    assert_eq!(picture::from_data_url(&format!("data:image/png;base64,{body}")).unwrap(), image);
    let unpadded = body.trim_end_matches('=');
    assert_eq!(picture::from_data_url(&format!("data:image/png;base64,{unpadded}")).unwrap(), image);
    for wrong in [
        "https://example.org/a.png".to_owned(),
        "data:image/png;base64".to_owned(),
        format!("data:text/plain;base64,{body}"),
        format!("data:image/png,{body}"),
        "data:image/png;base64,%%%".to_owned(),
    ] {
        let e = picture::from_data_url(&wrong).unwrap_err();
        assert!(matches!(e, VisionError::DataUrl { .. }), "{wrong:.40}: {e}");
    }
    let half = &body[..body.len() / 2 / 4 * 4];
    let e = picture::from_data_url(&format!("data:image/png;base64,{half}")).unwrap_err();
    assert!(matches!(e, VisionError::Decode { .. }), "{e}");
}

#[test]
fn placeholders_that_do_not_fit() {
    for f in fixtures() {
        let case = &f.cases.prompts[0];
        let media = f.media(case);
        let image = f.processor.placeholders().image;
        let mut none = case.ids.clone();
        none.retain(|&id| id != image);
        let too_few: Vec<u32> =
            case.expanded.iter().rev().skip_while(|&&id| id != image).skip(1).copied().collect();
        let mut too_many = case.expanded.clone();
        too_many.push(image);
        for ids in [&none, &too_few, &too_many] {
            let e = vision(f.processor.prompt(ids, &media).unwrap_err());
            assert!(matches!(e, VisionError::Placeholders { .. }), "{}: {e}", f.name);
            assert!(e.to_string().contains(&image.to_string()), "{e}");
        }
        let e = vision(f.processor.prompt(&case.ids, &[]).unwrap_err());
        assert!(matches!(e, VisionError::Placeholders { media: 0, .. }), "{e}");
    }
}

#[test]
fn media_that_are_not_seen() {
    let f = fixture("llava");
    let frames = vec![RgbImage::new(20, 20); 2];
    let video = Media::Video { frames: frames.clone(), interval: 1.0 };
    let e = vision(f.processor.prompt(&f.cases.prompts[0].ids, &[video]).unwrap_err());
    assert!(matches!(e, VisionError::Unseen { .. }), "{e}");

    for name in ["llava-onevision", "qwen2-vl", "internvl2"] {
        let f = fixture(name);
        let mixed = vec![RgbImage::new(20, 20), RgbImage::new(20, 21)];
        let e = vision(f.processor.prepare(&[Media::Video { frames: mixed, interval: 1.0 }]).unwrap_err());
        assert!(matches!(e, VisionError::FrameSize { index: 1, .. }), "{e}");
        let e =
            vision(f.processor.prepare(&[Media::Video { frames: Vec::new(), interval: 1.0 }]).unwrap_err());
        assert!(matches!(e, VisionError::Empty { .. }), "{e}");
        let e = vision(f.processor.prepare(&[Media::Image(RgbImage::new(0, 9))]).unwrap_err());
        assert!(matches!(e, VisionError::Empty { .. }), "{e}");
    }
    assert!(matches!(smart_resize(2000, 9, 28, (1, 1 << 20)), Err(VisionError::AspectRatio { .. })));
}

#[test]
fn pixels_and_positions_of_another_shape() {
    for f in fixtures() {
        let case = &f.cases.prompts[0];
        let mut prompt = f.prompt(case);
        let pixels = &prompt.media[0].media.pixels;
        let last = pixels.dim() as i64 - 1;
        prompt.media[0].media.pixels = pixels.narrow(last, 0, pixels.size()[last as usize] - 1);
        let e = vision(f.model.embed_prompt(&prompt).unwrap_err());
        assert!(matches!(e, VisionError::Shape { .. }), "{}: {e}", f.name);
    }
    assert!(Ragged::contiguous(&[(SeqId(0), 0, 3)]).with_planes(vec![[0; 3]; 2]).is_err());
}

#[test]
fn tensors_that_are_missing_or_misshapen() {
    for f in fixtures() {
        let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
        let stored = checkpoint.root(Device::Cpu, Kind::Float);
        let towers =
            ["vision_tower", "visual", "vision_model", "multi_modal_projector", "mlp1", "image_newline"];
        let seen: Vec<&str> = checkpoint
            .names()
            .filter(|n| towers.iter().any(|t| n.starts_with(t)))
            .filter(|n| !(n.contains("post_layernorm") || f.name == "llava" && n.contains("layers.2.")))
            .collect();
        assert!(!seen.is_empty());
        let all: HashMap<String, Tensor> =
            checkpoint.names().map(|n| (n.to_owned(), stored.stored(n).unwrap())).collect();
        let load = |tensors: HashMap<String, Tensor>| {
            load_vlm_at(checkpoint.config_json(), &TensorPath::from_tensors(tensors)).err()
        };
        let copy = || all.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect::<HashMap<_, _>>();
        for name in &seen {
            let mut without = copy();
            without.remove(*name);
            let e = load(without).unwrap_or_else(|| panic!("{}: {name} is not missed", f.name));
            assert!(
                matches!(&e, Error::Checkpoint(CheckpointError::MissingTensor { key, .. }) if key == name),
                "{}: {name}: {e}",
                f.name
            );
        }
        for name in seen.iter().step_by(5) {
            let mut other = copy();
            other.insert((*name).to_owned(), Tensor::zeros([3, 5], (Kind::Float, Device::Cpu)));
            let e = load(other).unwrap();
            assert!(
                matches!(&e, Error::Checkpoint(CheckpointError::WrongShape { key, .. }) if key == name),
                "{e}"
            );
        }
    }
}

#[test]
fn configurations_that_are_senseless() {
    let mut tried = 0;
    for f in fixtures() {
        let checkpoint = Checkpoint::open_dir(&f.dir).unwrap();
        let root = checkpoint.root(Device::Cpu, Kind::Float);
        let good = checkpoint.config_json();
        let vision = |field: &str, value: Value| {
            let mut json = good.clone();
            json["vision_config"][field] = value;
            json
        };
        let top = |field: &str, value: Value| {
            let mut json = good.clone();
            json.insert(field.into(), value);
            json
        };
        let text = if f.name == "internvl2" { "llm_config" } else { "text_config" };
        let mut wrong: Vec<(Map<String, Value>, &str)> = vec![
            (vision("patch_size", json!(0)), "patch_size"),
            (vision("patch_size", json!("four")), "patch_size"),
            (vision("hidden_act", json!("sine")), "sine"),
            (top("vision_config", json!(null)), "vision_config"),
            (top("architectures", json!(["LlamaForCausalLM"])), VLM_ARCHITECTURES[0]),
            (top("quantization_config", json!({"quant_method": "awq"})), "awq"),
            (top(text, json!("none")), text),
        ];
        match f.name.as_str() {
            "llava" => {
                wrong.push((top("vision_feature_layer", json!(-9)), "vision_feature_layer"));
                wrong.push((top("vision_feature_layer", json!([])), "vision_feature_layer"));
                wrong.push((
                    top("vision_feature_select_strategy", json!("some")),
                    "vision_feature_select_strategy",
                ));
            }
            "llava-onevision" => {
                wrong.push((top("vision_aspect_ratio", json!("square")), "vision_aspect_ratio"));
                wrong.push((top("image_grid_pinpoints", json!([[20, 21]])), "image_grid_pinpoints"));
            }
            "internvl2" => {
                wrong.push((top("downsample_ratio", json!(0.3)), "downsample_ratio"));
                wrong.push((top("select_layer", json!(7)), "select_layer"));
                wrong.push((top("force_image_size", json!(64)), "force_image_size"));
            }
            _ => {
                wrong.push((vision("depth", json!(0)), "depth"));
                wrong.push((vision("num_heads", json!(5)), "num_heads"));
            }
        }
        for (json, named) in wrong {
            let e = load_vlm_at(&json, &root).err().unwrap_or_else(|| panic!("{}: {named} is taken", f.name));
            assert!(e.to_string().contains(named), "{}: {named}: {e}", f.name);
            tried += 1;
        }
    }
    println!("{tried} configurations");
}

#[test]
fn preprocessors_that_are_senseless() {
    type Changes<'a> = &'a [(&'a str, &'a str, Value)];
    let changes: Changes = &[
        ("llava", "resample", json!(9)),
        ("llava", "resample", json!("bicubic")),
        ("llava", "image_std", json!([0.1, 0.0, 0.1])),
        ("llava", "image_mean", json!([0.1])),
        ("llava", "rescale_factor", json!(-1.0)),
        ("llava", "size", json!("large")),
        ("llava", "crop_size", json!({"height": 0, "width": 28})),
        ("llava-onevision", "size", json!({"shortest_edge": 1, "longest_edge": 9})),
        ("llava-onevision", "image_grid_pinpoints", json!([[1, 2, 3]])),
        ("qwen2-vl", "patch_size", json!(14)),
        ("qwen2-vl", "merge_size", json!(3)),
        ("qwen2.5-vl", "min_pixels", json!(5000)),
        ("qwen2.5-vl", "min_pixels", json!(0)),
        ("internvl2", "image_std", json!([0.0, 1.0, 1.0])),
    ];
    for (name, field, value) in changes {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(root().join(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        let path = copy.path().join("preprocessor_config.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json[field] = value.clone();
        std::fs::write(&path, json.to_string()).unwrap();
        let e = Processor::open(&Checkpoint::open_dir(copy.path()).unwrap()).err();
        let e = e.unwrap_or_else(|| panic!("{name}: {field} {value} is taken")).to_string();
        assert!(e.contains(field), "{name}: {field} {value}: {e}");
    }
    // A size that is not the tower's shows when an image comes.
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(root().join("llava")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.path().join("preprocessor_config.json");
    std::fs::write(&path, r#"{"crop_size": 20, "size": {"shortest_edge": 20}}"#).unwrap();
    let processor = Processor::open(&Checkpoint::open_dir(copy.path()).unwrap()).unwrap();
    let e = vision(processor.prepare(&[Media::Image(RgbImage::new(30, 40))]).unwrap_err());
    assert!(e.to_string().contains("20x20") && e.to_string().contains("28x28"), "{e}");

    // Without its tokenizer's list of tokens InternVL2 has no placeholder.
    std::fs::copy(root().join("internvl2/config.json"), copy.path().join("config.json")).unwrap();
    let e = Processor::open(&Checkpoint::open_dir(copy.path()).unwrap()).unwrap_err();
    assert!(e.to_string().contains("<IMG_CONTEXT>"), "{e}");
}

#[test]
fn positions_where_the_model_has_no_place_for_them() {
    let f = fixture("llava");
    let x = Tensor::zeros([2, 32], (Kind::Float, Device::Cpu));
    let rows = Ragged::contiguous(&[(SeqId(0), 0, 2)]).with_planes(vec![[0; 3], [1; 3]]).unwrap();
    let batch = Batch::new(rows, Input::Embeds(&x));
    let e = f.model.forward(&batch, &mut NoCache::new(), None).unwrap_err();
    assert!(e.to_string().contains("mrope_section"), "{e}");

    let sections = json!({"type": "mrope", "mrope_section": [1, 1, 1]});
    let e = RopeConfig::parse(1e4, 8, 64, Some(&sections)).unwrap_err();
    assert!(e.to_string().contains("mrope_section"), "{e}");
}

/// Damaged files are errors or images, never panics.
#[test]
fn damaged_files() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut refused = 0;
    for name in ["rgba.png", "palette-clear.png", "plain.bmp", "plain.gif", "clear.webp", "turned.jpg"] {
        let whole = std::fs::read(root().join("pictures").join(name)).unwrap();
        for _ in 0..60 {
            let mut bytes = whole.clone();
            for _ in 0..rng.random_range(1..8) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            bytes.truncate(rng.random_range(0..=bytes.len()));
            refused += usize::from(picture::decode(&bytes).is_err());
        }
    }
    assert!(refused > 100, "{refused} of 360");
}

/// Images of odd shapes give as many features as tokens, or the error that names their shape.
#[test]
fn images_of_odd_shapes() {
    let _no_grad = tch::no_grad_guard();
    for f in fixtures() {
        let image = f.processor.placeholders().image;
        let mut taken = 0;
        for (width, height) in [(1, 1), (400, 1), (1, 400), (190, 1), (3, 7), (41, 40), (700, 30), (20, 999)]
        {
            let media = [Media::Image(RgbImage::from_pixel(width, height, image::Rgb([9, 99, 199])))];
            match f.processor.prompt(&[1, image, 2], &media) {
                Ok(prompt) => {
                    let embedded = f.model.embed_prompt(&prompt).unwrap();
                    let rows = prompt.ids.len() as i64;
                    assert_eq!(embedded.embeddings.size()[0], rows, "{}: {width}x{height}", f.name);
                    taken += 1;
                }
                Err(e) => {
                    let e = vision(e);
                    let long = matches!(e, VisionError::AspectRatio { .. });
                    assert!(long && f.name.starts_with("qwen"), "{}: {width}x{height}: {e}", f.name);
                }
            }
        }
        assert!(taken >= 6, "{}", f.name);
    }
}
