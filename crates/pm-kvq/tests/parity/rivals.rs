//! The rivals of the paper on the folder's models, and the caches of transformers on recorded keys and values.

use nics_core::cache::DenseCache;
use nics_core::models::{Decoder, Model, ModelDims};
use nics_core::nn::Rope;
use nics_core::seam::{KvCache, Mask, Ragged, SeqId, Site};
use pm_kvq::baselines::{
    Format, FrozenFp8, Kivi, Method, Mikv, Residual, RotateKv, Rtn, Simulated, When, channel_orders,
};
use pm_kvq::calibrate::Samples;
use tch::{Device, Kind, Tensor};

use crate::kit::{Case, assert_near, cases};
use crate::models::{agreement, assert_agrees, decode, model_of};

fn method(case: &Case, model: &Decoder, name: &str, bits: u32) -> Simulated {
    let dims = model.dims();
    let number = |key: &str| case.json[key].as_u64().unwrap() as usize;
    let group = pm_kvq::quantize::default_group(dims.head_dim);
    let codes = Format::Groups { bits, group };
    let simulated = match name {
        "rtn_pre_attention" => Simulated::new(dims, Rtn::new(codes, When::Before)),
        "rtn_post_attention" => Simulated::new(dims, Rtn::new(codes, When::After)),
        "kivi_g8" => {
            let tokens = number("kivi_group");
            Simulated::new(dims, Kivi::new(bits, tokens, tokens as i64).unwrap())
        }
        "mikv_uniform" => Simulated::new(dims, Mikv::new(codes, 0)),
        "mikv_hh6_causal" => Simulated::new(dims, Mikv::new(codes, number("mikv_heavy_hitters"))),
        "mikv_hh6_official_noncausal_prefill" => {
            Simulated::new(dims, Mikv::new(codes, number("mikv_heavy_hitters")).bidirectional())
        }
        "rotatekv_noreorder_nopivot" => {
            Simulated::new(dims, RotateKv::new(dims, bits, group, 0, &[]).unwrap())
        }
        "rotatekv_full" => {
            let orders: Vec<Tensor> = (0..dims.layers)
                .map(|l| case.tensor(&format!("rotatekv.reorder.layer{l}")).shallow_clone())
                .collect();
            Simulated::new(
                dims,
                RotateKv::new(dims, bits, group, number("rotatekv_pivots"), &orders).unwrap(),
            )
        }
        other => panic!("no method {other}"),
    };
    simulated.unwrap()
}

#[test]
fn plain_decoding() {
    for case in cases("06_") {
        let model = model_of(&case);
        let ids: Vec<u32> = case.field("input_ids");
        let prefill = case.field("prefill");
        let logits = decode(&model, &mut DenseCache::new(), &ids, prefill, |_, _, _| {}).unwrap();
        assert_near(&logits, case.tensor("logits_steps"), 1e-3, &case.name);
        let all = decode(&model, &mut DenseCache::new(), &ids, 1, |_, _, _| {}).unwrap();
        assert_near(&all, case.tensor("logits_full"), 1e-3, &case.name);
    }
}

#[test]
fn rivals() {
    for case in cases("13_") {
        let model = model_of(&case);
        let ids: Vec<u32> = case.field("input_ids");
        let prefill: usize = case.field("prefill");
        let mut names: Vec<&String> = case.tensors.keys().filter(|n| n.contains(".b")).collect();
        names.sort();
        assert!(!names.is_empty());
        for name in names {
            let (method_name, bits) = name.rsplit_once(".b").unwrap();
            let mut cache = method(&case, &model, method_name, bits.parse().unwrap());
            let logits = decode(&model, &mut cache, &ids, prefill, |_, _, _| {}).unwrap();
            println!("{} {name} {:?}", case.name, agreement(&logits, case.tensor(name)));
            assert_agrees(&logits, case.tensor(name), &format!("{} {name}", case.name));
        }
    }
}

