//! The largest of many values, e.g. of the logits of a vocabulary, in one pass.
//!
//! A block of values is passed over with one comparison each unless one of them is above the least that is kept; those
//! survivors are gathered and cut back to the largest whenever there are twice as many as are wanted.

use crate::each_kind;
use crate::element::{Element, Values};
use crate::isa::Isa;

/// Values that are compared together.
const BLOCK: usize = 64;

/// The `k` largest of `values`, descending, in f32; all of them when there are fewer. Values that are no numbers come first.
pub fn largest(values: Values, k: usize) -> Vec<f32> {
    largest_with(Isa::detect(), values, k)
}

/// [`largest`] with chosen instructions.
///
/// # Panics
/// When the processor lacks the instructions.
pub fn largest_with(isa: Isa, values: Values, k: usize) -> Vec<f32> {
    isa.assert_available();
    if k == 0 {
        return Vec::new();
    }
    each_kind!(values, Values, v => match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has these instructions, as asserted above.
        Isa::Avx512 => unsafe { scan_avx512(v, k) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has these instructions, as asserted above.
        Isa::Avx2 => unsafe { scan_avx2(v, k) },
        _ => scan(v, k),
    })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn scan_avx2<T: Element>(values: &[T], k: usize) -> Vec<f32> {
    scan(values, k)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn scan_avx512<T: Element>(values: &[T], k: usize) -> Vec<f32> {
    scan(values, k)
}

#[allow(clippy::neg_cmp_op_on_partial_ord)] // What is no number is on the side of the large ones.
#[inline(always)]
fn scan<T: Element>(values: &[T], k: usize) -> Vec<f32> {
    let mut kept: Vec<f32> = Vec::with_capacity(2 * k + BLOCK);
    let mut least = f32::NEG_INFINITY;
    for block in values.chunks(BLOCK) {
        // Not `>`: what is no number is kept, too. Without a branch, so that it becomes vector code.
        let mut any = kept.len() < k;
        for v in block {
            any |= !(v.to_f32() <= least);
        }
        if !any {
            continue;
        }
        let full = kept.len() >= k;
        kept.extend(block.iter().map(|v| v.to_f32()).filter(|&v| !full || !(v <= least)));
        if kept.len() >= 2 * k {
            kept.select_nth_unstable_by(k - 1, descending);
            kept.truncate(k);
            least = kept[k - 1];
        }
    }
    kept.sort_unstable_by(descending);
    kept.truncate(k);
    kept
}

/// The largest first, before it what is no number, whatever its sign.
#[allow(clippy::trivially_copy_pass_by_ref)] // As `sort_by` hands them over.
fn descending(a: &f32, b: &f32) -> std::cmp::Ordering {
    b.is_nan().cmp(&a.is_nan()).then(b.total_cmp(a))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// A sequence without an end that looks random.
    fn noise(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 1024.0 - 8000.0
        }
    }

    fn sorted(values: &[f32], k: usize) -> Vec<f32> {
        let mut all = values.to_vec();
        all.sort_by(descending);
        all.truncate(k);
        all
    }

    #[test]
    fn equals_sorting_whatever_size_order_and_instructions() {
        for (seed, n) in [0usize, 1, 63, 64, 65, 200, 1000, 5000].into_iter().enumerate() {
            let mut next = noise(seed as u64 + 1);
            let random: Vec<f32> = (0..n).map(|_| next()).collect();
            let (mut up, mut down, few) =
                (random.clone(), random.clone(), random.iter().map(|v| v % 3.0).collect());
            up.sort_by(f32::total_cmp);
            down.sort_by(|a, b| b.total_cmp(a));
            let ends = vec![f32::NEG_INFINITY; n];
            for values in [random, up, down, few, ends] {
                let narrow: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
                let wide: Vec<f32> = narrow.iter().map(|v| v.to_f32()).collect();
                for k in [0, 1, 3, 100, n, n + 7] {
                    for isa in Isa::available() {
                        assert_eq!(
                            largest_with(isa, Values::F32(&values), k),
                            sorted(&values, k),
                            "{n} {k} {isa}"
                        );
                        assert_eq!(
                            largest_with(isa, Values::Bf16(&narrow), k),
                            sorted(&wide, k),
                            "{n} {k} {isa}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_is_not_lost() {
        for sign in [1.0f32, -1.0] {
            let mut values: Vec<f32> = (0..500).map(|i| i as f32).collect();
            values[3] = f32::NAN.copysign(sign);
            values[400] = f32::INFINITY;
            for isa in Isa::available() {
                let found = largest_with(isa, Values::F32(&values), 4);
                assert!(found[0].is_nan(), "{found:?}");
                assert_eq!(found[1..], [f32::INFINITY, 499.0, 498.0]);
            }
        }
    }
}
