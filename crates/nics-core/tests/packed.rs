//! A model whose projections are packed: the same as one with the dequantized weights, cached or not, alone or in a batch.

use std::path::Path;
use std::sync::Arc;

use nics_core::Result;
use nics_core::cache::{DenseCache, NoCache};
use nics_core::checkpoint::{Checkpoint, TensorPath, save};
use nics_core::generate::{Generator, Request, collect};
use nics_core::models::{self, Batch, Decoder, Input, Model};
use nics_core::nn::{Linear, PackedLinear, by_panels};
use nics_core::seam::{Projection, ProjectionSource, Ragged, SeqId};
use nics_kernels::packed::Rounding;
use tch::{Device, Kind, Tensor};

fn load(name: &str) -> Decoder {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(name);
    models::load(&Checkpoint::open_dir(&dir).unwrap(), Device::Cpu, Kind::Float).unwrap()
}

/// A projection in 4 bits, a scale a row.
fn pack(projection: &dyn Projection, rounding: Rounding) -> PackedLinear {
    let w = projection.dense().unwrap();
    let (low, high) = (w.amin([1], true).clamp_max(0.0), w.amax([1], true).clamp_min(0.0));
    let scales = (high - &low) / 15.0;
    let zeros = (-low / &scales).round();
    let codes = ((w / &scales).round() + &zeros).clamp(0.0, 15.0);
    let [codes, zeros] = [codes, zeros].map(|t| t.to_kind(Kind::Uint8));
    PackedLinear::new(4, &codes, &scales, &zeros, projection.bias(), rounding, Kind::Float).unwrap()
}

/// The model with every projection of its layers packed, or with what those amount to.
fn packed(name: &str, rounding: Option<Rounding>) -> Decoder {
    let mut model = load(name);
    model
        .visit_projections(&mut |path, projection| {
            if path.contains("layers") {
                let packed = pack(&**projection, rounding.unwrap_or(Rounding::A16));
                *projection = match rounding {
                    Some(_) => Box::new(packed),
                    None => Box::new(Linear::new(packed.dense()?, packed.bias())),
                };
            }
            Ok(())
        })
        .unwrap();
    model
}

/// Packs the gates of the MLPs as they are loaded, from dense weights under another name.
struct Gates;

impl ProjectionSource for Gates {
    fn load(&self, at: &TensorPath, input: i64, output: i64, _: bool) -> Result<Option<Box<dyn Projection>>> {
        if !at.has("stored") {
            return Ok(None);
        }
        let stored = Linear::new(at.tensor("stored", &[output, input])?, None);
        Ok(Some(Box::new(pack(&stored, Rounding::A16))))
    }

    fn owns(&self, tensor: &str) -> bool {
        tensor.ends_with(".stored")
    }
}

#[test]
fn a_checkpoint_brings_its_own_layers() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden/llama");
    let plain = Checkpoint::open_dir(&from).unwrap();
    let root = plain.root(Device::Cpu, Kind::Float);
    let renamed = |name: &str| name.replace("gate_proj.weight", "gate_proj.stored");
    let tensors = plain.names().map(|n| (renamed(n), root.stored(n).unwrap()));
    let mut config = serde_json::Value::Object(plain.config_json().clone());
    config["quantization_config"] = serde_json::json!({"quant_method": "gates"});
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), tensors, &config, u64::MAX).unwrap();

    let checkpoint = Checkpoint::open_dir(dir.path()).unwrap();
    assert!(checkpoint.is_quantized());
    let refused = models::load(&checkpoint, Device::Cpu, Kind::Float).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("the weights are quantized (gates)"), "{refused}");
    let checkpoint = checkpoint.with_projections(Arc::new(Gates));
    assert!(!checkpoint.is_quantized());
    assert_eq!(checkpoint.arch_hash(), plain.arch_hash());
    let mut model = models::load(&checkpoint, Device::Cpu, Kind::Float).unwrap();
    let parameters = models::parameters(&mut model).unwrap();
    assert_eq!(parameters, models::parameters(&mut load("llama")).unwrap());
    model
        .visit_projections(&mut |path, p| {
            assert_eq!(p.as_packed().is_some(), path.ends_with("gate_proj"), "{path}");
            Ok(())
        })
        .unwrap();
    let mut expected = load("llama");
    expected
        .visit_projections(&mut |path, p| {
            if path.ends_with("gate_proj") {
                *p = Box::new(Linear::new(pack(&**p, Rounding::A16).dense()?, None));
            }
            Ok(())
        })
        .unwrap();
    assert!(relative(&logits(&model, &[12]), &logits(&expected, &[12])) < 1e-4);
    // What is packed says nothing about the dtype that a model is loaded as.
    let gate = "model.layers.0.mlp.gate_proj.stored";
    assert!(checkpoint.is_in_projection(gate) && !checkpoint.is_in_projection("model.norm.weight"));
    assert_eq!(models::kind_of(&checkpoint, |name| name != gate), Kind::Float);
}

