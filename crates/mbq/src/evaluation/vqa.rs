//! The accuracy of visual question answering (TextVQA, VizWiz): an answer is as good as the number of people who gave it.

use std::collections::HashMap;
use std::sync::LazyLock;

/// Marks that are taken out of a text, or replaced by a space. The colon is not among them.
const MARKS: [char; 21] = [
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!',
];

/// The most periods that are taken out: the reference hands a flag to the parameter for that number.
const MOST_PERIODS: usize = 32;

const ARTICLES: [&str; 3] = ["a", "an", "the"];

const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

static CONTRACTIONS: LazyLock<HashMap<&str, &str>> = LazyLock::new(|| {
    let pairs = include_str!("contractions.txt").lines().filter_map(|line| line.split_once(' '));
    pairs.collect()
});

/// What a word is replaced by when its apostrophe is missing or misplaced.
pub fn contraction(word: &str) -> Option<&'static str> {
    CONTRACTIONS.get(word).copied()
}

/// All contractions, word to word.
pub fn contractions() -> impl Iterator<Item = (&'static str, &'static str)> {
    CONTRACTIONS.iter().map(|(from, to)| (*from, *to))
}

/// A text as answers are compared: lower case, without marks and articles, number words as digits.
pub fn normalize(text: &str) -> String {
    let text = text.to_lowercase().replace([',', '?'], "").replace("'s", " 's");
    let text = text.trim().replace(['\n', '\t'], " ");
    let text = without_periods(&without_marks(text.trim()));
    let words = text.split_whitespace().map(|word| {
        let number = NUMBERS.iter().find(|(name, _)| *name == word);
        number.map_or(word, |(_, digits)| digits)
    });
    let words = words.filter(|w| !ARTICLES.contains(w)).map(|w| contraction(w).unwrap_or(w));
    words.collect::<Vec<_>>().join(" ")
}

/// A mark that touches a space anywhere in the text goes everywhere, any other becomes a space.
fn without_marks(text: &str) -> String {
    let mut out = text.to_owned();
    for mark in MARKS {
        let touches = text.contains(&format!("{mark} ")) || text.contains(&format!(" {mark}"));
        out = out.replace(mark, if touches { "" } else { " " });
    }
    out
}

/// Without periods that no digit follows.
fn without_periods(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut gone = 0;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let digit = chars.peek().is_some_and(|next| next.is_numeric());
        if c == '.' && !digit && gone < MOST_PERIODS {
            gone += 1;
        } else {
            out.push(c);
        }
    }
    out
}

/// The accuracy of an answer: the mean over the references of `min(1, n/3)`, where `n` of the others agree with it.
pub fn accuracy(answer: &str, references: &[impl AsRef<str>]) -> f64 {
    if references.is_empty() {
        return 0.0;
    }
    let answer = normalize(answer);
    let agree: Vec<bool> = references.iter().map(|r| normalize(r.as_ref()) == answer).collect();
    let all = agree.iter().filter(|a| **a).count();
    // In thirds, so that the mean is rounded once.
    let thirds: usize = agree.iter().map(|own| (all - usize::from(*own)).min(3)).sum();
    thirds as f64 / (3 * references.len()) as f64
}
