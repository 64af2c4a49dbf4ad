//! Incremental decoding: id by id, never a broken character, and in sum exactly the full decode.

use std::sync::LazyLock;

use tokenizers::DecoderWrapper;

use super::{Tokenizer, TokenizerError};

/// Decodes a sequence id by id.
///
/// The pieces put together, [`finish`](Self::finish) included, equal [`Tokenizer::decode`] of all ids. A character whose
/// bytes are spread over several tokens is held back until it is complete, or until it is certain that it never will be.
/// The work for an id does not grow with the length of the sequence.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    state: State,
}

enum State {
    /// Byte-level vocabularies: tokens are bytes. Holds up to three bytes of an unfinished character.
    Bytes(Vec<u8>),
    /// Any other decoder: text is what decoding `context` and `pending` gives beyond `context`.
    Window {
        /// Ids whose text is out. They keep a decoder from treating what follows as the begin of a text.
        context: Vec<u32>,
        /// Text of `context`.
        prefix: String,
        /// Ids whose text is held back.
        pending: Vec<u32>,
        /// Whether a `<0xHH>` token is a byte, so that a run of them must be whole.
        byte_fallback: bool,
        /// Whether text that ends in U+FFFD may be an unfinished character.
        byte_level: bool,
    },
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        let mut stages = Vec::new();
        flatten(tokenizer.inner.hf.get_decoder(), &mut stages);
        let state = if let [DecoderWrapper::ByteLevel(_)] = stages.as_slice() {
            State::Bytes(Vec::new())
        } else {
            State::Window {
                context: Vec::new(),
                prefix: String::new(),
                pending: Vec::new(),
                byte_fallback: stages.iter().any(|s| matches!(s, DecoderWrapper::ByteFallback(_))),
                byte_level: stages.iter().any(|s| matches!(s, DecoderWrapper::ByteLevel(_))),
            }
        };
        Self { tokenizer, skip_special, state }
    }

    /// Takes the next id and returns the text that is certain by now, which may be empty.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        // Exactly what the full decode leaves out: unknown ids, and special tokens when they are skipped.
        let Some(token) = self.tokenizer.token(id) else { return Ok(String::new()) };
        if self.skip_special && self.tokenizer.is_special_token(&token) {
            return Ok(String::new());
        }
        match &mut self.state {
            State::Bytes(held) => {
                push_bytes(&token, held);
                Ok(take_certain(held))
            }
            State::Window { pending, byte_fallback, .. } => {
                pending.push(id);
                if *byte_fallback && is_byte_token(&token) { Ok(String::new()) } else { self.settle(false) }
            }
        }
    }

    /// Ends the sequence: the text that was held back. An unfinished character comes out as U+FFFD, as the full decode has
    /// it. The stream can then take a new sequence.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        match &mut self.state {
            State::Bytes(held) => {
                let rest = String::from_utf8_lossy(held).into_owned();
                held.clear();
                Ok(rest)
            }
            State::Window { .. } => {
                let rest = self.settle(true)?;
                if let State::Window { context, prefix, pending, .. } = &mut self.state {
                    context.clear();
                    prefix.clear();
                    pending.clear();
                }
                Ok(rest)
            }
        }
    }

    /// Decodes the window and moves what is certain into the context.
    fn settle(&mut self, last: bool) -> Result<String, TokenizerError> {
        let State::Window { context, prefix, pending, byte_level, .. } = &mut self.state else {
            return Ok(String::new());
        };
        if pending.is_empty() {
            return Ok(String::new());
        }
        let all: Vec<u32> = context.iter().chain(pending.iter()).copied().collect();
        let text = self.tokenizer.decode(&all, self.skip_special)?;
        let unfinished = *byte_level && text.ends_with(char::REPLACEMENT_CHARACTER);
        // A decoder that rewrites earlier text when more follows is waited for; no decoder in use does.
        let Some(new) = text.strip_prefix(prefix.as_str()).filter(|_| last || !unfinished) else {
            return Ok(String::new());
        };
        let new = new.to_owned();
        // The shortest context that has text: without any, a decoder that strips the begin would strip again.
        let mut length = 1;
        while length < all.len() {
            let tail = &all[all.len() - length..];
            let tail_text = self.tokenizer.decode(tail, self.skip_special)?;
            if !tail_text.is_empty() {
                break;
            }
            length *= 2;
        }
        *context = all[all.len().saturating_sub(length)..].to_vec();
        *prefix = self.tokenizer.decode(context, self.skip_special)?;
        pending.clear();
        Ok(new)
    }
}

impl Tokenizer {
    /// The bytes that a token stands for in the middle of a text, which may be part of a character; `None` beyond the
    /// vocabulary. Special tokens are their literal form.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.token(id)?;
        let mut stages = Vec::new();
        flatten(self.inner.hf.get_decoder(), &mut stages);
        if self.is_special_token(&token) {
            return Some(token.into_bytes());
        }
        if let [DecoderWrapper::ByteLevel(_)] = stages.as_slice() {
            let mut bytes = Vec::new();
            push_bytes(&token, &mut bytes);
            return Some(bytes);
        }
        if is_byte_token(&token) && stages.iter().any(|s| matches!(s, DecoderWrapper::ByteFallback(_))) {
            return Some(vec![u8::from_str_radix(&token[3..5], 16).ok()?]);
        }
        // Decoders strip the begin of a text: what the token adds behind itself is its text.
        let once = self.decode(&[id], false).ok()?;
        let twice = self.decode(&[id, id], false).ok()?;
        Some(twice.strip_prefix(once.as_str()).unwrap_or(&once).as_bytes().to_vec())
    }
}

/// The stages of a decoder, sequences resolved.
fn flatten<'a>(decoder: Option<&'a DecoderWrapper>, stages: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        Some(DecoderWrapper::Sequence(sequence)) => {
            for stage in sequence.get_decoders() {
                flatten(Some(stage), stages);
            }
        }
        Some(stage) => stages.push(stage),
        None => {}
    }
}

fn is_byte_token(token: &str) -> bool {
    token.len() == 6
        && token.starts_with("<0x")
        && token.ends_with('>')
        && token.is_char_boundary(5)
        && u8::from_str_radix(&token[3..5], 16).is_ok()
}

/// The printable characters that stand for bytes in byte-level vocabularies, and back: printable Latin-1 stands for
/// itself, the rest follows from U+0100 on in order.
static BYTE_OF: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut table = vec![None; 0x200];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let at = if printable { usize::from(byte) } else { next };
        if !printable {
            next += 1;
        }
        table[at] = Some(byte);
    }
    table
});

/// Appends the bytes of a token; one that is not written in byte characters (an added token) is its own text.
fn push_bytes(token: &str, bytes: &mut Vec<u8>) {
    let before = bytes.len();
    for c in token.chars() {
        if let Some(Some(byte)) = BYTE_OF.get(c as usize) {
            bytes.push(*byte);
        } else {
            bytes.truncate(before);
            bytes.extend(token.as_bytes());
            return;
        }
    }
}

/// Takes the text that no later byte can change, and leaves at most an unfinished character.
fn take_certain(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = held.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(e) => {
                let (valid, after) = rest.split_at(e.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                let Some(broken) = e.error_len() else {
                    rest = after;
                    break;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &after[broken..];
            }
        }
    }
    let left = rest.len();
    held.drain(..held.len() - left);
    text
}
