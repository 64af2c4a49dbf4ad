//! Baselines: plain rounding, SmoothQuant, AWQ's clipping, GPTQ.

use mbq::QuantSpec;
use mbq::batch::CalibBatch;
use mbq::calibrate::Running;
use mbq::clip::{ClipConfig, clip_range, clipped};
use mbq::gptq::{GptqConfig, Hessian, gptq};
use mbq::methods::{Method, Rtn, SmoothQuant, Task};
use mbq::operators::Tap;
use mbq::smooth::{largest, smooth};
use nics_base::interrupt::Interrupt;
use nics_core::models::Decoder;
use tch::{Device, Kind, Tensor};

use crate::kit::{assert_close, assert_near, case, get};
use crate::models::{batch, logits, model, weight};
use crate::search::origin;

fn mean(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().mean(Kind::Double).double_value(&[])
}

/// A decoder after a method.
fn quantized(name: &str, batch: &CalibBatch, method: &dyn Method) -> Decoder {
    let (mut decoder, names) = model(name);
    let running = Running {
        out: None,
        chunk: None,
        max_memory: None,
        interrupt: &Interrupt::never(),
        progress: &mut |_| {},
    };
    let task = Task { names: &names, batch: Some(batch), origin: &origin(), running };
    method.quantize(&mut decoder, task).unwrap();
    decoder
}

#[test]
fn rounding_and_smoothing() {
    let mut seen = 0;
    for name in crate::KINDS.run.iter().filter(|n| n.starts_with("08_")) {
        seen += 1;
        let case = case(name);
        let kind = name.strip_prefix("08_").unwrap().strip_suffix("_rtn_sq").unwrap();
        let (model_name, batch_name) = (format!("07_{kind}_model"), format!("07_{kind}_batch"));
        let batch = batch(&batch_name);
        let (group, alpha) = (case.field("group"), case.field("alpha"));
        let expected = |name: &str| case.tensor(name);
        let samples = expected("logits_rtn_w3").size()[0];
        let of = |method: &dyn Method| logits(&quantized(&model_name, &batch, method), &batch, samples);

        let w3 = Rtn { spec: QuantSpec::weights(3, group) };
        assert_near(&of(&w3), expected("logits_rtn_w3"), 5e-3, "rounding of weights");
        let float = logits(&model(&model_name).0, &batch, samples);
        let w4a8 = QuantSpec::with_activations(4, 8);
        let rounded = |found: &Tensor, name: &str| {
            let error = mean(expected(name), &float);
            assert!(mean(found, expected(name)) <= 0.05 * error, "{name}");
        };
        rounded(&of(&Rtn { spec: w4a8 }), "logits_rtn_w4a8");
        rounded(&of(&SmoothQuant { spec: w4a8, alpha }), "logits_sq_w4a8");

        let (mut decoder, names) = model(&model_name);
        let most = largest(&decoder, &batch).unwrap();
        for (key, e) in case.tensors.iter().filter_map(|(k, t)| Some((k.strip_prefix("act_max.")?, t))) {
            let layer: usize =
                key.split("layers.").nth(1).unwrap().split('.').next().unwrap().parse().unwrap();
            let tap = match key.rsplit('.').next().unwrap() {
                "q_proj" | "k_proj" | "v_proj" | "wqkv" => Tap::Attention,
                "o_proj" | "wo" => Tap::Output,
                "gate_proj" | "up_proj" | "w1" | "w3" => Tap::Mlp,
                _ => Tap::Down,
            };
            assert_close(most[layer].at(tap), e, 1e-5, key);
        }
        smooth(&mut decoder, &names, &most, alpha).unwrap();
        for (key, e) in case.tensors.iter().filter_map(|(k, t)| Some((k.strip_prefix("smoothed.")?, t))) {
            assert_close(&weight(&mut decoder, key), e, 1e-5, key);
        }
        let smoothed = logits(&decoder, &batch, samples);
        assert_near(&smoothed, expected("logits_smoothed_fp"), 5e-4, "smoothed");
    }
    assert!(seen > 0);
}

#[test]
fn clipping() {
    let case = case("11_awq_clip");
    let config = ClipConfig {
        grid: case.field("n_grid"),
        most: case.field("max_shrink"),
        tokens: case.field("n_sample_token"),
    };
    case.each(|sub, i| {
        let spec = QuantSpec::weights(get(sub, "bits").unwrap(), get(sub, "group").unwrap());
        let (w, x) = (case.tensor(&format!("w{i}")), case.tensor(&format!("x{i}")));
        let range = clip_range(w, x, &spec, &config).unwrap();
        let expected = case.tensor(&format!("max_val{i}"));
        assert_eq!(range.size(), expected.size());
        let off = (&range - expected).abs().gt(1e-6).sum(Kind::Int64).int64_value(&[]);
        assert!(off <= 2, "{off} ranges differ");
        assert_near(&clipped(w, expected).unwrap(), case.tensor(&format!("w_clipped{i}")), 0.0, "clipped");
    });
}

#[test]
fn columns_one_after_the_other() {
    let case = case("12_gptq");
    case.each(|sub, i| {
        let config = GptqConfig {
            bits: get(sub, "bits").unwrap(),
            group: get(sub, "group").unwrap(),
            sym: get(sub, "sym").unwrap(),
            act_order: get(sub, "act_order").unwrap(),
            static_groups: get(sub, "static_groups").unwrap(),
            block: get(sub, "blocksize").unwrap(),
            damp: get(sub, "percdamp").unwrap(),
        };
        let (w, x) = (case.tensor(&format!("w{i}")), case.tensor(&format!("x{i}")));
        let (batches, sequences, _, input) = x.size4().unwrap();
        let mut hessian = Hessian::new(input, Device::Cpu).unwrap();
        for b in 0..batches {
            hessian.add(&x.get(b).reshape([-1, input]), sequences as f64).unwrap();
        }
        assert_near(hessian.matrix(), case.tensor(&format!("H{i}")), 1e-5, "derivatives");
        let found = gptq(w, hessian.matrix(), &config).unwrap();
        assert_near(&found.dequantize().unwrap(), case.tensor(&format!("q{i}")), 1e-5, "rounded");
    });
}
