//! Quantized linear layers as a checkpoint stores them: what its `quantization_config` says, and its tensors read.
//!
//! Four forms are read: our own (docs/mbq-format.md), AutoAWQ's, GPTQ's and compressed-tensors' `pack-quantized`. Nothing in
//! a file is trusted: every tensor is held against the others and against the model that asks for it, and what does not fit is
//! an error that names the layer.

mod settings;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use nics_core::checkpoint::{Checkpoint, TensorPath};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::layout::{ZeroPoints, Zeros, from_awq, from_compressed, from_gptq, from_packed};
use crate::quantize::QTensor;
use crate::{Error, Result};
pub use settings::{Imported, PackedConfig};

/// A form of quantized layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Our own.
    Packed,
    /// AutoAWQ's GEMM layout.
    Awq,
    /// GPTQ's, with its zero points.
    Gptq(Zeros),
    /// compressed-tensors' `pack-quantized`; whether it stores zero points.
    Compressed {
        /// They are in the middle, and not stored.
        symmetric: bool,
    },
}

impl Form {
    /// Names of a layer's tensors; the first is there for every quantized layer.
    fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Packed => &["qweight", "scales", "zeros"],
            Self::Awq => &["qweight", "qzeros", "scales"],
            Self::Gptq(_) => &["qweight", "qzeros", "scales", "g_idx"],
            Self::Compressed { .. } => {
                &["weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"]
            }
        }
    }
}

/// The quantized layers of a checkpoint.
#[derive(Debug)]
pub struct Stored {
    /// How they are stored.
    pub form: Form,
    /// Bits of a weight.
    pub bits: u8,
    /// Inputs that share a scale; −1 for all of a row.
    pub group: i64,
    /// Bits that inputs are rounded to by token, when the checkpoint says so and it can be followed.
    pub act_bits: Option<u8>,
    /// What the checkpoint says of activations, where that is not followed, and why.
    pub ignored: Option<String>,
    /// Linear layers that the checkpoint says are not quantized.
    pub untouched: Vec<String>,
    /// `quantization_config` as it is.
    pub config: Value,
    /// Their names.
    layers: BTreeSet<String>,
    dir: PathBuf,
}

impl Stored {
    /// The quantized layers of a checkpoint; `None` when its config.json says of none.
    ///
    /// # Errors
    /// A method, a format or a setting that is not read here; no quantized layer where there should be some.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let Some(config) = checkpoint.quantization_config() else { return Ok(None) };
        let mut stored = settings::read(config, checkpoint)?;
        let marker = format!(".{}", stored.form.parts()[0]);
        stored.layers =
            checkpoint.names().filter_map(|n| n.strip_suffix(&marker).map(str::to_owned)).collect();
        if stored.layers.is_empty() {
            let reason =
                format!("no tensor is named `…{marker}`, though config.json says that layers are quantized");
            return Err(Error::Artefact { path: stored.dir, reason });
        }
        Ok(Some(stored))
    }

    /// The form that a `quantization_config` speaks of, whatever the checkpoint itself says.
    pub(crate) fn form_of(config: &Value, checkpoint: &Checkpoint) -> Result<Form> {
        Ok(settings::read(config, checkpoint)?.form)
    }

    /// Names of the quantized layers, sorted.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = &str> {
        self.layers.iter().map(String::as_str)
    }

    /// Whether a tensor is a part of a quantized layer.
    pub fn owns(&self, tensor: &str) -> bool {
        tensor
            .rsplit_once('.')
            .is_some_and(|(layer, part)| self.form.parts().contains(&part) && self.layers.contains(layer))
    }

    /// Whether the layer at `at` is quantized.
    pub fn has(&self, at: &TensorPath) -> bool {
        at.shape(self.form.parts()[0]).is_some()
    }

    /// Reads the quantized layer at `at`; `model` is the `[out, in]` that the model asks for.
    ///
    /// # Errors
    /// Tensors that are missing, of another shape or dtype than the others and the model ask for, zero points out of range,
    /// scales that are no positive numbers, inputs that are not in their order.
    pub fn read(&self, at: &TensorPath, model: Option<[i64; 2]>) -> Result<QTensor> {
        let layer = Layer { at, stored: self };
        let q = match self.form {
            Form::Packed => layer.packed(model),
            Form::Awq => layer.awq(model),
            Form::Gptq(zeros) => layer.gptq(zeros, model),
            Form::Compressed { symmetric } => layer.compressed(symmetric, model),
        }?;
        let bad = |what: &str| layer.bad(format!("{what} is no number from 0 on"));
        if q.scale.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0
            || q.scale.f_min()?.f_double_value(&[])? < 0.0
        {
            return Err(bad("a scale"));
        }
        let most = (1i64 << self.bits) - 1;
        let zero = q.zero.f_to_kind(Kind::Int)?.f_max()?.f_int64_value(&[])?;
        if zero > most {
            return Err(layer.bad(format!("zero point {zero} is beyond the {most} of {} bits", self.bits)));
        }
        Ok(q)
    }

    /// Holds the tensors of our own form against the hash in config.json; reads all of them.
    ///
    /// # Errors
    /// Tensors that are not those that were written.
    pub fn verify(&self, root: &TensorPath) -> Result<()> {
        if self.form != Form::Packed {
            return Err(Error::Input("only our own layout has a hash over its tensors".into()));
        }
        let mut hashes = BTreeMap::new();
        for name in &self.layers {
            let at = root.at(name);
            let parts = Form::Packed.parts().iter().map(|part| at.stored(part));
            let parts: Vec<Tensor> = parts.collect::<Result<_, _>>()?;
            hashes.insert(name.clone(), settings::layer_hash(&parts.iter().collect::<Vec<_>>())?);
        }
        let found = settings::tensors_hash(hashes);
        if self.config["tensors_hash"] == found.as_str() {
            return Ok(());
        }
        let reason = "the quantized tensors are not those that were written: their hash is another than config.json says";
        Err(Error::Artefact { path: self.dir.clone(), reason: reason.into() })
    }

    /// The dtype of the scales, and how zero points of compressed-tensors are stored, by the first layer.
    pub fn details(&self, root: &TensorPath) -> Result<(Kind, ZeroPoints)> {
        let Some(first) = self.layers.first() else { return Ok((Kind::Half, ZeroPoints::Packed)) };
        let at = root.at(first);
        Ok(match self.form {
            Form::Compressed { symmetric: true } => (at.stored("weight_scale")?.kind(), ZeroPoints::Middle),
            Form::Compressed { symmetric: false } => {
                let signed = at.stored("weight_zero_point")?.kind() == Kind::Int8;
                let zeros = if signed { ZeroPoints::Signed } else { ZeroPoints::Packed };
                (at.stored("weight_scale")?.kind(), zeros)
            }
            _ => (at.stored("scales")?.kind(), ZeroPoints::Packed),
        })
    }
}

