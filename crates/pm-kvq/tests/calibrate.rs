//! Calibration: resumed runs, artefacts that are wrong, scales at run time and in the weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nics_base::interrupt::Interrupt;
use nics_core::cache::DenseCache;
use nics_core::checkpoint::{Checkpoint, save_file};
use nics_core::golden::difference;
use nics_core::models::{self, Decoder, Model, read};
use nics_core::seam::KvCache;
use nics_core::tokenizer::Tokenizer;
use pm_kvq::baselines::{Format, Rtn, Simulated, When};
use pm_kvq::calibrate::artefact::{self, ALLOCATION, MAX_KEYS, REP_SCALES, SENSITIVITY};
use pm_kvq::calibrate::max_keys::max_keys;
use pm_kvq::calibrate::sensitivity::sensitivity;
use pm_kvq::calibrate::{
    Cut, GradOrder, MaxMode, Origin, Progress, Samples, Scaled, Scales, Settings, calibrate, fold,
};
use pm_kvq::{Bits, Error};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/golden").join(name)
}

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open_dir(&golden(name)).unwrap()
}

fn model(name: &str) -> Decoder {
    // Products this small only lose by a second thread.
    nics_core::device::set_threads(Some(1)).unwrap();
    models::load(&checkpoint(name), Device::Cpu, Kind::Float).unwrap()
}

fn samples() -> Samples {
    let ids = |salt: u32| (0..12).map(|i: u32| (i * 37 + salt * 101 + i * i) % 199).collect();
    Samples::new((0..5).map(ids).collect()).unwrap()
}

fn settings(model: &Decoder) -> Settings {
    let dims = model.dims();
    let unit = pm_kvq::allocate::unit(dims.kv_heads as usize, dims.head_dim as usize, 100);
    Settings {
        effective_len: Some(48),
        group: pm_kvq::quantize::default_group(dims.head_dim),
        grad_order: GradOrder::Aligned,
        max_mode: MaxMode::Rotated,
        choices: vec![Bits::B2, Bits::B4],
        // Room for one layer of 4 bits beyond 2 everywhere.
        budget: (unit * (2 * dims.layers + 2) as f64) as u64,
        max_len: 100,
    }
}

fn origin(name: &str) -> Origin {
    Origin::of(&checkpoint(name)).unwrap()
}

fn run(out: &Path, interrupt: &Interrupt, progress: &mut dyn FnMut(Progress)) -> pm_kvq::Result<()> {
    let mut model = model("qwen2");
    let settings = settings(&model);
    calibrate(&mut model, &samples(), &settings, &origin("qwen2"), out, interrupt, progress).map(drop)
}

/// Every file of a folder but the lock.
fn bytes(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .filter(|(name, _)| name != ".calibration.lock")
        .collect()
}

/// A finished calibration of qwen2.
fn finished() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &Interrupt::never(), &mut |_| {}).unwrap();
    dir
}

#[test]
fn a_run_that_is_interrupted_after_every_sample_ends_like_an_unbroken_one() {
    let whole = finished();
    let broken = tempfile::tempdir().unwrap();
    let mut runs = 0;
    loop {
        let interrupt = Interrupt::never();
        let mut first = None;
        let result = run(broken.path(), &interrupt, &mut |at| {
            let begun = *first.get_or_insert(at);
            if at.done > begun.done || (at.stage > begun.stage && at.done > 0) {
                interrupt.request();
            }
        });
        runs += 1;
        match result {
            Ok(()) => break,
            Err(Error::Base(nics_base::Error::Interrupted)) => {}
            // A child of a test beside this one holds the lock between its fork and its start.
            Err(Error::Base(nics_base::Error::Busy(_))) => sleep(Duration::from_millis(5)),
            Err(e) => panic!("{e}"),
        }
    }
    // Of ten samples each run makes one.
    assert!(runs >= 10, "{runs} runs");
    let (whole, broken) = (bytes(whole.path()), bytes(broken.path()));
    assert_eq!(whole.keys().collect::<Vec<_>>(), broken.keys().collect::<Vec<_>>());
    for name in [SENSITIVITY, ALLOCATION, MAX_KEYS, REP_SCALES] {
        assert!(whole[name] == broken[name], "{name} differs");
    }
}

/// Where the process that is killed works; without it this is a test of its own in a folder of its own.
const FOLDER: &str = "NICS_TEST_CALIBRATION_FOLDER";

