//! The CUDA kernels on a device, against libtorch's operations there: `cargo test -p pm-kvq --test device_gpu -- --ignored`, after
//! `cargo xtask setup --cuda`.

#[path = "device/made.rs"]
mod made;

use made::{Block, assert_close, pages, read, tensor};
use nics_core::device::DeviceSpec;
use nics_kernels::Kind;
use pm_kvq::Bits;
use pm_kvq::device::{Attention, Layout, Pages, Way};
use tch::Device;

const LAYOUTS: [Layout; 4] = [
    Layout { queries: 40, kv_heads: 8, head_dim: 128, group: 128, page: 128, exact: Kind::Bf16 },
    Layout { queries: 6, kv_heads: 2, head_dim: 64, group: 16, page: 40, exact: Kind::F16 },
    Layout { queries: 3, kv_heads: 3, head_dim: 192, group: 64, page: 130, exact: Kind::F16 },
    Layout { queries: 16, kv_heads: 2, head_dim: 256, group: 256, page: 64, exact: Kind::Bf16 },
];

/// By kernels, and by operations.
fn both(layout: Layout) -> (Device, Attention, Attention) {
    let device = DeviceSpec::Cuda(0).open().unwrap();
    let kernels = Attention::new(layout, device).unwrap();
    assert_eq!(kernels.way(), Way::Kernels);
    (device, kernels, Attention::by_operations(layout, device).unwrap())
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_the_kernel_attends_as_the_operations_do() {
    for layout in LAYOUTS {
        let (device, kernels, operations) = both(layout);
        let blocks = |n: usize, seed: u64| -> Vec<Block> {
            let widths = [Bits::B2, Bits::B4, Bits::B4, Bits::B8];
            let page = |i| Block::new(&layout, widths[i % 4], layout.page, seed + i as u64);
            (0..n).map(page).chain([Block::new(&layout, Bits::B16, 1 + n % layout.page, seed)]).collect()
        };
        let sequences: Vec<Pages> =
            [(70, 1), (3, 2), (0, 3)].map(|(n, seed)| pages(layout, &blocks(n, seed), device)).into();
        let sequences: Vec<&Pages> = sequences.iter().collect();
        let q = tensor(&[3, layout.queries as i64, layout.head_dim as i64], 7).to_device(device);
        let scale = 2.0 / (layout.head_dim as f64).sqrt();
        let got = kernels.attend(&q, scale, &sequences).unwrap();
        assert_close(&got, &operations.attend(&q, scale, &sequences).unwrap(), 1e-4);
        // Alone: the same bits.
        for (s, sequence) in sequences.iter().enumerate() {
            let alone = kernels.attend(&q.narrow(0, s as i64, 1), scale, &[sequence]).unwrap();
            assert_eq!(alone, got.narrow(0, s as i64, 1));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_pages_are_halved_to_the_same_bytes() {
    for layout in LAYOUTS {
        let (device, kernels, operations) = both(layout);
        let blocks: Vec<Block> = (0..5).map(|i| Block::new(&layout, Bits::B16, layout.page, i)).collect();
        let (mut one, mut other) = (pages(layout, &blocks, device), pages(layout, &blocks, device));
        // Pages of several widths at once.
        for which in [0..3, 1..5, 1..3, 3..5, 0..1, 0..1] {
            kernels.halve(&mut one, which.clone()).unwrap();
            operations.halve(&mut other, which).unwrap();
            for (a, b) in one.pages().iter().zip(other.pages()) {
                assert_eq!(a.bits(), b.bits());
                assert!(read(a) == read(b), "{layout:?}: a page of {} bits", a.bits().get());
            }
        }
    }
}
