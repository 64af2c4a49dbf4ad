//! Server-sent events, as OpenAI's API streams them: `data:` lines up to an empty one.

use std::io::{self, BufRead};

/// The longest event, in bytes.
const MAX_EVENT: usize = 16 << 20;

/// The data of the events of a stream, one after another.
pub struct Events<R> {
    from: R,
}

impl<R: BufRead> Events<R> {
    /// The events that `from` holds.
    pub fn new(from: R) -> Self {
        Self { from }
    }
}

impl<R: BufRead> Iterator for Events<R> {
    type Item = io::Result<String>;

    fn next(&mut self) -> Option<io::Result<String>> {
        let mut data: Option<String> = None;
        loop {
            let mut line = Vec::new();
            // One more byte than is allowed, so that too long a line shows.
            let mut limited = io::Read::take(&mut self.from, MAX_EVENT as u64 + 1);
            match limited.read_until(b'\n', &mut line) {
                Ok(0) => return data.map(Ok),
                Ok(_) => {}
                Err(e) => return Some(Err(e)),
            }
            if line.len() + data.as_ref().map_or(0, String::len) > MAX_EVENT {
                return Some(Err(io::Error::new(io::ErrorKind::InvalidData, "an event is too long")));
            }
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\r', '\n']);
            if line.is_empty() {
                match data.take() {
                    Some(data) => return Some(Ok(data)),
                    None => continue,
                }
            }
            // Comments (heartbeats) and other fields say nothing here.
            if let Some(text) = line.strip_prefix("data:") {
                let text = text.strip_prefix(' ').unwrap_or(text);
                match &mut data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(text);
                    }
                    None => data = Some(text.to_owned()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_end_at_empty_lines() {
        let stream = ": ping\n\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:b\ndata: c\n\n\ndata: [DONE]\n";
        let events: Vec<String> = Events::new(stream.as_bytes()).map(Result::unwrap).collect();
        assert_eq!(events, ["{\"a\":1}", "b\nc", "[DONE]"]);
    }
}
