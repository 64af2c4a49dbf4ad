//! The two ways in which the reference makes answers in LaTeX comparable.

use std::sync::LazyLock;

use regex::Regex;

/// A pattern with what takes the place of its matches.
type Rule = (Regex, &'static str);

fn rules(all: &[(&str, &'static str)]) -> Vec<Rule> {
    all.iter().map(|(p, by)| (Regex::new(p).expect("the pattern is well formed"), *by)).collect()
}

fn apply(rules: &[Rule], text: String) -> String {
    rules.iter().fold(text, |text, (pattern, by)| pattern.replace_all(&text, *by).into_owned())
}

fn replace(pairs: &[(&str, &str)], text: &str) -> String {
    pairs.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// An answer without what does not change its value: line breaks, trailing dots, sizes of brackets and fractions, a unit
/// at its end, degrees, currency, per cent, `k =` in front; with `\sqrt` and `\frac` in braces and `a/b` as a fraction.
///
/// # Errors
/// The text as far as it is stripped, where one slash stands between anything but whole numbers: the reference fails there.
pub fn strip(text: &str) -> Result<String, String> {
    const SPACES: &[(&str, &str)] = &[
        ("\\!", ""),
        ("\\ ", ""),
        ("\\\\", "\\"),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
    ];
    const MARKS: &[(&str, &str)] = &[
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
        ("$", ""),
        ("\\text", ""),
        ("x\\in", ""),
        ("\\%", ""),
        ("%", ""),
        (" .", " 0."),
        ("{.", "{0."),
        ("\\cdot", ""),
        ("infinity", "\\infty"),
    ];
    const WORDS: &[(&str, &str)] =
        &[("+\\inity", "\\infty"), ("and", ""), ("\\mathbf", ""), ("\\mathrm", "")];
    static UNIT: LazyLock<Vec<Rule>> = LazyLock::new(|| rules(&[(r"\\text\{.*?\}$", "")]));
    static MBOX: LazyLock<Vec<Rule>> = LazyLock::new(|| rules(&[(r"\\mbox\{.*?\}", "")]));
    static WHOLE: LazyLock<Vec<Rule>> =
        LazyLock::new(|| rules(&[(r"(\d+)\.0+([^\d])", "${1}${2}"), (r"(\d+)\.0+$", "${1}")]));
    static ROOT: LazyLock<Vec<Rule>> = LazyLock::new(|| rules(&[(r"\\sqrt(\w+)", "\\sqrt{${1}}")]));

    let text = text.trim().replace('\n', "");
    let mut text = replace(SPACES, text.trim_end_matches('.'));
    let without_unit = apply(&UNIT, text.clone()).trim().to_owned();
    if !without_unit.is_empty() {
        // An answer that is nothing but a unit stays.
        text = without_unit;
    }
    text = replace(MARKS, &text);
    if !text.contains("\\infty") {
        text = text.replace("inf", "\\infty");
    }
    text = apply(&MBOX, replace(WORDS, &text));
    if text.contains('j') && !text.contains('i') {
        text = text.replace('j', "i");
    }
    text = apply(&WHOLE, text);
    if text.is_empty() {
        return Ok(text);
    }
    if text.starts_with('.') {
        text.insert(0, '0');
    }
    if let [name, value] = text.split('=').collect::<Vec<_>>()[..]
        && name.chars().count() <= 2
    {
        text = value.into();
    }
    text = apply(&ROOT, text).replace(' ', "");
    let text = braced_fractions(&text);
    slash_as_fraction(&text).ok_or(text)
}

/// `\frac12` as `\frac{1}{2}`, `\frac1{72}` as `\frac{1}{72}`; unchanged where a fraction has no two parts.
fn braced_fractions(text: &str) -> String {
    let mut parts = text.split("\\frac");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out += "\\frac";
        if part.starts_with('{') {
            out += part;
            continue;
        }
        let mut chars = part.chars();
        let (Some(a), Some(b)) = (chars.next(), chars.next()) else { return text.to_owned() };
        let lower = if b == '{' { b.to_string() } else { format!("{{{b}}}") };
        out.extend(["{", a.encode_utf8(&mut [0; 4]), "}", &lower, chars.as_str()]);
    }
    out
}

/// `a/b` of whole numbers as `\frac{a}{b}`; `None` where one slash stands between anything else.
fn slash_as_fraction(text: &str) -> Option<String> {
    let [a, b] = text.split('/').collect::<Vec<_>>()[..] else { return Some(text.to_owned()) };
    let (plain_a, plain_b) = (whole_number(a)?, whole_number(b)?);
    Some(if plain_a && plain_b { format!("\\frac{{{a}}}{{{b}}}") } else { text.to_owned() })
}

/// Whether a text is a whole number as a program writes it (`Some(false)` for `+3`, `007`, `1_000`); `None` for no number.
fn whole_number(text: &str) -> Option<bool> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let number = !unsigned.is_empty()
        && unsigned.split('_').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    let plain = !text.starts_with('+')
        && !unsigned.contains('_')
        && (unsigned == "0" || !unsigned.starts_with('0'))
        && text != "-0";
    number.then_some(plain)
}

/// An answer without articles, spaces, units and wrappers of text: what a sentence says the answer is, what stands in a
/// box or between dollar signs.
pub fn normalize(text: &str) -> String {
    const ARTICLES: &[(&str, &str)] = &[
        ("an ", ""),
        ("a ", ""),
        (".$", "$"),
        ("\\$", ""),
        ("\\ ", ""),
        (" ", ""),
        ("mbox", "text"),
        (",\\text{and}", ","),
        ("\\text{and}", ","),
        ("\\text{m}", "\\text{}"),
        ("\\le", "<"),
    ];
    const UNITS: &[&str] = &[
        "square",
        "ways",
        "integers",
        "dollars",
        "mph",
        "inches",
        "ft",
        "hours",
        "km",
        "units",
        "\\ldots",
        "sue",
        "points",
        "feet",
        "minutes",
        "digits",
        "cents",
        "degrees",
        "cm",
        "gm",
        "pounds",
        "meters",
        "meals",
        "edges",
        "students",
        "childrentickets",
        "multiples",
        "\\text{s}",
        "\\text{.}",
        "\\text{\ns}",
        "\\text{}^2",
        "\\text{}^3",
        "\\text{\n}",
        "\\text{}",
        "\\mathrm{th}",
        "^\\circ",
        "^{\\circ}",
        "\\;",
        ",\\!",
        "{,}",
        "\"",
        "\\dots",
        "\n",
        "\r",
        "\u{c}",
    ];
    static WRAPPERS: LazyLock<Vec<Rule>> = LazyLock::new(|| {
        rules(&[
            (r"\\text\{\((.*?)\)\}", "${1}"),
            (r"\\text\{(.*?)\}", "${1}"),
            (r"\\textbf\{(.*?)\}", "${1}"),
            (r"\\overline\{(.*?)\}", "${1}"),
            (r"\\boxed\{(.*)\}", "${1}"),
        ])
    });
    static PLACES: LazyLock<Vec<Regex>> = LazyLock::new(|| {
        [r"finalansweris(.*)", r"answer?is:?(.*)", r"oxed\{(.*?)\}", r"\$(.*?)\$"]
            .map(|p| Regex::new(p).expect("the pattern is well formed"))
            .into()
    });
    static SHORTHAND: LazyLock<Vec<Rule>> = LazyLock::new(|| {
        rules(&[(r"frac([^{])(.)", "frac{${1}}{${2}}"), (r"sqrt([^{])", "sqrt{${1}}"), (r"\$", "")])
    });

    let text = UNITS.iter().fold(replace(ARTICLES, text), |text, unit| text.replace(unit, ""));
    let mut text = apply(&WRAPPERS, text);
    for place in PLACES.iter() {
        if let Some(last) = place.captures_iter(&text).last().and_then(|c| c.get(1)) {
            text = last.as_str().into();
        }
    }
    let mut text = String::from(text.trim());
    if text.contains("rac") && !text.contains("\\frac") {
        text = text.replace("rac", "\\frac");
    }
    text = apply(&SHORTHAND, text);
    let digits = text.replace(',', "");
    if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) { digits } else { text }
}
