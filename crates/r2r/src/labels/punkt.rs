//! Sentence boundaries as Punkt (Kiss & Strunk, 2006) finds them without learned statistics, in the form of its widely
//! used Python implementation.
//!
//! A *candidate* is one of `. ? !` with a character of [`NON_WORD`] or white space and a further token behind it. Its
//! *local context* (the word before it, the mark, what follows) is split into tokens; the candidate ends a sentence when
//! a token other than the last is final.

use std::ops::Range;

/// Characters that end a word.
const NON_WORD: &str = ")\";}]*:@'({[!?";
/// Characters that no word begins with.
const NO_START: &str = "(\"`{[:;&#*@)}]-,";
/// Tokens behind which an initial or a number does not end a sentence.
const PUNCTUATION: &str = ";:,.!?";
/// Characters that belong to the sentence before when they open one.
const CLOSING: &str = "\"')]}";

/// The sentences of a text, as ranges of its characters; white space between them belongs to none.
pub fn sentences(text: &[char]) -> Vec<Range<usize>> {
    realigned(text, &slices(text))
}

struct Candidate {
    /// Where the mark is.
    mark: usize,
    /// Where its word begins.
    word: usize,
    /// Where what follows ends.
    end: usize,
    /// Where the next token begins, where there is one.
    next: Option<usize>,
}

/// Candidates whose words do not overlap: of adjacent marks the last counts.
fn candidates(text: &[char]) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    // Of the candidate before, kept or not.
    let (mut last_word, mut last_mark) = (0, 0);
    for mark in (0..text.len()).filter(|&i| matches!(text[i], '.' | '?' | '!')) {
        let Some((end, next)) = follows(text, mark + 1) else { continue };
        // A white space in the very first place counts as none, as in the original.
        let space = (last_mark + 1..mark).rev().find(|&i| is_space(text[i]));
        let word = space.map_or(last_word, |space| space + 1);
        if let Some(before) = found.last()
            && before.mark > word
        {
            found.pop();
        }
        found.push(Candidate { mark, word, end, next });
        (last_word, last_mark) = (word, mark);
    }
    found
}

/// What stands behind a mark: where it ends, and where the next token begins.
fn follows(text: &[char], from: usize) -> Option<(usize, Option<usize>)> {
    let first = *text.get(from)?;
    if NON_WORD.contains(first) {
        return Some((from + 1, None));
    }
    if !first.is_whitespace() {
        return None;
    }
    let next = from + text[from..].iter().position(|c| !c.is_whitespace())?;
    let len = text[next..].iter().position(|c| c.is_whitespace()).unwrap_or(text.len() - next);
    Some((next + len, Some(next)))
}

/// White space before a word, ASCII alone as in the original.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

fn slices(text: &[char]) -> Vec<Range<usize>> {
    let (mut all, mut from) = (Vec::new(), 0);
    for candidate in candidates(text) {
        if breaks(&text[candidate.word..candidate.end]) {
            all.push(from..candidate.mark + 1);
            from = candidate.next.unwrap_or(candidate.mark + 1);
        }
    }
    let end = text.iter().rposition(|c| !c.is_whitespace()).map_or(0, |last| last + 1);
    all.push(from..end.max(from));
    all
}

/// Whether a token of a local context, other than the last, ends a sentence.
fn breaks(context: &[char]) -> bool {
    let tokens = tokens(context);
    tokens.windows(2).any(|pair| is_final(pair[0]) && !loses_mark(pair[0], pair[1]))
}

fn is_final(token: &[char]) -> bool {
    match token {
        ['?' | '!'] => true,
        [.., '.'] => !token.ends_with(&['.', '.']),
        _ => false,
    }
}

/// An initial in front of a word, or a number in front of a lower-case one, goes on.
fn loses_mark(token: &[char], next: &[char]) -> bool {
    let punctuation = matches!(next, [c] if PUNCTUATION.contains(*c));
    let first = next.first().copied().unwrap_or(' ');
    match token {
        [c, '.'] if c.is_alphabetic() || *c == '_' => {
            punctuation || first.is_lowercase() || first.is_uppercase()
        }
        _ => is_number(token) && (punctuation || first.is_lowercase()),
    }
}

/// `-?[.,]?` a digit, then digits, commas, dots and hyphens up to a dot.
fn is_number(token: &[char]) -> bool {
    let rest = token.strip_prefix(&['-']).unwrap_or(token);
    let rest = rest.strip_prefix(&['.']).or_else(|| rest.strip_prefix(&[','])).unwrap_or(rest);
    let part = |c: &char| c.is_numeric() || matches!(c, ',' | '.' | '-');
    rest.len() > 1 && rest[0].is_numeric() && rest[1..].iter().all(part) && rest.ends_with(&['.'])
}

/// Splits a local context: runs of dots or hyphens, words, single characters.
fn tokens(text: &[char]) -> Vec<&[char]> {
    let (mut all, mut at) = (Vec::new(), 0);
    while at < text.len() {
        if text[at].is_whitespace() {
            at += 1;
            continue;
        }
        let len = match run(&text[at..]) {
            0 if NO_START.contains(text[at]) => 1,
            0 => word(&text[at..]),
            len => len,
        };
        all.push(&text[at..at + len]);
        at += len;
    }
    all
}

/// Length of two or more hyphens or dots, or of dots with a space between each (three at least); 0 when there is none.
fn run(text: &[char]) -> usize {
    let same = |mark: char| text.iter().take_while(|c| **c == mark).count();
    let (hyphens, dots) = (same('-'), same('.'));
    if hyphens >= 2 || dots >= 2 {
        return hyphens.max(dots);
    }
    let mut pairs = 0;
    while matches!(text.get(2 * pairs..2 * pairs + 2), Some(['.', space]) if space.is_whitespace()) {
        pairs += 1;
    }
    // The run ends with a dot: one pair is given back where none follows.
    match text.get(2 * pairs) {
        Some('.') if pairs >= 2 => 2 * pairs + 1,
        _ if pairs >= 3 => 2 * pairs - 1,
        _ => 0,
    }
}

/// Length of the shortest word: up to white space, the end, a character that ends words, a run, or a comma before one of
/// these.
fn word(text: &[char]) -> usize {
    let ends = |at: usize| match text.get(at) {
        None => true,
        Some(c) => c.is_whitespace() || NON_WORD.contains(*c) || run(&text[at..]) > 0,
    };
    (1..=text.len())
        .find(|&len| {
            text[len - 1].is_whitespace() || ends(len) || (text.get(len) == Some(&',') && ends(len + 1))
        })
        .unwrap_or(text.len())
}

/// Moves quotes and brackets that open a sentence, with white space, two hyphens or the end behind them, to the sentence
/// before.
fn realigned(text: &[char], slices: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut all, mut moved) = (Vec::new(), 0);
    for (i, slice) in slices.iter().enumerate() {
        let from = (slice.start + moved).min(slice.end);
        moved = 0;
        let mut end = slice.end;
        if let Some(next) = slices.get(i + 1) {
            let opening = &text[next.clone()];
            let closing = opening.iter().take_while(|c| CLOSING.contains(**c)).count();
            // The shortest run that has white space, hyphens or the end behind it.
            let fits = |len: &usize| match &opening[*len..] {
                [] | ['-', '-', ..] => true,
                [c, ..] => c.is_whitespace(),
            };
            if let Some(len) = (1..=closing).find(fits) {
                let space = opening[len..].iter().take_while(|c| c.is_whitespace()).count();
                end = next.start + len;
                moved = len + space;
            }
        }
        if from < end {
            all.push(from..end);
        }
    }
    all
}
