//! What benchmarks of several kinds grade by: the program in a reply, and pass@k.

/// What stands between the last two lines with a fence; empty when there are not two.
pub fn last_fenced_code(text: &str) -> String {
    let lines: Vec<&str> = text.split('\n').collect();
    let fences: Vec<usize> = (0..lines.len()).filter(|&i| lines[i].contains("```")).collect();
    match fences[..] {
        [.., from, to] => lines[from + 1..to].join("\n"),
        _ => String::new(),
    }
}

/// The chance that at least one of `k` of `n` samples, `correct` of which are right, is right (Chen et al., 2021):
/// `1 - C(n - c, k) / C(n, k)`.
pub fn pass_at_k(n: u64, correct: u64, k: u64) -> f64 {
    let correct = correct.min(n);
    if n - correct < k {
        return 1.0;
    }
    let miss: f64 = (n - correct + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product();
    1.0 - miss
}
