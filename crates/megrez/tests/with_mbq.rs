//! Quantized weights in the binary, alone and with another method's cache: features `with-mbq` and `with-pm-kvq`.

#[path = "support/server.rs"]
mod server;
mod support;

use std::path::{Path, PathBuf};

use mbq::QuantSpec;
use mbq::apply::round;
use mbq::export::{Layout, Made, export};
use mbq::language::Language;
use mbq::packed::{Act, open};
use megrez::Megrez;
use nics_core::cache::DenseCache;
use nics_core::checkpoint::{Checkpoint, Origin};
use nics_core::models::{Model, read};
use nics_core::seam::KvCache;
use pm_kvq::cache::{CacheConfig, PagedCache};
use pm_kvq::calibrate::Scaled;
use pm_kvq::calibrate::artefact::{ScalesNote, write_scales};
use pm_kvq::calibrate::fold::foldable;
use pm_kvq::calibrate::scales::Scales;
use serde_json::json;
use server::Server;
use support::*;
use tch::{Device, Kind, Tensor};

const QUESTION: &str = "Tom has 3 apples and buys 4 more. How many apples does he have?";

fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/nano/megrez-text")
}

/// The nano checkpoint rounded, in a layout; the rounded model.
fn quantized(spec: &str, layout: Layout, to: &Path) -> Language {
    let checkpoint = Checkpoint::open_dir(&nano()).unwrap();
    let mut model = Language::load(&checkpoint, Device::Cpu, Kind::Float).unwrap();
    let (names, spec): (_, QuantSpec) = (model.names().unwrap(), spec.parse().unwrap());
    let rounded = round(model.decoder_mut(), &names, &spec).unwrap();
    let made = Made { method: "rtn".into(), source: Origin::of(&checkpoint).unwrap() };
    export(&mut model, &names, &rounded, &spec, &made, &checkpoint, layout, to).unwrap();
    model
}

/// Key scales as a calibration writes them, for the nano checkpoint.
fn key_scales(model: &mut dyn Model, to: &Path) -> Scales {
    let dims = model.dims().clone();
    let of = |l: usize| {
        let n = dims.kv_heads * dims.head_dim / 2;
        let values: Vec<f32> = (0..n).map(|i| 0.5 + ((i * 7 + l as i64) % 11) as f32).collect();
        Tensor::from_slice(&values).view([dims.kv_heads, dims.head_dim / 2])
    };
    let scales = Scales::new(&(0..dims.layers).map(of).collect::<Vec<_>>()).unwrap();
    let origin = Origin::of(&Checkpoint::open_dir(&nano()).unwrap()).unwrap();
    let about = ScalesNote { alphas: vec![0.5; dims.layers], bits: Vec::new(), samples: 1 };
    write_scales(to, &origin, &scales, &about).unwrap();
    scales
}

fn answer(flags: &[std::ffi::OsString]) -> String {
    let command = args!["generate", "--prompt", QUESTION, "--greedy"];
    run(command.iter().chain(flags)).ok()
}

#[test]
fn quantized_weights_write_what_they_mean() {
    let dir = tempfile::tempdir().unwrap();
    let (packed, dense, gptq) =
        (dir.path().join("packed"), dir.path().join("dense"), dir.path().join("gptq"));
    quantized("w8g32", Layout::Packed, &packed);
    quantized("w8g32", Layout::Dense, &dense);
    quantized("w8g32", Layout::Gptq, &gptq);
    let expected = answer(&args!["--model", dense]);
    assert!(expected.contains("#### 7"), "{expected}");
    let weights = |more: &str| format!("mbq:{}{more}", packed.display());
    // In place of the model's own weights, without a model, as the model itself, and in another's layout.
    assert_eq!(answer(&args!["--model", nano(), "--weights", weights("")]), expected);
    assert_eq!(answer(&args!["--weights", weights(",act=dense")]), expected);
    assert_eq!(answer(&args!["--model", packed]), expected);
    assert_eq!(answer(&args!["--weights", format!("mbq:{}", gptq.display())]), expected);
}

