//! A quantized checkpoint in another layout: the integers stay as they are, so that what comes back from a layout that has been
//! there before is the same to the byte.

use std::collections::BTreeSet;
use std::path::Path;

use nics_base::interrupt::Interrupt;
use nics_core::checkpoint::{Checkpoint, Origin};
use tch::{Device, Kind};

use crate::export::{Details, Layers, Layout, refuse_existing, write};
use crate::layout::{ZeroPoints, Zeros};
use crate::quantize::QuantSpec;
use crate::stored::{Form, Imported, PackedConfig, Stored};
use crate::{Error, Result};

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// Linear layers.
    pub layers: usize,
    /// Their weights.
    pub weights: u64,
    /// How they are quantized, e.g. `w3g128`.
    pub spec: String,
    /// How they were stored.
    pub from: Layout,
}

/// Writes a quantized checkpoint in another layout, into a folder that does not exist yet. `progress` is told the layers that
/// are done, and of how many.
///
/// # Errors
/// A checkpoint that is not quantized, is in that layout already, or has layers that it does not hold.
pub fn convert(
    checkpoint: &Checkpoint,
    to: Layout,
    dir: &Path,
    interrupt: &Interrupt,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Converted> {
    refuse_existing(dir)?;
    let Some(stored) = Stored::of(checkpoint)? else {
        return Err(Error::Input(format!(
            "{} is not quantized: quantize it with `mbq quantize`, or give --scales",
            checkpoint.dir().display()
        )));
    };
    let from = layout_of(stored.form);
    if from == to {
        return Err(Error::Input(format!("{} is stored as {to} already", checkpoint.dir().display())));
    }
    let spec = QuantSpec { act_bits: stored.act_bits, ..QuantSpec::weights(stored.bits, stored.group) };
    to.check(&spec)?;
    let root = checkpoint.root(Device::Cpu, Kind::Float);
    let imported = imported(&stored, to)?;
    let (scale, zero_points) = stored.details(&root)?;
    let details = match &imported {
        Some(imported) => details_of(imported, checkpoint)?,
        None => Details {
            scale: if to == Layout::Compressed { dense_kind(checkpoint, &stored) } else { Kind::Half },
            zeros: Zeros::Exact,
            zero_points: ZeroPoints::Packed,
            exact: true,
            dense: dense_kind(checkpoint, &stored),
        },
    };
    let total = stored.layers().len();
    let (mut layers, mut weights): (Layers, u64) = (Vec::with_capacity(total), 0);
    for (done, name) in stored.layers().enumerate() {
        interrupt.check()?;
        progress(done, total);
        let q = stored.read(&root.at(name), None)?;
        weights += q.q.numel() as u64;
        let parts = to.parts(&q, stored.bits, details);
        layers.push((name.to_owned(), parts.map_err(|e| Error::Input(format!("{name}: {e}")))?));
    }
    progress(total, total);
    let mut rest = Vec::new();
    for name in checkpoint.names().filter(|n| !stored.owns(n)) {
        rest.push((name.to_owned(), root.stored(name)?));
    }
    let untouched = untouched(checkpoint, &stored);
    let config = match (to, imported) {
        (_, Some(imported)) => Some(imported.config),
        (Layout::Packed, None) => {
            let method = stored.config["quant_method"].as_str().unwrap_or_default();
            let source = Origin::of(checkpoint)?;
            let mut config = PackedConfig::new(stored.bits, stored.group, stored.act_bits, method, source);
            config.modules_to_not_convert = untouched;
            config.imported = Some(Imported {
                config: stored.config.clone(),
                scale_dtype: name_of(scale).into(),
                signed_zeros: zero_points == ZeroPoints::Signed,
            });
            Some(config.over(&layers)?)
        }
        _ => to.config(stored.bits, stored.group, &untouched),
    };
    write(dir, checkpoint, rest, layers, config)?;
    Ok(Converted { layers: total, weights, spec: spec.to_string(), from })
}

/// The layout of a form.
pub fn layout_of(form: Form) -> Layout {
    match form {
        Form::Packed => Layout::Packed,
        Form::Awq => Layout::Awq,
        Form::Gptq(_) => Layout::Gptq,
        Form::Compressed { .. } => Layout::Compressed,
    }
}

/// How the layers had been stored, where that was in the layout that they go to.
fn imported(stored: &Stored, to: Layout) -> Result<Option<Imported>> {
    if stored.form != Form::Packed {
        return Ok(None);
    }
    let config: PackedConfig = serde_json::from_value(stored.config.clone())
        .map_err(|e| Error::Input(format!("`quantization_config`: {e}")))?;
    let method = match to {
        Layout::Awq => "awq",
        Layout::Gptq => "gptq",
        Layout::Compressed => "compressed-tensors",
        Layout::Dense | Layout::Packed => return Ok(None),
    };
    Ok(config.imported.filter(|i| i.config["quant_method"] == method))
}

fn details_of(imported: &Imported, checkpoint: &Checkpoint) -> Result<Details> {
    let form = Stored::form_of(&imported.config, checkpoint)?;
    let scale = match imported.scale_dtype.as_str() {
        "float16" => Kind::Half,
        "bfloat16" => Kind::BFloat16,
        "float32" => Kind::Float,
        other => {
            return Err(Error::Input(format!(
                "`quantization_config`: imported.scale_dtype is {other:?}, expected float16, bfloat16 or float32"
            )));
        }
    };
    let zero_points = match form {
        Form::Compressed { symmetric: true } => ZeroPoints::Middle,
        _ if imported.signed_zeros => ZeroPoints::Signed,
        _ => ZeroPoints::Packed,
    };
    let zeros = if let Form::Gptq(zeros) = form { zeros } else { Zeros::Exact };
    Ok(Details { scale, zeros, zero_points, exact: true, dense: scale })
}

fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Float => "float32",
        _ => "float16",
    }
}

/// The dtype of what is not quantized.
fn dense_kind(checkpoint: &Checkpoint, stored: &Stored) -> Kind {
    nics_core::models::kind_of(checkpoint, |name| !stored.owns(name))
}

/// Linear layers that are not quantized: those that the checkpoint names, or where it names none everything that could be one,
/// since too long a list does no harm.
fn untouched(checkpoint: &Checkpoint, stored: &Stored) -> Vec<String> {
    if !stored.untouched.is_empty() {
        return stored.untouched.clone();
    }
    let matrix = |name: &&str| checkpoint.shape(name).is_some_and(|s| s.len() == 2);
    let names: BTreeSet<String> = checkpoint
        .names()
        .filter(|n| !stored.owns(n))
        .filter(matrix)
        .filter_map(|n| n.strip_suffix(".weight"))
        .filter(|n| !n.ends_with("embed_tokens") && !n.ends_with("tok_embeddings"))
        .map(str::to_owned)
        .collect();
    names.into_iter().collect()
}
