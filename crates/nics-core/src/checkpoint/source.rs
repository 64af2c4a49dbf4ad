//! What stands behind a [`TensorPath`](super::TensorPath): files, a seeded initialiser, or tensors in memory.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use super::CheckpointError;
use super::files::WeightFiles;
use crate::nn::memory::{empty_in_huge_pages, in_huge_pages};

/// The origin of tensors, with the names that were asked for.
pub(super) struct Source {
    pub origin: Origin,
    asked: Mutex<BTreeSet<String>>,
}

/// Where tensors come from.
pub(super) enum Origin {
    /// Weights files of a checkpoint, and its name for messages.
    Files(Arc<WeightFiles>, String),
    /// Every tensor drawn from `(seed, name)`.
    Random { seed: u64, std: f64 },
    /// Tensors by name. The lock makes them shareable: a tensor may be sent but not shared.
    Memory(Mutex<HashMap<String, Tensor>>),
}

/// Which stored dtypes may be read as a given one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Float,
    Integer,
    Other,
}

impl Source {
    pub fn new(origin: Origin) -> Arc<Self> {
        Arc::new(Self { origin, asked: Mutex::default() })
    }

    /// Remembers that `name` was asked for.
    pub fn mark(&self, name: &str) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if !asked.contains(name) {
            asked.insert(name.to_owned());
        }
    }

    /// Whether `name` was asked for.
    pub fn is_marked(&self, name: &str) -> bool {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    /// The shape stored under `name`; `None` when there is none, and for the initialiser, which has any shape.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        match &self.origin {
            Origin::Files(files, _) => files.entry(name).map(|e| e.shape.iter().map(|&d| d as i64).collect()),
            Origin::Random { .. } => None,
            Origin::Memory(tensors) => lock(tensors).get(name).map(Tensor::size),
        }
    }

    /// All names; empty for the initialiser.
    pub fn names(&self) -> Vec<String> {
        match &self.origin {
            Origin::Files(files, _) => files.entries().map(|e| e.name.clone()).collect(),
            Origin::Random { .. } => Vec::new(),
            Origin::Memory(tensors) => {
                let mut names: Vec<String> = lock(tensors).keys().cloned().collect();
                names.sort();
                names
            }
        }
    }

    /// What a message calls the place of `name`.
    pub fn place(&self, name: &str) -> String {
        match &self.origin {
            Origin::Files(files, folder) => {
                files.path_of(name).map_or_else(|| folder.clone(), |p| p.display().to_string())
            }
            Origin::Random { .. } => "the random initialiser".to_owned(),
            Origin::Memory(_) => "the tensors in memory".to_owned(),
        }
    }

    /// Reads `name` as `kind` on `device`, refusing another family of dtypes and values that are not finite.
    ///
    /// The shape has been checked; `shape` is what the initialiser fills. `None` when the name is not there.
    pub fn read(
        &self,
        name: &str,
        shape: &[i64],
        kind: Kind,
        device: Device,
    ) -> Result<Option<Tensor>, CheckpointError> {
        let _guard = tch::no_grad_guard();
        let torch = |e: tch::TchError| CheckpointError::torch(name, &e);
        let tensor = match &self.origin {
            Origin::Files(files, _) => {
                let Some(entry) = files.entry(name) else { return Ok(None) };
                let stored = self.convertible(name, entry.dtype, kind)?;
                let bytes = files.bytes(name)?.unwrap_or_default();
                self.check_finite(name, entry.dtype, bytes)?;
                let t = tensor_of(bytes, shape, stored, kind, device).map_err(torch)?;
                files.release(name);
                if narrows(stored, kind) {
                    self.check_finite_after(name, &t)?;
                }
                t
            }
            Origin::Random { seed, std } => initial(*seed, *std, name, shape, kind, device).map_err(torch)?,
            Origin::Memory(tensors) => {
                let Some(stored) = lock(tensors).get(name).map(Tensor::shallow_clone) else {
                    return Ok(None);
                };
                let found = stored.f_kind().map_err(torch)?;
                if family(found) != family(kind) || family(kind) == Family::Other {
                    return Err(self.wrong_dtype(name, format!("{found:?}"), kind));
                }
                // A copy in every case: the reader may train it in place.
                let t = stored
                    .f_detach()
                    .and_then(|t| t.f_to_device_(device, kind, false, true))
                    .map_err(torch)?;
                if family(kind) == Family::Float {
                    self.check_finite_after(name, &t)?;
                }
                t
            }
        };
        Ok(Some(tensor))
    }

    /// Reads `name` as it is stored.
    pub fn read_stored(&self, name: &str, device: Device) -> Result<Option<Tensor>, CheckpointError> {
        let torch = |e: tch::TchError| CheckpointError::torch(name, &e);
        match &self.origin {
            Origin::Files(files, _) => {
                let Some(entry) = files.entry(name) else { return Ok(None) };
                let Some(kind) = kind_of(entry.dtype) else {
                    let expected = "a dtype that libtorch has";
                    let (key, origin) = (name.to_owned(), self.place(name));
                    return Err(CheckpointError::WrongDtype {
                        key,
                        origin,
                        found: entry.dtype.to_string(),
                        expected,
                    });
                };
                let shape: Vec<i64> = entry.shape.iter().map(|&d| d as i64).collect();
                let bytes = files.bytes(name)?.unwrap_or_default();
                let t = tensor_of(bytes, &shape, kind, kind, device).map_err(torch)?;
                files.release(name);
                Ok(Some(t))
            }
            Origin::Random { .. } => Ok(None),
            Origin::Memory(tensors) => lock(tensors)
                .get(name)
                .map(|t| t.f_detach().and_then(|t| t.f_to_device_(device, t.kind(), false, true)))
                .transpose()
                .map_err(torch),
        }
    }

    /// The libtorch kind of a stored dtype when it may be read as `kind`.
    fn convertible(&self, name: &str, dtype: Dtype, kind: Kind) -> Result<Kind, CheckpointError> {
        match kind_of(dtype) {
            Some(stored) if family(stored) == family(kind) && family(kind) != Family::Other => Ok(stored),
            _ => Err(self.wrong_dtype(name, dtype.to_string(), kind)),
        }
    }

    fn wrong_dtype(&self, name: &str, found: String, kind: Kind) -> CheckpointError {
        let expected = match family(kind) {
            Family::Float => {
                "one of F32, BF16, F16, F64 (integer and 8-bit weights are quantized and need the method that packed them)"
            }
            _ => "an integer dtype (I64, I32, I16, I8, U8, BOOL)",
        };
        CheckpointError::WrongDtype { key: name.to_owned(), origin: self.place(name), found, expected }
    }

    /// Looks for NaN and infinities in the stored bytes: no conversion, no temporary.
    fn check_finite(&self, name: &str, dtype: Dtype, bytes: &[u8]) -> Result<(), CheckpointError> {
        let (count, first, total) = match dtype {
            Dtype::F32 => not_finite(bytes, |b: [u8; 4]| f32::from_le_bytes(b).is_finite()),
            Dtype::F64 => not_finite(bytes, |b: [u8; 8]| f64::from_le_bytes(b).is_finite()),
            Dtype::F16 => not_finite(bytes, |b: [u8; 2]| f16::from_le_bytes(b).is_finite()),
            Dtype::BF16 => not_finite(bytes, |b: [u8; 2]| bf16::from_le_bytes(b).is_finite()),
            _ => return Ok(()),
        };
        if count == 0 {
            return Ok(());
        }
        let (key, origin) = (name.to_owned(), self.place(name));
        Err(CheckpointError::NotFinite { key, origin, count, total, first, kind: String::new() })
    }

    /// Looks for NaN and infinities in a tensor.
    pub fn check_finite_after(&self, name: &str, t: &Tensor) -> Result<(), CheckpointError> {
        let look = || -> Result<_, tch::TchError> {
            let bad = t.f_isfinite()?.f_logical_not()?.f_flatten(0, -1)?;
            let count = bad.f_sum(Kind::Int64)?.f_int64_value(&[])?;
            if count == 0 {
                return Ok(None);
            }
            let first = bad.f_to_kind(Kind::Uint8)?.f_argmax(0, false)?.f_int64_value(&[])?;
            Ok(Some((count as u64, first as u64, t.f_kind()?)))
        };
        if t.numel() == 0 {
            return Ok(());
        }
        let Some((count, first, kind)) = look().map_err(|e| CheckpointError::torch(name, &e))? else {
            return Ok(());
        };
        Err(CheckpointError::NotFinite {
            key: name.to_owned(),
            origin: self.place(name),
            count,
            total: t.numel() as u64,
            first,
            kind: format!("{kind:?}"),
        })
    }
}

