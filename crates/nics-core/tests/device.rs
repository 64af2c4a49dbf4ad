//! Choosing device, dtype and threads, on a machine with or without CUDA.

use nics_core::device::{DeviceSpec, DtypeSpec, set_threads, threads_allowed};
use nics_core::tch::{self, Device, Kind, Tensor};
use nics_core::{Error, memory};

#[test]
fn devices_are_written_as_they_are_read() {
    for (text, spec) in [
        ("cpu", DeviceSpec::Cpu),
        ("cuda", DeviceSpec::Cuda(0)),
        ("cuda:3", DeviceSpec::Cuda(3)),
        ("auto", DeviceSpec::Auto),
    ] {
        assert_eq!(text.parse::<DeviceSpec>().unwrap(), spec);
        assert_eq!(spec.to_string().parse::<DeviceSpec>().unwrap(), spec);
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<DeviceSpec>(&json).unwrap(), spec);
    }
    for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "CPU", "cuda:99999999999999999999"] {
        let e = wrong.parse::<DeviceSpec>().unwrap_err();
        assert!(matches!(e, Error::Device(_)), "{e}");
        assert!(e.to_string().contains("cpu, cuda, cuda:INDEX or auto"), "{e}");
    }
}

#[test]
fn dtypes_follow_the_checkpoint_unless_told_otherwise() {
    assert_eq!("auto".parse::<DtypeSpec>().unwrap().resolve(Kind::BFloat16), Kind::BFloat16);
    assert_eq!("f32".parse::<DtypeSpec>().unwrap().resolve(Kind::BFloat16), Kind::Float);
    assert_eq!("bf16".parse::<DtypeSpec>().unwrap().resolve(Kind::Float), Kind::BFloat16);
    assert_eq!("f16".parse::<DtypeSpec>().unwrap().resolve(Kind::Float), Kind::Half);
    let e = "int8".parse::<DtypeSpec>().unwrap_err().to_string();
    assert!(e.contains("auto, f32, bf16 or f16"), "{e}");
}

/// Either outcome is checked: an unusable CUDA must say what is missing, a usable one must compute.
#[test]
fn cuda_computes_or_says_what_is_missing() {
    assert_eq!(DeviceSpec::Cpu.open().unwrap(), Device::Cpu);
    let auto = DeviceSpec::Auto.open().unwrap();
    match DeviceSpec::Cuda(0).open() {
        Ok(device) => {
            assert_eq!(auto, Device::Cuda(0));
            assert_eq!(Tensor::ones([4], (Kind::Int64, device)).sum(Kind::Int64).int64_value(&[]), 4);
            let beyond = DeviceSpec::Cuda(4000).open().unwrap_err().to_string();
            assert!(beyond.contains("cuda:4000") && beyond.contains("there"), "{beyond}");
        }
        Err(e) => {
            assert_eq!(auto, Device::Cpu);
            assert!(matches!(e, Error::Device(_)), "{e}");
            let text = e.to_string();
            assert!(text.contains("libtorch_cuda.so") || text.contains("NVIDIA driver"), "{text}");
            assert!(text.contains("--device cpu"), "{text}");
        }
    }
}

#[test]
fn threads_are_set_and_bounded() {
    assert_eq!(set_threads(Some(2)).unwrap(), 2);
    assert_eq!(tch::get_num_threads(), 2);
    assert_eq!(set_threads(None).unwrap(), threads_allowed());
    assert_eq!(tch::get_num_threads() as usize, threads_allowed());
    for wrong in [0, 5000] {
        let e = set_threads(Some(wrong)).unwrap_err().to_string();
        assert!(e.contains(&wrong.to_string()) && e.contains("1 to 4096"), "{e}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_tensor_shows_in_resident_memory() {
    let before = memory::resident().unwrap();
    let tensor = Tensor::ones([64 << 20], (Kind::Uint8, Device::Cpu));
    let during = memory::resident().unwrap();
    assert!(during >= before + (48 << 20), "{before} -> {during}");
    assert!(memory::peak_resident().unwrap() >= during);
    drop(tensor);
    if memory::reset_peak() {
        assert!(memory::peak_resident().unwrap() < during);
    }
}