#[test]
fn calibrating_process() {
    let own = tempfile::tempdir().unwrap();
    let killed = std::env::var_os(FOLDER);
    let dir = killed.as_ref().map_or_else(|| own.path().to_owned(), PathBuf::from);
    let result = run(&dir, &Interrupt::never(), &mut |_| {
        if killed.is_some() {
            // So that kills find it at work.
            sleep(Duration::from_millis(20));
        }
    });
    match result {
        // The lock of a killed process can outlive it for a moment.
        Err(Error::Base(nics_base::Error::Busy(_))) => std::process::exit(75),
        other => other.unwrap(),
    }
}

fn start(dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "calibrating_process"]).env(FOLDER, dir);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn killed_equals_unbroken(kills: usize) {
    let whole = finished();
    let broken = tempfile::tempdir().unwrap();
    let progress = || fs::read(broken.path().join("progress.safetensors")).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(300);
    let mut killed = 0;
    loop {
        assert!(Instant::now() < deadline, "{killed} kills so far");
        let before = progress();
        let mut child = start(broken.path());
        while child.try_wait().unwrap().is_none() && progress() == before && killed < kills {
            assert!(Instant::now() < deadline);
            sleep(Duration::from_millis(1));
        }
        if killed < kills && child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            killed += 1;
        }
        match child.wait().unwrap().code() {
            Some(0) => break,
            None | Some(75) => sleep(Duration::from_millis(5)),
            other => panic!("the resumed run failed: {other:?}"),
        }
    }
    assert_eq!(killed, kills);
    assert!(bytes(whole.path()) == bytes(broken.path()));
}

#[test]
fn a_killed_run_ends_like_an_unbroken_one() {
    killed_equals_unbroken(2);
}

#[test]
#[ignore = "long"]
fn a_run_killed_eight_times_ends_like_an_unbroken_one() {
    killed_equals_unbroken(8);
}

#[test]
fn progress_of_other_settings_and_a_second_run_are_refused() {
    let dir = finished();
    let mut model = model("qwen2");
    let mut other = settings(&model);
    other.max_mode = MaxMode::Hypot;
    let mut again = |settings: &Settings| {
        let never = Interrupt::never();
        calibrate(&mut model, &samples(), settings, &origin("qwen2"), dir.path(), &never, &mut |_| {})
            .map(drop)
    };
    let message = again(&other).unwrap_err().to_string();
    assert!(message.contains("progress.safetensors") && message.contains("other settings"), "{message}");
    let _lock = nics_base::artefact::Lock::take(dir.path().join(".calibration.lock")).unwrap();
    assert!(matches!(again(&other), Err(Error::Base(nics_base::Error::Busy(_)))));
}

#[test]
fn artefacts_come_back() {
    let dir = finished();
    let (own, dims) = (origin("qwen2"), model("qwen2").dims().clone());
    let files = artefact::Files::at(dir.path());
    let found = artefact::read_sensitivity(&files.path(SENSITIVITY), &own, dims.layers).unwrap();
    let direct = sensitivity(&model("qwen2"), &samples(), Some(48), found.group, GradOrder::Aligned).unwrap();
    for (bits, both) in &direct.bits {
        for (a, b) in both.k.iter().zip(&found.bits[bits].k) {
            assert!((a - b).abs() <= 1e-12 * a.abs());
        }
    }
    let widths = artefact::read_allocation(&files.path(ALLOCATION), &own, dims.layers).unwrap();
    assert_eq!(widths.allocation.widths.iter().filter(|b| **b == Bits::B4).count(), 1);
    let keys = artefact::read_max_keys(&files.path(MAX_KEYS), &own, &dims).unwrap();
    let direct = max_keys(&model("qwen2"), &samples(), Some(48), MaxMode::Rotated).unwrap();
    for (a, b) in keys.layers.iter().zip(&direct.layers) {
        assert!(difference(a, b).unwrap().1 <= 1e-6);
    }
    let (scales, about) = artefact::read_scales(&files.path(REP_SCALES), &own, &dims).unwrap();
    let again = Scales::of(&keys.layers, &about.alphas).unwrap();
    for (a, b) in scales.layers().iter().zip(again.layers()) {
        assert_eq!(a, b);
    }
    assert_eq!(about.bits, widths.allocation.widths);
}

