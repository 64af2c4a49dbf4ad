//! Cutting a text into sentences, and finding the one in which two continuations part.

use super::punkt;

/// A piece of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The piece, white space behind it included.
    pub text: String,
    /// Its first character.
    pub start: usize,
    /// Its last character.
    pub end: usize,
}

/// Cuts a text: after every newline (two in a row count as one), and between sentences.
///
/// Sentences of a text without Chinese characters are Punkt's, each with the white space behind it; a text with them is
/// cut after `。！？；…`, and white space at the ends of such pieces belongs to none.
pub fn segments(text: &str) -> Vec<Segment> {
    let chars: Vec<char> = text.chars().collect();
    let chinese = chars.iter().any(|c| ('\u{4e00}'..='\u{9fff}').contains(c));
    let sentences = if chinese { chinese_sentences(&chars) } else { spaced_sentences(&chars) };
    let mut all = Vec::new();
    for (mut from, end) in sentences {
        while from < end {
            let rest = &chars[from..end];
            let cut = rest
                .iter()
                .position(|c| *c == '\n')
                .map_or(rest.len(), |at| at + if rest.get(at + 1) == Some(&'\n') { 2 } else { 1 });
            all.push(Segment { text: rest[..cut].iter().collect(), start: from, end: from + cut - 1 });
            from += cut;
        }
    }
    all
}

/// Punkt's sentences, each up to the next.
fn spaced_sentences(text: &[char]) -> Vec<(usize, usize)> {
    let sentences = punkt::sentences(text);
    let starts = sentences.iter().map(|s| s.start);
    let ends = starts.clone().skip(1).chain([text.len()]);
    if sentences.is_empty() && !text.is_empty() {
        return vec![(0, text.len())];
    }
    starts.zip(ends).collect()
}

fn chinese_sentences(text: &[char]) -> Vec<(usize, usize)> {
    let mut all = Vec::new();
    let mut from = 0;
    for at in 0..text.len() {
        if matches!(text[at], '。' | '！' | '？' | '；' | '…') || at + 1 == text.len() {
            let piece = &text[from..=at];
            let first = piece.iter().position(|c| !c.is_whitespace());
            let last = piece.iter().rposition(|c| !c.is_whitespace());
            if let (Some(first), Some(last)) = (first, last) {
                all.push((from + first, from + last + 1));
            }
            from = at + 1;
        }
    }
    all
}

/// How much around the divergence a judge gets to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Segments from the divergent one on, itself counted. Default 1.
    pub continuation: usize,
    /// Segments before it that belong to the sentence; `None` is all. Default 0.
    pub previous: Option<usize>,
    /// Segments of the common context before that; `None` is all. Default all.
    pub common: Option<usize>,
    /// Whether only what follows the last `<think>` of the context counts. Default true.
    pub skip_input: bool,
}

impl Default for Window {
    fn default() -> Self {
        Self { continuation: 1, previous: Some(0), common: None, skip_input: true }
    }
}

/// What a judge gets to see of one branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch {
    /// What both branches have in common.
    pub common: String,
    /// The sentence with the divergence; `EMPTY` when there is none.
    pub sentence: String,
}

/// A token with its mark: `<<token>>`, a leading space kept outside.
pub fn marked(token: &str) -> String {
    match token.strip_prefix(' ') {
        Some(rest) => format!(" <<{rest}>>"),
        None => format!("<<{token}>>"),
    }
}

/// The sentence with the divergence: of `context`, a marked token and its `continuation`.
///
/// `after_stop` says that the token and the one before it both end sentences: the sentence behind is meant then.
pub fn branch(context: &str, marked: &str, continuation: &str, after_stop: bool, window: Window) -> Branch {
    let context = match context.rsplit_once("<think>") {
        Some((_, rest)) if window.skip_input => rest,
        _ => context,
    };
    let segments = segments(&format!("{context}{marked}{continuation}"));
    let mut index = context.chars().count();
    if marked.starts_with(' ') {
        index += 1;
    }
    if after_stop {
        index += marked.chars().count();
    }
    let Some(at) = segments.iter().position(|s| (s.start..=s.end).contains(&index)) else {
        return Branch { common: String::new(), sentence: "EMPTY".into() };
    };
    let back = |from: usize, count: Option<usize>| count.map_or(0, |count| from.saturating_sub(count));
    let join = |part: &[Segment]| part.iter().map(|s| s.text.as_str()).collect::<String>();
    let first = back(at, window.previous);
    let end = (at + window.continuation).min(segments.len());
    Branch {
        common: join(&segments[back(first, window.common)..first]),
        sentence: join(&segments[first..end]),
    }
}
