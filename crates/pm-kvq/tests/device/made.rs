//! Pages of random codes and rows, for the tests of the module `device`.

use half::{bf16, f16};
use nics_kernels::Kind;
use pm_kvq::device::{Layout, Pages};
use pm_kvq::{Bits, pack};
use tch::{Device, Tensor};

/// Values of a seed, between -1 and 1.
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub fn tensor(shape: &[i64], seed: u64) -> Tensor {
    Tensor::from_slice(&random(shape.iter().product::<i64>() as usize, seed)).reshape(shape)
}

/// A page as the processor's cache keeps it: `[keys and values, kv_heads, tokens of a page, ..]`.
pub struct Block {
    pub bits: Bits,
    pub tokens: usize,
    pub rows: Vec<u8>,
    pub scales: Vec<f32>,
    pub zeros: Vec<f32>,
}

impl Block {
    pub fn new(layout: &Layout, bits: Bits, tokens: usize, seed: u64) -> Self {
        let n = 2 * layout.kv_heads * layout.page * layout.head_dim;
        let x = random(n, seed);
        if bits == Bits::B16 {
            let rows = x.iter().flat_map(|x| match layout.exact {
                Kind::F16 => f16::from_f32(*x).to_le_bytes(),
                _ => bf16::from_f32(*x).to_le_bytes(),
            });
            return Self { bits, tokens, rows: rows.collect(), scales: Vec::new(), zeros: Vec::new() };
        }
        let levels = bits.levels() as f32;
        let codes: Vec<u8> = x.iter().map(|x| ((x + 1.0) / 2.0 * levels).round() as u8).collect();
        let mut rows = vec![0; bits.bytes(n)];
        pack::pack(bits, layout.head_dim, &codes, &mut rows);
        let groups = n / layout.group;
        let scales = random(groups, seed ^ 3).iter().map(|x| (x + 1.1) / levels).collect();
        Self { bits, tokens, rows, scales, zeros: random(groups, seed ^ 5) }
    }
}

/// The same pages as tensors. Exact pages are appended as rows, so all but the last of them are full.
pub fn pages(layout: Layout, blocks: &[Block], device: Device) -> Pages {
    let mut pages = Pages::new(layout, device).unwrap();
    for block in blocks {
        if block.bits == Bits::B16 {
            let values: Vec<f32> = block
                .rows
                .chunks_exact(2)
                .map(|x| match layout.exact {
                    Kind::F16 => f16::from_le_bytes([x[0], x[1]]).to_f32(),
                    _ => bf16::from_le_bytes([x[0], x[1]]).to_f32(),
                })
                .collect();
            let shape = [2, layout.kv_heads, layout.page, layout.head_dim].map(|n| n as i64);
            let both = Tensor::from_slice(&values).reshape(shape).narrow(2, 0, block.tokens as i64);
            let both = both.transpose(1, 2);
            pages.append(&both.get(0), &both.get(1)).unwrap();
        } else {
            pages.push(block.bits, block.tokens, &block.rows, &block.scales, &block.zeros).unwrap();
        }
    }
    pages
}

/// The bytes of a page's rows, and its scales and zeros.
pub fn read(page: &pm_kvq::device::Page) -> (Vec<u8>, Vec<f32>) {
    let bytes = page.rows().to_device(Device::Cpu).view_dtype(tch::Kind::Uint8).reshape([-1]);
    let mut rows = vec![0; bytes.numel()];
    bytes.copy_data(&mut rows, bytes.numel());
    let parameters = page.parameters().map_or(Vec::new(), |t| {
        let t = t.to_device(Device::Cpu).reshape([-1]);
        let mut own = vec![0f32; t.numel()];
        t.copy_data(&mut own, t.numel());
        own
    });
    (rows, parameters)
}

pub fn assert_close(got: &Tensor, expected: &Tensor, within: f64) {
    assert_eq!(got.size(), expected.size());
    let got = got.to_device(Device::Cpu).to_kind(tch::Kind::Double);
    let expected = expected.to_device(Device::Cpu).to_kind(tch::Kind::Double);
    let most = (got - expected).abs().max().double_value(&[]);
    assert!(most <= within, "differs by {most}");
}
