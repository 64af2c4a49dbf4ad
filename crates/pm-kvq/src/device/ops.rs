//! The same by libtorch's operations, on any device and for heads of any width.

use tch::{Device, Kind, Tensor};

use super::pages::{Layout, Page, Pages};
use crate::{Bits, Result, pack};

/// Tokens that are unpacked at a time.
const PIECE: usize = 4096;

/// As [`super::Attention::attend`], of float32 queries.
pub fn attend(layout: &Layout, q: &Tensor, scale: f64, sequences: &[&Pages]) -> Result<Tensor> {
    let (kv, d) = (layout.kv_heads as i64, layout.head_dim as i64);
    let group = (layout.queries / layout.kv_heads) as i64;
    let mut rows = Vec::with_capacity(sequences.len());
    for (s, sequence) in sequences.iter().enumerate() {
        let q = q.f_select(0, s as i64)?.f_reshape([kv, group, d])?.f_mul_scalar(scale)?;
        // The largest score so far, the sum of the exponentials, the sum of the weighted values.
        let mut kept: Option<[Tensor; 3]> = None;
        let pages: Vec<&Page> = sequence.pages().iter().filter(|page| page.tokens > 0).collect();
        let mut from = 0;
        while from < pages.len() {
            let (mut to, mut tokens) = (from, 0);
            while to < pages.len() && pages[to].bits == pages[from].bits && (tokens < PIECE || to == from) {
                tokens += pages[to].tokens;
                to += 1;
            }
            let both = values(layout, &pages[from..to])?;
            let (keys, values) = (both.f_select(0, 0)?, both.f_select(0, 1)?);
            let scores = q.f_matmul(&keys.f_transpose(1, 2)?)?; // [kv, group, tokens]
            let own = scores.f_amax([-1].as_slice(), true)?;
            let max = match &kept {
                Some([max, ..]) => max.f_maximum(&own)?,
                None => own,
            };
            let e = scores.f_sub(&max)?.f_exp()?;
            let (mut total, mut sum) =
                (e.f_sum_dim_intlist([-1].as_slice(), true, Kind::Float)?, e.f_matmul(&values)?);
            if let Some([old_max, old_total, old_sum]) = &kept {
                let weight = old_max.f_sub(&max)?.f_exp()?;
                total = total.f_add(&old_total.f_mul(&weight)?)?;
                sum = sum.f_add(&old_sum.f_mul(&weight)?)?;
            }
            kept = Some([max, total, sum]);
            from = to;
        }
        if let Some([_, total, sum]) = kept {
            rows.push(sum.f_div(&total)?.f_reshape([layout.queries as i64, d])?);
        }
    }
    Ok(Tensor::f_stack(&rows, 0)?)
}

/// Keys and values of pages of one width, float32 `[2, kv_heads, tokens, head_dim]`.
fn values(layout: &Layout, pages: &[&Page]) -> Result<Tensor> {
    let joined = |of: &dyn Fn(&Page) -> Result<Tensor>, axis: i64| -> Result<Tensor> {
        let parts = pages
            .iter()
            .map(|page| Ok(of(page)?.f_narrow(axis, 0, page.tokens as i64)?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&parts, axis)?)
    };
    let rows = joined(&|page| Ok(page.rows.shallow_clone()), 2)?;
    let bits = pages.first().map_or(Bits::B16, |page| page.bits);
    if bits == Bits::B16 {
        return Ok(rows.f_to_kind(Kind::Float)?);
    }
    let x = unpack(bits, layout.head_dim, &rows)?.f_to_kind(Kind::Float)?;
    let parameters = |part| {
        let own = move |page: &Page| match &page.parameters {
            Some(parameters) => Ok(parameters.f_select(0, part)?),
            None => Ok(Tensor::f_zeros([0, 0, 0, 0], (Kind::Float, Device::Cpu))?),
        };
        joined(&own, 2)?.f_unsqueeze(-1).map_err(crate::Error::from)
    };
    let shape = x.size();
    let x = x.f_reshape([shape[0], shape[1], shape[2], layout.groups() as i64, layout.group as i64])?;
    Ok(x.f_mul(&parameters(0)?)?.f_sub(&parameters(1)?)?.f_reshape(shape)?)
}

