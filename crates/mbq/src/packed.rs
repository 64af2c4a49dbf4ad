//! Quantized checkpoints as models: linear layers are multiplied by as they are stored, and no dense copy of them exists at any
//! time.
//!
//! [`open`] makes of a quantized [`Checkpoint`] one that every loader of `nics-core` reads, [`nics_core::models::load`] and
//! [`nics_core::models::load_vlm`] among them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use nics_core::checkpoint::{Checkpoint, TensorPath};
use nics_core::nn::{Linear, PackedLinear};
use nics_core::seam::{Projection, ProjectionSource};
use nics_kernels::packed::{Packed, Rounding};
use tch::{Device, Tensor};

use crate::quantize::{QTensor, QuantSpec, fake_quant_rows};
use crate::stored::Stored;
use crate::{Error, Result};

/// How the inputs of packed layers are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// To 8 bits: the fastest; relative errors of some 1e-3 in a layer whose weights alone were quantized.
    Bits8,
    /// To 16 bits: relative errors of 1e-5.
    Bits16,
    /// Not at all: weights are dequantized for every call, which takes the memory of one dense layer and much time.
    Dense,
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bits8 => "8",
            Self::Bits16 => "16",
            Self::Dense => "dense",
        })
    }
}

impl FromStr for Act {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let all = [Self::Bits8, Self::Bits16, Self::Dense];
        all.into_iter().find(|a| a.to_string() == s).ok_or_else(|| Error::Setting {
            field: "act",
            found: s.to_owned(),
            expected: "8, 16 or dense",
        })
    }
}

/// A quantized checkpoint whose layers are made [packed](PackedLinear). Without `act`, inputs are rounded as the checkpoint says,
/// and to 16 bits where it says nothing.
///
/// # Errors
/// A checkpoint that is not quantized, or in a way that is not read here.
pub fn open(checkpoint: Checkpoint, act: Option<Act>) -> Result<Checkpoint> {
    Ok(Opened::open(checkpoint, act)?.checkpoint)
}

/// What was made of a quantized layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// What it computes, whether it is held packed or, for want of a kernel, dense: `w3g128`, `w4a8`, or `w3g128 A8` where inputs
    /// are rounded to 8 bits by group.
    pub kind: String,
    /// Its weights.
    pub weights: u64,
}

/// A quantized checkpoint, and what its loaders make of it.
pub struct Opened {
    /// To be loaded.
    pub checkpoint: Checkpoint,
    source: Arc<PackedSource>,
}

impl Opened {
    /// As the function [`open`].
    ///
    /// # Errors
    /// As there.
    pub fn open(checkpoint: Checkpoint, act: Option<Act>) -> Result<Self> {
        let Some(stored) = Stored::of(&checkpoint)? else {
            return Err(Error::Artefact {
                path: checkpoint.dir().join("config.json"),
                reason: "it has no `quantization_config`, its weights are not quantized; `mbq quantize` quantizes them".into(),
            });
        };
        if let Some(ignored) = &stored.ignored {
            tracing::warn!("{}: {ignored}", checkpoint.name());
        }
        let source = Arc::new(PackedSource { stored, act, said: Mutex::default(), made: Mutex::default() });
        Ok(Self { checkpoint: checkpoint.with_projections(Arc::clone(&source) as _), source })
    }

    /// The checkpoint's `quantization_config`.
    pub fn config(&self) -> &serde_json::Value {
        &self.source.stored.config
    }

