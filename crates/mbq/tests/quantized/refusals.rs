//! Every way in which a quantized checkpoint can be wrong is one error that names the thing.

use std::collections::HashMap;
use std::path::Path;

use mbq::export::Layout;
use mbq::language::Language;
use mbq::packed::open;
use mbq::stored::Stored;
use nics_core::checkpoint::Checkpoint;
use nics_core::tch::{Device, Kind, Tensor};
use serde_json::{Value, json};

use crate::kit::{changed, layer_of, model, quantized};

type Change = Box<dyn FnOnce(&mut HashMap<String, Tensor>, &mut Value)>;

/// What loading says.
fn said(dir: &Path) -> String {
    let load = || -> mbq::Result<Language> {
        let checkpoint = open(Checkpoint::open_dir(dir)?, None)?;
        Language::load(&checkpoint, Device::Cpu, Kind::Float)
    };
    match load() {
        Ok(_) => "it loads".into(),
        Err(e) => e.to_string(),
    }
}

/// Changes a part of the first layer.
fn part(name: &'static str, change: impl Fn(&Tensor) -> Option<Tensor> + 'static) -> Change {
    Box::new(move |tensors, _| {
        let key = format!("{}.{name}", layer_of(tensors, name));
        match change(&tensors[&key]) {
            Some(t) => tensors.insert(key, t),
            None => tensors.remove(&key),
        };
    })
}

/// Sets a field of `quantization_config`.
fn field(pointer: &'static str, value: Value) -> Change {
    Box::new(move |_, config| {
        let at = format!("/quantization_config/{pointer}");
        match config.pointer_mut(&at) {
            Some(field) => *field = value,
            None => config["quantization_config"][pointer] = value,
        }
    })
}

fn check(spec: &str, layout: Layout, cases: Vec<(Change, &str)>) {
    let dir = tempfile::tempdir().unwrap();
    let from = model("llama", Kind::Float, dir.path());
    let good = dir.path().join("good");
    quantized(&from, spec, layout, &good);
    assert_eq!(said(&good), "it loads");
    for (i, (change, says)) in cases.into_iter().enumerate() {
        let bad = dir.path().join(i.to_string());
        changed(&good, &bad, change);
        let said = said(&bad);
        assert!(said.contains(says) && !said.contains('\n'), "{layout}, {i}: {says:?} is not in {said:?}");
    }
}

/// A part of the first layer without its last row.
fn cut(name: &'static str) -> Change {
    part(name, |t| Some(t.narrow(0, 0, t.size()[0] - 1).contiguous()))
}

#[test]
fn our_own() {
    check(
        "w3g32",
        Layout::Packed,
        vec![
            (part("scales", |_| None), "scales"),
            (part("zeros", |_| None), "zeros"),
            (cut("scales"), "scales has shape"),
            (cut("zeros"), "zeros has shape"),
            (cut("qweight"), "outputs of"),
            (part("qweight", |t| Some(t.narrow(1, 0, 5).contiguous())), "no whole number of 3 bits"),
            (part("qweight", |t| Some(t.to_kind(Kind::Int))), "qweight is Int, expected"),
            (part("scales", |t| Some(t.to_kind(Kind::Double))), "scales is Double"),
            (part("zeros", |t| Some(t.ones_like() * 8)), "zero point 8 is beyond the 7 of 3 bits"),
            (part("scales", |t| Some(t * f64::NAN)), "a scale is no number from 0 on"),
            (part("scales", |t| Some(t * -1.0)), "a scale is no number from 0 on"),
            (
                field("quant_method", json!("hqq")),
                "quant_method is \"hqq\", expected mbq, awq, gptq or compressed-tensors",
            ),
            (field("format", json!("tiles")), "format is \"tiles\""),
            (field("format_version", json!(2)), "format_version is 2, expected 1"),
            (field("bits", json!(9)), "bits is 9, expected 2 to 8"),
            (field("bits", json!(4)), "outputs of"),
            (field("group_size", json!(0)), "group_size is 0"),
            (field("group_size", json!(64)), "scales has shape"),
            (field("group_size", json!(48)), "groups of 48 do not divide"),
            (field("act_bits", json!(1)), "act_bits is 1"),
            (field("source", json!("x")), "`quantization_config`"),
            (Box::new(|_, config| config["hidden_size"] = json!(128)), "config.json was changed since"),
            (
                Box::new(|tensors, _| tensors.retain(|n, _| !n.contains("qweight"))),
                "no tensor is named `….qweight`",
            ),
        ],
    );
}

