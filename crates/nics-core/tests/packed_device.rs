//! Packed weights as they lie on a device: libtorch's operations over them against the codes' meaning in double precision,
//! the CUDA kernels' source, run as C++, against those operations, and on a GPU the kernels themselves.

use nics_core::device::DeviceSpec;
use nics_core::nn::{DeviceWeight, PackedLinear};
use nics_core::seam::Projection;
use nics_cuda::packed::{ROWS, SOURCE, dequantize, names, product};
use nics_cuda::{Emulated, Source};
use nics_kernels::packed::{Packed, Rounding};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

/// A weight of random codes, scales of half precision or with more bits, and zeros.
fn random(bits: u32, [out, input]: [usize; 2], group: usize, fine: bool, seed: u64) -> Packed {
    let levels = 1i64 << bits;
    let groups = input / group;
    let uniform = |n: usize, most: i64, seed: u64| -> Vec<i64> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = move |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as i64 % most
        };
        (0..n).map(next).collect()
    };
    let whole = |n, seed| -> Vec<u8> { uniform(n, levels, seed).into_iter().map(|x| x as u8).collect() };
    let scale = |x: i64| {
        let s = 0.01 + x as f32 * 1e-5;
        if fine { s } else { half::f16::from_f32(s).to_f32() }
    };
    let scales: Vec<f32> = uniform(out * groups, 1000, seed ^ 3).into_iter().map(scale).collect();
    Packed::new(bits, [out, input], group, &whole(out * input, seed), &scales, &whole(out * groups, seed ^ 5))
        .unwrap()
}

/// What a weight means, in double precision.
fn meant(weight: &Packed) -> Tensor {
    let mut whole = vec![0f32; weight.out() * weight.input()];
    weight.dequantize(0, &mut whole);
    Tensor::from_slice(&whole).reshape([weight.out() as i64, -1]).to_kind(Kind::Double)
}

