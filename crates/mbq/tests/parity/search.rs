//! The search of scales: one operator at a time, and whole calibrations.

use std::collections::HashMap;

use mbq::QuantSpec;
use mbq::apply::{fold_scales, round};
use mbq::artefact::{Origin, Scales};
use mbq::batch::{Seating, Seats};
use mbq::calibrate::{BalanceMode, CalibConfig, Running, calibrate};
use mbq::candidates::magnitude;
use mbq::fold::fold;
use mbq::layer::{LayerWeights, Role};
use mbq::loss::{Balance, LossKind, Losses, Part, best};
use mbq::operators::{Branch, Names, operators};
use mbq::run::{self, module};
use mbq::search::{Candidates, SearchConfig, Weighing};
use mbq::sensitivity::weighing;
use nics_base::interrupt::Interrupt;
use nics_core::checkpoint::TensorPath;
use nics_core::models::{self, Decoder};
use nics_core::nn::Rope;
use nics_core::seam::{Ragged, SeqId};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::kit::{Case, assert_close, assert_near, case, close, get};
use crate::models::{batch, logits, model, weight};

/// Losses of other orders of summation, relative.
fn tolerance(spec: &QuantSpec) -> f64 {
    if spec.act_bits.is_some() { 1e-2 } else { 1e-4 }
}

/// A decoder of one layer from `layer.*` tensors.
fn one_layer(case: &Case) -> Decoder {
    let mut tensors: HashMap<String, Tensor> = case
        .tensors
        .iter()
        .filter_map(|(k, t)| {
            Some((format!("model.layers.0.{}", k.strip_prefix("layer.")?), t.shallow_clone()))
        })
        .collect();
    let gate = tensors["model.layers.0.mlp.gate_proj.weight"].size();
    let norm = tensors["model.layers.0.input_layernorm.weight"].shallow_clone();
    tensors.insert("model.norm.weight".into(), norm.shallow_clone());
    tensors.insert("model.embed_tokens.weight".into(), norm.unsqueeze(0));
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": gate[1],
        "intermediate_size": gate[0],
        "num_hidden_layers": 1,
        "num_attention_heads": case.field::<i64>("heads"),
        "num_key_value_heads": case.field::<i64>("kv_heads"),
        "vocab_size": 1,
        "tie_word_embeddings": true,
    });
    let config = models::config(config.as_object().unwrap()).unwrap();
    models::load_at(config, &TensorPath::from_tensors(tensors)).unwrap()
}

#[test]
fn operators_of_one_layer() {
    let _no_grad = tch::no_grad_guard();
    let case = case("06_block_search");
    let mut decoder = one_layer(&case);
    let scale = decoder.scale();
    let names = Names::of(&decoder, "layers");
    let layer = &mut decoder.layers[0];
    let weights = LayerWeights::of(layer).unwrap();
    let ops = operators(&weights).unwrap();
    let (samples, positions) = case.tensor("vision_mask").size2().unwrap();
    let each: Vec<_> = (0..samples).map(|i| (SeqId(i as u64), 0, positions as usize)).collect();
    let rows = |t: &Tensor| t.squeeze_dim(0).repeat([samples, 1]);
    let seats = Seats {
        rows: Ragged::contiguous(&each),
        rope: Rope { cos: rows(case.tensor("cos")), sin: rows(case.tensor("sin")) },
        mask: case.tensor("causal_mask").shallow_clone(),
        scale,
    };
    let mut seen = 0;
    for result in case.field::<Vec<Value>>("results") {
        let key: String = get(&result, "key").unwrap();
        let (mode, first) = key.split_once('.').unwrap();
        let [width, loss, masks] = mode.splitn(3, '_').collect::<Vec<_>>()[..] else { panic!("{key}") };
        let bits = &case.json[if width == "wa" { "wa" } else { "weight_only" }];
        let w_bit = get(bits, "w_bit").unwrap();
        let spec = match width {
            "wa" => QuantSpec::with_activations(w_bit, get(bits, "a_bit").unwrap()),
            _ => QuantSpec::weights(w_bit, case.field("group")),
        };
        let mut config = SearchConfig::new(spec);
        config.loss = if loss == "mae" { LossKind::Mae } else { LossKind::Mse };
        let op = ops.iter().find(|op| names.linears(0, op)[0] == format!("layers.0.{first}")).unwrap();
        let listed: Vec<String> = get(&result, "layers").unwrap();
        assert_eq!(names.linears(0, op), listed.iter().map(|n| format!("layers.0.{n}")).collect::<Vec<_>>());
        assert_eq!(names.previous(0, op), format!("layers.0.{}", result["prev_op"].as_str().unwrap()));
        let branch = if op.branch == Branch::Attention { "attn" } else { "mlp" };
        let part = |mask: &str, weight| Part { mask: case.tensor(mask).shallow_clone(), weight };
        let balance = match masks {
            "both" => {
                let r = case.json["ratio"][branch].as_f64().unwrap();
                Balance::of(vec![part("answer_mask", 1.0), part("vision_mask", r)]).unwrap()
            }
            "answer_only" => Balance::of(vec![part("answer_mask", 1.0)]).unwrap(),
            "none" => Balance::everything(),
            other => panic!("{other}"),
        };
        let x = case.tensor(&format!("feat.{first}"));
        let candidates = Candidates::new(*op, &weights, &config, &magnitude(x).unwrap()).unwrap();
        let x = x.flatten(0, 1);
        let mut losses = Losses::new(config.loss, &balance, config.grid);
        let target = module(layer, &seats, op.tap, &x).unwrap();
        let piece = losses.piece(0, samples, &target).unwrap();
        candidates.judge(&mut losses, &piece, layer, &seats, &x).unwrap();
        let found = losses.finish();
        let history = case.tensor(&format!("{key}.loss_history"));
        assert_close(&Tensor::from_slice(&found), history, tolerance(&spec), &key);
        let (k, _) = best(&found).unwrap();
        let ratio = result["best_ratio"].as_f64().unwrap();
        assert!((mbq::candidates::exponent(k, config.grid) - ratio).abs() < 1e-9, "{key}: exponent");
        assert_close(candidates.scales(k), case.tensor(&format!("{key}.scales")), 1e-6, &key);
        seen += 1;
    }
    assert!(seen > 0);
}

