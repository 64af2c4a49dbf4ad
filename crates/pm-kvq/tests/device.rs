//! Pages on a device: libtorch's operations against the scalar kernel of the processor, over random shapes; the CUDA
//! kernels' source, run as C++, against the operations; and that source through NVRTC, where there is one.

#[path = "device/made.rs"]
mod made;

use made::{Block, assert_close, pages, random, read, tensor};
use nics_cuda::{Arch, Argument, Emulated, Grid, LOCATION, Nvrtc, Source};
use nics_kernels::{Isa, Kind, Pool, Values, ValuesMut};
use pm_kvq::Bits;
use pm_kvq::device::{Attention, Layout, Pages, SOURCE, Segments, Way, defines, unsupported};
use pm_kvq::kernel::narrow::{halve_with, quantize_with};
use pm_kvq::kernel::{Heads, Page, PageView, Rows, attend_with};
use proptest::prelude::*;
use tch::{Device, Tensor};

/// The scalar kernel over the same blocks.
fn scalar(layout: &Layout, q: &[f32], scale: f32, sequences: &[Vec<Block>]) -> Vec<f32> {
    let Layout { queries, kv_heads, head_dim, page, .. } = *layout;
    let groups = head_dim / layout.group;
    let rows = |block: &'_ Block, part: usize, head: usize| {
        let (first, row) = ((part * kv_heads + head) * page, block.bits.bytes(head_dim));
        // SAFETY: the block outlives the views.
        let block: &'static Block = unsafe { &*std::ptr::from_ref(block) };
        let bytes = &block.rows[first * row..][..block.tokens * row];
        if block.bits == Bits::B16 {
            return Rows::of_bytes(bytes, layout.exact);
        }
        let own = first * groups..(first + block.tokens) * groups;
        Rows::Codes(PageView {
            bits: block.bits,
            tokens: block.tokens,
            codes: bytes,
            scales: &block.scales[own.clone()],
            zeros: &block.zeros[own],
        })
    };
    let views: Vec<Vec<Page>> = sequences
        .iter()
        .map(|blocks| {
            let of_head = |head| {
                blocks
                    .iter()
                    .map(move |block| Page { keys: rows(block, 0, head), values: rows(block, 1, head) })
            };
            (0..kv_heads).flat_map(of_head).collect()
        })
        .collect();
    let views: Vec<&[Page]> = views.iter().map(Vec::as_slice).collect();
    let mut out = vec![0f32; q.len()];
    let heads = Heads { queries, keys: kv_heads, dim: head_dim };
    let pool = Pool::new(1).unwrap();
    attend_with(Isa::Scalar, &pool, heads, Values::F32(q), scale, &views, ValuesMut::F32(&mut out));
    out
}

/// Widths of pages, and tokens of the last one; exact pages come last, as in a cache.
fn sequence() -> impl Strategy<Value = (Vec<Bits>, usize)> {
    let bits = prop::sample::select(vec![Bits::B8, Bits::B4, Bits::B2, Bits::B2]);
    (prop::collection::vec(bits, 0..5), 0..3usize, any::<prop::sample::Index>()).prop_map(
        |(mut widths, exact, last)| {
            widths.extend(vec![Bits::B16; exact]);
            if widths.is_empty() {
                widths.push(Bits::B4);
            }
            (widths, last.index(1000))
        },
    )
}