/// A change to the tensors of a file.
type Edit<'a> = &'a dyn Fn(&mut Vec<(String, Tensor)>);

/// Writes `value` changed by `change` over the JSON file at `path`.
fn change(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn wrong_json_is_refused() {
    let dir = finished();
    let (own, layers) = (origin("qwen2"), model("qwen2").dims().layers);
    let path = dir.path().join(SENSITIVITY);
    let good = fs::read(&path).unwrap();
    let refuses = |edit: &dyn Fn(&mut Value), expected: &str| {
        fs::write(&path, &good).unwrap();
        change(&path, edit);
        let e = artefact::read_sensitivity(&path, &own, layers).unwrap_err().to_string();
        assert!(e.contains(SENSITIVITY) && e.contains(expected), "{e}");
    };
    refuses(&|v| v["format_version"] = json!(9), "format version 9");
    refuses(&|v| v["arch_hash"] = json!("00"), "another architecture");
    refuses(&|v| v["bits"]["2"]["k"] = json!([1.0]), "has 1 layers");
    refuses(&|v| v["bits"]["2"]["v"][0] = json!(null), "null");
    refuses(&|v| v["bits"]["4"]["k"][0] = json!(-1.0), "no positive numbers");
    refuses(&|v| v["bits"] = json!({}), "no width");
    refuses(&|v| drop(v.as_object_mut().unwrap().remove("group")), "group");
    fs::write(&path, "{").unwrap();
    assert!(artefact::read_sensitivity(&path, &own, layers).is_err());
    assert!(artefact::read_sensitivity(&dir.path().join("none.json"), &own, layers).is_err());
    // Other weights of the same architecture are a warning.
    fs::write(&path, &good).unwrap();
    change(&path, |v| v["weights_hash"] = json!("00"));
    artefact::read_sensitivity(&path, &own, layers).unwrap();
    let path = dir.path().join(ALLOCATION);
    change(&path, |v| v["widths"] = json!([4]));
    assert!(artefact::read_allocation(&path, &own, layers).unwrap_err().to_string().contains("widths of 1"));
    change(&path, |v| v["widths"] = json!([3, 4]));
    assert!(artefact::read_allocation(&path, &own, layers).unwrap_err().to_string().contains("3 bits"));
}

#[test]
fn wrong_tensors_are_refused() {
    let dir = finished();
    let (own, dims) = (origin("qwen2"), model("qwen2").dims().clone());
    let path = dir.path().join(REP_SCALES);
    let note = nics_core::checkpoint::note(&path, "calibration").unwrap().unwrap();
    let (good, _) = artefact::read_scales(&path, &own, &dims).unwrap();
    let write = |edit: Edit, note: &str| {
        let tensors = good.layers().iter().enumerate();
        let mut tensors: Vec<(String, Tensor)> =
            tensors.map(|(l, t)| (format!("layers.{l}.rep_scale"), t.copy())).collect();
        edit(&mut tensors);
        save_file(&path, tensors, &[("calibration", note)]).unwrap();
        artefact::read_scales(&path, &own, &dims).map(drop).map_err(|e| e.to_string())
    };
    let refuses = |edit: Edit, expected: &str| {
        let e = write(edit, &note).unwrap_err();
        assert!(e.contains(REP_SCALES) && e.contains(expected), "{e}");
    };
    write(&|_| {}, &note).unwrap();
    refuses(&|t| t[0].1 = t[0].1.narrow(1, 0, 1), "shape");
    refuses(&|t| t[0].1 = &t[0].1 * f64::NAN, "finite");
    refuses(&|t| t[0].1 = &t[0].1 * 0.0, "from 0");
    refuses(&|t| t[0].1 = t[0].1.neg(), "from -");
    refuses(&|t| drop(t.pop()), "rep_scale");
    refuses(&|t| t.push(("layers.99.rep_scale".into(), t[0].1.copy())), "layers.99");
    let e = write(&|_| {}, &note.replace(&own.arch_hash, "00")).unwrap_err();
    assert!(e.contains("another architecture"), "{e}");
    assert!(write(&|_| {}, "{}").unwrap_err().contains("format_version"));
    // A file of another kind.
    let e = artefact::read_scales(&dir.path().join(MAX_KEYS), &own, &dims).unwrap_err().to_string();
    assert!(e.contains(MAX_KEYS), "{e}");
    fs::write(&path, [0; 5]).unwrap();
    assert!(artefact::read_scales(&path, &own, &dims).is_err());
}

/// Hidden states of a prompt and some single tokens.
fn hidden(model: &Decoder, cache: &mut dyn KvCache) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let ids = &samples().ids()[0].clone();
    let seq = cache.open(ids.len()).unwrap();
    let mut all = vec![read(model, cache, &[(seq, 0, &ids[..6])]).unwrap()];
    for at in 6..ids.len() {
        all.push(read(model, cache, &[(seq, at, &ids[at..=at])]).unwrap());
    }
    Tensor::cat(&all, 0)
}