#[test]
fn channel_orders_of_rotatekv() {
    for case in cases("13_") {
        let model = model_of(&case);
        let samples = Samples::new(case.field("calib_input_ids")).unwrap();
        let found = channel_orders(&model, &samples).unwrap();
        for (l, found) in found.iter().enumerate() {
            let expected = case.tensor(&format!("rotatekv.reorder.layer{l}"));
            let differ = found.ne_tensor(expected).sum(Kind::Int64).int64_value(&[]);
            // Up to equal means: at most neighbours change places.
            let moved = (found.argsort(-1, false) - expected.argsort(-1, false)).abs().max().int64_value(&[]);
            assert!(moved <= 1, "layer {l}: {differ} channels stand elsewhere, by up to {moved}");
        }
    }
}

/// Feeds keys and values `[1, heads, tokens, d]` as a prompt and then one by one, through a rope that does nothing, and
/// gives what the last call attends over: rows as they read back, where `raw` says so the last one as it came.
fn feed(method: impl Method + 'static, k: &Tensor, v: &Tensor, prefill: i64, raw: bool) -> (Tensor, Tensor) {
    let (_, heads, tokens, d) = k.size4().unwrap();
    let dims = ModelDims {
        layers: 1,
        hidden: 1,
        intermediate: 1,
        heads,
        kv_heads: heads,
        head_dim: d,
        vocab: 1,
        context: tokens as usize,
        kind: Kind::Float,
        device: Device::Cpu,
    };
    let mut cache = Simulated::new(&dims, method).unwrap();
    let seq = cache.open(tokens as usize).unwrap();
    let flat = |t: &Tensor, from: i64, len: i64| t.get(0).narrow(1, from, len).transpose(0, 1).contiguous();
    let mut at = 0;
    let mut before = None;
    while at < tokens {
        let len = if at == 0 { prefill } else { 1 };
        before = cache.rows(seq, 0).map(|(k, v)| (k.copy(), v.copy()));
        attend(&mut cache, seq, at as usize, &flat(k, at, len), &flat(v, at, len));
        at += len;
    }
    if !raw {
        let (k, v) = cache.rows(seq, 0).unwrap();
        return (k.unsqueeze(0), v.unsqueeze(0));
    }
    let (old_k, old_v) = before.unwrap();
    let whole = |old: &Tensor, new: &Tensor| {
        Tensor::cat(&[old, &new.get(0).narrow(1, tokens - 1, 1)], 1).unsqueeze(0)
    };
    (whole(&old_k, k), whole(&old_v, v))
}

fn attend(cache: &mut Simulated, seq: SeqId, start: usize, k: &Tensor, v: &Tensor) {
    let (rows, heads, d) = k.size3().unwrap();
    let ragged = Ragged::contiguous(&[(seq, start, rows as usize)]);
    let options = (Kind::Float, Device::Cpu);
    let rope = Rope { cos: Tensor::ones([rows, d], options), sin: Tensor::zeros([rows, d], options) };
    let site = Site {
        layer: 0,
        rows: &ragged,
        rope: &rope,
        input: &Tensor::zeros([rows, 1], options),
        mask: Mask::Causal,
        want_scores: None,
        scale: 1.0,
    };
    cache.attend(&site, &Tensor::zeros([rows, heads, d], options), k, v).unwrap();
}

#[test]
fn caches_of_transformers() {
    for case in cases("17_") {
        let k = case.tensor("x");
        let v = k.flip([-1]);
        let prefill: i64 = case.field("prefill");
        let (group, residual) = (case.field("q_group_size"), case.field("residual_length"));
        for bits in [2, 4] {
            let name = format!("hf_quanto_b{bits}_axis0_g{group}");
            let (found_k, found_v) =
                feed(Residual::new(bits, group, residual).unwrap(), k, &v, prefill, true);
            assert_near(&found_k, case.tensor(&format!("{name}.ret_k_last")), 2e-3, &name);
            assert_near(&found_v, case.tensor(&format!("{name}.ret_v_last")), 2e-3, &name);
        }
        let (found_k, found_v) = feed(FrozenFp8, k, &v, prefill, false);
        assert_near(&found_k, case.tensor("hf_fp8.ret_k_last"), 0.0, "hf_fp8");
        assert_near(&found_v, case.tensor("hf_fp8.ret_v_last"), 0.0, "hf_fp8");
    }
}