fn blocks(layout: &Layout, (widths, last): &(Vec<Bits>, usize), seed: u64) -> Vec<Block> {
    let tokens = |i| if i + 1 == widths.len() { last % layout.page + 1 } else { layout.page };
    widths
        .iter()
        .enumerate()
        .map(|(i, bits)| Block::new(layout, *bits, tokens(i), seed ^ (i as u64) << 20))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn operations_equal_the_scalar_kernel(
        kv_heads in 1usize..4, of_group in 1usize..6,
        head_dim in prop::sample::select(vec![4usize, 32, 48, 64, 80, 96, 128, 192, 256]),
        divisor in prop::sample::select(vec![1usize, 1, 2, 4]),
        page in prop::sample::select(vec![1usize, 16, 100, 128, 300]), half in any::<bool>(),
        sequences in prop::collection::vec(sequence(), 1..3), sharp in 0.1f32..3.0, seed in any::<u64>(),
    ) {
        let exact = if half { Kind::F16 } else { Kind::Bf16 };
        let layout = Layout { queries: kv_heads * of_group, kv_heads, head_dim, group: head_dim / divisor, page, exact };
        let stored: Vec<Vec<Block>> =
            sequences.iter().enumerate().map(|(s, of)| blocks(&layout, of, seed ^ (s as u64) << 40)).collect();
        let scale = sharp / (head_dim as f32).sqrt();
        let shape = [stored.len() as i64, layout.queries as i64, head_dim as i64];
        let q = random(shape.iter().product::<i64>() as usize, seed ^ 0x77);
        let expected = Tensor::from_slice(&scalar(&layout, &q, scale, &stored)).reshape(shape);
        let on_device: Vec<Pages> = stored.iter().map(|blocks| pages(layout, blocks, Device::Cpu)).collect();
        let attention = Attention::new(layout, Device::Cpu).unwrap();
        let q = Tensor::from_slice(&q).reshape(shape);
        let got = attention.attend(&q, f64::from(scale), &on_device.iter().collect::<Vec<_>>()).unwrap();
        assert_close(&got, &expected, 2e-5);
    }

    #[test]
    fn operations_halve_to_the_same_bytes(
        kv_heads in 1usize..3, head_dim in prop::sample::select(vec![4usize, 32, 48, 64, 80, 96, 128, 192, 256]),
        divisor in prop::sample::select(vec![1usize, 2, 4]), page in 1usize..40, half in any::<bool>(), seed in any::<u64>(),
    ) {
        let exact = if half { Kind::F16 } else { Kind::Bf16 };
        let layout = Layout { queries: kv_heads, kv_heads, head_dim, group: head_dim / divisor, page, exact };
        let block = Block::new(&layout, Bits::B16, page, seed);
        let mut on_device = pages(layout, std::slice::from_ref(&block), Device::Cpu);
        let attention = Attention::new(layout, Device::Cpu).unwrap();
        let (mut rows, n) = (block.rows, 2 * kv_heads * page * head_dim);
        let (mut scales, mut zeros) = (vec![0f32; n / layout.group], vec![0f32; n / layout.group]);
        for bits in [Bits::B8, Bits::B4, Bits::B2] {
            match bits {
                Bits::B8 => quantize_with(Isa::Scalar, exact, head_dim, layout.group, &mut rows, &mut scales, &mut zeros),
                Bits::B4 => halve_with(Isa::Scalar, Bits::B8, head_dim, &mut rows, &mut scales),
                _ => halve_with(Isa::Scalar, Bits::B4, head_dim, &mut rows, &mut scales),
            }
            rows.truncate(bits.bytes(n));
            attention.halve(&mut on_device, 0..1).unwrap();
            prop_assert_eq!(on_device.pages()[0].bits(), bits);
            prop_assert_eq!(on_device.bytes(), rows.len() + 8 * scales.len());
            let (got, parameters) = read(&on_device.pages()[0]);
            prop_assert!(got == rows, "codes of {} bits", bits.get());
            prop_assert_eq!(parameters, [scales.clone(), zeros.clone()].concat());
        }
    }
}

