//! From a reply to an answer.

use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Serialize};

/// What kind of answer a question has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerKind {
    /// In `\boxed{…}`, compared as text.
    Boxed,
    /// One of four letters.
    Choice,
    /// One of up to ten letters.
    LongChoice,
    /// A program, which is judged by running it: there is nothing to compare.
    Program,
}

type Pattern = LazyLock<Option<Regex>>;

fn first<'a>(pattern: &Pattern, text: &'a str) -> Option<&'a str> {
    let captures = LazyLock::force(pattern).as_ref()?.captures(text)?;
    Some(captures.get(1)?.as_str())
}

/// The part of a reply that is graded: behind the first `</think>`, up to a second one; all of it where there is none.
pub fn graded_part(reply: &str) -> &str {
    const END: &str = "</think>";
    match reply.split_once(END) {
        Some((_, rest)) => rest.split_once(END).map_or(rest, |(part, _)| part),
        None => reply,
    }
}

/// The first `\boxed{…}`, up to its first `}`, without white space around it.
pub fn boxed(text: &str) -> Option<String> {
    static PATTERN: Pattern = LazyLock::new(|| Regex::new(r"\\boxed\{([^}]*)\}").ok());
    first(&PATTERN, text).map(|answer| answer.trim().to_owned())
}

/// The first `Answer: X`, X of A to D, whatever the case.
pub fn choice(text: &str) -> Option<String> {
    static PATTERN: Pattern = LazyLock::new(|| Regex::new(r"(?i)answer[ \t]*:[ \t]*\$?([A-D])\$?").ok());
    first(&PATTERN, text).map(str::to_uppercase)
}

/// `answer is (X)`, else `Answer: X`, else the last capital A to J that stands alone.
pub fn lone_letter(text: &str) -> Option<String> {
    static IS: Pattern = LazyLock::new(|| Regex::new(r"answer is \(?([A-J])\)?").ok());
    static COLON: Pattern = LazyLock::new(|| Regex::new(r"[aA]nswer:\s*([A-J])").ok());
    static LONE: Pattern = LazyLock::new(|| Regex::new(r"\b[A-J]\b").ok());
    let last = || Some(LazyLock::force(&LONE).as_ref()?.find_iter(text).last()?.as_str());
    first(&IS, text).or_else(|| first(&COLON, text)).or_else(last).map(str::to_owned)
}

/// The first fenced block (of Python where it says so), else a text that looks like Python itself.
pub fn fenced_code(text: &str) -> Option<String> {
    static PATTERN: Pattern = LazyLock::new(|| Regex::new(r"(?s)```(?:python)?\s*(.*?)```").ok());
    if let Some(code) = first(&PATTERN, text) {
        return Some(code.trim().to_owned());
    }
    let begins =
        |line: &str| ["def ", "class ", "import ", "from "].iter().any(|word| line.starts_with(word));
    text.lines().any(begins).then(|| text.trim().to_owned())
}

/// Whether an answer is the right one.
pub fn is_correct(kind: AnswerKind, answer: &str, gold: &str) -> bool {
    match kind {
        AnswerKind::Boxed => answer.trim() == gold.trim(),
        AnswerKind::Choice | AnswerKind::LongChoice => {
            answer.trim().to_uppercase() == gold.trim().to_uppercase()
        }
        AnswerKind::Program => true,
    }
}
