//! Tokens to text as they come: whole characters only, and nothing at or after a stop string.

use crate::Result;
use crate::tokenizer::{DecodeStream, Tokenizer};

/// The text of one sequence.
///
/// What [`push`](Self::push) and [`finish`](Self::finish) give, put together, is the text up to the first stop string, or
/// all of it. Text that may turn out to be the start of a stop string is held back.
pub struct TextStream<'a> {
    stream: DecodeStream<'a>,
    stops: Vec<String>,
    held: String,
    stopped: Option<usize>,
}

impl<'a> TextStream<'a> {
    /// A stream that ends at any of `stops` (empty ones are ignored); special tokens are left out of the text.
    pub fn new(tokenizer: &'a Tokenizer, stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stream: tokenizer.decode_stream(true), stops, held: String::new(), stopped: None }
    }

    /// Adds a token and gives the text that is certain now.
    pub fn push(&mut self, token: u32) -> Result<String> {
        if self.stopped.is_some() {
            return Ok(String::new());
        }
        let text = self.stream.push(token)?;
        self.held += &text;
        Ok(self.release())
    }

    /// Ends the sequence and gives what was held back.
    pub fn finish(&mut self) -> Result<String> {
        if self.stopped.is_some() {
            return Ok(String::new());
        }
        let text = self.stream.finish()?;
        self.held += &text;
        let released = self.release();
        Ok(released + &std::mem::take(&mut self.held))
    }

    /// The stop string that was met, by its index among those that are not empty.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }

    fn release(&mut self) -> String {
        // The stop string that begins first ends the text; of two that begin together, the one listed first.
        let met =
            self.stops.iter().enumerate().filter_map(|(i, s)| Some((self.held.find(s.as_str())?, i))).min();
        if let Some((at, i)) = met {
            self.stopped = Some(i);
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }
}

/// Length of the longest end of `text` that begins `stop`, in bytes.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len().min(text.len() + 1))
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn the_longest_beginning_of_a_stop_string_is_held_back() {
        for (text, stop, expected) in [
            ("abc", "cd", 1),
            ("aab", "aabx", 3),
            ("abab", "ababab", 4),
            ("abc", "abc", 0),
            ("再", "再见", 3),
            ("", "x", 0),
            ("x", "yz", 0),
        ] {
            assert_eq!(overlap(text, stop), expected, "{text} {stop}");
        }
    }
}
