//! A toy to train: a two-layer network that learns which of eight directions a noisy point lies in.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::path::Path;

use nics_core::tch::{Device, Kind, Tensor};
use nics_core::train::{
    Loss, METRICS_FILE, Micro, Result, STATE_FILE, TrainConfig, Trainer, masked_cross_entropy,
};
use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

const INPUT: i64 = 6;
const HIDDEN: i64 = 16;
const CLASSES: i64 = 8;

pub struct Toy {
    pub w1: Tensor,
    pub b1: Tensor,
    pub w2: Tensor,
    directions: Tensor,
}

fn uniform(rng: &mut ChaCha8Rng, shape: &[i64]) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_slice(&values).reshape(shape)
}

impl Toy {
    pub fn new() -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut param = |shape: &[i64]| (uniform(&mut rng, shape) * 0.4).set_requires_grad(true);
        let (w1, b1, w2) = (param(&[HIDDEN, INPUT]), param(&[HIDDEN]), param(&[CLASSES, HIDDEN]));
        Self { w1, b1, w2, directions: uniform(&mut rng, &[CLASSES, INPUT]) }
    }

    pub fn params(&self) -> Vec<(String, Tensor)> {
        [("w1", &self.w1), ("b1", &self.b1), ("w2", &self.w2)]
            .map(|(name, t)| (name.to_owned(), t.shallow_clone()))
            .into()
    }

    pub fn logits(&self, x: &Tensor) -> Tensor {
        x.linear(&self.w1, Some(&self.b1)).tanh().matmul(&self.w2.tr())
    }

    /// `rows` points and the directions that they lie in; every third one is not to count.
    pub fn batch(&self, mut rng: ChaCha8Rng, rows: i64) -> (Tensor, Tensor) {
        let labels: Vec<i64> = (0..rows).map(|_| rng.random_range(0..CLASSES)).collect();
        let noise = uniform(&mut rng, &[rows, INPUT]) * 0.2;
        let points = self.directions.index_select(0, &Tensor::from_slice(&labels)) + noise;
        let masked =
            labels.iter().enumerate().map(|(i, &l)| if i % 3 == 2 { -100 } else { l }).collect::<Vec<_>>();
        (points, Tensor::from_slice(&masked))
    }

    pub fn loss(&self, micro: Micro) -> Result<Loss> {
        let (x, labels) = self.batch(micro.rng(), 24);
        masked_cross_entropy(&self.logits(&x), &labels)
    }

    pub fn bits(&self) -> Vec<u32> {
        self.params().iter().flat_map(|(_, t)| floats(t)).map(f32::to_bits).collect()
    }
}

pub fn floats(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.detach().to_device(Device::Cpu).to_kind(Kind::Float).reshape([-1])).unwrap()
}

pub fn config(steps: u64) -> TrainConfig {
    TrainConfig {
        steps,
        lr: 0.02,
        warmup: 5,
        save_every: 7,
        log_every: 3,
        seed: 11,
        ..TrainConfig::default()
    }
}

pub fn trainer(toy: &Toy, config: TrainConfig, dir: &Path) -> Result<Trainer> {
    Trainer::new(toy.params(), config, json!({"data": "directions"}), dir)
}

/// The log without what a clock wrote.
pub fn untimed_log(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join(METRICS_FILE)).unwrap();
    let untimed = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        let fields = row.as_object_mut().unwrap();
        fields.remove("seconds");
        fields.remove("tokens_per_s");
        row
    };
    text.lines().map(untimed).collect()
}

/// The tensors of the saved state, without the header that holds times.
pub fn state_tensors(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(dir.join(STATE_FILE)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> =
        file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect();
    tensors.sort();
    assert!(!tensors.is_empty());
    tensors
}