/// Numbers of a seed, uniform from -1 to 1.
fn input(shape: &[i64], kind: Kind, seed: u64) -> Tensor {
    let n: i64 = shape.iter().product();
    let x: Vec<f32> = (0..n as u64)
        .map(|i| {
            let mixed = (i + 1).wrapping_mul(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15));
            (mixed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_slice(&x).reshape(shape).to_kind(kind)
}

/// How far `found` is from `expected` at most, in multiples of the largest expected value.
fn off(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let [found, expected] = [found, expected].map(|t| t.to_device(Device::Cpu).to_kind(Kind::Double));
    let most = expected.abs().max().double_value(&[]);
    (found - expected).abs().max().double_value(&[]) / most.max(1e-9)
}

/// Half a step of a dtype, of the largest result, and what sums in float32 lose; operations round weights too.
fn within(kind: Kind) -> f64 {
    match kind {
        Kind::Half => 1.5e-3,
        Kind::BFloat16 => 1.2e-2,
        _ => 1e-5,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn operations_compute_what_codes_mean(
        bits in prop::sample::select(vec![2u32, 3, 4, 8]), out in 1usize..100,
        group in prop::sample::select(vec![0usize, 32, 64, 96, 128, 256]), eighths in 1usize..40, groups in 1usize..4,
        fine in any::<bool>(), rows in prop::sample::select(vec![1i64, 2, 8, 9, 65]), biased in any::<bool>(),
        kind in prop::sample::select(vec![Kind::Float, Kind::BFloat16, Kind::Half]), seed in any::<u64>(),
    ) {
        let (channels, group) = if group == 0 { (eighths * 8, eighths * 8) } else { (group * groups, group) };
        let packed = random(bits, [out, channels], group, fine, seed);
        let weight = DeviceWeight::new(&packed, Device::Cpu).unwrap();
        prop_assert_eq!(weight.dequantize(Kind::Float).unwrap(), meant(&packed).to_kind(Kind::Float));
        let x = input(&[rows, channels as i64], kind, seed ^ 1);
        let bias = biased.then(|| input(&[out as i64], kind, seed ^ 2));
        let exact = bias.as_ref().map(|b| b.to_kind(Kind::Double));
        let expected = x.to_kind(Kind::Double).linear(&meant(&packed), exact);
        let y = weight.forward(&x, bias.as_ref()).unwrap();
        prop_assert_eq!(y.kind(), kind);
        let off = off(&y, &expected);
        prop_assert!(off < within(kind), "off by {off}");
    }
}

#[test]
fn a_weight_larger_than_a_piece_is_whole() {
    // 17 million codes: two pieces, the second of which ends within a tile.
    let packed = random(2, [4100, 4096], 128, false, 5);
    let weight = DeviceWeight::new(&packed, Device::Cpu).unwrap();
    let x = input(&[2, 4096], Kind::Float, 1);
    let expected = x.linear(&meant(&packed).to_kind(Kind::Float), None::<&Tensor>);
    assert!(off(&weight.forward(&x, None).unwrap(), &expected) < 1e-5);
    // Tiles of the processor are half as high: 16 outputs more fill up the last one.
    assert_eq!(weight.bytes(), packed.bytes() + 16 * (4096 / 4 + 4096 / 128 * 3));
}

#[test]
fn what_does_not_fit_is_refused() {
    let packed = random(4, [40, 256], 128, false, 1);
    let weight = DeviceWeight::new(&packed, Device::Cpu).unwrap();
    let e = weight.forward(&input(&[3, 255], Kind::Float, 1), None).unwrap_err().to_string();
    assert_eq!(e, "the layer takes 256 channels on Cpu, x is [3, 255] on Cpu");
    let none = weight.forward(&input(&[2, 0, 256], Kind::Float, 1), None).unwrap();
    assert_eq!(none.size(), [2, 0, 40]);
    assert!(weight.obstacle(Kind::Half).unwrap().contains("CUDA devices alone"));
    let odd = random(4, [40, 100], 100, false, 1);
    assert!(!DeviceWeight::takes(&odd) && DeviceWeight::takes(&packed));
    let e = DeviceWeight::new(&odd, Device::Cpu).unwrap_err().to_string();
    assert!(e.contains("100 channels, expected a multiple of 8"), "{e}");
}

#[test]
fn the_kernels_as_cpp_equal_the_operations() {
    for (bits, kind) in [(3, Kind::BFloat16), (4, Kind::Half)] {
        let packed = random(bits, [75, 384], 128, false, 9);
        let weight = DeviceWeight::new(&packed, Device::Cpu).unwrap();
        let defines = weight.compiled_for(kind).unwrap().defines();
        let kernels =
            Emulated::compile(&Source { name: "packed", text: SOURCE, defines: &defines }, &names());
        let layout = weight.layout();
        let at = |t: &Tensor| t.data_ptr() as u64;
        for rows in [1i64, 8, 20] {
            let x = input(&[rows, 384], kind, 2);
            let bias = input(&[75], kind, 3);
            let y = Tensor::full([rows, 75], f64::NAN, (kind, Device::Cpu));
            let launch = product(&layout, weight.addresses(), [at(&y), at(&x), at(&bias)], rows as usize);
            // SAFETY: tensors of the shapes of the layout, which live on.
            unsafe { kernels.launch(launch.kernel, launch.grid, &launch.arguments) };
            assert!(off(&y, &weight.forward(&x, Some(&bias)).unwrap()) < within(kind));
        }
        let whole = Tensor::full([75, 384], f64::NAN, (kind, Device::Cpu));
        let launch = dequantize(&layout, weight.addresses(), at(&whole));
        // SAFETY: as above.
        unsafe { kernels.launch(launch.kernel, launch.grid, &launch.arguments) };
        assert_eq!(whole, weight.dequantize(kind).unwrap());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_the_kernels_equal_the_operations() {
    let device = DeviceSpec::Cuda(0).open().unwrap();
    for (bits, shape, group, fine) in [
        (3, [3584, 3584], 128, false),
        (4, [1000, 18944], 128, false),
        (4, [75, 4096], 64, true),
        (2, [513, 1024], 32, false),
        (8, [96, 1000], 1000, true),
    ] {
        let packed = random(bits, shape, group, fine, u64::from(bits));
        let kernels = DeviceWeight::new(&packed, device).unwrap();
        let operations = DeviceWeight::new(&packed, device).unwrap().by_operations();
        for kind in [Kind::Half, Kind::BFloat16] {
            assert_eq!(kernels.obstacle(kind), None);
            assert_eq!(kernels.dequantize(kind).unwrap(), operations.dequantize(kind).unwrap());
            let bias = input(&[shape[0] as i64], kind, 3).to_device(device);
            for rows in [1, 2, 7, 8, 9, 16, 30, ROWS as i64, ROWS as i64 + 1, 300] {
                let x = input(&[rows, shape[1] as i64], kind, 4).to_device(device);
                let y = kernels.forward(&x, Some(&bias)).unwrap();
                let off = off(&y, &operations.forward(&x, Some(&bias)).unwrap());
                assert!(off < within(kind), "{bits} bits, {shape:?}, {rows} rows of {kind:?}: off by {off}");
            }
            // A view that does not begin where loads of 16 bytes may.
            let x = input(&[shape[1] as i64 + 1], kind, 4).to_device(device).narrow(0, 1, shape[1] as i64);
            let y = kernels.forward(&x, None).unwrap();
            assert!(off(&y, &operations.forward(&x, None).unwrap()) < within(kind));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn on_a_gpu_a_packed_layer_is_laid_out_there() {
    let device = DeviceSpec::Cuda(0).open().unwrap();
    let packed = random(4, [64, 256], 128, false, 1);
    let (scales, zeros) = packed.parameters();
    let codes = Tensor::from_slice(&packed.codes()).reshape([64, 256]);
    let (scales, zeros) =
        (Tensor::from_slice(&scales).reshape([64, 2]), Tensor::from_slice(&zeros).reshape([64, 2]));
    let layer = PackedLinear::new(4, &codes, &scales, &zeros, None, Rounding::A16, Kind::BFloat16).unwrap();
    let x = input(&[3, 256], Kind::BFloat16, 1);
    let there = layer.forward(&x.to_device(device)).unwrap();
    assert_eq!(there.device(), device);
    assert!(off(&there, &layer.forward(&x).unwrap()) < within(Kind::BFloat16));
}
