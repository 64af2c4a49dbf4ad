//! Scales as the method's official code saves them, with `torch.save`: a dictionary whose `scale` is a list of
//! `(previous, (linear, …), scales)` over all layers.
//!
//! Such a file names no model, no width and no data. What it can be held against is held: every operator of the model has its
//! scales there, of its size, and nothing else is there.

use std::collections::BTreeMap;
use std::path::Path;

use nics_core::checkpoint::torch_file::{TensorRef, TorchFile, Tree};
use nics_core::models::{Decoder, Model};
use tch::{Kind, Tensor};

use crate::artefact::{Imported, Scales};
use crate::calibrate::CalibConfig;
use crate::layer::LayerWeights;
use crate::methods::Mbq;
use crate::operators::{Names, check_groups, operators};
use crate::quantize::QuantSpec;
use crate::search::OpScale;
use crate::{Error, Result};

/// What stands before the number of a layer in checkpoints of the same decoder, beside the model's own name for it: releases of
/// model code differ in that.
const PREFIXES: [&str; 4] =
    ["model.layers", "language_model.model.layers", "model.language_model.layers", "language_model.layers"];

/// Reads the scales of a file for a decoder, which will be quantized as `spec` says: the file does not tell for what its scales were
/// searched.
///
/// # Errors
/// A file that is damaged or holds anything but scales; names, sizes and numbers of layers that are not those of the decoder;
/// values that are no positive numbers; a specification that does not fit.
pub fn read(path: &Path, decoder: &mut Decoder, names: &Names, spec: QuantSpec) -> Result<Scales> {
    check_groups(decoder.dims(), names, &spec)?;
    let wrong = |reason: String| Error::Artefact { path: path.to_owned(), reason };
    let mut file = TorchFile::open(path)?;
    let entries = entries(file.value()).map_err(wrong)?;
    let refs: Vec<(String, TensorRef)> =
        entries.iter().map(|e| (e.linears.join(", "), e.scales.clone())).collect();
    let tensors = file
        .tensors(&refs)
        .map_err(|refusal| Error::Core(nics_core::Error::Refused { path: path.to_owned(), refusal }))?;
    let mut found = by_place(entries, tensors, names).map_err(wrong)?;
    let Some(first) = decoder.layers.first_mut() else {
        return Err(Error::Input("the model has no layer".into()));
    };
    // Layers of a decoder are of one shape.
    let weights = LayerWeights::of(first)?;
    let ops = operators(&weights)?;
    let mut layers = Vec::with_capacity(decoder.layers.len());
    for l in 0..decoder.layers.len() {
        let mut own = Vec::with_capacity(ops.len());
        for op in &ops {
            let (previous, linears) = (names.previous(l, op), names.linears(l, op));
            let input = weights.linear(op.linears[0])?.weight.size()[1];
            let (before, scales) = found.remove(&linears).ok_or_else(|| {
                wrong(format!(
                    "it has no scales of {}: they are another model's, or a part of this one's",
                    linears.join(", ")
                ))
            })?;
            if before != previous {
                return Err(wrong(format!(
                    "scales of {} are to be folded into {before}, expected {previous}",
                    linears.join(", ")
                )));
            }
            let scales = usable(&scales, input)
                .map_err(|e| wrong(format!("scales of {}: {e}", linears.join(", "))))?;
            own.push(OpScale {
                previous,
                linears,
                exponent: f64::NAN,
                scales,
                statistic: Tensor::new(),
                losses: Vec::new(),
                margin: f64::NAN,
            });
        }
        layers.push(own);
    }
    if let Some(linears) = found.keys().next() {
        return Err(wrong(format!(
            "it has scales of {}, which are not scaled together in this model of {} layers: they are another model's",
            linears.join(", "),
            layers.len()
        )));
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Scales {
        names: names.clone(),
        config: config(spec),
        layers,
        sensitivity: None,
        ratios: Vec::new(),
        data_hash: String::new(),
        imported: Some(Imported { file, hash: nics_base::hash::file(path)? }),
    })
}

/// What is known of how imported scales were searched: the specification, and else what is published.
pub(crate) fn config(spec: QuantSpec) -> CalibConfig {
    Mbq::new(spec).config
}

/// An operator's part of the file.
struct Entry {
    previous: String,
    linears: Vec<String>,
    scales: TensorRef,
}

