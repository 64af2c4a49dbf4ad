//! Where a continuation ends: tokens that end a sentence.

use std::collections::HashSet;

use nics_core::tokenizer::Tokenizer;

use super::ThinkTokens;
use crate::Result;

/// Characters that a stop token ends with.
const ENDS: [char; 7] = ['.', '。', '!', '！', '?', '？', '\n'];
/// The most characters of a stop token.
const MAX_CHARS: usize = 4;
/// Left brackets with their partners. A straight quote is both, so that a token with one fails: its right side has no
/// partner.
const BRACKETS: [(char, char); 14] = [
    ('(', ')'),
    ('[', ']'),
    ('{', '}'),
    ('<', '>'),
    ('（', '）'),
    ('【', '】'),
    ('《', '》'),
    ('〈', '〉'),
    ('「', '」'),
    ('『', '』'),
    ('“', '”'),
    ('‘', '’'),
    ('"', '"'),
    ('\'', '\''),
];

/// Whether a token leaves no bracket open and holds no colon: every left bracket has its partner somewhere behind it, and
/// there are none or as many left ones as right ones.
pub fn brackets_fit(token: &str) -> bool {
    let chars: Vec<char> = token.chars().collect();
    if chars.iter().any(|c| matches!(c, ':' | '：')) {
        return false;
    }
    let (mut left, mut right) = (0, 0);
    for (i, c) in chars.iter().enumerate() {
        right += usize::from(BRACKETS.iter().any(|(_, r)| r == c));
        if let Some((_, partner)) = BRACKETS.iter().find(|(l, _)| l == c) {
            left += 1;
            if !chars[i + 1..].contains(partner) {
                return false;
            }
        }
    }
    left == 0 || left == right
}

/// The tokens that end a sentence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopTokens {
    ids: HashSet<i64>,
}

impl StopTokens {
    /// Of a vocabulary: tokens of at most four characters that end with a full stop, an exclamation or question mark or a
    /// newline, and leave no bracket open; and the think tokens.
    pub fn of_vocabulary<'a>(
        vocabulary: impl IntoIterator<Item = (i64, &'a str)>,
        think: Option<ThinkTokens>,
    ) -> Self {
        let ends = |token: &str| {
            let count = token.chars().take(MAX_CHARS + 1).count();
            (1..=MAX_CHARS).contains(&count) && token.ends_with(ENDS) && (count == 1 || brackets_fit(token))
        };
        let mut ids: HashSet<i64> =
            vocabulary.into_iter().filter(|(_, token)| ends(token)).map(|(id, _)| id).collect();
        ids.extend(think.into_iter().flat_map(|t| [t.start, t.end]));
        Self { ids }
    }

    /// These ids.
    pub fn of_ids(ids: impl IntoIterator<Item = i64>) -> Self {
        Self { ids: ids.into_iter().collect() }
    }

    /// Of a tokenizer: each token as the text that it stands for.
    pub fn of_tokenizer(tokenizer: &Tokenizer, think: Option<ThinkTokens>) -> Result<Self> {
        let mut texts = Vec::new();
        for id in 0..tokenizer.vocab_size() as u32 {
            let text = tokenizer.decode(&[id], false).map_err(nics_core::Error::from)?;
            texts.push((i64::from(id), text));
        }
        Ok(Self::of_vocabulary(texts.iter().map(|(id, text)| (*id, text.as_str())), think))
    }

    /// Whether a token ends a sentence.
    pub fn contains(&self, id: i64) -> bool {
        self.ids.contains(&id)
    }

    /// The ids, ascending.
    pub fn ids(&self) -> Vec<i64> {
        let mut ids: Vec<i64> = self.ids.iter().copied().collect();
        ids.sort_unstable();
        ids
    }
}

/// What the large model itself wrote after position `index`: up to and with the `count`-th stop token (`None` is no
/// limit), at most `max_new_tokens`. Nothing left gives a single `eos`; an `eos` at the end is left out.
pub fn reference_continuation(
    tokens: &[i64],
    index: usize,
    max_new_tokens: usize,
    count: Option<usize>,
    stops: &StopTokens,
    eos: i64,
) -> Vec<i64> {
    let rest = tokens.get(index + 1..).unwrap_or_default();
    if rest.is_empty() {
        return vec![eos];
    }
    let mut seen = 0;
    let mut cut = Vec::new();
    for &token in rest.iter().take(max_new_tokens) {
        cut.push(token);
        seen += usize::from(stops.contains(token));
        if count.is_some_and(|count| seen >= count) {
            break;
        }
    }
    if cut.last() == Some(&eos) {
        cut.pop();
    }
    cut
}

/// Ends a greedy continuation one step after its `count`-th stop token.
#[derive(Debug, Clone, Copy)]
pub struct ForcedEnd {
    left: usize,
    eos: i64,
}

impl ForcedEnd {
    /// Ends with `eos` after `count` stop tokens.
    pub fn new(count: usize, eos: i64) -> Self {
        Self { left: count, eos }
    }

    /// Takes the model's likeliest token and gives the one that is written. The count goes by what the model wanted.
    pub fn step(&mut self, likeliest: i64, stops: &StopTokens) -> i64 {
        if self.left == 0 {
            return self.eos;
        }
        self.left -= usize::from(stops.contains(likeliest));
        likeliest
    }
}