fn scales_of(model: &Decoder) -> Scales {
    let keys = max_keys(model, &samples(), Some(48), MaxMode::Rotated).unwrap();
    Scales::of(&keys.layers, &vec![0.6; keys.layers.len()]).unwrap()
}

fn quantized(model: &Decoder) -> Box<dyn KvCache> {
    let group = pm_kvq::quantize::default_group(model.dims().head_dim);
    let codes = Format::Groups { bits: 8, group };
    Box::new(Simulated::new(model.dims(), Rtn::new(codes, When::Before)).unwrap())
}

#[test]
fn scales_at_run_time_are_those_in_the_weights() {
    for name in ["llama", "llama-bias", "llama-yarn", "qwen2"] {
        let (plain, mut folded) = (model(name), model(name));
        let scales = scales_of(&plain);
        fold(&mut folded, &scales).unwrap();
        let expected = hidden(&plain, &mut DenseCache::new());
        let close = |found: &Tensor, expected: &Tensor, tolerance: f64, what: &str| {
            let (_, off) = difference(found, expected).unwrap();
            assert!(off <= tolerance, "{name}, {what}: off by {off:e}");
        };
        close(&hidden(&folded, &mut DenseCache::new()), &expected, 1e-4, "folded");
        let mut scaled = Scaled::new(Box::new(DenseCache::new()), &scales, plain.dims()).unwrap();
        close(&hidden(&plain, &mut scaled), &expected, 1e-4, "at run time");
        // Behind a quantized cache both see the same scaled keys; a rounding error may flip a code.
        let mut scaled = Scaled::new(quantized(&plain), &scales, plain.dims()).unwrap();
        close(&hidden(&plain, &mut scaled), &hidden(&folded, &mut *quantized(&plain)), 2e-2, "quantized");
    }
}

#[test]
fn normed_queries_and_keys_take_scales_at_run_time_alone() {
    let mut model = model("qwen3");
    let scales = scales_of(&model);
    let expected = hidden(&model, &mut DenseCache::new());
    let message = fold(&mut model, &scales).unwrap_err().to_string();
    assert!(message.contains("norm") && message.contains("run time"), "{message}");
    assert!(difference(&hidden(&model, &mut DenseCache::new()), &expected).unwrap().0 == 0.0);
    let mut scaled = Scaled::new(Box::new(DenseCache::new()), &scales, model.dims()).unwrap();
    let (_, off) = difference(&hidden(&model, &mut scaled), &expected).unwrap();
    assert!(off <= 1e-4, "off by {off:e}");
}

