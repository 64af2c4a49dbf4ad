//! Huge pages for weights, and the read bandwidth that limits decoding.

use std::time::Instant;

use crate::pool::Pool;

/// The size of a huge page on the processors that this crate has kernels for.
pub const HUGE_PAGE: usize = 2 << 20;

/// Asks the system to back a range with huge pages from its first use on, best before it is written. Reading weights
/// through 4 KiB pages costs a quarter of the bandwidth and more. A system that has no huge page to give leaves things as
/// they are.
pub fn prefer_huge_pages(start: *const u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    advise(start, bytes, libc::MADV_HUGEPAGE);
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

/// Moves what a range still has in small pages into huge ones: as a rule its ends, which it shares with its neighbours.
pub fn settle_in_huge_pages(start: *const u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    advise(start, bytes, MADV_COLLAPSE);
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

/// Linux 6.1 and later.
#[cfg(target_os = "linux")]
const MADV_COLLAPSE: libc::c_int = 25;

#[cfg(target_os = "linux")]
fn advise(start: *const u8, bytes: usize, advice: libc::c_int) {
    if bytes > 0 {
        let from = start as usize / HUGE_PAGE * HUGE_PAGE;
        let to = (start as usize + bytes).next_multiple_of(HUGE_PAGE);
        // SAFETY: the advice changes how memory of this process is backed, never what it holds; parts of the range that
        // are not mapped are left out by the system.
        unsafe { libc::madvise(from as *mut libc::c_void, to - from, advice) };
    }
}

/// Read bandwidth of main memory in bytes a second with all threads of `pool`: the best of `rounds` passes over
/// `bytes` bytes (take several times the last cache), in huge pages where the system has them.
pub fn read_bandwidth(pool: &Pool, bytes: usize, rounds: usize) -> f64 {
    const CHUNK: usize = 1 << 20;
    let words = (bytes.max(CHUNK) / CHUNK) * (CHUNK / 8);
    let mut buffer: Vec<u64> = Vec::with_capacity(words);
    prefer_huge_pages(buffer.as_ptr().cast(), words * 8);
    buffer.resize(words, 1);
    let chunks: Vec<&[u64]> = buffer.chunks(CHUNK / 8).collect();
    let mut best = 0f64;
    for _ in 0..rounds.max(1) {
        let start = Instant::now();
        pool.run(chunks.len(), &|i| {
            // Four chains of additions, so that the loads and not the sum set the pace.
            let mut sums = [0u64; 32];
            for part in chunks[i].chunks_exact(32) {
                for (sum, word) in sums.iter_mut().zip(part) {
                    *sum |= *word;
                }
            }
            std::hint::black_box(sums);
        });
        best = best.max((words * 8) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_is_measured_and_advice_is_harmless() {
        let pool = Pool::new(2).unwrap();
        let bandwidth = read_bandwidth(&pool, 8 << 20, 2);
        assert!(bandwidth.is_finite() && bandwidth > 1e6, "{bandwidth}");
        let data = vec![7u8; 5 << 20];
        prefer_huge_pages(data.as_ptr(), data.len());
        settle_in_huge_pages(data.as_ptr(), data.len());
        assert!(data.iter().all(|&b| b == 7));
        prefer_huge_pages(data.as_ptr(), 1);
        settle_in_huge_pages(std::ptr::null(), 0);
    }
}
