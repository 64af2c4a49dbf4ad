//! What is stored does not depend on how rows came, and everything comes back.

use nics_core::seam::KvCache;
use pm_kvq::cache::PagedCache;
use proptest::prelude::*;
use tch::Kind;

use crate::kit::{Sequence, assert_same_state, call, config, dims, feed};

/// Settings under which some hundred tokens go through all widths.
fn settings() -> impl Strategy<Value = (String, Kind)> {
    (
        (0usize..3, prop::sample::select(vec![4usize, 6, 16]), prop::bool::ANY),
        prop::sample::select(vec!["layer", "oldest", "newest"]),
        prop::sample::select(vec!["payload", "total"]),
        prop::sample::select(vec!["equivalent", "direct", "modified"]),
        prop::sample::select(vec!["auto", "f16", "f32"]),
        prop::sample::select(vec![2, 4, 8, 16]),
        prop::sample::select(vec![16, 32]),
        20usize..200,
        prop::sample::select(vec![Kind::Float, Kind::BFloat16, Kind::Half]),
    )
        .prop_map(|((sink, window, sliding), shrink, count, shift, exact, bits, group, max, kind)| {
            let mode = if sliding { "sliding" } else { "block" };
            let words = format!(
                "sink={sink},window={window},window-mode={mode},shrink={shrink},count={count},shift={shift},\
                 exact={exact},min-bits={bits},group={group},max-len={max}"
            );
            (words, kind)
        })
}

/// How many of `n` tokens fit the budget.
fn reach(cache: &PagedCache, n: usize) -> usize {
    pm_kvq::budget::schedule(&cache.rules()[0], 0, n).unwrap().reached
}