pub fn origin() -> Origin {
    Origin { model: "tiny".into(), arch_hash: "a".into(), weights_hash: "w".into() }
}

fn calibrated(case: &Case, chunk: Option<usize>) -> Scales {
    let (mut decoder, names) = model(&case.field::<String>("model"));
    let batch = batch(&case.field::<String>("batch"));
    let mode = &case.json["mode"];
    let flag = |name: &str| mode[name].as_bool().unwrap_or(false);
    let w_bit = get(mode, "w_bit").unwrap();
    let spec = if flag("wa") {
        QuantSpec::with_activations(w_bit, get(mode, "a_bit").unwrap())
    } else {
        QuantSpec::weights(w_bit, get(mode, "group").unwrap())
    };
    let mut search = SearchConfig::new(spec);
    search.loss = get(mode, "loss").unwrap();
    search.distort = flag("distort");
    let balance = if flag("reweight") { BalanceMode::Auto } else { BalanceMode::Off };
    let mut running =
        Running { out: None, chunk, max_memory: None, interrupt: &Interrupt::never(), progress: &mut |_| {} };
    calibrate(&mut decoder, &names, &batch, &CalibConfig { search, balance }, &origin(), &mut running)
        .unwrap()
}

#[test]
fn whole_calibrations() {
    let mut seen = 0;
    for name in crate::KINDS.run.iter().filter(|n| n.starts_with("07_")) {
        if name.ends_with("_model") || name.ends_with("_batch") {
            continue;
        }
        seen += 1;
        let case = case(name);
        let scales = calibrated(&case, None);
        let spec = scales.config.search.spec;
        gradients(&case, &scales);
        let found: Vec<_> = scales.layers.iter().flatten().collect();
        let expected: Vec<Value> = case.field("ops");
        assert_eq!(found.len(), expected.len(), "{name}: operators");
        for (i, (op, e)) in found.iter().zip(&expected).enumerate() {
            let what = format!("{name}, operator {i}");
            assert_eq!(op.previous, e["prev_op"].as_str().unwrap(), "{what}");
            assert_eq!(op.linears, get::<Vec<String>>(e, "layers").unwrap(), "{what}");
            let ratio = e["best_ratio"].as_f64().unwrap();
            assert!((op.exponent - ratio).abs() < 1e-9, "{what}: exponent {} for {ratio}", op.exponent);
            assert_close(&op.statistic, case.tensor(&format!("op{i}.x_max")), 1e-5, &what);
            assert_close(&op.scales, case.tensor(&format!("op{i}.scales")), 1e-5, &what);
            let history = case.tensor(&format!("op{i}.loss_history"));
            let losses = Tensor::from_slice(&op.losses);
            if !close(&losses, history, tolerance(&spec)) {
                // The last bit of a statistic may move a zero point or a weight over a tie: with the recorded statistic
                // none does.
                assert_close(&judged_anew(&case, &scales, i), history, tolerance(&spec), &what);
            }
        }
        applied(&case, &scales);
    }
    assert!(seen > 0);
}