#[test]
fn tokens_may_come_in_any_pieces() {
    let layout = Layout { queries: 4, kv_heads: 2, head_dim: 32, group: 32, page: 16, exact: Kind::Bf16 };
    let (keys, values) = (tensor(&[45, 2, 32], 1), tensor(&[45, 2, 32], 2));
    let mut whole = Pages::new(layout, Device::Cpu).unwrap();
    whole.append(&keys, &values).unwrap();
    let mut pieces = Pages::new(layout, Device::Cpu).unwrap();
    for (from, n) in [(0, 1), (1, 20), (21, 0), (21, 24)] {
        pieces.append(&keys.narrow(0, from, n), &values.narrow(0, from, n)).unwrap();
    }
    assert_eq!(pieces.tokens(), 45);
    for (a, b) in whole.pages().iter().zip(pieces.pages()) {
        assert_eq!((a.tokens(), read(a)), (b.tokens(), read(b)));
    }
    // A page that was halved takes no more rows.
    let attention = Attention::new(layout, Device::Cpu).unwrap();
    attention.halve(&mut pieces, 2..3).unwrap();
    pieces.append(&keys.narrow(0, 0, 1), &values.narrow(0, 0, 1)).unwrap();
    let tokens: Vec<usize> = pieces.pages().iter().map(pm_kvq::device::Page::tokens).collect();
    assert_eq!(tokens, [16, 16, 13, 1]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let layout = Layout { queries: 4, kv_heads: 2, head_dim: 32, group: 32, page: 16, exact: Kind::Bf16 };
    let attention = Attention::new(layout, Device::Cpu).unwrap();
    let Way::Operations { why } = attention.way() else { panic!("kernels on a processor") };
    assert!(why.contains("CUDA devices alone"), "{why}");
    let mut pages = Pages::new(layout, Device::Cpu).unwrap();
    let message = |e: pm_kvq::Error| e.to_string();
    let q = tensor(&[1, 4, 32], 1);
    let e = message(attention.attend(&q, 1.0, &[&pages]).unwrap_err());
    assert_eq!(e, "sequence 0 has no token to attend to");
    let e = message(attention.attend(&q, 1.0, &[]).unwrap_err());
    assert!(e.contains("[1, 4, 32]") && e.contains("expected [0, 4, 32]"), "{e}");
    let e = message(pages.append(&q, &q).unwrap_err());
    assert!(e.contains("expected [tokens, 2, 32] for both"), "{e}");
    let e = message(pages.push(Bits::B4, 17, &[], &[], &[]).unwrap_err());
    assert!(e.contains("a page of 17 tokens of 4 bits") && e.contains("at most 16"), "{e}");
    let block = Block::new(&layout, Bits::B2, 3, 1);
    pages.push(Bits::B2, 3, &block.rows, &block.scales, &block.zeros).unwrap();
    let e = message(attention.halve(&mut pages, 0..1).unwrap_err());
    assert_eq!(e, "page 0 has 2 bits, which are not halved");
    let e = message(attention.halve(&mut pages, 0..2).unwrap_err());
    assert_eq!(e, "pages 0..2 are to be halved, and there are 1");
    let other = Pages::new(Layout { page: 8, ..layout }, Device::Cpu).unwrap();
    assert!(message(attention.attend(&q, 1.0, &[&other]).unwrap_err()).contains("page: 8"));
    for (bad, says) in [
        (Layout { queries: 3, ..layout }, "queries is 3, expected a multiple of the 2 key heads"),
        (Layout { exact: Kind::F32, ..layout }, "exact is 32, expected bf16 or f16"),
        (Layout { group: 5, ..layout }, "groups of 5 values do not divide the head's 32 channels"),
        (Layout { page: 0, ..layout }, "page is 0"),
        (Layout { head_dim: 6, ..layout }, "head_dim is 6"),
    ] {
        let e = message(Pages::new(bad, Device::Cpu).unwrap_err());
        assert!(e.starts_with(says), "{e}");
    }
}

/// Layouts that the kernels serve: of each width of heads, one group a head or several, one query head or many.
const SERVED: [Layout; 4] = [
    Layout { queries: 10, kv_heads: 2, head_dim: 128, group: 128, page: 128, exact: Kind::Bf16 },
    Layout { queries: 6, kv_heads: 2, head_dim: 64, group: 16, page: 40, exact: Kind::F16 },
    Layout { queries: 1, kv_heads: 1, head_dim: 192, group: 64, page: 130, exact: Kind::F16 },
    Layout { queries: 8, kv_heads: 1, head_dim: 256, group: 256, page: 64, exact: Kind::Bf16 },
];

#[test]
fn layouts_that_the_kernels_serve_are_told_from_others() {
    assert!(SERVED.iter().all(|layout| unsupported(layout).is_none()));
    let [first, ..] = SERVED;
    for (bad, says) in [
        (Layout { head_dim: 80, group: 80, ..first }, "not 80"),
        (Layout { group: 8, ..first }, "not 8"),
        (Layout { queries: 34, ..first }, "17 query heads"),
        (Layout { queries: 32, head_dim: 256, group: 256, ..first }, "bytes of shared memory"),
    ] {
        let why = unsupported(&bad).unwrap();
        assert!(why.contains(says), "{why}");
    }
}

fn address<T>(of: &[T]) -> u64 {
    of.as_ptr() as u64
}

/// The kernels of a layout on the processor.
fn emulated(layout: &Layout) -> Emulated {
    let source = Source { name: "pm-kvq", text: SOURCE, defines: &defines(layout) };
    Emulated::compile(&source, &["attend", "combine", "quantize", "halve_8", "halve_4"])
}

fn grid(blocks: [u32; 2], threads: u32) -> Grid {
    Grid { blocks: [blocks[0], blocks[1], 1], threads, shared: 0 }
}

#[test]
fn the_kernels_as_cpp_equal_the_operations() {
    let mixed = |seed| (vec![Bits::B2, Bits::B4, Bits::B8, Bits::B2, Bits::B4, Bits::B16, Bits::B16], seed);
    for (i, layout) in SERVED.iter().enumerate() {
        let kernels = emulated(layout);
        let (heads, d, queries) = (layout.kv_heads as u32, layout.head_dim, layout.queries);
        let sequences = [mixed(31), (vec![Bits::B4], 0), (vec![Bits::B2; 4], 999)];
        let sequences: Vec<Pages> = sequences
            .iter()
            .map(|of| pages(*layout, &blocks(layout, of, 5 + i as u64), Device::Cpu))
            .collect();
        let sequences: Vec<&Pages> = sequences.iter().collect();
        let q = tensor(&[3, queries as i64, d as i64], 9);
        let segments = Segments::of(&sequences);
        let [chunks, first] = segments.offsets();
        let mut parts = vec![f32::NAN; segments.chunks * (queries * (2 + d))];
        let mut out = vec![f32::NAN; 3 * queries * d];
        let scale = 1.7 / (d as f64).sqrt();
        let factor = Argument::Float((scale * std::f64::consts::LOG2_E) as f32);
        let kv = Argument::Int(heads as i32);
        // SAFETY: the arguments of the kernels; what they point to lives on.
        unsafe {
            let words = address(&segments.words);
            let table = [words, words + 8 * chunks as u64];
            let pointers = [parts.as_mut_ptr() as u64, q.data_ptr() as u64, table[0], table[1]];
            let arguments = [&pointers.map(Argument::Pointer)[..], &[kv, factor]].concat();
            kernels.launch("attend", grid([segments.chunks as u32, heads], 128), &arguments);
            let pointers = [out.as_mut_ptr() as u64, address(&parts), words + 8 * first as u64];
            let arguments = [&pointers.map(Argument::Pointer)[..], &[kv]].concat();
            kernels.launch("combine", grid([3, queries as u32], d as u32), &arguments);
        }
        let expected = Attention::new(*layout, Device::Cpu).unwrap().attend(&q, scale, &sequences).unwrap();
        assert_close(&Tensor::from_slice(&out).reshape(q.size()), &expected, 2e-5);
    }
}

#[test]
fn the_kernels_as_cpp_halve_to_the_same_bytes() {
    for layout in &SERVED {
        let kernels = emulated(layout);
        let attention = Attention::new(*layout, Device::Cpu).unwrap();
        let n = 2 * layout.kv_heads * layout.page * layout.head_dim;
        let blocks = [1, 2].map(|seed| Block::new(layout, Bits::B16, layout.page, seed));
        let mut expected = pages(*layout, &blocks, Device::Cpu);
        let groups = n / layout.group;
        // Words, so that rows begin where loads of 16 bytes may.
        let mut rows: Vec<Vec<u128>> = blocks
            .iter()
            .map(|b| b.rows.chunks_exact(16).map(|x| u128::from_le_bytes(x.try_into().unwrap())).collect())
            .collect();
        let mut parameters = vec![vec![f32::NAN; 2 * groups]; 2];
        let steps = [(Bits::B16, "quantize"), (Bits::B8, "halve_8"), (Bits::B4, "halve_4")];
        for (from, kernel) in steps {
            let table: Vec<u64> = rows
                .iter_mut()
                .zip(&mut parameters)
                .flat_map(|(rows, own)| [rows.as_mut_ptr() as u64, own.as_mut_ptr() as u64])
                .collect();
            let counts = [from.bytes(n) as u64, groups as u64].map(Argument::Unsigned);
            let arguments = [Argument::Pointer(address(&table)), counts[0], counts[1]];
            // SAFETY: the arguments of the kernels; what they point to lives on.
            unsafe { kernels.launch(kernel, grid([2, 1], 512), &arguments) };
            attention.halve(&mut expected, 0..2).unwrap();
            for (i, page) in expected.pages().iter().enumerate() {
                let (codes, own) = read(page);
                let got: Vec<u8> = rows[i].iter().flat_map(|x| x.to_le_bytes()).take(codes.len()).collect();
                assert!(got == codes, "{layout:?}: page {i} from {} bits", from.get());
                assert_eq!(parameters[i], own);
            }
        }
    }
}

#[test]
fn the_kernels_compile_with_nvrtc() {
    let nvrtc = match Nvrtc::open() {
        Ok(found) => found,
        Err(e) if std::env::var_os(LOCATION).is_none() => {
            eprintln!("not tested, but by `cargo xtask check`: {e}");
            return;
        }
        Err(e) => panic!("{LOCATION} is set, but {e}"),
    };
    for (layout, majors) in [(SERVED[0], [8, 9].as_slice()), (SERVED[1], &[8]), (SERVED[2], &[9])] {
        for major in majors {
            let source = Source { name: "pm-kvq", text: SOURCE, defines: &defines(&layout) };
            let code = nvrtc.compile(&source, Arch { major: *major, minor: 0 }).unwrap();
            assert!(code.starts_with(b"\x7fELF"));
        }
    }
}
