//! Writing the official checkpoint: the archive and the pickle that `torch.save` makes of a router.

use std::io::{Seek, Write};
use std::path::Path;

use nics_base::artefact::AtomicFile;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::Card;
use crate::router::{InitArgs, Router, Storage};
use crate::{Error, Result};

/// The archive's folder.
const FOLDER: &str = "router";

/// Writes a router as an official `.pt` file, float32, without the frozen embedding.
///
/// `init_args` holds what the architecture reads and whatever differs from the official class's default; label statistics,
/// the validation curve and the tokenizer's hash are our own and are not written.
///
/// # Errors
/// A router that is not kept in float32, and an architecture whose arguments the official class does not take.
pub fn export(path: &Path, router: &Router, card: &Card) -> Result<()> {
    if router.storage() != Storage::F32 {
        let found = format!("{:?}", router.storage());
        return Err(Error::setting("the router's storage", found, "F32, to be written"));
    }
    let tensors = router.tensors()?;
    let pickle = pickle(card, &tensors)?;
    let io = |source: std::io::Error| nics_base::Error::Io { action: "write", path: path.to_owned(), source };
    let zipped = |e: zip::result::ZipError| io(e.into());
    let mut file = AtomicFile::create(path)?;
    let mut zip = ZipWriter::new(file.file_mut());
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default());
    let entry = |zip: &mut ZipWriter<_>, name: &str, bytes: &[u8]| -> Result<()> {
        put(zip, &format!("{FOLDER}/{name}"), bytes, options).map_err(zipped)?;
        Ok(())
    };
    entry(&mut zip, "data.pkl", &pickle)?;
    entry(&mut zip, "byteorder", b"little")?;
    for (key, (_, tensor)) in tensors.iter().enumerate() {
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        let mut bytes = vec![0; tensor.numel() * 4];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        entry(&mut zip, &format!("data/{key}"), &bytes)?;
    }
    entry(&mut zip, "version", b"3\n")?;
    zip.finish().map_err(zipped)?;
    file.commit()?;
    Ok(())
}

fn put<W: Write + Seek>(
    zip: &mut ZipWriter<W>,
    name: &str,
    bytes: &[u8],
    options: SimpleFileOptions,
) -> zip::result::ZipResult<()> {
    // torch maps tensors into memory at multiples of 64 bytes.
    zip.start_file(name, options.with_alignment(64))?;
    zip.write_all(bytes)?;
    Ok(())
}

/// What the architecture reads, and what differs from the default.
fn init_args(card: &Card) -> Result<Map<String, Value>> {
    let wrong = |source| nics_base::Error::Json { what: "the arguments of a router".into(), source };
    let (own, default) = (
        serde_json::to_value(&card.init_args).map_err(wrong)?,
        serde_json::to_value(InitArgs::default()).map_err(wrong)?,
    );
    let kind = card.model_type;
    let mut kept = vec!["hidden_dims", "expansion_factor", "dropout_rate", "normalize_input"];
    if kind.takes_hidden() {
        kept.push("hidden_states_size");
    }
    if kind.takes_logits() {
        kept.push("logits_size");
    }
    if kind.takes_token() {
        kept.extend(["pretrained_model_name", "freeze_lm_head"]);
    }
    let mut args = Map::new();
    for (name, value) in own.as_object().into_iter().flatten() {
        if kept.contains(&name.as_str()) || default.get(name) != Some(value) {
            args.insert(name.clone(), value.clone());
        }
    }
    Ok(args)
}

fn pickle(card: &Card, tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let mut p = Pickle(vec![0x80, 2]);
    p.0.extend_from_slice(b"}(");
    for (name, value) in [
        ("model_type", json!(card.model_type.name())),
        ("init_args", Value::Object(init_args(card)?)),
        (
            "common_args",
            json!({ "threshold": card.common_args.threshold, "input_type": card.common_args.input_type }),
        ),
        ("model_specific_args", Value::Object(card.model_specific_args.clone())),
    ] {
        p.text(name);
        p.value(&value)?;
    }
    p.text("state_dict");
    // An OrderedDict, filled behind its making.
    p.0.extend_from_slice(b"ccollections\nOrderedDict\n)R(");
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        p.text(name);
        p.tensor(key, tensor);
    }
    p.0.extend_from_slice(b"uu.");
    Ok(p.0)
}

/// A pickle of protocol 2 being written.
struct Pickle(Vec<u8>);

impl Pickle {
    fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend_from_slice(&(text.len() as u32).to_le_bytes());
        self.0.extend_from_slice(text.as_bytes());
    }

    fn int(&mut self, n: i64) {
        if let Ok(n) = i32::try_from(n) {
            self.0.push(b'J');
            self.0.extend_from_slice(&n.to_le_bytes());
        } else {
            self.0.extend_from_slice(&[0x8a, 8]);
            self.0.extend_from_slice(&n.to_le_bytes());
        }
    }

    fn value(&mut self, value: &Value) -> Result<()> {
        match value {
            Value::Null => self.0.push(b'N'),
            Value::Bool(b) => self.0.push(if *b { 0x88 } else { 0x89 }),
            Value::Number(n) => match (n.as_i64(), n.as_f64()) {
                (Some(n), _) => self.int(n),
                (None, Some(x)) => {
                    self.0.push(b'G');
                    self.0.extend_from_slice(&x.to_be_bytes());
                }
                _ => return Err(Error::Input(format!("{n} cannot be pickled"))),
            },
            Value::String(text) => self.text(text),
            Value::Array(items) => {
                self.0.extend_from_slice(b"](");
                for item in items {
                    self.value(item)?;
                }
                self.0.push(b'e');
            }
            Value::Object(fields) => {
                self.0.extend_from_slice(b"}(");
                for (name, value) in fields {
                    self.text(name);
                    self.value(value)?;
                }
                self.0.push(b'u');
            }
        }
        Ok(())
    }

    fn tuple(&mut self, numbers: &[i64]) {
        self.0.push(b'(');
        for &n in numbers {
            self.int(n);
        }
        self.0.push(b't');
    }

    /// `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`.
    fn tensor(&mut self, key: usize, tensor: &Tensor) {
        let shape = tensor.size();
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        self.0.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.0.extend_from_slice(b"ctorch\nFloatStorage\n");
        self.text(&key.to_string());
        self.text("cpu");
        self.int(tensor.numel() as i64);
        self.0.extend_from_slice(b"tQ");
        self.int(0);
        self.tuple(&shape);
        self.tuple(&strides);
        self.0.push(0x89);
        self.0.extend_from_slice(b"ccollections\nOrderedDict\n)RtR");
    }
}