/// A layer being read.
struct Layer<'a> {
    at: &'a TensorPath,
    stored: &'a Stored,
}

impl Layer<'_> {
    fn bad(&self, reason: String) -> Error {
        let layer = self.at.path().to_owned();
        Error::BadPackedFile { dir: self.stored.dir.clone(), layer, reason }
    }

    /// A part in one of some dtypes.
    fn part(&self, name: &str, kinds: &[Kind]) -> Result<Tensor> {
        let why = format!("layers quantized as config.json says ({})", self.stored.config["quant_method"]);
        let t = self.at.because(why).stored(name)?;
        if !kinds.contains(&t.kind()) {
            return Err(self.bad(format!("{name} is {:?}, expected {kinds:?}", t.kind())));
        }
        Ok(t)
    }

    fn shaped(&self, name: &str, t: &Tensor, expected: &[i64], because: &str) -> Result<()> {
        if t.size() == expected {
            return Ok(());
        }
        Err(self.bad(format!("{name} has shape {:?}, expected {expected:?}: {because}", t.size())))
    }

    /// Holds the layer's channels against those that the model asks for, and gives the number of groups.
    fn fits(&self, [out, input]: [i64; 2], model: Option<[i64; 2]>) -> Result<i64> {
        if let Some(expected) = model
            && expected != [out, input]
        {
            return Err(self.bad(format!(
                "its tensors hold {out} outputs of {input} inputs, the model asks for {} of {}",
                expected[0], expected[1]
            )));
        }
        let group = if self.stored.group == -1 { input } else { self.stored.group };
        if group == 0 || input % group != 0 {
            return Err(self.bad(format!("groups of {group} do not divide its {input} inputs")));
        }
        Ok(input / group)
    }

    fn two(&self, name: &str, t: &Tensor) -> Result<[i64; 2]> {
        match t.size().as_slice() {
            [rows, columns] if *rows > 0 && *columns > 0 => Ok([*rows, *columns]),
            other => Err(self.bad(format!("{name} has shape {other:?}, expected two axes"))),
        }
    }

    fn packed(&self, model: Option<[i64; 2]>) -> Result<QTensor> {
        let bits = i64::from(self.stored.bits);
        let qweight = self.part("qweight", &[Kind::Uint8])?;
        let scales = self.part("scales", &[Kind::Half, Kind::Float])?;
        let zeros = self.part("zeros", &[Kind::Uint8])?;
        let [out, bytes] = self.two("qweight", &qweight)?;
        if bytes * 8 % bits != 0 {
            return Err(self.bad(format!("rows of {bytes} bytes hold no whole number of {bits} bits")));
        }
        let groups = self.fits([out, bytes * 8 / bits], model)?;
        self.shaped("scales", &scales, &[out, groups], "[out, groups]")?;
        self.shaped("zeros", &zeros, &[out, groups], "[out, groups]")?;
        from_packed(&qweight, &scales, &zeros, self.stored.bits)
    }

    fn awq(&self, model: Option<[i64; 2]>) -> Result<QTensor> {
        let qweight = self.part("qweight", &[Kind::Int])?;
        let qzeros = self.part("qzeros", &[Kind::Int])?;
        let scales = self.part("scales", FLOATS)?;
        let [input, words] = self.two("qweight", &qweight)?;
        let out = words * 8;
        let groups = self.fits([out, input], model)?;
        self.shaped("qzeros", &qzeros, &[groups, words], "[groups, out/8]")?;
        self.shaped("scales", &scales, &[groups, out], "[groups, out]")?;
        from_awq(&qweight, &qzeros, &scales)
    }

    fn gptq(&self, zeros: Zeros, model: Option<[i64; 2]>) -> Result<QTensor> {
        let bits = i64::from(self.stored.bits);
        let qweight = self.part("qweight", &[Kind::Int])?;
        let qzeros = self.part("qzeros", &[Kind::Int])?;
        let scales = self.part("scales", FLOATS)?;
        let [words, out] = self.two("qweight", &qweight)?;
        if words * 32 % bits != 0 || out * bits % 32 != 0 {
            return Err(
                self.bad(format!("qweight has shape {:?}, which no words of {bits} bits fill", [words, out]))
            );
        }
        let input = words * 32 / bits;
        let groups = self.fits([out, input], model)?;
        self.shaped("qzeros", &qzeros, &[groups, out * bits / 32], "[groups, out·bits/32]")?;
        self.shaped("scales", &scales, &[groups, out], "[groups, out]")?;
        if self.at.shape("g_idx").is_some() {
            let order = self.part("g_idx", &[Kind::Int, Kind::Int64])?;
            self.in_order("g_idx", &order, input, groups)?;
        } else if self.stored.config["desc_act"] == true {
            return Err(self.bad("config.json says desc_act, but there is no g_idx".into()));
        }
        from_gptq(&qweight, &qzeros, &scales, self.stored.bits, zeros)
    }

    fn compressed(&self, symmetric: bool, model: Option<[i64; 2]>) -> Result<QTensor> {
        let bits = i64::from(self.stored.bits);
        let packed = self.part("weight_packed", &[Kind::Int])?;
        let scale = self.part("weight_scale", FLOATS)?;
        let shape = self.part("weight_shape", &[Kind::Int, Kind::Int64])?;
        self.shaped("weight_shape", &shape, &[2], "[out, in]")?;
        let shape = Vec::<i64>::try_from(shape.f_to_kind(Kind::Int64)?)?;
        let [out, words] = self.two("weight_packed", &packed)?;
        let input = shape[1];
        if shape[0] != out || input <= 0 || (input.saturating_mul(bits) + 31) / 32 != words {
            return Err(self.bad(format!(
                "weight_shape says {shape:?}, but weight_packed has shape {:?} at {bits} bits",
                packed.size()
            )));
        }
        let groups = self.fits([out, input], model)?;
        self.shaped("weight_scale", &scale, &[out, groups], "[out, groups]")?;
        if self.at.shape("weight_g_idx").is_some() {
            let order = self.part("weight_g_idx", &[Kind::Int, Kind::Int64])?;
            self.in_order("weight_g_idx", &order, input, groups)?;
        }
        if symmetric {
            return from_compressed(
                &packed,
                &scale,
                None,
                self.stored.bits,
                ZeroPoints::Middle,
                input as usize,
            );
        }
        let zero = self.part("weight_zero_point", &[Kind::Int, Kind::Int8])?;
        let zeros = if zero.kind() == Kind::Int8 {
            self.shaped("weight_zero_point", &zero, &[out, groups], "[out, groups]")?;
            ZeroPoints::Signed
        } else {
            let words = (out * bits + 31) / 32;
            self.shaped("weight_zero_point", &zero, &[words, groups], "[out·bits/32, groups]")?;
            ZeroPoints::Packed
        };
        from_compressed(&packed, &scale, Some(&zero), self.stored.bits, zeros, input as usize)
    }

    /// Refuses inputs that were sorted before they were put into groups.
    fn in_order(&self, name: &str, order: &Tensor, input: i64, groups: i64) -> Result<()> {
        self.shaped(name, order, &[input], "[in]")?;
        let order = Vec::<i64>::try_from(order.f_to_kind(Kind::Int64)?)?;
        match order.iter().enumerate().find(|(i, group)| **group != *i as i64 * groups / input) {
            None => Ok(()),
            Some((i, group)) => Err(self.bad(format!(
                "{name} puts input {i} into group {group}: inputs that were sorted by their activations (desc_act, actorder) \
                 are not read; quantize the model without that"
            ))),
        }
    }
}

/// Dtypes of scales.
const FLOATS: &[Kind] = &[Kind::Half, Kind::BFloat16, Kind::Float];
