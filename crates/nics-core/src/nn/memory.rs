//! Tensors as plain memory, for the CPU kernels.
//!
//! A kernel sees a tensor when it lies on the CPU, is contiguous, is of a format that kernels have, and when nobody
//! waits for its gradient. In any other case the caller takes libtorch's way.

use half::{bf16, f16};
use nics_kernels::{Values, ValuesMut};
use tch::{Device, Kind, Tensor};

/// The values of `t`, where a kernel may read them.
pub fn values(t: &Tensor) -> Option<Values<'_>> {
    if !readable(t) {
        return None;
    }
    let (at, len) = (t.data_ptr().cast_const(), t.numel());
    // SAFETY: a contiguous tensor on the CPU has `numel` values of its kind at `data_ptr`, and lives as long as the
    // borrow. One thread owns a model's tensors, so nobody writes meanwhile.
    unsafe {
        Some(match t.kind() {
            Kind::Float => Values::F32(slice(at.cast(), len)),
            Kind::BFloat16 => Values::Bf16(slice(at.cast::<bf16>(), len)),
            Kind::Half => Values::F16(slice(at.cast::<f16>(), len)),
            _ => return None,
        })
    }
}

/// The values of `t` for writing. `&mut` stands for the caller's promise that no other tensor over the same storage is
/// in use; it is given for tensors that the caller has just made.
pub fn values_mut(t: &mut Tensor) -> Option<ValuesMut<'_>> {
    if !readable(t) {
        return None;
    }
    let (at, len) = (t.data_ptr(), t.numel());
    // SAFETY: as for `values`, and the tensor is the caller's alone.
    unsafe {
        Some(match t.kind() {
            Kind::Float => ValuesMut::F32(slice_mut(at.cast(), len)),
            Kind::BFloat16 => ValuesMut::Bf16(slice_mut(at.cast::<bf16>(), len)),
            Kind::Half => ValuesMut::F16(slice_mut(at.cast::<f16>(), len)),
            _ => return None,
        })
    }
}

/// The float32 values of `t`, where a kernel may read them.
pub fn floats(t: &Tensor) -> Option<&[f32]> {
    match values(t)? {
        Values::F32(x) => Some(x),
        _ => None,
    }
}

/// The same values in memory of their own, side by side.
///
/// # Errors
/// libtorch's, e.g. for lack of memory.
pub fn copied(t: &Tensor) -> Result<Tensor, tch::TchError> {
    let mut own = Tensor::f_empty(t.size(), (t.kind(), t.device()))?;
    own.f_copy_(t)?;
    Ok(own)
}

/// Bytes of a tensor from which on huge pages are asked for: weights that decoding reads again and again.
const LARGE: usize = 64 << 10;

/// Where the values of a large tensor on the CPU begin, and their bytes.
fn large(t: &Tensor) -> Option<(*const u8, usize)> {
    let bytes = t.numel() * t.kind().elt_size_in_bytes();
    (t.device() == Device::Cpu && bytes >= LARGE).then(|| (t.data_ptr().cast_const().cast(), bytes))
}

/// A new tensor with the values of `from`, in huge pages where it is large and on the CPU; they are there for sure once it
/// is [settled](settle_in_huge_pages).
///
/// # Errors
/// libtorch's, e.g. for lack of memory.
pub fn in_huge_pages(from: &Tensor, kind: Kind, device: Device) -> Result<Tensor, tch::TchError> {
    let mut to = empty_in_huge_pages(&from.size(), kind, device)?;
    to.f_copy_(from)?;
    Ok(to)
}

/// A new tensor whose values are still to be written, likewise.
///
/// # Errors
/// libtorch's, e.g. for lack of memory.
pub fn empty_in_huge_pages(shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, tch::TchError> {
    let to = Tensor::f_empty(shape, (kind, device))?;
    if let Some((at, bytes)) = large(&to) {
        nics_kernels::memory::prefer_huge_pages(at, bytes);
    }
    Ok(to)
}

/// Moves what a large tensor on the CPU still has in small pages into huge ones.
pub fn settle_in_huge_pages(t: &Tensor) {
    if let Some((at, bytes)) = large(t) {
        nics_kernels::memory::settle_in_huge_pages(at, bytes);
    }
}

fn readable(t: &Tensor) -> bool {
    t.device() == Device::Cpu && t.is_contiguous() && !t.requires_grad()
}

/// # Safety
/// As for `std::slice::from_raw_parts`, but `at` may be null when `len` is 0, as that of an empty tensor is.
unsafe fn slice<'a, T>(at: *const T, len: usize) -> &'a [T] {
    // SAFETY: the caller's promise.
    if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(at, len) } }
}

/// # Safety
/// As for `std::slice::from_raw_parts_mut`, but `at` may be null when `len` is 0.
unsafe fn slice_mut<'a, T>(at: *mut T, len: usize) -> &'a mut [T] {
    // SAFETY: the caller's promise.
    if len == 0 { &mut [] } else { unsafe { std::slice::from_raw_parts_mut(at, len) } }
}
