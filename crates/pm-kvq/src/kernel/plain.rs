//! The reference: one token after the other, for heads of any width.

use nics_kernels::Element;
use nics_kernels::attention::exponentials;
use nics_kernels::each_kind;

use super::{Page, PageView, Rows};
use crate::pack;

/// One piece of one key head: as `piece::attend`.
pub fn attend(q: &[f32], pages: &[Page<'_>], dim: usize, part: &mut [f32]) {
    let group = q.len() / dim;
    let tokens: usize = pages.iter().map(|page| page.keys.tokens(dim)).sum();
    let mut scores = vec![0f32; group * tokens];
    let mut t = 0;
    each_row(pages.iter().map(|page| page.keys), dim, |key| {
        for (g, q) in q.chunks_exact(dim).enumerate() {
            scores[g * tokens + t] = q.iter().zip(key).map(|(q, k)| q * k).sum();
        }
        t += 1;
    });
    exponentials(&mut scores, tokens, tokens, part);
    let sums = &mut part[2 * group..];
    sums.fill(0.0);
    let mut t = 0;
    each_row(pages.iter().map(|page| page.values), dim, |value| {
        for (g, sums) in sums.chunks_exact_mut(dim).enumerate() {
            let e = scores[g * tokens + t];
            sums.iter_mut().zip(value).for_each(|(sum, v)| *sum += e * v);
        }
        t += 1;
    });
}

/// Hands over every token's row.
fn each_row<'a>(rows: impl Iterator<Item = Rows<'a>>, dim: usize, mut take: impl FnMut(&[f32])) {
    let (mut codes, mut row) = (vec![0u8; dim], vec![0f32; dim]);
    for rows in rows {
        match rows {
            Rows::Codes(PageView { bits, tokens, codes: packed, scales, zeros }) => {
                let (bytes, groups) = (bits.bytes(dim), scales.len() / tokens);
                for t in 0..tokens {
                    pack::unpack(bits, dim, &packed[t * bytes..][..bytes], &mut codes);
                    for (i, (x, code)) in row.iter_mut().zip(&codes).enumerate() {
                        let g = t * groups + i / (dim / groups);
                        *x = f32::from(*code) * scales[g] - zeros[g];
                    }
                    take(&row);
                }
            }
            Rows::Blocks(blocks) => {
                let (bytes, block) = blocks.parts();
                for token in bytes.chunks_exact(dim / 32 * block) {
                    for (x, block) in row.chunks_exact_mut(32).zip(token.chunks_exact(block)) {
                        x.copy_from_slice(&blocks.dequantize(block));
                    }
                    take(&row);
                }
            }
            Rows::Exact(values) => each_kind!(values, Values, values => {
                for values in values.chunks_exact(dim) {
                    row.iter_mut().zip(values).for_each(|(x, v)| *x = Element::to_f32(*v));
                    take(&row);
                }
            }),
        }
    }
}