    /// The quantized layers that were loaded so far, by path.
    pub fn layers(&self) -> BTreeMap<String, Made> {
        self.source.made.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Makes a checkpoint's quantized layers.
struct PackedSource {
    stored: Stored,
    act: Option<Act>,
    /// What was said already: once for all layers.
    said: Mutex<BTreeSet<String>>,
    /// What [`Opened::layers`] tells.
    made: Mutex<BTreeMap<String, Made>>,
}

/// What a layer does with its inputs.
enum Inputs {
    Rounded(Rounding),
    Exact,
    /// Rounded by token to a width that kernels do not have.
    Simulated(u8),
}

impl PackedSource {
    fn say(&self, what: String) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if !said.contains(&what) {
            tracing::warn!("{what}");
            said.insert(what);
        }
    }

    fn inputs(&self, device: Device) -> Inputs {
        match (self.act, self.stored.act_bits) {
            (Some(Act::Dense), _) => Inputs::Exact,
            // Kernels of other devices take inputs as they are.
            (None | Some(Act::Bits8), Some(8)) if device != Device::Cpu => Inputs::Simulated(8),
            (None | Some(Act::Bits8), Some(8)) => Inputs::Rounded(Rounding::A8Row),
            (Some(Act::Bits8), _) => Inputs::Rounded(Rounding::A8),
            (Some(Act::Bits16), _) | (None, None) => Inputs::Rounded(Rounding::A16),
            (None, Some(bits)) => {
                self.say(format!(
                    "activations of {bits} bits have no kernel (8 have): they are rounded beside weights that are dequantized \
                     for every call, which is slow"
                ));
                Inputs::Simulated(bits)
            }
        }
    }

    /// Takes down what is made of a layer of `weights` weights.
    fn note(&self, at: &TensorPath, weights: usize, inputs: &Inputs, packed: bool) {
        let act_bits = match inputs {
            Inputs::Rounded(Rounding::A8Row) => Some(8),
            Inputs::Simulated(bits) => Some(*bits),
            Inputs::Rounded(_) | Inputs::Exact => None,
        };
        let spec = QuantSpec { act_bits, ..QuantSpec::weights(self.stored.bits, self.stored.group) };
        let by_group =
            matches!(inputs, Inputs::Rounded(Rounding::A8)) && packed && at.device() == Device::Cpu;
        let kind = if by_group { format!("{spec} A8") } else { spec.to_string() };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.insert(at.path().to_owned(), Made { kind, weights: weights as u64 });
    }

    /// The layer of these integers; dense where there is no kernel for its groups.
    fn layer(&self, q: &QTensor, bias: Option<Tensor>, at: &TensorPath) -> Result<Box<dyn Projection>> {
        let (_, input) = q.q.size2()?;
        let group = input / q.scale.size2()?.1;
        // Codes of 5, 6 and 7 bits lie in bytes.
        let bits = if matches!(self.stored.bits, 5..=7) { 8 } else { u32::from(self.stored.bits) };
        if bits != u32::from(self.stored.bits) {
            let bits = self.stored.bits;
            self.say(format!(
                "weights of {bits} bits have no kernel (2, 3, 4 and 8 have): they take 8 bits in memory"
            ));
        }
        let inputs = self.inputs(at.device());
        if let Err(e) = Packed::check(bits, input as usize, group as usize) {
            self.say(format!("no kernel for {e}: such layers are held dense"));
            self.note(at, q.q.numel(), &inputs, false);
            let weight = q.dequantize()?.f_to_kind(at.kind())?.f_to_device(at.device())?;
            return Ok(match inputs {
                Inputs::Simulated(bits) => Box::new(Simulated { inner: Linear::new(weight, bias), bits }),
                Inputs::Rounded(Rounding::A8Row) => {
                    Box::new(Simulated { inner: Linear::new(weight, bias), bits: 8 })
                }
                _ => Box::new(Linear::new(weight, bias)),
            });
        }
        self.note(at, q.q.numel(), &inputs, true);
        let rounding = match inputs {
            Inputs::Rounded(rounding) => rounding,
            Inputs::Exact | Inputs::Simulated(_) => Rounding::A16,
        };
        let made = PackedLinear::new(bits, &q.q, &q.scale, &q.zero, bias, rounding, at.kind())?;
        Ok(match inputs {
            Inputs::Rounded(_) => Box::new(made),
            Inputs::Exact => Box::new(made.with_exact_inputs()),
            Inputs::Simulated(bits) => Box::new(Simulated { inner: made.with_exact_inputs(), bits }),
        })
    }
}

impl ProjectionSource for PackedSource {
    fn load(
        &self,
        at: &TensorPath,
        input: i64,
        output: i64,
        bias: bool,
    ) -> nics_core::Result<Option<Box<dyn Projection>>> {
        if !self.stored.has(at) {
            return Ok(None);
        }
        let q = self.stored.read(at, Some([output, input]))?;
        let bias = if bias { Some(at.tensor("bias", &[output])?) } else { None };
        Ok(Some(self.layer(&q, bias, at)?))
    }

    fn owns(&self, tensor: &str) -> bool {
        self.stored.owns(tensor)
    }
}

/// A layer whose inputs are rounded by token before it.
struct Simulated<P> {
    inner: P,
    bits: u8,
}

impl<P: Projection> Projection for Simulated<P> {
    fn forward(&self, x: &Tensor) -> nics_core::Result<Tensor> {
        self.inner.forward(&fake_quant_rows(x, self.bits)?)
    }

    fn dense(&self) -> nics_core::Result<Tensor> {
        self.inner.dense()
    }

    fn bias(&self) -> Option<Tensor> {
        self.inner.bias()
    }

    fn parameters(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        self.inner.parameters()
    }
}
