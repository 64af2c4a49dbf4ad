//! When an answer is the expected one.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

/// Whether a program's output is the expected one: the same lines, white space around them and around the whole aside. Lines
/// that differ are the same if both are numbers, as many of them, of equal value: `1.50 2` and `1.5 2e0`.
pub(super) fn lines(said: &str, expected: &str) -> bool {
    let mut said = said.trim().lines().map(str::trim);
    let mut expected = expected.trim().lines().map(str::trim);
    loop {
        match (said.next(), expected.next()) {
            (None, None) => return true,
            (Some(a), Some(b)) if a == b || numbers(a).is_some_and(|a| Some(a) == numbers(b)) => {}
            _ => return false,
        }
    }
}

fn numbers(line: &str) -> Option<Vec<Decimal>> {
    line.split_whitespace().map(Decimal::read).collect()
}

/// The exact value of a number in decimal, so that long ones are never taken for their neighbours.
#[derive(Debug, PartialEq, Eq)]
enum Decimal {
    Infinity {
        negative: bool,
    },
    /// `0.digits` times ten to `exponent`, without zeros at either end; zero has no digits and is never negative.
    Finite {
        negative: bool,
        digits: String,
        exponent: i64,
    },
}

impl Decimal {
    fn read(text: &str) -> Option<Self> {
        let (negative, text) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        if ["inf", "infinity"].iter().any(|name| text.eq_ignore_ascii_case(name)) {
            return Some(Self::Infinity { negative });
        }
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<i64>().ok()?),
            None => (text, 0),
        };
        let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        if whole.len() + part.len() == 0 || !(whole.bytes().chain(part.bytes())).all(|b| b.is_ascii_digit()) {
            return None;
        }
        let all = format!("{whole}{part}");
        let digits = all.trim_start_matches('0');
        let exponent =
            exponent.checked_add(whole.len() as i64)?.checked_sub((all.len() - digits.len()) as i64)?;
        let digits = digits.trim_end_matches('0').to_owned();
        let zero = digits.is_empty();
        Some(Self::Finite { negative: negative && !zero, exponent: if zero { 0 } else { exponent }, digits })
    }
}

/// Whether two texts are the same value in JSON, as Python sees it: `1`, `1.0` and `true` are equal.
pub(super) fn values(said: &str, expected: &str) -> bool {
    let raw = |text| serde_json::from_str::<&RawValue>(text).ok();
    raw(said).zip(raw(expected)).is_some_and(|(said, expected)| same(said, expected))
}

fn same(a: &RawValue, b: &RawValue) -> bool {
    let (a, b) = (a.get().trim(), b.get().trim());
    match (a.as_bytes().first(), b.as_bytes().first()) {
        (Some(b'['), Some(b'[')) => {
            let list = |text| serde_json::from_str::<Vec<&RawValue>>(text).ok();
            list(a)
                .zip(list(b))
                .is_some_and(|(a, b)| a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| same(a, b)))
        }
        (Some(b'{'), Some(b'{')) => {
            let object = |text| serde_json::from_str::<BTreeMap<String, &RawValue>>(text).ok();
            object(a).zip(object(b)).is_some_and(|(a, b)| {
                a.len() == b.len() && a.iter().zip(&b).all(|((k, a), (l, b))| k == l && same(a, b))
            })
        }
        (Some(b'"'), Some(b'"')) => {
            let text = |text| serde_json::from_str::<String>(text).ok();
            text(a).zip(text(b)).is_some_and(|(a, b)| a == b)
        }
        _ => a == b || number(a).is_some_and(|a| Some(a) == number(b)),
    }
}

/// Whole numbers have any length and are compared exactly; with a fraction they are double precision, as in Python.
fn number(text: &str) -> Option<Decimal> {
    match text {
        "true" => Decimal::read("1"),
        "false" => Decimal::read("0"),
        _ if text.contains(['.', 'e', 'E']) => {
            let value: f64 = text.parse().ok()?;
            // What it prints as tells doubles apart, and equals the whole number where there is no fraction.
            value.is_finite().then(|| Decimal::read(&value.to_string()))?
        }
        _ => Decimal::read(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_compared_line_by_line() {
        for (said, expected) in [
            ("1 2\n3\n", "1 2\n3"),
            ("  1 2  \r\n 3 \n\n", "1 2\n3"),
            ("1.50 2", "1.5 2e0"),
            ("-0", "0"),
            ("0.0", "-0.000"),
            ("100", "1E+2"),
            (".5", "0.5"),
            ("5.", "5"),
            ("+7", "7"),
            ("inf", "Infinity"),
            ("", "\n"),
            ("YES", "YES "),
        ] {
            assert!(lines(said, expected), "{said:?} {expected:?}");
            assert!(lines(expected, said), "{expected:?} {said:?}");
        }
        for (said, expected) in [
            ("1 2 3", "1 2"),
            ("1\n2", "1 2"),
            ("Yes", "YES"),
            ("1\n\n2", "1\n2"),
            // Equal in double precision.
            ("50000000000000001", "50000000000000000"),
            ("0.1", "0.10000000000000001"),
            ("1,0", "1"),
            ("a 1.0", "a 1"),
            ("nan", "NaN"),
            ("1e", "1"),
            (".", "0"),
            ("-inf", "inf"),
            ("", "0"),
        ] {
            assert!(!lines(said, expected), "{said:?} {expected:?}");
        }
    }

    #[test]
    fn values_are_compared_as_python_does() {
        for (said, expected) in [
            ("[1, 2.0, true]", "[1.0,2,1]"),
            (r#"{"a": [1], "b": null}"#, r#"{"b":null,"a":[1.0]}"#),
            (r#""\u00e9""#, "\"é\""),
            ("123456789012345678901234567890", "123456789012345678901234567890"),
            ("0.30000000000000004", "3.0000000000000004e-1"),
            ("-0.0", "0"),
            (" [ ] ", "[]"),
        ] {
            assert!(values(said, expected), "{said:?} {expected:?}");
        }
        for (said, expected) in [
            ("[1, 2]", "[2, 1]"),
            ("[1]", "[1, 1]"),
            ("\"1\"", "1"),
            ("null", "0"),
            ("null", "false"),
            ("[]", "{}"),
            (r#"{"a": 1}"#, r#"{"a": 1, "b": 1}"#),
            ("123456789012345678901234567890", "123456789012345678901234567891"),
            ("0.1", "0.2"),
            ("1", ""),
            ("", "1"),
            ("1 1", "1"),
            ("NaN", "NaN"),
        ] {
            assert!(!values(said, expected), "{said:?} {expected:?}");
        }
    }
}