/// Where the codes of a byte begin, uint8 `[codes of a byte, 1]`.
fn shifts(bits: Bits, device: Device) -> Result<Tensor> {
    let shifts: Vec<u8> = (0..8 / bits.get()).map(|p| (p * bits.get()) as u8).collect();
    Ok(Tensor::f_from_slice(&shifts)?.f_unsqueeze(-1)?.f_to_device(device)?)
}

/// Codes, uint8 `[.., head_dim]`, of rows of 8, 4 or 2 bits in the native layout.
fn unpack(bits: Bits, head_dim: usize, rows: &Tensor) -> Result<Tensor> {
    if bits == Bits::B8 {
        return Ok(rows.shallow_clone());
    }
    let mut shape = rows.size();
    let stride = bits.bytes(pack::run(bits, head_dim)) as i64;
    // Byte j of a run holds codes j, j + stride, ..: [runs, bytes] -> [runs, codes of a byte, bytes]
    let runs = rows.f_reshape([-1, 1, stride])?;
    let codes =
        runs.f_bitwise_right_shift(&shifts(bits, rows.device())?)?.f_bitwise_and(i64::from(bits.levels()))?;
    if let Some(last) = shape.last_mut() {
        *last = head_dim as i64;
    }
    Ok(codes.f_reshape(shape)?)
}

/// What [`unpack`] undoes.
fn pack(bits: Bits, head_dim: usize, codes: &Tensor) -> Result<Tensor> {
    if bits == Bits::B8 {
        return Ok(codes.shallow_clone());
    }
    let mut shape = codes.size();
    let stride = bits.bytes(pack::run(bits, head_dim)) as i64;
    let planes = i64::from(8 / bits.get());
    let placed =
        codes.f_reshape([-1, planes, stride])?.f_bitwise_left_shift(&shifts(bits, codes.device())?)?;
    if let Some(last) = shape.last_mut() {
        *last = bits.bytes(head_dim) as i64;
    }
    // The codes of a byte do not overlap: their sum is their union.
    Ok(placed.f_sum_dim_intlist([1].as_slice(), false, Kind::Uint8)?.f_reshape(shape)?)
}

/// Halves a page that has more than 2 bits.
pub fn halve(layout: &Layout, page: &mut Page) -> Result<()> {
    let d = layout.head_dim;
    let Some(half) = page.bits.half() else { return Ok(()) };
    match &mut page.parameters {
        None => {
            let [_, heads, tokens, groups] = layout.shape(layout.groups());
            let x = page.rows.f_to_kind(Kind::Float)?;
            let x = x.f_reshape([2, heads, tokens, groups, layout.group as i64])?;
            let least = x.f_amin([-1].as_slice(), true)?;
            // A divisor on the device: by a number, CUDA multiplies with its inverse.
            let levels = Tensor::f_from_slice(&[255f32])?.f_to_device(x.device())?;
            let scale = x.f_amax([-1].as_slice(), true)?.f_sub(&least)?.f_div(&levels)?.f_clamp(1e-5, 1e5)?;
            let zero = least.f_neg()?;
            let codes = x.f_add(&zero)?.f_div(&scale)?.f_round()?.f_clamp(0.0, 255.0)?;
            page.rows = codes.f_to_kind(Kind::Uint8)?.f_reshape(layout.shape(d))?;
            page.parameters = Some(Tensor::f_stack(&[scale, zero], 0)?.f_squeeze_dim(-1)?);
        }
        Some(parameters) => {
            let h = half.get();
            let codes = unpack(page.bits, d, &page.rows)?.f_to_kind(Kind::Int)?;
            let (add, factor) = (1i64 << (h - 1), (1i64 << (2 * h)) - (1 << h) + 1);
            let codes = codes.f_add_scalar(add)?.f_mul_scalar(factor)?;
            let codes =
                codes.f_bitwise_right_shift_tensor_scalar(i64::from(3 * h))?.f_to_kind(Kind::Uint8)?;
            page.rows = pack(half, d, &codes)?;
            let mut scales = parameters.f_select(0, 0)?;
            let _ = scales.f_mul_scalar_((1i64 << h) + 1)?;
        }
    }
    page.bits = half;
    Ok(())
}