#[test]
fn inputs_that_are_not_rounded_are_exact() {
    let source = Linear::new(Tensor::randn([24, 64], (Kind::Float, Device::Cpu)), None);
    let (rounded, exact) = (pack(&source, Rounding::A8), pack(&source, Rounding::A8).with_exact_inputs());
    assert_eq!((rounded.rounding(), exact.rounding()), (Some(Rounding::A8), None));
    let x = Tensor::randn([3, 64], (Kind::Float, Device::Cpu));
    let expected = x.linear(&exact.dense().unwrap(), None::<&Tensor>);
    assert!(exact.forward(&x).unwrap().equal(&expected));
    assert!(relative(&rounded.forward(&x).unwrap(), &expected) > 1e-4);
    // Beside another that rounds, each does what it does.
    let both = rounded.forward_many(&[&exact], &x).unwrap();
    assert!(both[1].equal(&expected) && both[0].equal(&rounded.forward(&x).unwrap()));
}

fn logits(model: &Decoder, lens: &[usize]) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let rows: Vec<(SeqId, usize, usize)> =
        lens.iter().enumerate().map(|(i, n)| (SeqId(i as u64), 0, *n)).collect();
    let n: usize = lens.iter().sum();
    let ids = Tensor::from_slice(&(0..n as i64).map(|i| (i * 37 + 5) % 199).collect::<Vec<_>>());
    let batch = Batch::new(Ragged::contiguous(&rows), Input::Ids(&ids));
    model.logits(&model.forward(&batch, &mut NoCache::new(), None).unwrap().hidden).unwrap()
}

fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    f64::try_from((found - expected).norm() / expected.norm()).unwrap()
}

#[test]
fn packed_weights_compute_what_they_mean() {
    // Biases on q, k and v in one of them; one row, few, and many.
    for name in ["llama", "qwen2"] {
        let dense = packed(name, None);
        assert!(relative(&logits(&dense, &[40]), &logits(&load(name), &[40])) > 1e-3);
        for (rounding, most) in [(Rounding::A16, 1e-3), (Rounding::A8, 0.05), (Rounding::A8Row, 0.05)] {
            let packed = packed(name, Some(rounding));
            for lens in [&[1][..], &[3, 2], &[40, 7, 21]] {
                let off = relative(&logits(&packed, lens), &logits(&dense, lens));
                assert!(off < most, "{name}, {rounding:?}, {lens:?}: {off}");
            }
        }
    }
}

#[test]
fn generation_with_packed_weights_is_the_same_alone_and_in_a_batch() {
    let model = packed("qwen2", Some(Rounding::A16));
    let requests = || (3u32..8).map(|n| Request::greedy((1..=n).collect(), 12, &[]));
    let alone = collect(&mut Generator::new(&model, &mut DenseCache::new()), requests(), 1).unwrap();
    let together = collect(&mut Generator::new(&model, &mut DenseCache::new()), requests(), 5).unwrap();
    assert_eq!(alone, together);
    assert!(alone.iter().all(|reply| reply.len() == 12));
}

