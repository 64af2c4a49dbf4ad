//! Streams in pieces that never split a citation.

/// Collects pieces of a stream until there are `size` characters, and gives out all but an open bracket at the end.
///
/// The pieces put together, [`finish`](Self::finish) included, are the stream.
#[derive(Debug)]
pub struct Rechunker {
    size: usize,
    buffer: String,
}

impl Rechunker {
    /// The vendor's size of the buffer, in characters.
    pub const SIZE: usize = 20;

    /// A stream's begin.
    pub fn new(size: usize) -> Self {
        Self { size, buffer: String::new() }
    }

    /// Adds a piece; gives what is to be shown now, if anything.
    pub fn push(&mut self, piece: &str) -> Option<String> {
        self.buffer.push_str(piece);
        if self.buffer.chars().count() < self.size {
            return None;
        }
        let open = match (self.buffer.rfind('['), self.buffer.rfind(']')) {
            (Some(open), Some(close)) if open < close => self.buffer.len(),
            (Some(open), _) => open,
            (None, _) => self.buffer.len(),
        };
        let rest = self.buffer.split_off(open);
        let out = std::mem::replace(&mut self.buffer, rest);
        (!out.is_empty()).then_some(out)
    }

    /// Ends the stream: what is left, if anything.
    pub fn finish(&mut self) -> Option<String> {
        let rest = std::mem::take(&mut self.buffer);
        (!rest.is_empty()).then_some(rest)
    }
}

impl Default for Rechunker {
    fn default() -> Self {
        Self::new(Self::SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_piece_splits_a_citation_and_nothing_is_lost() {
        let text = "据报道，今天晴[citation:1][citation:12]，明天有雨 [citation:3]。See [the map](x) and [citation:4]";
        for step in 1..30 {
            let chars: Vec<char> = text.chars().collect();
            let mut stream = Rechunker::default();
            let mut pieces: Vec<String> =
                chars.chunks(step).filter_map(|c| stream.push(&c.iter().collect::<String>())).collect();
            pieces.extend(stream.finish());
            assert_eq!(pieces.concat(), text);
            for piece in &pieces {
                assert_eq!(piece.matches('[').count(), piece.matches(']').count(), "{piece}");
            }
        }
    }
}
