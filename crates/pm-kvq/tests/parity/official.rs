//! The reference's caches: one layer alone, and behind the models.

use nics_core::models::Model;
use pm_kvq::cache::OfficialCache;
use pm_kvq::cache::official::{Backend, LayerState, Settings};
use pm_kvq::calibrate::{Scales, fold};
use pm_kvq::{Bits, Error, pack};
use tch::{Kind, Tensor};

use crate::kit::{Case, assert_same, cases};
use crate::models::{assert_agrees, decode, model_of};

fn mib(value: f64) -> u64 {
    // Payloads are whole bytes: rounded down, the budget is over at the same one.
    (value * 1_048_576.0).floor() as u64
}

fn settings(case: &Case, backend: Backend, budgets: &[f64]) -> Settings {
    let number = |key: &str| case.json[key].as_u64().map(|n| n as usize);
    Settings {
        backend,
        sink: number("n_sink").unwrap(),
        window: number("n_window").unwrap(),
        init: number("init_bits").map_or(Bits::B16, |b| Bits::try_from(b as u32).unwrap()),
        group: 128,
        budgets: budgets.iter().copied().map(mib).collect(),
    }
}

#[test]
fn one_packed_layer() {
    for case in cases("04_") {
        let settings = settings(&case, Backend::Packed, &[case.field("budget_mib")]);
        let (prefill, steps): (i64, i64) = (case.field("prefill"), case.field("decode_steps"));
        let mut layer = LayerState::new(&settings);
        let (mut trace, mut error) = (Vec::new(), None);
        let mut seen_calls = 0;
        for call in 0..=steps {
            let (from, len) = if call == 0 { (0, prefill) } else { (prefill + call - 1, 1) };
            let new = ["k", "v"].map(|name| case.tensor(name).squeeze_dim(0).narrow(1, from, len));
            let positions: Vec<i64> = (from..from + len).collect();
            let (seen, after) = match layer.update(0, &settings, [&new[0], &new[1]], &positions) {
                Ok(both) => both,
                Err(e) => {
                    assert!(matches!(e, Error::CacheExhausted { .. }), "{e}");
                    error = Some((call, from + len));
                    break;
                }
            };
            for (seen, name) in seen.iter().zip(["ret_k", "ret_v"]) {
                if let Some(expected) = case.tensors.get(&format!("{name}.call{call}")) {
                    assert_same(&seen.unsqueeze(0), expected, &format!("{} call {call}", case.name));
                    seen_calls += 1;
                }
            }
            layer = after;
            let c = layer.counts();
            let row = [(from + len) as usize, layer.bits().get() as usize, c.sink, c.middle, c.window];
            trace.push(row);
        }
        assert_eq!(trace, case.field::<Vec<[usize; 5]>>("trace"), "{}", case.name);
        let expected = case.json["error"]
            .as_object()
            .map(|e| (e["call"].as_i64().unwrap(), e["tokens_seen"].as_i64().unwrap()));
        assert_eq!(error, expected, "{}", case.name);
        let returned = case.tensors.keys().filter(|name| name.starts_with("ret_")).count();
        assert_eq!(seen_calls, returned, "{}", case.name);
        if case.tensors.contains_key("final.key_cache") {
            let middle = layer.middle().unwrap();
            for (codes, name) in middle.iter().zip(["key", "value"]) {
                let words = pack::words(&codes.codes, layer.bits()).unwrap();
                for (found, part) in [(&words, "cache"), (&codes.scale, "scales"), (&codes.zero, "zeros")] {
                    let expected = case.tensor(&format!("final.{name}_{part}"));
                    assert_same(&found.unsqueeze(0), expected, &format!("{} {name}_{part}", case.name));
                }
            }
        }
    }
}

/// Decodes a case; gives the logits of the calls that succeeded and the cache.
fn run(case: &Case, backend: Backend, model: &dyn Model) -> (Vec<Vec<usize>>, Option<Tensor>, Option<Last>) {
    let settings = settings(case, backend, &case.field::<Vec<f64>>("kv_budgets_mib"));
    let layers = model.dims().layers;
    let mut cache = OfficialCache::new(model.dims(), settings).unwrap();
    let ids: Vec<u32> = case.field("input_ids");
    let mut trace = Vec::new();
    let mut last = None;
    let logits = decode(model, &mut cache, &ids, case.field("prefill"), |cache, seq, tokens| {
        let widths = (0..layers).map(|l| cache.layer(seq, l).unwrap().bits().get() as usize);
        trace.push([vec![tokens], widths.collect()].concat());
        last = Some(Last::of(cache, seq, layers));
    });
    match logits {
        Ok(logits) => (trace, Some(logits), last),
        Err(e) => {
            assert!(e.to_string().contains("the budget is full"), "{e}");
            (trace, None, last)
        }
    }
}