#[test]
fn half_precision_inputs_other_strides_and_gradients_are_served() {
    let source = Linear::new(
        Tensor::randn([24, 64], (Kind::Float, Device::Cpu)),
        Some(Tensor::ones([24], (Kind::Float, Device::Cpu))),
    );
    let layer = pack(&source, Rounding::A16);
    let dense = layer.dense().unwrap();
    let x = Tensor::randn([64, 2, 5], (Kind::Float, Device::Cpu)).permute([2, 1, 0]);
    let expected = x.linear(&dense, layer.bias());
    assert!(relative(&layer.forward(&x).unwrap(), &expected) < 1e-4);
    let half = pack(&Linear::new(source.dense().unwrap(), None), Rounding::A16);
    let found = half.forward(&x.to_kind(Kind::BFloat16)).unwrap();
    assert_eq!((found.kind(), found.size()), (Kind::BFloat16, vec![5, 2, 24]));
    assert!(relative(&found.to_kind(Kind::Float), &x.linear(&dense, None::<&Tensor>)) < 1e-2);
    // Whoever needs gradients goes through libtorch.
    let x = x.contiguous().set_requires_grad(true);
    let y = layer.forward(&x).unwrap();
    y.sum(Kind::Float).backward();
    assert_eq!(x.grad().size(), [5, 2, 64]);
    assert!(
        layer
            .forward(&Tensor::zeros([2, 63], (Kind::Float, Device::Cpu)))
            .unwrap_err()
            .to_string()
            .contains("64 channels")
    );
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let codes = Tensor::zeros([4, 64], (Kind::Uint8, Device::Cpu));
    let (scales, zeros) =
        (Tensor::ones([4, 2], (Kind::Float, Device::Cpu)), Tensor::zeros([4, 2], (Kind::Uint8, Device::Cpu)));
    let new = |bits, scales: &Tensor, zeros: &Tensor, bias: Option<Tensor>| {
        PackedLinear::new(bits, &codes, scales, zeros, bias, Rounding::A8, Kind::Float)
            .unwrap_err()
            .to_string()
    };
    for (found, says) in [
        (new(4, &scales.narrow(1, 0, 1), &zeros, None), "zeros [4, 2]"),
        (new(5, &scales, &zeros, None), "5 bits"),
        (new(4, &(&scales * f64::NAN), &zeros, None), "scale NaN"),
        (new(4, &scales, &zeros, Some(Tensor::zeros([3], (Kind::Float, Device::Cpu)))), "expected [4]"),
    ] {
        assert!(found.contains(says), "{found:?} does not say {says:?}");
    }
}

/// More rows than the integer kernels are for, in bfloat16: where the processor multiplies that itself, another way is taken.
#[test]
fn hundreds_of_rows_in_bfloat16() {
    let seeded = |size: &[i64], step: i64| {
        let n: i64 = size.iter().product();
        let x: Vec<f32> = (0..n).map(|i| ((i * step % 251) as f32 - 125.0) / 125.0).collect();
        Tensor::from_slice(&x).view(size).to_kind(Kind::BFloat16)
    };
    let dense = Linear::new(seeded(&[1003, 192], 37), Some(seeded(&[1003], 11)));
    let layer = pack(&dense, Rounding::A16);
    let x = seeded(&[2, 150, 192], 53);
    let exact = x
        .to_kind(Kind::Double)
        .linear(&layer.dense().unwrap().to_kind(Kind::Double), layer.bias().map(|b| b.to_kind(Kind::Double)));
    for found in [
        layer.forward(&x).unwrap(),
        layer.forward_many(&[&layer], &x).unwrap().pop().unwrap(),
        by_panels(layer.weight(), layer.bias().as_ref(), &x.view([300, 192])).unwrap().view([2, 150, 1003]),
    ] {
        assert_eq!((found.size(), found.kind()), (exact.size(), Kind::BFloat16));
        let off = relative(&found.to_kind(Kind::Double), &exact);
        assert!(off < 5e-3, "off by {off}");
    }
    let narrow = seeded(&[300, 160], 53);
    for refused in [layer.forward(&narrow), by_panels(layer.weight(), None, &narrow)] {
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("192 channels") && said.contains("160"), "{said}");
    }
    let ids = Tensor::zeros([300, 192], (Kind::Int64, Device::Cpu));
    let said = by_panels(layer.weight(), None, &ids).unwrap_err().to_string();
    assert!(said.contains("expected a float"), "{said}");
}
