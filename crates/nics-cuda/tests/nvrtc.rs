//! The compiler, where there is one, and what is told where there is none.

use std::path::Path;

use nics_cuda::{Arch, Device, Error, LOCATION, Nvrtc, Source, compiled};

const SOURCE: Source = Source {
    name: "add",
    text: r#"extern "C" __global__ void add(float* x) { x[blockIdx.x * blockDim.x + threadIdx.x] += ADDEND; }"#,
    defines: &[("ADDEND", 3)],
};

/// The compiler; a test without one passes only where nobody asked for one.
fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::open() {
        Ok(found) => Some(found),
        Err(e) if std::env::var_os(LOCATION).is_none() => {
            eprintln!("not tested: {e}");
            None
        }
        Err(e) => panic!("{LOCATION} is set, but {e}"),
    }
}

#[test]
fn a_source_becomes_code_that_is_kept() {
    let Some(nvrtc) = nvrtc() else { return };
    assert!(nvrtc.version().unwrap().0 >= 12);
    let dir = tempfile::tempdir().unwrap();
    for major in [8, 9] {
        let arch = Arch { major, minor: 0 };
        let code = compiled(&SOURCE, arch, Some(dir.path())).unwrap();
        assert!(code.starts_with(b"\x7fELF"));
        assert_eq!(compiled(&SOURCE, arch, Some(dir.path())).unwrap(), code);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn the_compilers_messages_are_told() {
    let Some(nvrtc) = nvrtc() else { return };
    let bad = Source { text: "__global__ void f() { undeclared = 1; }", ..SOURCE };
    let Err(Error::Compile { name, arch, log }) = nvrtc.compile(&bad, Arch { major: 8, minor: 0 }) else {
        panic!("it compiled")
    };
    assert_eq!((name.as_str(), arch.as_str()), ("add", "sm_80"));
    assert!(log.contains("\"undeclared\" is undefined"), "{log}");
    assert!(matches!(nvrtc.compile(&SOURCE, Arch { major: 1, minor: 7 }), Err(Error::Compile { .. })));
}

#[test]
fn without_a_library_the_error_names_it_and_the_mend() {
    let e = Nvrtc::open_at(Path::new("/nowhere/libnvrtc.so.13")).unwrap_err().to_string();
    assert!(e.starts_with("libnvrtc.so, which compiles CUDA kernels, was not found"), "{e}");
    assert!(e.contains("/nowhere/libnvrtc.so.13") && e.contains("cargo xtask setup --cuda"), "{e}");
    match Device::open(usize::MAX) {
        Err(Error::NoDriver) => assert!(Error::NoDriver.to_string().starts_with("libcuda.so.1")),
        Err(Error::NoDevice { .. } | Error::Driver { .. }) => {}
        other => panic!("{other:?}"),
    }
}