#[test]
fn at_two_seams() {
    let dir = tempfile::tempdir().unwrap();
    let (packed, file) = (dir.path().join("packed"), dir.path().join("scales.safetensors"));
    let mut model = quantized("w4g32", Layout::Packed, &packed);
    key_scales(model.model_mut(), &file);
    let weights = format!("mbq:{}", packed.display());
    let with = |kv: &str| answer(&args!["--weights", weights, "--kv", kv]);
    let plain = answer(&args!["--weights", weights]);
    // Nothing is quantized in the cache; with key scales, and without.
    assert_eq!(with("pm-kvq:exact=f32"), plain);
    assert_eq!(with(&format!("pm-kvq:exact=f32,scales={}", file.display())), plain);
    // Most of it is.
    let low = format!("pm-kvq:window=8,min-bits=4,max-len=400,scales={}", file.display());
    assert!(!with(&low).trim().is_empty());

    let server = Server::start(args!["--weights", weights, "--kv", low]);
    let reply = server
        .complete(&json!({ "prompt": "1 + 2 =", "max_tokens": 8, "temperature": 0, "ignore_eos": true }));
    assert_eq!(reply["usage"]["completion_tokens"], 8, "{reply}");
}

/// Packed projections take no folded scales: applied at run time they change nothing but the rounding of what is kept.
#[test]
fn key_scales_are_applied_at_run_time() {
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("packed");
    quantized("w4g32", Layout::Packed, &packed);
    let checkpoint = open(Checkpoint::open_dir(&packed).unwrap(), Some(Act::Bits16)).unwrap();
    let Megrez { mut decoder, .. } = Megrez::load(&checkpoint, Device::Cpu, Kind::Float).unwrap();
    let refused = foldable(&mut decoder).unwrap_err().to_string();
    assert!(refused.contains("no separate weights of q_proj and k_proj"), "{refused}");
    let scales = key_scales(&mut decoder, &dir.path().join("scales.safetensors"));
    let ids: Vec<u32> = (0..60).map(|i| 1 + i * 7 % 250).collect();
    let hidden = |cache: &mut dyn KvCache| {
        let _no_grad = tch::no_grad_guard();
        let seq = cache.open(64).unwrap();
        let first = read(&decoder, cache, &[(seq, 0, &ids[..50])]).unwrap();
        let last = read(&decoder, cache, &[(seq, 50, &ids[50..])]).unwrap();
        Tensor::cat(&[first, last], 0)
    };
    let off = |found: &Tensor, expected: &Tensor| {
        f64::try_from((found - expected).norm() / expected.norm()).unwrap()
    };
    let paged =
        |words: &str| PagedCache::new(decoder.dims(), &words.parse::<CacheConfig>().unwrap()).unwrap();
    let dense = hidden(&mut DenseCache::new());
    let scaled = |words: &str| {
        let mut cache = Scaled::new(Box::new(paged(words)), &scales, decoder.dims()).unwrap();
        hidden(&mut cache)
    };
    let exact = off(&scaled("exact=f32"), &dense);
    assert!(exact < 1e-4, "{exact}");
    // At four bits they do make a difference, as does leaving them out.
    let low = "window=8,min-bits=4,max-len=56,exact=f32,exhausted=below";
    let (with, without) = (off(&scaled(low), &dense), off(&hidden(&mut paged(low)), &dense));
    assert!(with > 1e-4 && without > 1e-4 && (with - without).abs() > 1e-6, "{with} {without}");
}

#[test]
fn what_is_wrong_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("packed");
    quantized("w4g32", Layout::Packed, &packed);
    let named = |more: &str| format!("mbq:{}{more}", packed.display());
    let refused = |flags: &[std::ffi::OsString], code: i32, says: &str| {
        let command = args!["generate", "--prompt", "a", "--raw"];
        let ran = run(command.iter().chain(flags));
        assert_eq!(ran.code, Some(code), "{}", ran.stderr);
        assert!(ran.stderr.contains(says), "{says:?} is not in: {}", ran.stderr);
        assert_eq!(ran.stderr.lines().filter(|l| l.starts_with("error:")).count(), 1, "{}", ran.stderr);
    };
    refused(&args!["--weights", "mbq:nowhere"], 1, "nowhere");
    refused(&args!["--weights", named(",act=4")], 1, "8, 16 or dense");
    refused(&args!["--weights", "mbq"], 1, "neither a folder nor a model");
    refused(&args!["--model", nano(), "--weights", "mbq"], 1, "is not quantized");
    refused(
        &args!["--model", nano(), "--weights", format!("mbq:{}", nano().display())],
        1,
        "`quantization_config`",
    );
    refused(&args!["--model", golden(), "--weights", named("")], 1, "its architecture is not that of megrez");
    refused(&args!["--weights", "shuffle:0"], 1, "give --model, too");
    refused(&args!["--kv", "dense"], 2, "--model");
    refused(&args!["--weights", named(""), "--kv", "pm-kvq:scales=gone.safetensors"], 1, "gone.safetensors");
}
