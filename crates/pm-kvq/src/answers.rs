//! From replies to figures: the answer in a reply, whether it is right, the vote of several, pass@k.
//!
//! Extraction is the reference's. Whether two answers are equal is asked under one of two [`Judging`]s: that of published
//! figures with its oddities, or ours without them. A reply of a program is [`last_fenced_code`], judged by running it.

mod latex;

use std::collections::HashMap;
use std::sync::LazyLock;

use nics_datasets::grading::pass_at_k;
use regex::Regex;

pub use latex::{normalize, strip};
pub use nics_datasets::grading::last_fenced_code;

/// Which answers count as equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Judging {
    /// Texts that are equal once they are [`strip`]ped or [`normalize`]d, and whole numbers of one value. A missing answer
    /// is wrong.
    #[default]
    Strict,
    /// As published figures were made: two missing answers are equal, `025` is not `25`, and a slash between anything but
    /// whole numbers keeps a text from being stripped.
    Official,
}

/// The answer in a reply: what stands in its last `\boxed{…}` (one pair of braces inside is taken off), else the first
/// sentence that says `final answer` or `answer is`, else the first sentence, [`normalize`]d. May be empty.
pub fn extract(reply: &str) -> String {
    if let Some(answer) = boxed(reply).filter(|a| !a.is_empty()) {
        return answer.to_owned();
    }
    let says = |sentence: &&str| {
        let sentence = sentence.to_lowercase();
        sentence.contains("final answer") || sentence.contains("answer is")
    };
    let first = reply.split('.').next().unwrap_or_default();
    normalize(reply.split('.').find(says).unwrap_or(first))
}

/// What stands in the last `\boxed{…}` with its braces in balance; `None` where a `\fbox` or nothing at all does.
fn boxed(text: &str) -> Option<&str> {
    static WRAPPED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^\{(.*)\}$").expect("the pattern is well formed"));
    let from = text.rfind("\\boxed").or_else(|| text.rfind("\\fbox"))?;
    let text = &text[from..];
    let mut open = 0i32;
    let end = text.char_indices().find_map(|(i, c)| {
        open += match c {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        (c == '}' && open == 0).then_some(i)
    })?;
    let inside = text[..end].strip_prefix("\\boxed{")?;
    Some(WRAPPED.captures(inside).and_then(|c| c.get(1)).map_or(inside, |m| m.as_str()))
}

/// Whether two answers are equal; `None` is a missing one.
pub fn equal(judging: Judging, a: Option<&str>, b: Option<&str>) -> bool {
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (None, None) => return judging == Judging::Official,
        _ => return false,
    };
    let stripped = match judging {
        Judging::Official => strip(a).ok().zip(strip(b).ok()),
        Judging::Strict => Some((strip(a).unwrap_or_else(|text| text), strip(b).unwrap_or_else(|text| text))),
    };
    if let Some((a, b)) = &stripped
        && (a == b || normalize(a) == normalize(b) || (judging == Judging::Strict && same_number(a, b)))
    {
        return true;
    }
    a == b || normalize(a) == normalize(b)
}

/// Whole numbers of one value, leading zeros aside.
fn same_number(a: &str, b: &str) -> bool {
    let digits = |text: &str| -> Option<String> {
        let text = normalize(text);
        let whole = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        whole.then(|| text.trim_start_matches('0').to_owned())
    };
    digits(a).zip(digits(b)).is_some_and(|(a, b)| a == b)
}

/// The answer that most replies give, the earliest of those on a tie.
pub fn vote<S: AsRef<str>>(answers: &[S]) -> Option<&str> {
    let mut votes: HashMap<&str, usize> = HashMap::new();
    for answer in answers {
        *votes.entry(answer.as_ref()).or_default() += 1;
    }
    let most = votes.values().max()?;
    answers.iter().map(AsRef::as_ref).find(|answer| votes[answer] == *most)
}

/// Whether a program has passed: each of its tests gives a positive result (`true`, 1; below 0 where it did not run).
pub fn passes(tests: &[i64]) -> bool {
    tests.iter().all(|&result| result > 0)
}

/// pass@k in per cent, the mean over problems of which each is `(replies, right ones)`; `None` without problems.
pub fn pass_at_k_percent(problems: &[(u64, u64)], k: u64) -> Option<f64> {
    let sum: f64 = problems.iter().map(|&(n, right)| pass_at_k(n, right, k)).sum();
    (!problems.is_empty()).then(|| 100.0 * sum / problems.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oddities_are_the_official_judges_alone() {
        let both =
            |a, b| (equal(Judging::Strict, Some(a), Some(b)), equal(Judging::Official, Some(a), Some(b)));
        assert_eq!(both("025", "25"), (true, false));
        assert_eq!(both("x/2 ", "x/2."), (true, false));
        assert_eq!(both("0", "00"), (true, false));
        assert_eq!(both("3/4", "\\frac{3}{4}"), (true, true));
        assert_eq!(both("-25", "25"), (false, false));
        assert!(!equal(Judging::Strict, None, None) && equal(Judging::Official, None, None));
    }

    #[test]
    fn votes_and_passes() {
        assert_eq!(vote(&["a", "b", "b", "a"]), Some("a"));
        assert_eq!(vote(&["a", "b", "b"]), Some("b"));
        assert_eq!(vote::<&str>(&[]), None);
        assert!(passes(&[1, 1]) && !passes(&[1, 0]) && !passes(&[-1]));
        assert_eq!(pass_at_k_percent(&[], 1), None);
    }

    proptest::proptest! {
        /// Whatever a model writes: no panic, and an answer equals itself.
        #[test]
        fn any_text_is_judged(text in ".{0,40}", more in r"[\\{}$/.=0-9a-z√é ]{0,30}") {
            let text = text + &more;
            let answer = extract(&text);
            for judging in [Judging::Strict, Judging::Official] {
                proptest::prop_assert!(equal(judging, Some(&text), Some(&text)));
                proptest::prop_assert!(equal(judging, Some(&answer), Some(&answer)));
            }
        }
    }
}
