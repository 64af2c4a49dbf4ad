//! Weights in 8-bit integers with a scale for each row, made into float32 as they are read.

use nics_core::nn::memory::floats;
use nics_kernels::Pool;
use nics_kernels::gemv::shares;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Outputs whose sums are taken together: each value of `x` is loaded once for all of them.
const TOGETHER: usize = 4;
/// Independent sums of a dot product.
const LANES: usize = 16;
/// Bytes of a line of the caches.
const LINE: usize = 64;
/// Bytes by which weights are asked for ahead of what is read, at least.
const AHEAD: usize = 8 << 10;

/// `weight` (`[out, in]`, float32) as values (int8, `[out, in]`) and scales (`[out]`): the row's largest magnitude
/// becomes 127.
pub fn quantize(weight: &Tensor) -> Result<(Tensor, Tensor)> {
    let largest = weight.f_abs()?.f_amax(1, false)?;
    let scale = largest.f_div_scalar(127.0)?;
    // A row of zeros stays one under any scale.
    let scale = scale.f_masked_fill(&scale.f_eq(0.0)?, 1.0)?;
    let values = weight.f_div(&scale.f_unsqueeze(1)?)?.f_round()?.f_clamp(-127.0, 127.0)?;
    Ok((values.f_to_kind(Kind::Int8)?, scale))
}

struct Results(*mut f32);
// SAFETY: tasks write disjoint outputs, and the tensor behind the pointer outlives the call.
unsafe impl Sync for Results {}

/// `y = (x valuesᵀ) * scale + bias` for a few rows. `x` `[rows, input]`, `y` `[rows, out]`, all on the CPU and contiguous.
pub fn product(
    pool: &Pool,
    x: &Tensor,
    values: &Tensor,
    scale: &Tensor,
    bias: &Tensor,
    y: &mut Tensor,
    input: usize,
) -> Result<()> {
    let (Some(xs), Some(scale), Some(bias)) = (floats(x), floats(scale), floats(bias)) else {
        return Err(Error::Input("int8 weights take float32 rows on the CPU, without gradients".into()));
    };
    let out = scale.len();
    let rows = xs.len() / input.max(1);
    let fits = values.kind() == Kind::Int8
        && values.device() == Device::Cpu
        && values.is_contiguous()
        && values.size() == [out as i64, input as i64]
        && y.is_contiguous()
        && y.size() == [rows as i64, out as i64]
        && y.kind() == Kind::Float;
    if !fits {
        return Err(Error::Input(format!(
            "int8 weights of shape {:?} do not fit {rows} rows of {input}",
            values.size()
        )));
    }
    // SAFETY: a contiguous int8 tensor on the CPU has `out * input` values at its pointer and outlives the call.
    let weights: &[i8] =
        unsafe { std::slice::from_raw_parts(values.data_ptr().cast_const().cast(), out * input) };
    let results = Results(y.data_ptr().cast());
    let results = &results;
    let tasks: Vec<_> = shares(out, input, pool.threads()).collect();
    pool.run(tasks.len(), &|task| {
        let outputs = tasks[task].clone();
        for first in outputs.clone().step_by(TOGETHER) {
            let count = TOGETHER.min(outputs.end - first);
            // A missing output takes the weights of the last one; its sum is thrown away.
            let weights: [&[i8]; TOGETHER] = std::array::from_fn(|i| {
                let o = first + i.min(count - 1);
                &weights[o * input..(o + 1) * input]
            });
            for row in 0..rows {
                let sums = dots(weights, &xs[row * input..(row + 1) * input]);
                for (o, sum) in (first..first + count).zip(sums) {
                    // SAFETY: `row < rows` and `o < out` are inside `y`; this task alone writes these outputs.
                    unsafe { results.0.add(row * out + o).write(sum * scale[o] + bias[o]) };
                }
            }
        }
    });
    Ok(())
}

