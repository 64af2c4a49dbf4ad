//! What is refused, and that nothing of it is kept.

use nics_core::nn::Rope;
use nics_core::plugin::Plugins;
use nics_core::seam::{KvCache, Mask, Ragged, Site};
use pm_kvq::cache::PagedCache;
use pm_kvq::plugin::PmKvq;
use tch::{Device, Kind, Tensor};

use crate::kit::{Sequence, call, config, dims, rope};

#[test]
fn keys_that_are_no_numbers_are_refused_with_their_layer() {
    let dims = dims(3, 2, 1, 32, Kind::Float);
    let mut cache = PagedCache::new(&dims, &config("window=8")).unwrap();
    let s = cache.open(20).unwrap();
    for value in [f64::NAN, f64::INFINITY] {
        for which in 0..2 {
            let mut rows = Sequence::new(&dims, 12, 0);
            let t = if which == 0 { &mut rows.k } else { &mut rows.v };
            let _ = t.narrow(0, 5, 1).fill_(value);
            let e = call(&mut cache, &dims, 2, &[(s, &rows, 0, 12)], None).unwrap_err();
            assert!(e.to_string().contains("layer 2") && e.to_string().contains("finite"), "{e}");
            assert_eq!((cache.kept(s, 2), cache.held(s).unwrap().allocated), (0, 0));
        }
    }
    let mut half = PagedCache::new(&dims, &config("window=8,exact=f16")).unwrap();
    let s = half.open(20).unwrap();
    let mut rows = Sequence::new(&dims, 1, 0);
    let _ = rows.v.fill_(1e5);
    let e = call(&mut half, &dims, 0, &[(s, &rows, 0, 1)], None).unwrap_err();
    assert!(e.to_string().contains("exact=bf16"), "{e}");
}

#[test]
fn calls_that_do_not_fit_change_nothing() {
    let dims = dims(1, 2, 1, 32, Kind::Float);
    let mut cache = PagedCache::new(&dims, &config("window=8")).unwrap();
    let rows = Sequence::new(&dims, 30, 0);
    let s = cache.open(20).unwrap();
    call(&mut cache, &dims, 0, &[(s, &rows, 0, 10)], None).unwrap();
    let before = cache.held(s);
    let refused =
        |cache: &mut PagedCache, parts: &[_]| call(cache, &dims, 0, parts, None).unwrap_err().to_string();
    assert!(refused(&mut cache, &[(s, &rows, 10, 25)]).contains("holds 20"));
    assert!(refused(&mut cache, &[(s, &rows, 5, 8)]).contains("ascend"));
    assert!(refused(&mut cache, &[(s, &rows, 10, 11), (s, &rows, 11, 12)]).contains("twice"));
    assert!(refused(&mut cache, &[(nics_core::seam::SeqId(9), &rows, 0, 1)]).contains("not open"));
    assert!(call(&mut cache, &dims, 1, &[(s, &rows, 10, 11)], None).is_err());
    let ragged = Ragged::contiguous(&[(s, 10, 1)]);
    let rope: Rope = rope(&dims, &ragged);
    let input = Tensor::zeros([1, 8], (Kind::Float, Device::Cpu));
    let site = Site {
        layer: 0,
        rows: &ragged,
        rope: &rope,
        input: &input,
        mask: Mask::Window(4),
        want_scores: None,
        scale: 1.0,
    };
    let [q, k, v] = rows.part(10, 11);
    assert!(cache.attend(&site, &q, &k, &v).unwrap_err().to_string().contains("sliding window of 4"));
    assert_eq!((cache.kept(s, 0), cache.held(s)), (10, before));
}