/// Ascending cuts of `0 .. n`.
fn cuts(n: usize, marks: &[usize]) -> Vec<usize> {
    let mut cuts: Vec<usize> = marks.iter().map(|m| m % (n + 1)).chain([0, n]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_division_into_calls_stores_the_same(
        (words, kind) in settings(),
        n in 1usize..160,
        marks in prop::collection::vec(0usize..200, 0..12),
        seed: u64,
    ) {
        let dims = dims(2, 4, 2, 32, kind);
        let mut cache = PagedCache::new(&dims, &config(&words)).unwrap();
        let n = reach(&cache, n);
        let rows = Sequence::new(&dims, n, seed);
        let (one, many) = (cache.open(n).unwrap(), cache.open(n).unwrap());
        feed(&mut cache, &dims, one, &rows, 0, n);
        for cut in cuts(n, &marks).windows(2) {
            feed(&mut cache, &dims, many, &rows, cut[0], cut[1]);
        }
        assert_same_state(&cache, one, many, 2);
    }

    #[test]
    fn cut_back_where_it_is_exact_is_never_having_appended(
        (words, kind) in settings(),
        n in 1usize..150,
        cut in 0usize..150,
        more in 0usize..60,
        seed: u64,
    ) {
        let dims = dims(2, 2, 1, 32, kind);
        let mut cache = PagedCache::new(&dims, &config(&words)).unwrap();
        let n = reach(&cache, n);
        let cut = cut.min(n);
        let more = reach(&cache, cut + more) - cut;
        let rows = Sequence::new(&dims, n + more, seed);
        // The rows that are taken back are others than those that come in their place.
        let other = Sequence::new(&dims, n + more, seed ^ 1);
        let (s, fresh) = (cache.open(n + more).unwrap(), cache.open(n + more).unwrap());
        feed(&mut cache, &dims, s, &rows, 0, cut);
        feed(&mut cache, &dims, s, &other, cut, n);
        let exact = cache.exact_from(s).is_some_and(|from| cut >= from);
        let branch = cache.branch(s, cut, n + more).unwrap();
        prop_assert_eq!(branch.is_some(), exact && cut > 0);
        cache.truncate(s, cut).unwrap();
        prop_assert_eq!(cache.kept(s, 0), cut);
        feed(&mut cache, &dims, s, &rows, cut, cut + more);
        feed(&mut cache, &dims, fresh, &rows, 0, cut + more);
        if exact {
            assert_same_state(&cache, s, fresh, 2);
        }
        if let Some(branch) = branch {
            feed(&mut cache, &dims, branch, &rows, cut, cut + more);
            assert_same_state(&cache, branch, fresh, 2);
        }
    }

    #[test]
    fn copies_and_snapshots_are_the_same_and_independent(
        (words, kind) in settings(),
        n in 1usize..120,
        more in 1usize..60,
        seed: u64,
    ) {
        let dims = dims(2, 2, 1, 32, kind);
        let config = config(&words);
        let mut cache = PagedCache::new(&dims, &config).unwrap();
        let n = reach(&cache, n);
        let more = reach(&cache, n + more) - n;
        let (rows, other) = (Sequence::new(&dims, n + more, seed), Sequence::new(&dims, n + more, seed ^ 1));
        let s = cache.open(n + more).unwrap();
        feed(&mut cache, &dims, s, &rows, 0, n);
        let fork = cache.fork(s).unwrap();
        let snapshot = cache.snapshot(s).unwrap();
        feed(&mut cache, &dims, s, &other, n, n + more);
        let restored = cache.restore(&snapshot).unwrap();
        assert_same_state(&cache, fork, restored, 2);
        for s in [fork, restored] {
            feed(&mut cache, &dims, s, &rows, n, n + more);
        }
        let fresh = cache.open(n + more).unwrap();
        feed(&mut cache, &dims, fresh, &rows, 0, n + more);
        assert_same_state(&cache, fork, fresh, 2);
        assert_same_state(&cache, restored, fresh, 2);
        // Into another cache of the same settings.
        let mut elsewhere = PagedCache::new(&dims, &config).unwrap();
        let there = elsewhere.restore(&snapshot).unwrap();
        prop_assert_eq!(elsewhere.kept(there, 1), n);
    }

    #[test]
    fn every_page_comes_back(
        (words, kind) in settings(),
        steps in prop::collection::vec((0usize..6, 0usize..5, 1usize..40), 1..30),
        seed: u64,
    ) {
        let dims = dims(2, 2, 1, 32, kind);
        let mut cache = PagedCache::new(&dims, &config(&words)).unwrap();
        let rows = Sequence::new(&dims, 400, seed);
        let mut open: Vec<nics_core::seam::SeqId> = Vec::new();
        for (what, which, n) in steps {
            let s = open.get(which).copied();
            match (what, s) {
                (0, Some(s)) => {
                    cache.close(s);
                    open.retain(|o| *o != s);
                }
                (1, Some(s)) => cache.truncate(s, cache.kept(s, 0).saturating_sub(n)).unwrap(),
                (2, Some(s)) => open.push(cache.fork(s).unwrap()),
                (3, Some(s)) => {
                    let snapshot = cache.snapshot(s).unwrap();
                    open.push(cache.restore(&snapshot).unwrap());
                }
                (4 | 5, Some(s)) => {
                    // A call may fail at any layer, when the budget is full.
                    for layer in 0..2 {
                        let from = cache.kept(s, layer);
                        let to = (from + n).min(400);
                        if from < to {
                            let _ = call(&mut cache, &dims, layer, &[(s, &rows, from, to)], None);
                        }
                    }
                }
                _ => open.push(cache.open(400).unwrap()),
            }
            let held: usize = open.iter().map(|s| cache.held(*s).unwrap().allocated).sum();
            let (allocated, used) = cache.pool_bytes();
            prop_assert_eq!(held, used);
            let payload: usize = open.iter().map(|s| cache.held(*s).unwrap().payload).sum();
            prop_assert_eq!((cache.bytes().payload, cache.bytes().allocated), (payload, allocated));
            prop_assert!(payload <= used && used <= allocated);
        }
        for s in open {
            cache.close(s);
        }
        prop_assert_eq!(cache.pool_bytes().1, 0);
    }

    #[test]
    fn a_sequence_never_takes_more_than_its_forecast(
        (words, kind) in settings(),
        n in 1usize..200,
        seed: u64,
    ) {
        let dims = dims(2, 2, 1, 32, kind);
        let mut cache = PagedCache::new(&dims, &config(&words)).unwrap();
        let rows = Sequence::new(&dims, n, seed);
        let s = cache.open(n).unwrap();
        let forecast = cache.forecast(&dims, n);
        'rows: for from in 0..n {
            let mut full = false;
            for layer in 0..2 {
                let attended = call(&mut cache, &dims, layer, &[(s, &rows, from, from + 1)], None).unwrap();
                full |= attended.exhausted == [s];
            }
            let held = cache.held(s).unwrap();
            prop_assert!(held.allocated <= forecast, "{} of {forecast} at {from}", held.allocated);
            let rules = cache.rules()[0].clone();
            let (payload, parameters) = cache.ledger(s, 0).unwrap().bytes(&rules.shape);
            let counted = if rules.count == pm_kvq::ledger::Count::Total { payload + parameters } else { payload };
            prop_assert!(counted as u64 <= rules.budget.unwrap());
            if full {
                // The plan says the same.
                let plan = pm_kvq::budget::schedule(&rules, 0, n + 1).unwrap();
                prop_assert_eq!(plan.exhausted_at, Some(from + 2));
                prop_assert!(call(&mut cache, &dims, 0, &[(s, &rows, from, from + 1)], None).is_err());
                break 'rows;
            }
        }
    }
}