/// A sum of products for each row of weights, with the best instructions there are.
fn dots(weights: [&[i8]; TOGETHER], x: &[f32]) -> [f32; TOGETHER] {
    #[cfg(target_arch = "x86_64")]
    match nics_kernels::Isa::detect() {
        // SAFETY: the processor has these instructions.
        nics_kernels::Isa::Avx512 => return unsafe { dots_avx512(weights, x) },
        // SAFETY: the processor has these instructions.
        nics_kernels::Isa::Avx2 => return unsafe { dots_avx2(weights, x) },
        nics_kernels::Isa::Scalar => {}
    }
    weights.map(|weights| dot_lanes(weights, x))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn dots_avx512(weights: [&[i8]; TOGETHER], x: &[f32]) -> [f32; TOGETHER] {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_reduce_add_ps, _mm512_setzero_ps,
    };
    let whole = x.len() / (2 * LANES) * (2 * LANES);
    assert!(weights.iter().all(|w| w.len() == x.len()));
    let mut sums = [[_mm512_setzero_ps(); 2]; TOGETHER];
    // The outputs that come next lie behind these. Four short rows in turns are no pattern that the processor foresees.
    let ahead = AHEAD.next_multiple_of(TOGETHER * x.len().max(1));
    for at in (0..whole).step_by(2 * LANES) {
        if at % LINE == 0 {
            for w in weights {
                // A prefetch from anywhere is sound; beyond the last weights it is lost.
                _mm_prefetch::<_MM_HINT_T0>(w.as_ptr().wrapping_add(ahead + at));
            }
        }
        for half in 0..2 {
            let at = at + half * LANES;
            // SAFETY: 16 values from `at` on lie below `whole`, which is at most the length of `x` and of all weights.
            unsafe {
                let v = _mm512_loadu_ps(x.as_ptr().add(at));
                for (sum, w) in sums.iter_mut().zip(weights) {
                    let w = _mm512_cvtepi8_epi32(_mm_loadu_si128(w.as_ptr().add(at).cast()));
                    sum[half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(w), v, sum[half]);
                }
            }
        }
    }
    let mut result = [0.0; TOGETHER];
    for ((result, sum), w) in result.iter_mut().zip(sums).zip(weights) {
        let rest: f32 = w[whole..].iter().zip(&x[whole..]).map(|(&w, &v)| f32::from(w) * v).sum();
        *result = _mm512_reduce_add_ps(sum[0]) + _mm512_reduce_add_ps(sum[1]) + rest;
    }
    result
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dots_avx2(weights: [&[i8]; TOGETHER], x: &[f32]) -> [f32; TOGETHER] {
    weights.map(|weights| dot_lanes(weights, x))
}

/// Sums in lanes, which the compiler makes into vectors.
#[allow(clippy::inline_always)] // Gets the caller's instructions by being inlined.
#[inline(always)]
fn dot_lanes(weights: &[i8], x: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (mut w, mut v) = (weights.chunks_exact(LANES), x.chunks_exact(LANES));
    for (w, v) in w.by_ref().zip(v.by_ref()) {
        for ((sum, &w), &v) in sums.iter_mut().zip(w).zip(v) {
            *sum += f32::from(w) * v;
        }
    }
    for ((sum, &w), &v) in sums.iter_mut().zip(w.remainder()).zip(v.remainder()) {
        *sum += f32::from(w) * v;
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_kernel_equals_libtorch_over_the_same_values(
            rows in 1i64..17, input in 1i64..200, out in 1i64..150, seed in 0u64..1000,
        ) {
            use rand::{RngExt, SeedableRng};
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            let mut random = |shape: &[i64]| {
                let n: i64 = shape.iter().product();
                let values: Vec<f32> = (0..n).map(|_| rng.random::<f32>() - 0.5).collect();
                Tensor::from_slice(&values).reshape(shape)
            };
            let (x, w, bias) = (random(&[rows, input]), random(&[out, input]), random(&[out]));
            let (values, scale) = quantize(&w).unwrap();
            let dense = values.to_kind(Kind::Float) * scale.unsqueeze(1);
            // Half a step of the largest magnitude at most.
            let error = (&dense - &w).abs().amax(1, false) - &scale * 0.5001;
            prop_assert!(error.max().double_value(&[]) <= 0.0);
            let mut y = Tensor::zeros([rows, out], (Kind::Float, Device::Cpu));
            product(&nics_kernels::pool::own(), &x, &values, &scale, &bias, &mut y, input as usize).unwrap();
            let expected = x.linear(&dense, Some(&bias));
            // Whatever instructions this machine has, the plain sums are held too.
            let weights: Vec<i8> = Vec::try_from(values.reshape([-1])).unwrap();
            let first: Vec<f32> = Vec::try_from(x.get(0)).unwrap();
            let rows: [&[i8]; TOGETHER] = [&weights[..input as usize]; TOGETHER];
            let plain = dot_lanes(rows[0], &first);
            for sum in dots(rows, &first) {
                prop_assert!((sum - plain).abs() <= 1e-4 * plain.abs().max(100.0));
            }
            prop_assert!((y - expected).abs().max().double_value(&[]) < 1e-4);
        }
    }
}
