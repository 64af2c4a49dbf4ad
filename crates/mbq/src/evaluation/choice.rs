//! Answers to multiple-choice questions: MMMU, SEED-Bench, ScienceQA.

use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::Rules;

/// The letter of the `n`-th option.
pub fn letter(n: usize) -> char {
    char::from(b'A' + (n % 26) as u8)
}

/// What an answer counts as in which no option can be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// None of them: wrong.
    Wrong,
    /// An option by chance, of this seed, as the reference has it.
    Random(u64),
}

/// The option that an answer to a question of MMMU names: `(A)`, else `A `, else `A.`, else, of more than five words, the
/// text of an option. Of several the one that stands last.
pub fn mmmu(answer: &str, options: &[impl AsRef<str>], fallback: Fallback) -> Option<char> {
    let mut text = answer;
    for mark in [',', '.', '!', '?', ';', ':', '\''] {
        text = text.trim_matches(mark);
    }
    let text = format!(" {text} ");
    let lower = text.to_lowercase();
    let found = |form: &dyn Fn(char) -> String| -> Vec<usize> {
        (0..options.len()).filter(|n| text.contains(&form(letter(*n)))).collect()
    };
    let bracketed = |c: char| format!("({c})");
    let spaced = |c: char| format!(" {c} ");
    let hits = found(&bracketed);
    if !hits.is_empty() {
        return Some(letter(last(&hits, |n| text.rfind(&bracketed(letter(n))))));
    }
    for form in [|c: char| format!("{c} "), |c: char| format!("{c}.")] {
        let hits = found(&form);
        if !hits.is_empty() {
            return Some(letter(last(&hits, |n| text.rfind(&spaced(letter(n))))));
        }
    }
    if text.split_whitespace().count() > 5 {
        let option = |n: usize| options[n].as_ref().to_lowercase();
        let hits: Vec<usize> = (0..options.len()).filter(|n| lower.contains(&option(*n))).collect();
        if !hits.is_empty() {
            return Some(letter(last(&hits, |n| lower.rfind(&option(n)))));
        }
    }
    match fallback {
        Fallback::Wrong => None,
        Fallback::Random(seed) => {
            let all: Vec<char> = (0..options.len()).map(letter).collect();
            all.choose(&mut ChaCha8Rng::seed_from_u64(seed)).copied()
        }
    }
}

/// Of some options the first of those that stand furthest back.
fn last(hits: &[usize], place: impl Fn(usize) -> Option<usize>) -> usize {
    let mut best = (hits[0], place(hits[0]));
    for &n in &hits[1..] {
        let at = place(n);
        if at > best.1 {
            best = (n, at);
        }
    }
    best.0
}

/// Whether the first character of an answer to SEED-Bench is the letter.
pub fn seed(answer: &str, letter: &str) -> bool {
    let first: String = answer.trim().chars().take(1).collect();
    !first.is_empty() && first.to_lowercase() == letter.trim().to_lowercase()
}

/// Whether an answer to ScienceQA is the letter. The paper's harness looked for upper case in a text that it had made lower
/// case, so that `B. text` never counted.
pub fn science_qa(answer: &str, letter: char, rules: Rules) -> bool {
    let (text, wanted) = (answer.trim().to_lowercase(), letter.to_lowercase().to_string());
    if text == wanted {
        return true;
    }
    rules == Rules::Mended && text.strip_prefix(&wanted).is_some_and(|rest| rest.starts_with('.'))
}
