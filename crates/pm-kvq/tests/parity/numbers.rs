//! The quantizer, the packed layout and the shift, to the bit.

use pm_kvq::Bits;
use pm_kvq::pack;
use pm_kvq::quantize::{Codes, Group, Mode, fake_quant};
use pm_kvq::shrink::{self, Shift};
use tch::Kind;

use crate::kit::{assert_same, cases};

#[test]
fn quantizer() {
    for case in cases("01_") {
        let variants = case.json["variants"].as_object().unwrap();
        assert!(!variants.is_empty());
        for (name, variant) in variants {
            let x = case.tensor(if variant["in"] == "bfloat16" { "x_bf16" } else { "x" });
            let bits = variant["n_bits"].as_u64().unwrap() as u32;
            let group = match variant["granularity"].as_str().unwrap() {
                "per_group" => Group::Values(variant["group_size"].as_i64().unwrap()),
                "per_token" => Group::Token,
                "per_tensor" => Group::Tensor,
                other => panic!("granularity {other}"),
            };
            let mode =
                match (variant["symmetric"].as_bool().unwrap(), variant["round_zeros"].as_bool().unwrap()) {
                    (true, _) => Mode::Symmetric,
                    (false, true) => Mode::RoundedZero,
                    (false, false) => Mode::FloatZero,
                };
            let found = fake_quant(x, bits, group, mode).unwrap();
            assert_same(&found, case.tensor(&format!("y.{name}")), name);
        }
    }
}

#[test]
fn packed_words() {
    for case in cases("02_") {
        for bits in Bits::ALL {
            let b = bits.get();
            let words = pack::words(case.tensor(&format!("codes.b{b}")), bits).unwrap();
            assert_same(&words, case.tensor(&format!("words.b{b}")), "words");
            let signed = case.tensor(&format!("unpacked_signed.b{b}"));
            let codes = signed.bitwise_and(i64::from(bits.levels()));
            assert_same(&pack::codes(&words, bits).unwrap(), &codes, "codes");
        }
        let mut runs: Vec<(Bits, i64, String, String)> =
            vec![(Bits::B4, 32, "x.g32".into(), "g32.b4".into())];
        for variant in case.json["variants"].as_array().unwrap() {
            let bits = Bits::try_from(variant[0].as_u64().unwrap() as u32).unwrap();
            let dtype = variant[1].as_str().unwrap();
            runs.push((bits, 128, format!("x.{dtype}"), format!("b{}.{dtype}", bits.get())));
        }
        for (bits, group, x, name) in runs {
            let quantized = Codes::of(case.tensor(&x), bits.get(), group).unwrap();
            let words = pack::words(&quantized.codes, bits).unwrap();
            assert_same(&words, case.tensor(&format!("words.{name}")), &name);
            assert_same(&quantized.scale, case.tensor(&format!("scale.{name}")), &name);
            assert_same(&quantized.zero, case.tensor(&format!("zero.{name}")), &name);
            assert_same(&quantized.values().unwrap(), case.tensor(&format!("deq.{name}")), &name);
        }
    }
}

#[test]
fn shift() {
    for case in cases("03_") {
        for from in [Bits::B16, Bits::B8, Bits::B4] {
            let to = from.half().unwrap();
            let name = format!("{}to{}", from.get(), to.get());
            let table = Vec::<u8>::try_from(case.tensor(&format!("table.{name}"))).unwrap();
            let found: Vec<u8> =
                (0..=from.levels()).map(|q| shrink::code(Shift::Equivalent, from, q) as u8).collect();
            assert_eq!(found, table, "{name}");
            let factor = case.tensor(&format!("scale_factor.{name}")).double_value(&[0, 0]);
            let (scale, zero) = shrink::parameters(Shift::Equivalent, from, 1.0, 0.5);
            assert_eq!((f64::from(scale), zero), (factor, 0.5));
        }
        for dtype in ["f32", "bf16"] {
            let tensor = |name: &str| case.tensor(&format!("chain.{dtype}.{name}"));
            let mut codes = Codes::of(tensor("x"), 16, 128).unwrap();
            assert_same(&codes.zero, tensor("zero"), "zero");
            for bits in Bits::ALL.into_iter().rev() {
                let b = bits.get();
                if bits != Bits::B16 {
                    codes = codes.halved(Bits::try_from(2 * b).unwrap()).unwrap();
                    assert_same(&codes.values().unwrap(), tensor(&format!("deq{b}")), "values");
                }
                assert_same(&pack::words(&codes.codes, bits).unwrap(), tensor(&format!("words{b}")), "words");
                assert_same(&codes.scale, tensor(&format!("scale{b}")), "scale");
                assert_eq!(codes.codes.kind(), Kind::Int);
            }
        }
    }
}