fn lock(tensors: &Mutex<HashMap<String, Tensor>>) -> std::sync::MutexGuard<'_, HashMap<String, Tensor>> {
    tensors.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many values are not finite, the index of the first, and how many values there are.
fn not_finite<const N: usize>(bytes: &[u8], finite: impl Fn([u8; N]) -> bool) -> (u64, u64, u64) {
    let values = bytes.as_chunks::<N>().0;
    let count = values.iter().map(|&b| u64::from(!finite(b))).sum();
    let first = if count == 0 { None } else { values.iter().position(|&b| !finite(b)) };
    (count, first.unwrap_or_default() as u64, values.len() as u64)
}

/// Whether finite values of `from` may overflow in `to`.
fn narrows(from: Kind, to: Kind) -> bool {
    let range = |k| match k {
        Kind::Half => 0,
        Kind::BFloat16 => 1,
        Kind::Float => 2,
        Kind::Double => 3,
        _ => 4,
    };
    range(to) < range(from)
}

fn family(kind: Kind) -> Family {
    match kind {
        Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double => Family::Float,
        Kind::Uint8 | Kind::Int8 | Kind::Int16 | Kind::Int | Kind::Int64 | Kind::Bool => Family::Integer,
        _ => Family::Other,
    }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        Dtype::F8_E5M2 => Kind::Float8e5m2,
        Dtype::F8_E4M3 => Kind::Float8e4m3fn,
        Dtype::F8_E5M2FNUZ => Kind::Float8e5m2fnuz,
        Dtype::F8_E4M3FNUZ => Kind::Float8e4m3fnuz,
        _ => return None,
    })
}