fn entries(value: &Tree) -> Result<Vec<Entry>, String> {
    let Tree::Dict(fields) = value else {
        return Err(format!("it holds {}, expected a dictionary with `scale`", value.what()));
    };
    let mut scale = None;
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("scale", Tree::List(items)) => scale = Some(items),
            ("scale", other) => return Err(format!("its `scale` is {}, expected a list", other.what())),
            // AWQ's code saves it too.
            ("clip", Tree::List(items)) if items.is_empty() => {}
            ("clip", _) => {
                return Err("it holds `clip`, ranges that were shrunk, which are not read: weights would be rounded otherwise \
                            than in its search; `mbq quantize --clip` shrinks ranges anew"
                    .into());
            }
            (other, _) => {
                let other: String = other.chars().take(120).flat_map(char::escape_default).collect();
                return Err(format!(
                    "it has the field `{other}`, expected `scale` alone: it holds no scales of this method"
                ));
            }
        }
    }
    let items = scale.ok_or("it has no field `scale`")?;
    items.iter().enumerate().map(|(n, item)| entry(n, item)).collect()
}

fn entry(n: usize, item: &Tree) -> Result<Entry, String> {
    let wrong = || format!("entry {n} of its `scale` is no (previous, (linear, …), scales)");
    let Tree::List(parts) = item else { return Err(wrong()) };
    let [Tree::Text(previous), Tree::List(linears), Tree::Tensor(scales)] = parts.as_slice() else {
        return Err(wrong());
    };
    let name = |t: &Tree| if let Tree::Text(name) = t { Ok(name.clone()) } else { Err(wrong()) };
    let linears = linears.iter().map(name).collect::<Result<Vec<_>, _>>()?;
    if linears.is_empty() {
        return Err(wrong());
    }
    Ok(Entry { previous: previous.clone(), linears, scales: scales.clone() })
}

/// By their linear layers as the model names them, what stands before them and their scales.
fn by_place(
    entries: Vec<Entry>,
    tensors: Vec<Tensor>,
    names: &Names,
) -> Result<BTreeMap<Vec<String>, (String, Tensor)>, String> {
    let mut found = BTreeMap::new();
    // One for the whole file: a decoder has one place in a model.
    let mut theirs: Option<String> = None;
    let mut own = |name: &str| -> Result<String, String> {
        let shown: String = name.chars().take(120).flat_map(char::escape_default).collect();
        let (prefix, rest) = split(name).ok_or_else(|| format!("`{shown}` is no part of a decoder layer"))?;
        if prefix != names.layers() && !PREFIXES.contains(&prefix) {
            return Err(format!(
                "`{shown}` is no part of the language model, whose layers are {}.N",
                names.layers()
            ));
        }
        let first = theirs.get_or_insert_with(|| prefix.to_owned());
        if first != prefix {
            return Err(format!("`{shown}` is under another name than {first}.N, where the others are"));
        }
        Ok(format!("{}.{rest}", names.layers()))
    };
    for (entry, tensor) in entries.into_iter().zip(tensors) {
        let previous = own(&entry.previous)?;
        let linears = entry.linears.iter().map(|name| own(name)).collect::<Result<Vec<_>, _>>()?;
        let said = linears.join(", ");
        if found.insert(linears, (previous, tensor)).is_some() {
            return Err(format!("it has scales of {said} twice"));
        }
    }
    Ok(found)
}

/// `model.layers.3.mlp.up_proj` as `model.layers` and `3.mlp.up_proj`.
fn split(name: &str) -> Option<(&str, &str)> {
    let at = name.find("layers.")? + "layers".len();
    let (prefix, rest) = (&name[..at], &name[at + 1..]);
    let (number, part) = rest.split_once('.')?;
    let canonical = number.parse::<usize>().is_ok_and(|n| n.to_string() == number);
    (canonical && !part.is_empty()).then_some((prefix, rest))
}

/// Scales as they are folded: float32 `[in]`.
fn usable(scales: &Tensor, input: i64) -> Result<Tensor, String> {
    if !matches!(scales.kind(), Kind::Float | Kind::Half | Kind::BFloat16) {
        return Err(format!("they are {:?}, expected floats", scales.kind()));
    }
    if scales.size() != [input] {
        return Err(format!(
            "they have shape {:?}, expected [{input}], one for each input: they are another model's",
            scales.size()
        ));
    }
    let scales = scales.f_to_kind(Kind::Float).map_err(|e| e.to_string())?;
    let values = Vec::<f32>::try_from(&scales).map_err(|e| e.to_string())?;
    match values.iter().position(|s| !s.is_finite() || *s <= 0.0) {
        Some(channel) => {
            Err(format!("that of channel {channel} is {}, expected a positive number", values[channel]))
        }
        None => Ok(scales),
    }
}