/// Losses of the `i`-th operator's candidates when they are made from the recorded statistic.
fn judged_anew(case: &Case, scales: &Scales, i: usize) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let (mut decoder, _) = model(&case.field::<String>("model"));
    let batch = batch(&case.field::<String>("batch"));
    let (config, samples) = (scales.config.search, batch.samples());
    let seats = Seating::of(&decoder, &batch).unwrap().seats(0, samples).unwrap();
    let per_layer = scales.layers[0].len();
    let (last, nth) = (i / per_layer, i % per_layer);
    let mut float = batch.embeds().flatten(0, 1);
    let mut rounded = float.shallow_clone();
    for (l, layer) in decoder.layers.iter_mut().enumerate() {
        let weights = LayerWeights::of(layer).unwrap();
        let ops = operators(&weights).unwrap();
        let mut folded = weights.clone();
        let before = if l == last { nth } else { ops.len() };
        for (op, found) in ops.iter().zip(&scales.layers[l]).take(before) {
            fold(&mut folded, op, &found.scales).unwrap();
        }
        let taps = run::layer(layer, &seats, &float).unwrap();
        let distorted = config.distort.then(|| {
            let path = if before == 0 { folded } else { folded.quantized(&config.spec).unwrap() };
            let mut parts = path.parts(Kind::Float).unwrap();
            parts.within(layer, |layer| run::layer(layer, &seats, &rounded)).unwrap()
        });
        if l < last {
            float = taps.output;
            rounded = distorted.map_or(rounded, |d| d.output);
            continue;
        }
        let op = ops[nth];
        let statistic = case.tensor(&format!("op{i}.x_max"));
        let candidates = Candidates::new(op, &weights, &config, statistic).unwrap();
        let weighing = match scales.config.balance {
            BalanceMode::Off => Weighing::default(),
            _ => weighing(&batch, &scales.ratios, l).unwrap(),
        };
        let mut losses = Losses::new(config.loss, weighing.of(op.branch), config.grid);
        let target = if op.branch == Branch::Attention { &taps.attention } else { &taps.mlp };
        let piece = losses.piece(0, samples, target).unwrap();
        let x = distorted.as_ref().unwrap_or(&taps).input(op.tap);
        candidates.judge(&mut losses, &piece, layer, &seats, x).unwrap();
        return Tensor::from_slice(&losses.finish());
    }
    panic!("{}: no operator {i}", case.name)
}

/// Mean absolute gradients at the outputs of both branches. The reference divides each loss by the number of samples.
fn gradients(case: &Case, scales: &Scales) {
    let Some(sensitivity) = &scales.sensitivity else { return };
    let n = batch(&case.field::<String>("batch")).samples() as f64;
    for (key, e) in case.json["avg_abs_grad"].as_object().unwrap() {
        let layer: usize = key.split('.').nth(1).unwrap().parse().unwrap();
        for (modality, name) in [(0, "cap"), (1, "vis")] {
            let of = &sensitivity.modalities[modality];
            let found = match key.rsplit('.').next().unwrap() {
                "o_proj" | "wo" => of.attention[layer] / n,
                "down_proj" | "w2" => of.mlp[layer] / n,
                _ => continue,
            };
            let expected = e[name].as_f64().unwrap();
            assert!(
                (found - expected).abs() <= 1e-4 * expected,
                "{key} {name}: {found}, expected {expected}"
            );
        }
    }
}

/// Folding changes nothing, rounding changes what it should.
fn applied(case: &Case, scales: &Scales) {
    let name = case.field::<String>("model");
    let (mut decoder, names) = model(&name);
    let batch_name = case.field::<String>("batch");
    let batch = batch(&batch_name);
    let float = self::case(&batch_name);
    let expected = float.tensor("logits_fp");
    assert_near(&logits(&decoder, &batch, batch.samples()), expected, 2e-4, "float logits");
    fold_scales(&mut decoder, &names, &scales.layers).unwrap();
    let folded = case.tensor("logits_scaled_fp");
    let samples = folded.size()[0];
    assert_near(&logits(&decoder, &batch, samples), folded, 5e-4, "folded logits");
    let spec = scales.config.search.spec;
    let summary = round(&mut decoder, &names, &spec).unwrap().summary;
    assert_eq!(summary.linears, decoder.layers.iter().map(|l| Role::of(l).len()).sum::<usize>());
    let (found, quant) = (logits(&decoder, &batch, samples), case.tensor("logits_quant"));
    if spec.act_bits.is_some() {
        let float = expected.narrow(0, 0, samples);
        let mean = |a: &Tensor, b: &Tensor| (a - b).abs().mean(Kind::Double).double_value(&[]);
        let (off, error) = (mean(&found, quant), mean(quant, &float));
        assert!(off <= 0.05 * error, "{}: logits off by {off}, the error is {error}", case.name);
    } else {
        assert_near(&found, quant, 5e-3, &case.name);
    }
    for (key, expected) in case.tensors.iter().filter_map(|(k, t)| Some((k.strip_prefix("quant.")?, t))) {
        assert_near(&weight(&mut decoder, key), expected, 1e-5, key);
    }
}

#[test]
fn pieces_of_the_samples_give_the_same() {
    for name in ["07_llava_qwen_w3_mae_rw", "07_llava_qwen_w3_mae_rw_distort", "07_llama_w3_mae_rw"] {
        let case = case(name);
        let (whole, pieces) = (calibrated(&case, None), calibrated(&case, Some(3)));
        for (a, b) in whole.layers.iter().flatten().zip(pieces.layers.iter().flatten()) {
            assert!((a.exponent - b.exponent).abs() < 1e-12);
            assert_close(&Tensor::from_slice(&b.losses), &Tensor::from_slice(&a.losses), 1e-5, name);
        }
    }
}
