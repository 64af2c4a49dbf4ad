//! Sequences of random lengths come and go in a pool of fixed size.

use std::time::{Duration, Instant};

use nics_core::seam::KvCache;
use pm_kvq::budget::schedule;
use pm_kvq::cache::PagedCache;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Kind;

use crate::kit::{Sequence, call, config, dims};

/// What a sequence is at.
struct Running {
    id: nics_core::seam::SeqId,
    kept: usize,
    /// Tokens that it is to have.
    most: usize,
    /// Bytes that were set aside for it.
    reserved: usize,
}

/// Runs for `time`, or until `sequences` have ended when that comes later.
fn soak(time: Duration, sequences: usize, seed: u64) {
    let dims = dims(2, 2, 1, 64, Kind::BFloat16);
    let mut cache = PagedCache::new(&dims, &config("window=32,min-bits=2,max-len=700")).unwrap();
    let end = {
        let rules = cache.rules();
        schedule(&rules[0], 0, 2000).unwrap().exhausted_at
    };
    let rows = Sequence::new(&dims, 1100, seed);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let limit = 6 * cache.forecast(&dims, 1000);
    let mut running: Vec<Running> = Vec::new();
    let (mut ended, mut exhausted, mut highest) = (0, 0, 0);
    let start = Instant::now();
    while start.elapsed() < time || ended < sequences {
        let most = rng.random_range(1..1000);
        let reserved = cache.forecast(&dims, most);
        let aside: usize = running.iter().map(|r| r.reserved).sum();
        if running.len() < 40 && aside + reserved <= limit {
            running.push(Running { id: cache.open(most).unwrap(), kept: 0, most, reserved });
        }
        // Prompts come in pieces, then single rows of all at once.
        let pick = rng.random_range(0..running.len());
        let n = if running[pick].kept == 0 { rng.random_range(1..200) } else { rng.random_range(1..20) };
        let to = (running[pick].kept + n).min(running[pick].most);
        let mut full = Vec::new();
        for layer in 0..dims.layers {
            let r = &running[pick];
            full = call(&mut cache, &dims, layer, &[(r.id, &rows, r.kept, to)], None).unwrap().exhausted;
        }
        let r = &mut running[pick];
        r.kept = to;
        // Rows that a rejected draft brought are taken back.
        if rng.random_range(0..10) == 0 && full.is_empty() {
            let back = r.kept - rng.random_range(0..r.kept.min(10));
            cache.truncate(r.id, back).unwrap();
            r.kept = back;
        }
        let pure = cache.exact_from(r.id).is_some();
        if pure {
            // Exhaustion where the plan says, no token earlier or later.
            assert_eq!(
                !full.is_empty(),
                end.is_some_and(|end| r.kept + 1 >= end),
                "{} tokens, {end:?}",
                r.kept
            );
        }
        let held = cache.held(r.id).unwrap();
        assert!(!full.is_empty() || held.allocated <= r.reserved);
        if !full.is_empty() || r.kept == r.most {
            exhausted += usize::from(!full.is_empty());
            ended += 1;
            cache.close(r.id);
            running.swap_remove(pick);
        }
        let held: usize = running.iter().map(|r| cache.held(r.id).unwrap().allocated).sum();
        let (allocated, used) = cache.pool_bytes();
        assert_eq!(held, used, "a page is lost");
        highest = highest.max(allocated);
    }
    for r in running {
        cache.close(r.id);
    }
    assert_eq!(cache.pool_bytes().1, 0);
    assert!(exhausted > 0, "no sequence reached the end of its budget");
    // A block that is missing, and a step by which the pool grows.
    assert!(highest <= limit + limit / 8, "{highest} bytes allocated of {limit}");
    println!(
        "{ended} sequences ended, {exhausted} of them at a full budget; at most {highest} of {limit} bytes"
    );
}

#[test]
fn sequences_come_and_go() {
    // With seed 1 a call crosses the end of a budget, to where a block has left the window.
    (0..2).for_each(|seed| soak(Duration::ZERO, 60, seed));
}

#[test]
#[ignore = "long"]
fn sequences_come_and_go_for_ten_minutes() {
    soak(Duration::from_secs(600), 200, 1);
}
