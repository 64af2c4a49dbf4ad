//! Memory does not grow with the data.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::kit::*;

/// Peak resident memory of a run, in MiB.
fn peak(dir: &Path, text: &str) -> u64 {
    let mut child = command(dir, words(text)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        // The high water mark, so that what is between two looks counts.
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        if let Some(line) = text.lines().find_map(|l| l.strip_prefix("VmHWM:")) {
            peak = peak.max(line.trim().trim_end_matches(" kB").parse().unwrap());
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return peak >> 10;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn held_within(limit: u64, queries: u64) {
    let dir = inputs(queries);
    std::fs::write(dir.path().join("more.jsonl"), crate::kit::queries(10 * queries)).unwrap();
    let run = |file: &str, out: &str| {
        let text = RUN.replace("queries.jsonl", file).replace("--shard-tokens 300", "");
        peak(dir.path(), &format!("{text} --out {out} --mem-limit {limit}MiB"))
    };
    let (once, tenfold) = (run("queries.jsonl", "once"), run("more.jsonl", "tenfold"));
    println!("{queries} queries: {once} MiB, ten times as many: {tenfold} MiB, of {limit} MiB");
    assert!(once <= limit && tenfold <= limit, "{once} and {tenfold} MiB are above {limit} MiB");
    assert!(tenfold <= once + once / 5 + 16, "{once} MiB become {tenfold} MiB");
    let files = |out: &str| std::fs::read_to_string(dir.path().join(out).join("index.json")).unwrap();
    assert!(files("tenfold").matches("features-").count() > files("once").matches("features-").count());
}

#[test]
#[ignore = "long"]
fn ten_times_the_data_takes_no_more_memory() {
    held_within(208, 200);
}