/// What is looked at after the last call.
struct Last {
    bits: Vec<Vec<i64>>,
    rows: [Tensor; 2],
}

impl Last {
    fn of(cache: &OfficialCache, seq: nics_core::seam::SeqId, layers: usize) -> Self {
        let bits = (0..layers).map(|l| {
            let layer = cache.layer(seq, l).unwrap();
            let c = layer.counts();
            let each = |n: usize, bits: u32| vec![i64::from(bits); n];
            [each(c.sink, 16), each(c.middle, layer.bits().get()), each(c.window, 16)].concat()
        });
        let bits = bits.collect();
        Self { bits, rows: cache.layer(seq, 0).unwrap().rows().unwrap().unwrap() }
    }
}

/// The numbers of layer 0, which do not depend on quantization elsewhere.
fn layer_0(case: &Case, found: &Last) {
    for (found, name) in found.rows.iter().zip(["final_k.layer0", "final_v.layer0"]) {
        let off = (found.unsqueeze(0) - case.tensor(name)).abs().max().double_value(&[]);
        // The fixtures' README: 1e-6.
        assert!(off <= 1e-6, "{} {name}: off by {off}", case.name);
    }
}

#[test]
fn simulated_behind_models() {
    for case in cases("07_") {
        let model = model_of(&case);
        let (trace, logits, last) = run(&case, Backend::Simulated, &model);
        assert_eq!(trace, case.field::<Vec<Vec<usize>>>("trace"), "{}", case.name);
        assert_eq!(logits.is_none(), case.json["error"].is_object(), "{}", case.name);
        let Some(logits) = logits else { continue };
        let last = last.unwrap();
        let expected = case.tensor("bits_per_token");
        for (l, bits) in last.bits.iter().enumerate() {
            assert_eq!(
                *bits,
                Vec::<i64>::try_from(expected.get(l as i64)).unwrap(),
                "{} layer {l}",
                case.name
            );
        }
        layer_0(&case, &last);
        assert_agrees(&logits, case.tensor("logits_steps"), &case.name);
    }
}

#[test]
fn packed_behind_models() {
    for case in cases("08_") {
        let model = model_of(&case);
        let (trace, logits, _) = run(&case, Backend::Packed, &model);
        assert_eq!(trace, case.field::<Vec<Vec<usize>>>("trace"), "{}", case.name);
        assert_agrees(&logits.unwrap(), case.tensor("logits_steps"), &case.name);
    }
}

#[test]
fn simulated_behind_folded_models() {
    for case in cases("12_") {
        let mut model = model_of(&case);
        // E.g. `11_search_llama rep_scales.b2`.
        let source: String = case.field("rep_scales_from");
        let (file, prefix) = source.split_once(' ').unwrap();
        let scales = crate::kit::case(file);
        let layers = 0..model.dims().layers;
        // [1, kv_heads, 1, d / 2] -> [kv_heads, d / 2]
        let layers: Vec<Tensor> = layers
            .map(|l| scales.tensor(&format!("{prefix}.layer{l}")).squeeze_dim(0).squeeze_dim(1))
            .collect();
        fold(&mut model, &Scales::new(&layers).unwrap()).unwrap();
        let (trace, logits, _) = run(&case, Backend::Simulated, &model);
        assert_eq!(trace, case.field::<Vec<Vec<usize>>>("trace"), "{}", case.name);
        assert_agrees(&logits.unwrap(), case.tensor("logits_steps"), &case.name);
    }
}

#[test]
fn a_layer_of_recorded_rows() {
    for case in cases("07_").into_iter().filter(|c| c.tensors.contains_key("raw_k.layer0")) {
        let budgets: Vec<f64> = case.field("kv_budgets_mib");
        let settings = settings(&case, Backend::Simulated, &budgets);
        let mut layer = LayerState::new(&settings);
        let prefill: i64 = case.field("prefill");
        let raw = ["raw_k.layer0", "raw_v.layer0"].map(|name| case.tensor(name).squeeze_dim(0));
        let mut at = 0;
        while at < raw[0].size()[1] {
            let len = if at == 0 { prefill } else { 1 };
            let new = [0, 1].map(|i| raw[i].narrow(1, at, len));
            layer = layer
                .update(0, &settings, [&new[0], &new[1]], &(at..at + len).collect::<Vec<_>>())
                .unwrap()
                .1;
            at += len;
        }
        let rows = layer.rows().unwrap().unwrap();
        assert_eq!(rows[0].kind(), Kind::Float);
        layer_0(&case, &Last { bits: vec![], rows });
    }
}
