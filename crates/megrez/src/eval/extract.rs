//! Reading an answer out of a reply.

use std::sync::LazyLock;

use regex::Regex;

/// The last number of a reply, without thousands separators, currency signs, leading and trailing zeros: the GSM8K rule.
///
/// Two numbers are equal when the texts that this function gives for them are.
pub fn last_number(reply: &str) -> Option<String> {
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[-−]?[$€£¥￥]?\d[\d,，]*(?:\.\d+)?").expect("a valid pattern"));
    let found = NUMBER.find_iter(reply).last()?;
    // A hyphen right behind a word or number (`12-3`, `step-4`) is no sign.
    let before = reply[..found.start()].chars().next_back();
    let text = found.as_str();
    let text = match before {
        Some(c) if c.is_alphanumeric() || c == ')' => text.trim_start_matches(['-', '−']),
        _ => text,
    };
    Some(normal(text))
}

fn normal(number: &str) -> String {
    let negative = number.starts_with(['-', '−']);
    let digits: String = number.chars().filter(|c| c.is_ascii_digit() || *c == '.').collect();
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    let (whole, fraction) = (whole.trim_start_matches('0'), fraction.trim_end_matches('0'));
    let whole = if whole.is_empty() { "0" } else { whole };
    let sign = if negative && !(whole == "0" && fraction.is_empty()) { "-" } else { "" };
    if fraction.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction}") }
}

/// The option that a reply chooses, counted from 0: after "答案是", "answer is" or the like, else in parentheses, else
/// the first letter that stands alone. Letters beyond the number of `options` are no answer.
pub fn choice_letter(reply: &str, options: usize) -> Option<usize> {
    static PATTERNS: LazyLock<[Regex; 3]> = LazyLock::new(|| {
        [
            r"(?i:答案(?:应该|应当|应|选项)?(?:是|为|选)?|answer(?:\s+is)?|故选|选择|选)\s*[:：]?\s*[*(（\[]*\s*([A-J])(?:[^A-Za-z0-9]|$)",
            r"[(（]\s*([A-J])\s*[)）]",
            r"(?:^|[^A-Za-z0-9])([A-J])(?:[^A-Za-z0-9]|$)",
        ]
        .map(|p| Regex::new(p).expect("a valid pattern"))
    });
    PATTERNS
        .iter()
        .flat_map(|pattern| pattern.captures_iter(reply))
        .filter_map(|found| Some(usize::from(found[1].bytes().next()? - b'A')))
        .find(|&index| index < options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_counts_whatever_it_wears() {
        for (reply, expected) in [
            ("12+30=42\n#### 42", Some("42")),
            ("It costs $1,234.50.", Some("1234.5")),
            ("一共￥1，200元。", Some("1200")),
            ("from 10 to -5", Some("-5")),
            ("so 12-3", Some("3")),
            ("3 apples, then 007", Some("7")),
            ("-0.0", Some("0")),
            ("12345678901234567890", Some("12345678901234567890")),
            ("no number", None),
            ("", None),
        ] {
            assert_eq!(last_number(reply).as_deref(), expected, "{reply}");
        }
    }

    #[test]
    fn a_letter_is_found_where_the_reply_names_it() {
        for (reply, expected) in [
            ("B", Some(1)),
            ("答案是C。", Some(2)),
            ("答案：D", Some(3)),
            ("A common mistake is B, but the answer is (C).", Some(2)),
            ("The answer is: **D**", Some(3)),
            ("I would pick (B) here", Some(1)),
            ("C. Because of E", Some(2)),
            ("the answer is J", None),
            ("None of them", None),
            ("ABCD", None),
        ] {
            assert_eq!(choice_letter(reply, 4), expected, "{reply}");
        }
    }
}
