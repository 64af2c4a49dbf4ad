//! The recorded cases of `tests/golden/vision`: whole tiny models on a video, layouts of videos, the preparation of images
//! and videos, and which frames are looked at.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use nics_core::cache::DenseCache;
use nics_core::checkpoint::TensorPath;
use nics_core::golden::{Golden, Kinds};
use nics_core::models::llava_onevision::{self, LlavaOnevisionVision, Newlines, Pooling};
use nics_core::models::{Batch, Input, Model, Vlm, load_vlm_at};
use nics_core::seam::{KvCache, Ragged};
use nics_core::vision::frames::{self, QwenFrames};
use nics_core::vision::resize::{Filter, resize};
use nics_core::vision::{
    Layout, Media, MediaPrompt, Placeholders, Prepared, RgbImage, TokenKind, patches, smart_resize,
    video_range,
};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::kit::{assert_close, assert_relative};

const LOGITS: f64 = 2e-3;
const EMBEDS: f64 = 2e-4;

/// The folder that `NICS_GOLDEN` names when it has such cases, else our own.
fn golden() -> Golden {
    let given =
        std::env::var_os("NICS_GOLDEN").map(PathBuf::from).filter(|dir| dir.join("llm_tiny.json").exists());
    Golden::at(given.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vision").into()))
}

/// Stems of all files.
fn stems() -> BTreeSet<String> {
    let files = std::fs::read_dir(golden().dir()).unwrap().map(|e| e.unwrap().file_name());
    files.filter_map(|name| Some(name.to_str()?.split('.').next()?.to_owned())).collect()
}

/// What follows `prefix` in the names of its cases.
fn cases(prefix: &str) -> Vec<String> {
    let all: Vec<String> =
        stems().iter().filter_map(|stem| stem.strip_prefix(prefix).map(str::to_owned)).collect();
    assert!(!all.is_empty(), "no case of {prefix}");
    all
}

fn ints(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t.to_kind(Kind::Int64).flatten(0, -1)).unwrap()
}

fn ids(t: &Tensor) -> Vec<u32> {
    ints(t).into_iter().map(|id| id as u32).collect()
}