/// Copies `bytes`, values of `stored`, into a tensor of `kind` on `device`.
fn tensor_of(
    bytes: &[u8],
    shape: &[i64],
    stored: Kind,
    kind: Kind,
    device: Device,
) -> Result<Tensor, tch::TchError> {
    // libtorch assumes aligned elements.
    let aligned = bytes.as_ptr().addr().is_multiple_of(stored.elt_size_in_bytes());
    if bytes.is_empty() || !aligned {
        return Tensor::f_from_data_size(bytes, shape, stored)?.f_to_device_(device, kind, false, false);
    }
    // SAFETY: `bytes` holds `shape` elements of `stored` (checked with the header) and outlives the view, which is
    // dropped here; its values are copied, so that nothing refers to the mapping afterwards.
    let view = unsafe { Tensor::f_from_blob(bytes.as_ptr(), shape, &[], stored, Device::Cpu)? };
    in_huge_pages(&view, kind, device)
}

/// Values that the initialiser draws at a time.
const PIECE: usize = 1 << 20;

/// The initialiser's tensor: ones for scales of norms, zeros for biases, otherwise normal with deviation `std`.
fn initial(
    seed: u64,
    std: f64,
    name: &str,
    shape: &[i64],
    kind: Kind,
    device: Device,
) -> Result<Tensor, tch::TchError> {
    let (parent, leaf) = name.rsplit_once('.').unwrap_or(("", name));
    let parent = parent.rsplit('.').next().unwrap_or_default().to_lowercase();
    if leaf == "bias" {
        return Tensor::f_zeros(shape, (kind, device));
    }
    if leaf == "weight" && (parent.contains("norm") || parent.starts_with("ln")) {
        return Tensor::f_ones(shape, (kind, device));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    // A piece at a time, so that there is never more than the tensor itself.
    let to = empty_in_huge_pages(shape, kind, device)?;
    let flat = to.f_view(-1)?;
    let n = flat.numel();
    let mut values = Vec::with_capacity(n.min(PIECE));
    for from in (0..n).step_by(PIECE) {
        values.clear();
        values.extend((from..n.min(from + PIECE)).map(|_| {
            let z: f32 = StandardNormal.sample(&mut rng);
            z * std as f32
        }));
        flat.f_narrow(0, from as i64, values.len() as i64)?.f_copy_(&Tensor::f_from_slice(&values)?)?;
    }
    Ok(to)
}
