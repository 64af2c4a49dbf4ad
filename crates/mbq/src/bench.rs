//! What packed weights are worth from end to end: a decoder of a published shape with random weights writes tokens, its layers
//! dense or packed, its embeddings and head as they are.
//!
//! Packed layers are drawn as codes, so that no dense copy of them is ever there and the peak of memory is that of a packed
//! checkpoint.

use std::sync::Arc;
use std::time::Instant;

use nics_core::cache::DenseCache;
use nics_core::checkpoint::TensorPath;
use nics_core::memory;
use nics_core::models::{Batch, Decoder, DecoderConfig, Input, Model, in_a_layer};
use nics_core::nn::PackedLinear;
use nics_core::seam::{KvCache, Projection, ProjectionSource, Ragged};
use nics_kernels::packed::Rounding;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::quantize::QuantSpec;
use crate::{Error, Result};

/// Rows of a prompt that are read at a time.
const CHUNK: usize = 512;
/// Deviation of random weights: hidden states stay finite whatever the depth.
const DEVIATION: f64 = 0.02;

/// How the layers are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Weights {
    /// In the model's dtype.
    Dense,
    /// In groups of few bits.
    Packed(QuantSpec, Rounding),
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// Tokens of the prompt, at least 1.
    pub context: usize,
    /// Tokens of a round, at least 1.
    pub tokens: usize,
    /// Rounds that count; one before them warms up.
    pub rounds: usize,
    /// Seed of the weights.
    pub seed: u64,
}

/// Bytes of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// Of the linear layers inside the decoder's layers.
    pub layers: u64,
    /// Of the head.
    pub head: u64,
    /// Of all else: embeddings, norms, biases.
    pub rest: u64,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Bytes of weights.
    pub bytes: Bytes,
    /// Seconds to read the prompt.
    pub prompt_s: f64,
    /// Seconds of a token, round by round.
    pub token_s: Vec<f64>,
    /// Seconds of the head alone, round by round.
    pub head_s: Vec<f64>,
    /// Most resident memory from before the model was made to the end, in bytes, where the system tells it.
    pub peak_rss: Option<u64>,
}

/// Makes a decoder of random weights and lets it write. `each` is called after every round and may end the run.
///
/// # Errors
/// A protocol that does not fit the model, groups that do not divide a layer, or what `each` returns.
pub fn measure(
    config: &DecoderConfig,
    kind: Kind,
    weights: Weights,
    protocol: &Protocol,
    each: &mut dyn FnMut() -> Result<()>,
) -> Result<Measured> {
    let Protocol { context, tokens, rounds, seed } = *protocol;
    if context == 0 || tokens == 0 || rounds == 0 {
        return Err(Error::Input("context, tokens and rounds are at least 1".into()));
    }
    let resettable = memory::reset_peak();
    let at = TensorPath::random(seed, DEVIATION, Device::Cpu, kind);
    let at = match weights {
        Weights::Dense => at,
        Weights::Packed(spec, rounding) => {
            at.with_projections(Arc::new(RandomCodes { spec, rounding, seed }))
        }
    };
    let mut model = Decoder::load(config.clone(), &at)?;
    let bytes = bytes(&mut model)?;
    let mut cache = DenseCache::new();
    let seq = cache.open(context + tokens * (rounds + 1))?;
    let vocab = model.dims().vocab;
    let prompt: Vec<i64> = (0..context as i64).map(|i| i * 7919 % vocab).collect();
    let start = Instant::now();
    let mut position = 0;
    let mut hidden = Tensor::new();
    for ids in prompt.chunks(CHUNK) {
        let rows = Ragged::contiguous(&[(seq, position, ids.len())]);
        let out =
            model.forward(&Batch::new(rows, Input::Ids(&Tensor::f_from_slice(ids)?)), &mut cache, None)?;
        position += ids.len();
        hidden = out.hidden.f_narrow(0, ids.len() as i64 - 1, 1)?;
    }
    let mut next = model.logits(&hidden)?.f_argmax(-1, false)?;
    let prompt_s = start.elapsed().as_secs_f64();
    let (mut token_s, mut head_s) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (start, mut in_head) = (Instant::now(), 0.0);
        for _ in 0..tokens {
            let rows = Ragged::contiguous(&[(seq, position, 1)]);
            hidden = model.forward(&Batch::new(rows, Input::Ids(&next)), &mut cache, None)?.hidden;
            position += 1;
            let head = Instant::now();
            let logits = model.logits(&hidden)?;
            in_head += head.elapsed().as_secs_f64();
            next = logits.f_argmax(-1, false)?;
        }
        if round > 0 {
            token_s.push(start.elapsed().as_secs_f64() / tokens as f64);
            head_s.push(in_head / tokens as f64);
        }
        each()?;
    }
    Ok(Measured {
        bytes,
        prompt_s,
        token_s,
        head_s,
        peak_rss: memory::peak_resident().filter(|_| resettable),
    })
}

/// Bytes of a decoder's weights.
fn bytes(model: &mut Decoder) -> Result<Bytes> {
    let of = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
    let mut all = 0;
    model.visit_parameters(&mut |_, t| {
        all += of(t);
        Ok(())
    })?;
    // Codes are no parameters; dense weights are, and a tied head is the embeddings.
    let (mut layers, mut dense, mut head) = (0, 0, 0);
    let tied = model.config().tied;
    model.visit_projections(&mut |name, projection| {
        let own = if let Some(packed) = projection.as_packed() {
            packed.weight().bytes() as u64
        } else {
            let own = of(&projection.dense()?);
            dense += if in_a_layer(name) || !tied { own } else { 0 };
            own
        };
        *(if in_a_layer(name) { &mut layers } else { &mut head }) += own;
        Ok(())
    })?;
    Ok(Bytes { layers, head, rest: all - dense })
}

/// Packed layers whose codes are drawn.
struct RandomCodes {
    spec: QuantSpec,
    rounding: Rounding,
    seed: u64,
}

impl ProjectionSource for RandomCodes {
    fn load(
        &self,
        at: &TensorPath,
        input: i64,
        output: i64,
        bias: bool,
    ) -> nics_core::Result<Option<Box<dyn Projection>>> {
        if !in_a_layer(at.path()) {
            return Ok(None);
        }
        let group = if self.spec.group == -1 { input } else { self.spec.group };
        if group <= 0 || input % group != 0 {
            let path = at.path();
            return Err(nics_core::Error::Input(format!(
                "groups of {group} weights do not divide the {input} inputs of {path}"
            )));
        }
        let bits = u32::from(self.spec.bits);
        let name = at.path().bytes().fold(self.seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut codes = vec![0u8; (output * input) as usize];
        ChaCha8Rng::seed_from_u64(name).fill_bytes(&mut codes);
        let most = ((1u32 << bits) - 1) as u8;
        for q in &mut codes {
            *q &= most;
        }
        // Uniform codes have a deviation of their number over the root of 12.
        let scale = DEVIATION * 12f64.sqrt() / f64::from(1u32 << bits);
        let groups = [output, input / group];
        let on = (Kind::Float, Device::Cpu);
        let bias = bias.then(|| at.tensor("bias", &[output])).transpose()?;
        let layer = PackedLinear::new(
            bits,
            &Tensor::f_from_slice(&codes)?.f_view([output, input])?,
            &Tensor::f_full(groups, scale, on)?,
            &Tensor::f_full(groups, f64::from(1u32 << (bits - 1)), on)?,
            bias,
            self.rounding,
            at.kind(),
        )?;
        Ok(Some(Box::new(layer)))
    }

    fn owns(&self, _: &str) -> bool {
        false
    }
}