/// `[values]` of a float tensor.
fn floats(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

/// Beginnings of the names of cases that the tests run, and of those that belong to what is built on these models.
const RUN: [&str; 10] = [
    "07_llava_",
    "09_qwen2vl_input",
    "09_qwen2vl_dense",
    "10_onevision_input",
    "10_onevision_dense",
    "11_qwen25vl_input",
    "11_qwen25vl_dense",
    "13_frame_sampling",
    "14_siglip_preprocess",
    "15_qwen_video_prep",
];
const LATER: [&str; 16] = [
    "01_",
    "02_",
    "03_",
    "04_",
    "05_",
    "06_",
    "07_internvl",
    "07_minicpmv",
    "07_nvila",
    "08_",
    "09_qwen2vl_",
    "10_onevision_",
    "11_qwen25vl_",
    "12_",
    "16_",
    "17_",
];

#[test]
fn every_case_is_run() {
    let stems = stems();
    let begins = |stem: &str, with: &[&str]| with.iter().any(|w| stem.starts_with(w));
    // A kind's name ends at a `-`.
    let kinds = |of: &dyn Fn(&str) -> bool| -> BTreeSet<&str> {
        stems.iter().filter(|s| of(s)).map(|s| s.split('-').next().unwrap_or(s)).collect()
    };
    let run: Vec<&str> = kinds(&|s| begins(s, &RUN)).into_iter().collect();
    let later: Vec<&str> = kinds(&|s| begins(s, &LATER) && !begins(s, &RUN)).into_iter().collect();
    for begin in RUN {
        assert!(run.iter().any(|kind| kind.starts_with(begin)), "no case of {begin}");
    }
    let parts = [
        "README.md",
        "llm_tiny.json",
        "llm_tiny.safetensors",
        "onevision_vision_tiny.safetensors",
        "qwen2vl_visual_tiny.safetensors",
        "qwen25vl_visual_tiny.safetensors",
    ];
    let files = golden().check(Kinds { run: &run, later: &later, parts: &parts }).unwrap();
    println!("{files} files");
}

/// The language model `llm_tiny` with a tower of another file; `prefix` is where the family keeps its language model.
fn tensors(tower: &str, prefix: &str) -> HashMap<String, Tensor> {
    let golden = golden();
    let language = golden.tensors("llm_tiny.safetensors").unwrap();
    let mut all: HashMap<String, Tensor> =
        language.into_iter().map(|(name, t)| (format!("{prefix}{name}"), t)).collect();
    all.extend(golden.tensors(tower).unwrap());
    all
}

/// Fields of the language model and of the case, as a config.json has them.
fn config(architecture: &str, input: &Value) -> Map<String, Value> {
    let mut text = golden().json("llm_tiny.json").unwrap();
    text["rope_theta"] = input["rope_theta"].clone();
    if !input["mrope_section"].is_null() {
        text["rope_scaling"] = json!({"type": "mrope", "mrope_section": input["mrope_section"]});
    }
    let mut config = json!({
        "architectures": [architecture],
        "text_config": text,
        "vision_config": input["vision_config"],
    });
    for field in ["video_token_id", "image_token_index", "video_token_index"] {
        if !input[field].is_null() {
            config[field] = input[field].clone();
        }
    }
    config.as_object().unwrap().clone()
}

/// Reads a prompt and goes on greedily: logits behind the prompt and behind each token.
fn greedy(model: &Vlm, prompt: &MediaPrompt, steps: usize) -> (Vec<Tensor>, Vec<i64>) {
    let _no_grad = tch::no_grad_guard();
    let embedded = model.embed_prompt(prompt).unwrap();
    let len = embedded.ids.len();
    let mut cache = DenseCache::new();
    let seq = cache.open(len + steps).unwrap();
    let turned = |rows: Ragged, planes: Vec<[i64; 3]>| {
        if embedded.rotary.is_some() { rows.with_planes(planes).unwrap() } else { rows }
    };
    let planes = embedded.rotary.as_ref().map_or_else(Vec::new, |r| r.planes.clone());
    let delta = embedded.rotary.as_ref().map_or(0, |r| r.delta);
    let rows = turned(Ragged::contiguous(&[(seq, 0, len)]), planes);
    let out =
        model.forward(&Batch::new(rows, Input::Embeds(&embedded.embeddings)), &mut cache, None).unwrap();
    let mut logits = vec![model.logits(&out.hidden.narrow(0, len as i64 - 1, 1)).unwrap()];
    let mut tokens = Vec::new();
    for step in 0..steps {
        let token = logits.last().unwrap().argmax(-1, false).int64_value(&[0]);
        tokens.push(token);
        if step + 1 == steps {
            break;
        }
        let at = len + step;
        let rows = turned(Ragged::contiguous(&[(seq, at, 1)]), vec![[at as i64 + delta; 3]]);
        let input = Tensor::from_slice(&[token]);
        let out = model.forward(&Batch::new(rows, Input::Ids(&input)), &mut cache, None).unwrap();
        logits.push(model.logits(&out.hidden).unwrap());
    }
    (logits, tokens)
}

fn assert_dense(name: &str, model: &Vlm, prompt: &MediaPrompt) {
    let dense = golden().tensors(&format!("{name}.safetensors")).unwrap();
    let steps = dense["logits"].size()[0] as usize;
    let (logits, tokens) = greedy(model, prompt, steps);
    assert_close(name, &Tensor::cat(&logits, 0), &dense["logits"], LOGITS);
    let expected = ints(&dense["tokens"]);
    assert_eq!(tokens[..expected.len()], expected, "{name}");
}

fn qwen(architecture: &str, tower: &str, input_name: &str, dense: &str) {
    let golden = golden();
    let input = golden.tensors(&format!("{input_name}.safetensors")).unwrap();
    let parameters = golden.json(&format!("{input_name}.json")).unwrap();
    let root = TensorPath::from_tensors(tensors(tower, ""));
    let model = load_vlm_at(&config(architecture, &parameters), &root).unwrap();
    assert!(root.unread().is_empty(), "{:?}", root.unread());

    let grid: [usize; 3] = ints(&input["video_grid_thw"])
        .into_iter()
        .map(|n| n as usize)
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let pixels = input["pixel_values_videos"].to_kind(Kind::Float);
    let merge = parameters["vision_config"]["spatial_merge_size"].as_u64().unwrap() as usize;
    let media = || Prepared {
        kind: TokenKind::Video,
        pixels: pixels.copy(),
        layout: Layout::Patches { grid, seconds: parameters["second_per_grid_ts"].as_f64().unwrap_or(1.0) },
        tokens: grid.iter().product::<usize>() / (merge * merge),
        parts: 1,
    };
    let features = tch::no_grad(|| model.vision.encode(&media()).unwrap());
    assert_close(input_name, &features, &input["video_embeds"], EMBEDS);

    let video = parameters["video_token_id"].as_u64().unwrap() as u32;
    let placeholders = Placeholders { image: 124, video: Some(video) };
    let prompt = placeholders.expand(&ids(&input["input_ids"]), vec![media()]).unwrap();
    let rotary = model.positions().of(&prompt).unwrap().unwrap();
    let planes: Vec<i64> = (0..3).flat_map(|i| rotary.planes.iter().map(move |p| p[i])).collect();
    assert_eq!(planes, ints(&input["position_ids"]), "{input_name}");
    assert_eq!(vec![rotary.delta], ints(&input["rope_delta"]), "{input_name}");
    assert_dense(dense, &model, &prompt);

    if let Some(frames) = input.get("video_frames") {
        let (_, _, height, width) = frames.size4().unwrap();
        let size = (height as usize, width as usize);
        let vision = &parameters["vision_config"];
        let n = |field: &str| vision[field].as_u64().unwrap() as usize;
        let (found, cut) = patches(&floats(frames), size, n("patch_size"), n("temporal_patch_size"), merge);
        assert_eq!(cut, grid);
        assert_close(input_name, &Tensor::from_slice(&found).view_as(&pixels), &pixels, 2e-3);
    }
}

#[test]
fn qwen2_vl_on_a_video() {
    for case in cases("09_qwen2vl_input") {
        let (input, dense) = (format!("09_qwen2vl_input{case}"), format!("09_qwen2vl_dense{case}"));
        qwen("Qwen2VLForConditionalGeneration", "qwen2vl_visual_tiny.safetensors", &input, &dense);
    }
}

#[test]
fn qwen2_5_vl_on_a_video() {
    for case in cases("11_qwen25vl_input") {
        let (input, dense) = (format!("11_qwen25vl_input{case}"), format!("11_qwen25vl_dense{case}"));
        qwen("Qwen2_5_VLForConditionalGeneration", "qwen25vl_visual_tiny.safetensors", &input, &dense);
    }
}

#[test]
fn llava_onevision_on_a_video() {
    let _no_grad = tch::no_grad_guard();
    for case in cases("10_onevision_input") {
        onevision(&format!("10_onevision_input{case}"), &format!("10_onevision_dense{case}"));
    }
}

fn onevision(input: &str, dense: &str) {
    let golden = golden();
    let parameters = golden.json(&format!("{input}.json")).unwrap();
    let input = golden.tensors(&format!("{input}.safetensors")).unwrap();
    let mut config = config("LlavaOnevisionForConditionalGeneration", &parameters);
    let edge = &parameters["vision_config"]["image_size"];
    config.insert("image_grid_pinpoints".into(), json!([[edge, edge]]));
    let root = TensorPath::from_tensors(tensors("onevision_vision_tiny.safetensors", "language_model."));
    let model = load_vlm_at(&config, &root).unwrap();
    assert!(root.unread().is_empty(), "{:?}", root.unread());

    let pixels = input["pixel_values_videos"].to_kind(Kind::Float).squeeze_dim(0);
    let parsed = llava_onevision::Config::parse(&config).unwrap();
    let parts = LlavaOnevisionVision::load(&parsed, &root).unwrap();
    assert_close("siglip", &parts.llava.tower.forward(&pixels).unwrap(), &input["siglip_last"], EMBEDS);
    let projected = parts.llava.features(&pixels).unwrap();
    assert_close("projected", &projected, &input["projected"], EMBEDS);
    assert_close("pooled", &Pooling::Bilinear.halve(&projected).unwrap(), &input["pooled"], EMBEDS);

    let frames = pixels.size()[0] as usize;
    let media = Prepared {
        kind: TokenKind::Video,
        pixels,
        layout: Layout::Frames(frames),
        tokens: parsed.video_tokens(frames),
        parts: 1,
    };
    let placeholders = Placeholders { image: parsed.image_token, video: Some(parsed.video_token) };
    let prompt = placeholders.expand(&ids(&input["input_ids"]), vec![media]).unwrap();
    assert_dense(dense, &model, &prompt);
}

#[test]
fn videos_of_llava_in_every_layout() {
    for name in &cases("07_llava_") {
        let golden = golden();
        let t = golden.tensors(&format!("07_llava_{name}.safetensors")).unwrap();
        let parameters = golden.json(&format!("07_llava_{name}.json")).unwrap();
        let pooling = match parameters["mm_spatial_pool_mode"].as_str().unwrap() {
            "bilinear" => Pooling::Bilinear,
            "average" => Pooling::Average,
            "max" => Pooling::Max,
            other => panic!("{other}"),
        };
        let newlines = match parameters["mm_newline_position"].as_str().unwrap() {
            "grid" => Newlines::Grid,
            "frame" => Newlines::Frame,
            "one_token" => Newlines::Video,
            "no_token" => Newlines::None,
            other => panic!("{other}"),
        };
        let pooled = pooling.halve(&t["projected"]).unwrap();
        assert_close(name, &pooled, &t["pooled"], 1e-5);
        let video = newlines.place(&pooled, &t["image_newline"]).unwrap();
        let (frames, tokens, _) = t["projected"].size3().unwrap();
        let half = pooling.half(tokens.isqrt() as usize);
        assert_eq!(video.size()[0] as usize, newlines.tokens(frames as usize, half), "{name}");
        // Spliced at the placeholder -200.
        let mut parts = Vec::new();
        for id in ints(&t["input_ids"]) {
            parts.push(if id < 0 { video.shallow_clone() } else { t["embed_weight"].narrow(0, id, 1) });
        }
        assert_close(name, &Tensor::cat(&parts, 0), &t["inputs_embeds"].squeeze_dim(0), 1e-5);
    }
}

#[test]
fn siglip_preparation() {
    for case in cases("14_siglip_preprocess") {
        siglip(&format!("14_siglip_preprocess{case}.safetensors"));
    }
}

fn siglip(file: &str) {
    let t = golden().tensors(file).unwrap();
    for i in 0..t.keys().filter(|name| name.starts_with("image")).count() {
        let picture = |name: String| {
            let (height, width, _) = t[&name].size3().unwrap();
            let bytes: Vec<u8> = Vec::try_from(t[&name].flatten(0, -1)).unwrap();
            RgbImage::from_raw(width as u32, height as u32, bytes).unwrap()
        };
        let expected = picture(format!("resized{i}"));
        let (width, height) = expected.dimensions();
        let found = resize(&picture(format!("image{i}")), width, height, Filter::Bicubic).unwrap();
        assert!(found == expected, "resized{i} differs");
        // (x / 255 - 1/2) / (1/2), channel first.
        let x = Tensor::from_slice(found.as_raw()).view([i64::from(height), i64::from(width), 3]);
        let x = (x.permute([2, 0, 1]).to_kind(Kind::Double) * 0.003_921_568_627_450_98).to_kind(Kind::Float);
        assert_relative(&format!("pixel{i}"), &((x - 0.5) / 0.5), &t[&format!("pixel{i}")], 1e-6);
    }
}

#[test]
fn qwen_sizes_and_frames() {
    for case in cases("15_qwen_video_prep") {
        qwen_preparation(&golden().json(&format!("15_qwen_video_prep{case}.json")).unwrap());
    }
}

fn qwen_preparation(cases: &Value) {
    for case in cases["smart_resize"].as_array().unwrap() {
        let n = |field: &str| case[field].as_u64().unwrap();
        let found = smart_resize(
            n("height") as u32,
            n("width") as u32,
            n("factor") as u32,
            (n("min_pixels"), n("max_pixels")),
        );
        let expected = case["result"].as_array().map(|r| (r[0].as_u64().unwrap(), r[1].as_u64().unwrap()));
        assert_eq!(found.ok().map(|(h, w)| (u64::from(h), u64::from(w))), expected, "{case}");
    }
    for case in cases["smart_nframes"].as_array().unwrap() {
        let options = &case["options"];
        let wanted = match options["nframes"].as_u64() {
            Some(n) => QwenFrames::Exactly(n as usize),
            None => QwenFrames::Rate {
                fps: options["fps"].as_f64().unwrap_or(2.0),
                min_frames: options["min_frames"].as_u64().unwrap_or(4) as usize,
                max_frames: options["max_frames"].as_u64().unwrap_or(768) as usize,
            },
        };
        let frames = case["total_frames"].as_u64().unwrap() as usize;
        let found = frames::qwen(frames, case["video_fps"].as_f64().unwrap(), wanted);
        let expected = case["indices"]
            .as_array()
            .map(|all| all.iter().map(|i| i.as_u64().unwrap() as usize).collect::<Vec<_>>());
        assert_eq!(found.ok(), expected, "{case}");
    }
}

#[test]
fn frames_of_llava_and_minicpm() {
    for case in cases("13_frame_sampling") {
        sampling(&golden().json(&format!("13_frame_sampling{case}.json")).unwrap());
    }
}

fn sampling(cases: &Value) {
    for case in cases["rows"].as_array().unwrap() {
        let n = |field: &str| case[field].as_u64().unwrap() as usize;
        let indices = |field: &str| -> Vec<usize> {
            case[field].as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as usize).collect()
        };
        let (frames, fps) = (n("total_frames"), case["avg_fps"].as_f64().unwrap());
        let force = case["force_sample"].as_bool().unwrap();
        let found =
            frames::llava(frames, fps, n("max_frames"), case["target_fps"].as_f64().unwrap(), force).unwrap();
        assert_eq!(found.indices, indices("llava_indices"), "{frames} frames");
        assert_eq!(found.times, case["llava_frame_time"].as_str().unwrap());
        assert!((found.seconds - case["llava_video_time"].as_f64().unwrap()).abs() < 1e-9);
        let found = frames::minicpm(frames, fps, n("max_frames")).unwrap();
        assert_eq!(found, indices("minicpm_indices"), "{frames} frames");
    }
}