#[test]
fn those_of_others() {
    check(
        "w4g32",
        Layout::Awq,
        vec![
            (part("qzeros", |_| None), "qzeros"),
            (cut("qzeros"), "qzeros has shape"),
            (cut("qweight"), "the model asks for"),
            (field("version", json!("gemv")), "version is \"gemv\", expected gemm"),
            (field("zero_point", json!(false)), "zero_point is false"),
            (field("bits", json!(8)), "bits is 8, expected 4"),
            (Box::new(|_, config| config["intermediate_size"] = json!(96)), "the model asks for"),
        ],
    );
    let disorder = |t: &Tensor| Some(t.flip([0]));
    check(
        "w3g32",
        Layout::Gptq,
        vec![
            (part("g_idx", disorder), "desc_act"),
            (cut("g_idx"), "g_idx has shape"),
            (cut("scales"), "scales has shape"),
            (part("qweight", |t| Some(t.narrow(0, 0, 2).contiguous())), "no words of 3 bits fill"),
            (field("checkpoint_format", json!("marlin")), "checkpoint_format is \"marlin\""),
            (field("bits", json!(5)), "bits is 5"),
            (field("dynamic", json!({"a": {}})), "several widths"),
            (
                Box::new(|tensors, config| {
                    config["quantization_config"]["desc_act"] = json!(true);
                    tensors.retain(|n, _| !n.contains("g_idx"));
                }),
                "there is no g_idx",
            ),
        ],
    );
    check(
        "w4g32",
        Layout::Compressed,
        vec![
            (part("weight_shape", |_| None), "weight_shape"),
            (part("weight_shape", |t| Some(t * 2)), "weight_shape says"),
            (part("weight_zero_point", |_| None), "weight_zero_point"),
            (cut("weight_zero_point"), "weight_zero_point has shape"),
            (cut("weight_scale"), "weight_scale has shape"),
            (field("format", json!("int-quantized")), "format is \"int-quantized\", expected pack-quantized"),
            (field("config_groups", json!({})), "one group at least"),
            (field("config_groups/group_0/weights/num_bits", json!(3)), "weights.num_bits is 3"),
            (
                field("config_groups/group_0/weights/strategy", json!("block")),
                "weights.strategy is \"block\"",
            ),
            (field("config_groups/group_0/weights/type", json!("float")), "weights.type is \"float\""),
        ],
    );
}

#[test]
fn a_cut_file_and_other_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let from = model("llama", Kind::Float, dir.path());
    let good = dir.path().join("good");
    quantized(&from, "w3g32", Layout::Packed, &good);
    let file = good.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    let said_of_cut = said(&good);
    assert!(said_of_cut.contains("model.safetensors"), "{said_of_cut}");
    std::fs::write(&file, &bytes).unwrap();
    let verify = || {
        let checkpoint = Checkpoint::open_dir(&good).unwrap();
        Stored::of(&checkpoint).unwrap().unwrap().verify(&checkpoint.root(Device::Cpu, Kind::Float))
    };
    verify().unwrap();
    let mut other = bytes;
    // The last tensors are those of bytes.
    *other.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &other).unwrap();
    assert!(verify().unwrap_err().to_string().contains("are not those that were written"));

    // What is not quantized says how to change that.
    assert!(said(&from).contains("`mbq quantize`"));
}

#[test]
fn activations_that_cannot_be_followed_are_taken_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let from = model("llama", Kind::Float, dir.path());
    let good = dir.path().join("good");
    quantized(&from, "w4g32", Layout::Compressed, &good);
    let of = |name: &str, inputs: Value| {
        let dir = dir.path().join(name);
        changed(&good, &dir, |_, config| {
            config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = inputs;
        });
        Stored::of(&Checkpoint::open_dir(&dir).unwrap()).unwrap().unwrap()
    };
    let inputs = |bits: u8, strategy: &str, dynamic: bool| json!({"num_bits": bits, "type": "int", "symmetric": true, "strategy": strategy, "dynamic": dynamic});
    let followed = of("followed", inputs(8, "token", true));
    assert_eq!((followed.act_bits, followed.ignored), (Some(8), None));
    for (name, inputs) in [("static", inputs(8, "tensor", false)), ("narrow", inputs(4, "token", true))] {
        let stored = of(name, inputs);
        assert_eq!(stored.act_bits, None);
        assert!(stored.ignored.unwrap().contains("only symmetric integers of 8 bits"));
    }
}
