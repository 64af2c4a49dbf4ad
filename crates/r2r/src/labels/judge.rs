//! Asking a judge whether two continuations say the same, and reading its answer.

use std::sync::LazyLock;

use regex::Regex;

/// The judge's system message.
pub const SYSTEM: &str = include_str!("../../templates/judge_system.txt");
/// The judge's task: `{{context}}`, `{{small}}` and `{{large}}` stand for the texts.
pub const USER: &str = include_str!("../../templates/judge_user.txt");

/// The score that a reply gives: the first integer after the word "output", else the first one anywhere, else -1.
pub fn score(reply: &str) -> i64 {
    static AFTER: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"(?i)\boutput\b[^0-9]*([0-9]+)").ok());
    static ANYWHERE: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new("([0-9]+)").ok());
    let first = |regex: &LazyLock<Option<Regex>>| {
        let captures = LazyLock::force(regex).as_ref()?.captures(reply)?;
        Some(captures.get(1)?.as_str().parse().unwrap_or(-1))
    };
    first(&AFTER).or_else(|| first(&ANYWHERE)).unwrap_or(-1)
}

/// [`score`] where it is a label, else -1.
pub fn strict_score(reply: &str) -> i64 {
    match score(reply) {
        label @ (0 | 1) => label,
        _ => -1,
    }
}

/// The user message for a mismatch.
pub fn question(context: &str, small: &str, large: &str) -> String {
    fill(USER, &[("context", context), ("small", small), ("large", large)])
}

/// Replaces `{{name}}` by its value, once through: what a value holds is left alone.
pub(crate) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find("{{") {
        filled.push_str(&rest[..at]);
        rest = &rest[at..];
        let value = rest.find("}}").and_then(|end| {
            let (_, value) = values.iter().find(|(name, _)| *name == &rest[2..end])?;
            Some((value, end + 2))
        });
        if let Some((value, end)) = value {
            filled.push_str(value);
            rest = &rest[end..];
        } else {
            filled.push_str("{{");
            rest = &rest[2..];
        }
    }
    filled.push_str(rest);
    filled
}