#[test]
fn videos_of_qwen_are_sized_and_cut() {
    let f = super::kit::fixture("qwen2-vl");
    // Of three frames the last is repeated; 96 x 104 pixels are whole tokens of 8 pixels and within the range.
    let frame = |shade: u8| RgbImage::from_pixel(104, 96, image::Rgb([shade; 3]));
    let frames = vec![frame(10), frame(90), frame(200)];
    let media = [Media::Video { frames, interval: 0.5 }];
    let prepared = f.processor.prepare(&media).unwrap().remove(0);
    assert_eq!(prepared.layout, Layout::Patches { grid: [2, 24, 26], seconds: 1.0 });
    assert_eq!((prepared.tokens, prepared.kind), (2 * 12 * 13, TokenKind::Video));
    let patches = prepared.pixels.view([2, -1, 3, 2, 16]);
    let shade = |moment: i64, frame: i64| patches.get(moment).get(0).get(0).get(frame).double_value(&[0]);
    assert!(shade(0, 0) < shade(0, 1) && shade(0, 1) < shade(1, 0));
    assert!((shade(1, 0) - shade(1, 1)).abs() < f64::EPSILON);

    // 128 to 768 tokens a frame; of many frames all share nine tenths of 128,000 tokens; but 1.05 times the least remain.
    let token = 28 * 28;
    assert_eq!(video_range(2, 28), (128 * token, 768 * token));
    assert_eq!(video_range(768, 28).1, 115_200 * token * 2 / 768);
    assert_eq!(video_range(2000, 28), (128 * token, 105_369));
}