#[test]
fn scaled_caches_are_caches() {
    let model = model("qwen2");
    let scales = scales_of(&model);
    let mut cache = Scaled::new(Box::new(DenseCache::new()), &scales, model.dims()).unwrap();
    let _no_grad = tch::no_grad_guard();
    let seq = cache.open(16).unwrap();
    let _ = read(&model, &mut cache, &[(seq, 0, &[1, 2, 3, 4])]).unwrap();
    let fork = cache.fork(seq).unwrap();
    let snapshot = cache.snapshot(seq).unwrap();
    assert!(DenseCache::new().restore(&snapshot).is_err());
    let other = Scales::of(scales.layers(), &vec![0.5; scales.layers().len()]).unwrap();
    let mut elsewhere = Scaled::new(Box::new(DenseCache::new()), &other, model.dims()).unwrap();
    assert!(elsewhere.restore(&snapshot).unwrap_err().to_string().contains("other key scales"));
    let restored = cache.restore(&snapshot).unwrap();
    let next = |cache: &mut Scaled, seq| read(&model, cache, &[(seq, 4, &[9])]).unwrap();
    let expected = next(&mut cache, seq);
    for seq in [fork, restored] {
        assert_eq!(next(&mut cache, seq), expected);
    }
    cache.truncate(seq, 4).unwrap();
    assert_eq!((cache.kept(seq, 0), cache.held(seq).is_some()), (4, true));
    assert_eq!(next(&mut cache, seq), expected);
    cache.close(seq);
    assert_eq!(cache.kept(seq, 0), 0);
    // Scales of another model.
    let wrong = Scales::new(&[Tensor::ones([1, 2], (Kind::Float, Device::Cpu))]).unwrap();
    assert!(matches!(
        Scaled::new(Box::new(DenseCache::new()), &wrong, model.dims()),
        Err(Error::ScaleShape { .. })
    ));
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let window = model("qwen2-window");
    let message = max_keys(&window, &samples(), None, MaxMode::Rotated).unwrap_err().to_string();
    assert!(message.contains("sliding window"), "{message}");
    let plain = model("qwen2");
    assert!(matches!(
        max_keys(&plain, &samples(), Some(50), MaxMode::Rotated),
        Err(Error::EffectiveLenNotMultiple { len: 12, effective: 50 })
    ));
    let message = sensitivity(&plain, &samples(), None, 7, GradOrder::Aligned).unwrap_err().to_string();
    assert!(message.contains("groups of 7"), "{message}");
    let beyond = Samples::new(vec![vec![1, 1_000_000]]).unwrap();
    assert!(max_keys(&plain, &beyond, None, MaxMode::Rotated).unwrap_err().to_string().contains("1000000"));
}

#[test]
fn samples_from_texts_and_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::from_file(&golden("tokenizers/byte-level/tokenizer.json")).unwrap();
    let cut = Cut { samples: 3, seq_len: 4, seed: 1 };
    let texts: Vec<String> = (0..9).map(|i| format!("{i} is the number of this sentence.")).collect();
    let found = Samples::from_texts(texts.clone(), &tokenizer, cut).unwrap();
    assert_eq!((found.len(), found.seq_len()), (3, 4));
    assert_eq!(found, Samples::from_texts(texts.clone(), &tokenizer, cut).unwrap());
    assert_ne!(found, Samples::from_texts(texts.clone(), &tokenizer, Cut { seed: 3, ..cut }).unwrap());
    let jsonl = dir.path().join("texts.jsonl");
    let lines: Vec<String> = texts.iter().map(|t| json!({"text": t, "id": 1}).to_string()).collect();
    fs::write(&jsonl, lines.join("\n")).unwrap();
    assert_eq!(Samples::from_file(&jsonl, Some(&tokenizer), cut).unwrap(), found);
    let plain = dir.path().join("text.txt");
    fs::write(&plain, texts.concat()).unwrap();
    assert_eq!(Samples::from_file(&plain, Some(&tokenizer), cut).unwrap().len(), 3);
    let message = Samples::from_file(&plain, None, cut).unwrap_err().to_string();
    assert!(message.contains("text.txt") && message.contains("tokenizer"), "{message}");
    let message = Samples::from_texts(vec!["a".into()], &tokenizer, Cut::default()).unwrap_err().to_string();
    assert!(message.contains("2048"), "{message}");

    let file = dir.path().join("calib.safetensors");
    let save = |t: Tensor| save_file(&file, [("input_ids".to_owned(), t)], &[]).unwrap();
    save(Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6]).view([3, 2]));
    let found = Samples::from_file(&file, None, Cut { samples: 2, ..cut }).unwrap();
    assert_eq!(found.ids(), [vec![1, 2], vec![3, 4]]);
    save(Tensor::from_slice(&[-1i64, 2]).view([1, 2]));
    assert!(Samples::from_file(&file, None, cut).unwrap_err().to_string().contains("no token"));
    save(Tensor::from_slice(&[1f32, 2.0]).view([1, 2]));
    assert!(Samples::from_file(&file, None, cut).unwrap_err().to_string().contains("Int64"));
    assert!(Samples::new(vec![]).is_err() && Samples::new(vec![vec![1, 2], vec![1]]).is_err());
}

#[test]
fn gradients_are_asked_for_under_a_guard_too() {
    let model = model("llama");
    let free = sensitivity(&model, &samples(), None, 4, GradOrder::Aligned).unwrap();
    let _no_grad = tch::no_grad_guard();
    assert_eq!(sensitivity(&model, &samples(), None, 4, GradOrder::Aligned).unwrap(), free);
}
