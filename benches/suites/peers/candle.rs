//! candle: Qwen2 of candle-transformers as it is published, float32, on its own matrix products.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::qwen2::{Config, ModelForCausalLM};
use serde_json::Value;

use super::{Past, Peer};

/// The most rows that one call reads of a past.
const CHUNK: usize = 512;

/// The model.
pub struct Candle {
    model: ModelForCausalLM,
    batch: usize,
    position: usize,
    logits: Option<Tensor>,
}

impl Candle {
    /// Reads a checkpoint's folder.
    pub fn load(folder: &Path, config: &Value) -> Result<Self> {
        let config: Config =
            serde_json::from_value(config.clone()).context("candle's Qwen2 configuration")?;
        let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
        let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let model = ModelForCausalLM::new(&config, weights)?;
        Ok(Self { model, batch: 0, position: 0, logits: None })
    }

    fn forward(&mut self, ids: &[i64]) -> Result<Tensor> {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        let rows = ids.len() / self.batch;
        let ids = Tensor::from_vec(ids, (self.batch, rows), &Device::Cpu)?;
        let logits = self.model.forward(&ids, self.position)?;
        self.position += rows;
        Ok(logits)
    }
}

impl Peer for Candle {
    fn name(&self) -> &'static str {
        "candle"
    }

    /// Its cache is its own, so it has to read the past itself.
    fn begin(&mut self, batch: usize, past: &Past, _room: usize) -> Result<()> {
        if batch == 0 {
            bail!("no sequence");
        }
        self.model.clear_kv_cache();
        (self.batch, self.position, self.logits) = (batch, 0, None);
        for chunk in past.ids.chunks(CHUNK) {
            self.forward(&chunk.repeat(batch))?;
        }
        Ok(())
    }

    fn call(&mut self, ids: &[i64]) -> Result<f64> {
        let start = Instant::now();
        let logits = self.forward(ids)?;
        let seconds = start.elapsed().as_secs_f64();
        self.logits = Some(logits);
        Ok(seconds)
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        let logits = self.logits.as_ref().context("no call was made")?;
        Ok(logits.flatten_all()?.to_vec1()?)
    }
}
