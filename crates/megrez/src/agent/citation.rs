//! Citations `[citation:3]` in an answer: found, clamped to the sources that there are, and written as links.

use std::sync::LazyLock;

use regex::{Captures, Regex};

static CITATION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\[citation:(\d+)\]").expect("the pattern is well formed"));
static SPACED: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\[ citation:(\d+)\]").expect("the pattern is well formed"));

/// The numbers that a text cites, as written, in order. `[ citation:3]` counts only where no `[citation:3]` is found.
pub fn extract(text: &str) -> Vec<String> {
    let all = |pattern: &Regex| -> Vec<String> {
        pattern.captures_iter(text).map(|found| found[1].to_owned()).collect()
    };
    let plain = all(&CITATION);
    if plain.is_empty() { all(&SPACED) } else { plain }
}

/// The source that a cited number stands for, from 1: numbers out of range become the nearest that there is. `None`
/// without sources.
pub fn clamp(number: &str, sources: usize) -> Option<usize> {
    let digits: Option<Vec<u32>> = number.chars().map(|c| c.to_digit(10)).collect();
    // Beyond what fits is beyond every range; digits of other scripts are no numbers of ours.
    let value = digits.map_or(1, |_| number.parse().unwrap_or(usize::MAX));
    (sources > 0).then(|| value.clamp(1, sources))
}

/// The text with every citation replaced by what `write` makes of its source's number (from 1); citations vanish where
/// there are no sources.
pub fn link(text: &str, sources: usize, write: impl Fn(usize) -> String) -> String {
    let replace = |found: &Captures| clamp(&found[1], sources).map(&write).unwrap_or_default();
    let pattern = if CITATION.is_match(text) { &*CITATION } else { &*SPACED };
    pattern.replace_all(text, replace).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_become_the_nearest_source() {
        let clamped = |n: &str| clamp(n, 5);
        assert_eq!(clamped("3"), Some(3));
        assert_eq!(clamped("0"), Some(1));
        assert_eq!(clamped("6"), Some(5));
        assert_eq!(clamped("99999999999999999999999999"), Some(5));
        assert_eq!(clamp("1", 0), None);
    }

    #[test]
    fn links_take_the_place_of_citations() {
        let written = link("a [citation:1] b [citation:9].", 2, |n| format!("[{n}]"));
        assert_eq!(written, "a [1] b [2].");
        assert_eq!(link("a[ citation:2]", 2, |n| n.to_string()), "a2");
        assert_eq!(link("a[citation:2]", 0, |n| n.to_string()), "a");
        assert_eq!(link("no citation: [x]", 2, |n| n.to_string()), "no citation: [x]");
    }
}