#[test]
fn a_full_budget_is_told_as_it_was_asked_for() {
    let dims = dims(1, 2, 1, 32, Kind::Float);
    let rows = Sequence::new(&dims, 100, 0);
    let words = "sink=1,window=8,window-mode=block,min-bits=4,max-len=40,exhausted=";
    for policy in ["stop", "error", "below"] {
        let mut cache = PagedCache::new(&dims, &config(&format!("{words}{policy}"))).unwrap();
        let s = cache.open(100).unwrap();
        let mut at = 0;
        let end = loop {
            match call(&mut cache, &dims, 0, &[(s, &rows, at, at + 1)], None) {
                Ok(attended) if attended.exhausted.is_empty() => at += 1,
                other => break other,
            }
            assert!(at < 100, "{policy}: never full");
        };
        let narrowest = cache.stats(s)[0].widths.unwrap().0.get();
        if policy == "error" {
            assert!(end.unwrap_err().to_string().contains("the budget is full"));
            assert!(cache.kept(s, 0) >= 40);
        } else {
            assert_eq!(end.unwrap().exhausted, [s]);
            let e = call(&mut cache, &dims, 0, &[(s, &rows, at + 1, at + 2)], None).unwrap_err();
            assert!(e.to_string().contains("the budget is full"), "{e}");
        }
        assert_eq!(narrowest, if policy == "below" { 2 } else { 4 });
        assert!(policy != "below" || at > 50);
        // A prompt that does not fit.
        let s = cache.open(100).unwrap();
        let whole = call(&mut cache, &dims, 0, &[(s, &rows, 0, 100)], None);
        if policy == "error" {
            assert!(whole.is_err());
            assert_eq!(cache.kept(s, 0), 0);
        } else {
            assert_eq!(whole.unwrap().exhausted, [s]);
        }
    }
}

#[test]
fn damaged_snapshots_are_refused_and_leave_nothing() {
    let dims = dims(2, 2, 1, 32, Kind::Float);
    let mut cache = PagedCache::new(&dims, &config("window=8,max-len=60,min-bits=4")).unwrap();
    let rows = Sequence::new(&dims, 50, 0);
    let s = cache.open(50).unwrap();
    for layer in 0..2 {
        call(&mut cache, &dims, layer, &[(s, &rows, 0, 50)], None).unwrap();
    }
    let used = cache.pool_bytes().1;
    for i in 0..10 {
        for damage in 0..3 {
            let mut snapshot = cache.snapshot(s).unwrap();
            let name = snapshot.tensors[i].0.clone();
            match damage {
                0 => {
                    let _ = snapshot.tensors.remove(i);
                }
                1 => {
                    let t = &snapshot.tensors[i].1;
                    snapshot.tensors[i].1 = t.narrow(0, 0, t.size()[0] - 1);
                }
                _ => snapshot.tensors[i].1 = Tensor::from_slice(&[-5i64, 3]),
            }
            let e = cache.restore(&snapshot).unwrap_err().to_string();
            assert!(e.contains("missing or damaged"), "{name}: {e}");
            assert_eq!(cache.pool_bytes().1, used, "{name}");
        }
    }
    let mut other = PagedCache::new(&dims, &config("window=8")).unwrap();
    assert!(other.restore(&cache.snapshot(s).unwrap()).unwrap_err().to_string().contains("settings"));
}

#[test]
fn the_plugin_reads_settings_and_names_what_is_wrong() {
    let dims = dims(4, 2, 1, 32, Kind::BFloat16);
    let plugins = Plugins::default().with(PmKvq);
    let cache = |spec: &str| plugins.cache(Some(("pm-kvq", spec)), &dims).map(|_| ());
    cache("").unwrap();
    cache("preset=official,max-len=4096,min-bits=2").unwrap();
    cache("budget=1MiB,min-bits=2/4/4/2,window=32").unwrap();
    let refused = |spec: &str| cache(spec).unwrap_err().to_string();
    assert!(refused("budget=1KiB").contains("raise it or take a smaller window"));
    assert!(refused("min-bits=2/4").contains("each of the model's 4 layers"));
    assert!(refused("group=24").contains("divisor"));
    assert!(refused("window=0").contains("at least 1"));
    assert!(refused("colour=red").contains("known are"));
}
