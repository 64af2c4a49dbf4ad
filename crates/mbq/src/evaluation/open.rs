//! Open answers of MMMU: what of a text can be the answer, and whether it is.

/// Something that an answer may mean.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A number, rounded to two decimals.
    Number(f64),
    /// A text in lower case.
    Text(String),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text.trim()),
        }
    }
}

/// Words behind which an answer tends to stand.
const SIGNS: [&str; 8] = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "];

/// Texts that are no answer.
const MARKS: [&str; 7] = [":", ",", ".", "!", "?", ";", "'"];

/// Everything that an answer may mean, each once, in the order of its parts.
pub fn parse(answer: &str) -> Vec<Value> {
    let parts = parts(answer);
    let mut texts = parts.clone();
    for part in &parts {
        texts.extend(numbers(part));
    }
    let mut all: Vec<Value> = Vec::new();
    for value in texts.iter().flat_map(|t| values(t)) {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

/// Whether one of the things that an answer may mean is the reference, or a text among them contains it.
pub fn correct(parsed: &[Value], references: &[impl AsRef<str>]) -> bool {
    let wanted: Vec<Value> = references.iter().flat_map(|r| values(r.as_ref())).collect();
    parsed.iter().any(|p| match p {
        Value::Number(_) => wanted.contains(p),
        Value::Text(text) => wanted.iter().any(|w| matches!(w, Value::Text(wanted) if text.contains(wanted))),
    })
}

/// The shortest text behind a sign in each line; the whole answer when no line has a sign. Behind `=` too in the last.
fn parts(answer: &str) -> Vec<String> {
    let text = answer.trim().trim_matches('.').to_lowercase();
    // The reference also cuts at a period before a capital letter, of which there are none any more.
    let lines: Vec<&str> = text.split('\n').collect();
    let mut found = Vec::new();
    for (n, line) in lines.iter().enumerate() {
        let more: &[&str] = if n + 1 == lines.len() { &["="] } else { &[] };
        let mut shortest: Option<&str> = None;
        for sign in SIGNS.iter().chain(more) {
            if let Some((_, behind)) = line.rsplit_once(sign) {
                let behind = behind.trim();
                // An empty text counts as none.
                match shortest {
                    Some(so_far)
                        if !so_far.is_empty() && behind.chars().count() >= so_far.chars().count() => {}
                    _ => shortest = Some(behind),
                }
            }
        }
        match shortest {
            Some(part) if !part.is_empty() && !MARKS.contains(&part) => found.push(part.to_owned()),
            _ => {}
        }
    }
    if found.is_empty() { vec![text] } else { found }
}

/// A text as a number where it is one, else in lower case; a single character is told from the inside of a word by a space.
fn values(text: &str) -> Vec<Value> {
    let text = text.trim();
    if let Some(number) = number(&text.replace(',', "")) {
        return vec![Value::Number(rounded(number))];
    }
    let text = text.to_lowercase();
    if text.chars().count() == 1 {
        return vec![Value::Text(format!(" {text}")), Value::Text(format!("{text} "))];
    }
    vec![Value::Text(text)]
}

/// Python's `float`.
fn number(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let lone = |i: usize| {
        let digit = |at: Option<usize>| at.and_then(|a| bytes.get(a)).is_some_and(u8::is_ascii_digit);
        bytes[i] == b'_' && !(digit(i.checked_sub(1)) && digit(Some(i + 1)))
    };
    if (0..bytes.len()).any(lone) {
        return None;
    }
    text.replace('_', "").trim().parse().ok()
}

/// To two decimals, half to even as the decimal expansion has it.
fn rounded(number: f64) -> f64 {
    if number.is_finite() { format!("{number:.2}").parse().unwrap_or(number) } else { number }
}

/// Numbers in a text: those with commas, in scientific notation, and plain ones, one kind after the other.
fn numbers(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    [with_commas, scientific, plain].into_iter().flat_map(|form| all(&chars, form)).collect()
}

/// All matches of a form, from the left, none within another. A form gives the end of a match that begins at a place.
fn all(text: &[char], form: fn(&[char], usize) -> Option<usize>) -> Vec<String> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < text.len() {
        match form(text, at) {
            Some(end) if end > at => {
                found.push(text[at..end].iter().collect());
                at = end;
            }
            _ => at += 1,
        }
    }
    found
}

fn is_digit(text: &[char], at: usize) -> bool {
    text.get(at).is_some_and(char::is_ascii_digit)
}

/// The first place from `at` on that is no digit.
fn digits(text: &[char], at: usize) -> usize {
    at + text.iter().skip(at).take_while(|c| c.is_ascii_digit()).count()
}

/// Whether a word begins or ends at a place.
fn boundary(text: &[char], at: usize) -> bool {
    let word =
        |i: Option<usize>| i.and_then(|i| text.get(i)).is_some_and(|c| c.is_alphanumeric() || *c == '_');
    word(at.checked_sub(1)) != word(Some(at))
}

/// The place behind a minus sign, if there is one.
fn signed(text: &[char], at: usize) -> usize {
    at + usize::from(text.get(at) == Some(&'-'))
}

/// `-?\b\d{1,3}(?:,\d{3})+\b`
fn with_commas(text: &[char], at: usize) -> Option<usize> {
    let from = signed(text, at);
    let first = digits(text, from);
    if !boundary(text, from) || !(1..=3).contains(&(first - from)) {
        return None;
    }
    let mut ends = Vec::new();
    let mut end = first;
    while text.get(end) == Some(&',') && (1..=3).all(|i| is_digit(text, end + i)) {
        end += 4;
        ends.push(end);
    }
    ends.into_iter().rev().find(|end| boundary(text, *end))
}

/// `[eE][+-]?\d+`, its end.
fn power(text: &[char], at: usize) -> Option<usize> {
    if !matches!(text.get(at), Some('e' | 'E')) {
        return None;
    }
    let from = at + 1 + usize::from(matches!(text.get(at + 1), Some('+' | '-')));
    let end = digits(text, from);
    (end > from).then_some(end)
}

/// `-?\d+(?:\.\d+)?[eE][+-]?\d+`
fn scientific(text: &[char], at: usize) -> Option<usize> {
    let from = signed(text, at);
    let whole = digits(text, from);
    if whole == from {
        return None;
    }
    let fraction = if text.get(whole) == Some(&'.') { digits(text, whole + 1) } else { whole };
    let ends = if fraction > whole + 1 { [Some(fraction), Some(whole)] } else { [Some(whole), None] };
    ends.into_iter().flatten().find_map(|end| power(text, end))
}

/// `-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])`, with what a backtracking engine gives up to match.
fn plain(text: &[char], at: usize) -> Option<usize> {
    let from = signed(text, at);
    let free = |end: usize| power(text, end).is_none() && text.get(end) != Some(&',') && !is_digit(text, end);
    let whole = digits(text, from);
    // A shorter run of digits would end before a digit, so that only the longest can match.
    if whole > from && text.get(whole) == Some(&'.') {
        let end = digits(text, whole + 1);
        if end > whole + 1 && free(end) {
            return Some(end);
        }
    }
    if whole == from && text.get(from) == Some(&'.') {
        let end = digits(text, from + 1);
        return (end > from + 1 && free(end)).then_some(end);
    }
    (whole > from && boundary(text, whole) && free(whole)).then_some(whole)
}
