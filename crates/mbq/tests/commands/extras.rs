//! What goes beyond the published method, off by default.

use mbq::batch::Seating;
use mbq::data::captions::read;
use mbq::data::conversation::{Numbering, Reader, batched_as};
use mbq::language::Language;
use mbq::prompt::Prompter;
use mbq::run;
use nics_core::cache::DenseCache;
use nics_core::checkpoint::Checkpoint;
use nics_core::models::{Batch, Embedded, Input, Model};
use nics_core::seam::KvCache;
use nics_core::tch::{self, Device, Kind};
use nics_core::vision::{Media, picture};
use serde_json::Value;

use crate::args;
use crate::kit::{FAMILIES, run as mbq};

#[test]
fn multimodal_positions_are_those_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let family = &FAMILIES[2];
    let (path, data) = (family.model(dir.path()), family.captions(dir.path()));
    let checkpoint = Checkpoint::open_dir(&path).unwrap();
    let model = Language::load(&checkpoint, Device::Cpu, Kind::Float).unwrap();
    let prompter = Prompter::open(&checkpoint).unwrap();
    let reader = Reader { prompter: &prompter, images: dir.path(), longest: 4096 };
    let items = read(&data).unwrap();
    let _no_grad = tch::no_grad_guard();
    // The shorter sample is filled up on the left.
    let samples: Vec<_> = [1, 2].iter().map(|i| reader.read(&data, &items[*i], &model).unwrap()).collect();
    let hidden = |numbering| {
        let batch = batched_as(&samples, reader.side(), numbering).unwrap();
        let seats = Seating::of(model.decoder(), &batch).unwrap().seats(1, 2).unwrap();
        let mut x = batch.embeds().get(1);
        for layer in &model.decoder().layers {
            x = run::layer(layer, &seats, &x).unwrap().output;
        }
        model.decoder().norm.forward(&x).unwrap()
    };
    // The same sample by the model itself.
    let Language::Seeing(vlm) = &model else { panic!() };
    let text = |caption: &mbq::data::captions::Caption| {
        let words = |i: usize| caption.conversations[i].value.replace("<image>\n", "");
        format!(
            "<|im_start|>user <|vision_start|><|image_pad|><|vision_end|> {} <|im_end|><|im_start|>assistant {} <|im_end|>",
            words(0),
            words(1)
        )
    };
    let ids = prompter.tokenizer.encode(&text(&items[2]), false).unwrap();
    let media = [Media::Image(picture::open(&items[2].images[0]).unwrap())];
    let embedded =
        vlm.embed_prompt(&prompter.processor.as_ref().unwrap().prompt(&ids, &media).unwrap()).unwrap();
    let mut cache = DenseCache::new();
    let seq = cache.open(4096).unwrap();
    let (rows, embeddings) = Embedded::batch(&[(seq, &embedded)]).unwrap();
    let output = vlm.forward(&Batch::new(rows, Input::Embeds(&embeddings)), &mut cache, None).unwrap();
    let expected = output.hidden;
    let n = expected.size()[0];
    let off =
        |x: tch::Tensor| f64::try_from((x.narrow(0, x.size()[0] - n, n) - &expected).abs().max()).unwrap();
    assert!(off(hidden(Numbering::Multimodal)) < 1e-4);
    assert!(off(hidden(Numbering::Sequential)) > 1e-3, "the published numbering is another");
}

#[test]
fn flags_reach_the_search_and_are_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let calibrate = |family: usize, name: &str, more: &[&str]| -> Value {
        let family = &FAMILIES[family];
        let folder = dir.path().join(format!("{}-{name}", family.name));
        std::fs::create_dir(&folder).unwrap();
        let (model, data) = (family.model(&folder), family.captions(&folder));
        let out = folder.join("out");
        let mut all = args![
            "calibrate",
            "--model",
            model,
            "--data",
            data,
            "--samples",
            "3",
            "--quant",
            "w3g16",
            "--out",
            out
        ]
        .to_vec();
        all.extend(more.iter().map(Into::into));
        mbq(all).ok();
        serde_json::from_slice(&std::fs::read(out.join("scales.json")).unwrap()).unwrap()
    };
    let plain = calibrate(2, "plain", &[]);
    assert_eq!(plain["config"]["search"]["over"], "all");
    let balanced = calibrate(2, "balanced", &["--act-stat", "balanced"]);
    assert_eq!(balanced["config"]["search"]["over"], "balanced");
    assert_ne!(plain["layers"], balanced["layers"]);
    let union = calibrate(2, "union", &["--stat-union", "--grid", "40"]);
    assert_eq!(union["layers"][0][0]["losses"].as_array().unwrap().len(), 80);
    let placed = calibrate(2, "placed", &["--positions", "multimodal"]);
    assert_ne!(plain["data_hash"], placed["data_hash"]);
    // A model that places its tokens one after the other has no other positions.
    let (a, b) = (calibrate(0, "a", &[]), calibrate(0, "b", &["--positions", "multimodal"]));
    assert_eq!(a["data_hash"], b["data_hash"]);

    let family = &FAMILIES[0];
    let (model, data) = (family.model(dir.path()), family.captions(dir.path()));
    let quantize = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let mut all =
            args!["quantize", "--model", model, "--data", data, "--samples", "2", "--out", out].to_vec();
        all.extend(more.iter().map(Into::into));
        mbq(all)
    };
    quantize("clipped", &["--clip", "--quant", "w3g16"]).ok();
    quantize("refused", &["--clip", "--method", "rtn", "--quant", "w3g16"]).refused(2, "--clip goes with");
    quantize("refused", &["--clip", "--quant", "w4a8"]).refused(1, "clip is set with rounded activations");
}
