//! A small random decoder, samples for it, and a run of a calibration.

use std::path::Path;

use mbq::QuantSpec;
use mbq::artefact::{Origin, Scales};
use mbq::batch::{CalibBatch, Modality, Seating};
use mbq::calibrate::{CalibConfig, Progress, Running, calibrate};
use mbq::methods::Mbq;
use mbq::operators::Names;
use mbq::run;
use nics_base::interrupt::Interrupt;
use nics_core::models::{self, Decoder, Model};
use nics_core::tch::{self, Device, Kind, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

pub const HIDDEN: i64 = 32;
pub const POSITIONS: i64 = 12;
pub const SAMPLES: i64 = 4;

/// Numbers about 0 of variance 1. libtorch's own generator is one for all threads of the tests.
pub fn normal(shape: &[i64], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let one = |_| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    let values: Vec<f32> = (0..shape.iter().product::<i64>()).map(one).collect();
    Tensor::from_slice(&values).view(shape)
}

/// A decoder of three layers. `kv` 4 has an operator for the output projection, 2 has not.
pub fn decoder(kv: i64, kind: Kind) -> Decoder {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": kv, "vocab_size": 50,
    });
    let config = models::config(config.as_object().unwrap()).unwrap();
    let mut decoder = models::random(config, Device::Cpu, kind, 3).unwrap();
    // Norms of one and weights of a trained model's size, with some loud columns.
    let mut seed = 11;
    decoder
        .visit_parameters(&mut |key, t| {
            seed += 1;
            let of = |scale: f64| (normal(&t.size(), seed) * scale).to_kind(kind);
            *t = if key.contains("norm") { of(0.1) + 1.0 } else { of(0.2) };
            Ok(())
        })
        .unwrap();
    decoder
}

pub fn names(decoder: &Decoder) -> Names {
    Names::of(decoder, "model.layers")
}

pub fn origin() -> Origin {
    Origin { model: "random".into(), arch_hash: "a".repeat(64), weights_hash: "b".repeat(64) }
}

/// What samples hold: position by position `v` an image, `p` a prompt, `a` an answer, `.` padding.
pub fn batch_of(samples: &[&str]) -> CalibBatch {
    let (n, l) = (samples.len() as i64, samples[0].len() as i64);
    let loud = Tensor::ones([HIDDEN], (Kind::Float, Device::Cpu));
    let _ = loud.narrow(0, 3, 2).fill_(6.0);
    let embeds = normal(&[n, l, HIDDEN], 5) * loud;
    let of = |f: &dyn Fn(usize, char) -> i64| -> Tensor {
        let all: Vec<i64> =
            samples.iter().flat_map(|s| s.chars().enumerate().map(|(i, c)| f(i, c))).collect();
        Tensor::from_slice(&all).view([n, l])
    };
    let is = |c: char| of(&|_, found| i64::from(found == c)).to_kind(Kind::Bool);
    let labels = of(&|i, c| if c == 'a' { (i * 7 % 50) as i64 } else { -100 });
    let vision = Modality { name: "vision".into(), mask: is('v') };
    CalibBatch::new(&embeds, is('.').logical_not(), labels, vec![vision]).unwrap()
}

pub fn batch() -> CalibBatch {
    batch_of(&["pvvvvppaaa..", "vvvvppaaaaaa", "ppvvvpaaaa..", "pvvvvpppaa.."])
}

pub fn config() -> CalibConfig {
    Mbq::new(QuantSpec::weights(3, 16)).config
}

/// How one run differs from the plain one.
#[derive(Default)]
pub struct Asked<'a> {
    pub out: Option<&'a Path>,
    pub chunk: Option<usize>,
    pub max_memory: Option<u64>,
    /// Asked to stop before this step.
    pub stop_at: Option<usize>,
}

/// A calibration of a decoder.
pub fn calibrated(
    decoder: &mut Decoder,
    batch: &CalibBatch,
    config: &CalibConfig,
    asked: &Asked,
) -> mbq::Result<Scales> {
    let interrupt = Interrupt::never();
    let mut steps = 0;
    let mut progress = |_: Progress| {
        if asked.stop_at == Some(steps) {
            interrupt.request();
        }
        steps += 1;
    };
    let mut running = Running {
        out: asked.out,
        chunk: asked.chunk,
        max_memory: asked.max_memory,
        interrupt: &interrupt,
        progress: &mut progress,
    };
    let names = names(decoder);
    calibrate(decoder, &names, batch, config, &origin(), &mut running)
}

/// Logits of all samples, `[rows, vocab]`.
pub fn logits(decoder: &Decoder, batch: &CalibBatch) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let seats = Seating::of(decoder, batch).unwrap().seats(0, batch.samples()).unwrap();
    let mut x = batch.embeds().flatten(0, 1).to_kind(decoder.dims().kind);
    for layer in &decoder.layers {
        x = run::layer(layer, &seats, &x).unwrap().output;
    }
    decoder.logits(&decoder.norm.forward(&x).unwrap()).unwrap().to_kind(Kind::Float)
}

pub fn off(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}
