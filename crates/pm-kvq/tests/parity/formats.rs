//! Rotations and the formats that users pick today.

use pm_kvq::baselines::Hadamard;
use pm_kvq::baselines::everyday::{Block, fp8, fp8_head_scales, fp8_scale};
use tch::{Kind, Tensor};

use crate::kit::{assert_near, assert_same, cases};

#[test]
fn rotations() {
    for case in cases("15_") {
        let mut names: Vec<&String> = case.tensors.keys().filter(|n| n.starts_with("y.n")).collect();
        names.sort();
        assert!(!names.is_empty());
        for name in names {
            let n: i64 = name["y.n".len()..].parse().unwrap();
            let x = case.tensor(&format!("x.n{n}"));
            // Lengths that are no power of two come with the matrix of their first factor.
            let first = case
                .tensors
                .iter()
                .filter_map(|(name, h)| Some((name.strip_prefix("had")?.parse::<i64>().ok()?, h)))
                .filter(|(k, _)| n % k == 0)
                .find(|(k, _)| (n / k).count_ones() == 1);
            let rotation = match first {
                Some((_, h)) if n.count_ones() > 1 => Hadamard::with(n, h).unwrap(),
                _ => Hadamard::new(n).unwrap(),
            };
            assert_near(&rotation.rotate(x).unwrap(), case.tensor(name), 1e-4, name);
            for (other, transposed) in [("y_fast", false), ("yT", true)] {
                if let Some(expected) = case.tensors.get(&format!("{other}.n{n}")) {
                    let found = if transposed { transpose(&rotation, x) } else { rotation.rotate(x) };
                    assert_near(&found.unwrap(), expected, 1e-4, other);
                }
            }
        }
    }
}

/// The first factor transposed alone is the whole transposed: Sylvester's matrices are symmetric.
fn transpose(rotation: &Hadamard, x: &Tensor) -> pm_kvq::Result<Tensor> {
    rotation.unrotate(x)
}

#[test]
fn blocks() {
    for case in cases("17_") {
        let x = case.tensor("x");
        let values = Vec::<f32>::try_from(x.flatten(0, -1)).unwrap();
        let mut held = 0;
        for format in Block::ALL {
            let name = format.name();
            let Some(expected) = case.tensors.get(&format!("{name}.bytes")) else { continue };
            let bytes = format.quantize(&values).unwrap();
            assert_eq!(bytes, Vec::<u8>::try_from(expected.flatten(0, -1)).unwrap(), "{name}");
            assert_same(&format.round_trip(x).unwrap(), case.tensor(&format!("{name}.deq")), name);
            held += 1;
        }
        assert!(held > 0);
    }
}

#[test]
fn floats_of_8_bits() {
    for case in cases("17_") {
        let x = case.tensor("x");
        let one = Tensor::ones([1], (Kind::Float, x.device()));
        for (name, scale) in [
            ("scale1", one),
            ("per_tensor_amax", fp8_scale(x).unwrap()),
            ("per_head_amax", fp8_head_scales(x).unwrap()),
        ] {
            assert_near(&fp8(x, &scale).unwrap(), case.tensor(&format!("fp8_e4m3.{name}")), 0.0, name);
        }
    }
}
