//! Quantizers, candidates and folding.

use mbq::QuantSpec;
use mbq::candidates::{GRID, candidates, magnitude};
use mbq::fold::{divided_norm, divided_rows, scaled_columns};
use mbq::layer::{Weights, projection};
use mbq::quantize::{fake_quant_group, fake_quant_rows, fake_quant_tensor, quantize_group};
use tch::Tensor;

use crate::kit::{assert_close, assert_near, assert_same, case, get};

#[test]
fn asymmetric_groups() {
    let case = case("01_quant_asym");
    case.each(|sub, i| {
        let spec = QuantSpec::weights(get(sub, "bits").unwrap(), get(sub, "group").unwrap());
        let w = case.tensor(&format!("w{i}"));
        assert_same(&fake_quant_group(w, &spec).unwrap(), case.tensor(&format!("dq{i}")), "dq");
        let q = quantize_group(w, &spec).unwrap();
        assert_same(&q.q, case.tensor(&format!("int{i}")), "integers");
        assert_same(&q.scale, case.tensor(&format!("scale{i}")), "scale");
        assert_same(&q.zero, case.tensor(&format!("zero{i}")), "zero");
        assert_same(&q.dequantize().unwrap(), case.tensor(&format!("dq{i}")), "dequantized");
    });
}

#[test]
fn symmetric_rows_and_tokens() {
    let case = case("02_quant_sym");
    case.each(|sub, i| {
        let bits = get(sub, "bits").unwrap();
        let at = |name: &str| case.tensor(&format!("{name}{i}"));
        assert_same(&fake_quant_rows(at("w"), bits).unwrap(), at("perchan"), "rows");
        assert_same(&fake_quant_tensor(at("w"), bits).unwrap(), at("pertensor"), "weight");
        assert_same(&fake_quant_rows(at("x"), bits).unwrap(), at("pertoken"), "tokens");
        assert_same(&fake_quant_tensor(at("x"), bits).unwrap(), at("xpertensor"), "activation");
    });
}

#[test]
fn linear_with_rounded_activations() {
    let case = case("03_wa_linear");
    case.each(|sub, i| {
        let (w_bit, a_bit) = (get(sub, "w_bit").unwrap(), get(sub, "a_bit").unwrap());
        let at = |name: &str| case.tensor(&format!("{name}{i}"));
        let bias = get::<bool>(sub, "bias").unwrap().then(|| at("bias").shallow_clone());
        let of = |weight: Tensor, act| {
            let w = Weights { weight, bias: bias.as_ref().map(Tensor::shallow_clone) };
            projection(w, act).forward(at("x")).unwrap()
        };
        let spec = QuantSpec::with_activations(w_bit, a_bit);
        assert_near(&of(spec.weight(at("weight")).unwrap(), Some(a_bit)), at("y"), 1e-5, "y");
        assert_near(&of(at("weight").shallow_clone(), None), at("y_fp"), 1e-5, "y_fp");
    });
}

#[test]
fn scale_grid() {
    let case = case("04_scale_grid");
    let a = magnitude(case.tensor("x")).unwrap();
    assert_close(&a, case.tensor("x_max"), 1e-6, "x_max");
    let n = case.tensor("scales").size()[0] as usize;
    assert_eq!(n, GRID);
    let found = Tensor::stack(&candidates(&a, None, n).unwrap(), 0);
    assert_close(&found, case.tensor("scales"), 1e-6, "scales");
}

#[test]
fn folding() {
    let case = case("05_apply_scale");
    let (at, s) = (|name: &str| case.tensor(name), case.tensor("s"));
    assert_close(&divided_norm(at("ln"), s).unwrap(), at("ln_out"), 1e-6, "norm");
    for name in ["fc1", "fc2"] {
        let found = scaled_columns(at(name), s).unwrap();
        assert_close(&found, at(&format!("{name}_out")), 1e-6, name);
    }
    // The bias of a layer whose columns are scaled stays.
    assert_same(at("fc2_bias"), at("fc2_bias_out"), "bias");
    let a = Weights { weight: at("a_w").shallow_clone(), bias: Some(at("a_b").shallow_clone()) };
    let a = divided_rows(&a, s).unwrap();
    assert_close(&a.weight, at("a_w_out"), 1e-6, "rows");
    assert_close(&a.bias.unwrap(), at("a_b_out"), 1e-6, "bias of the rows");
    assert_close(&scaled_columns(at("b_w"), s).unwrap(), at("b_w_out"), 1e-6, "columns");
    let wide = divided_rows(&Weights { weight: at("a2_w").shallow_clone(), bias: None }, s).unwrap();
    assert_close(&wide.weight, at("a2_w_out"), 1e-6, "last rows");
    assert_close(&scaled_columns(at("b2_w"), s).unwrap(), at("b2_w_out"), 1e-6, "columns");
}
