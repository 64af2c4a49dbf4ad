//! The one text in a pickle.
//!
//! A pickle is a program. Of its instructions those are followed that put a text on the stack and stop; whatever else a
//! pickle asks for is refused.

/// Reads it.
///
/// # Errors
/// What the pickle holds instead, for people.
pub(super) fn text(pickle: &[u8]) -> Result<&str, String> {
    let mut rest = Rest { bytes: pickle, at: 0 };
    let mut text = None;
    loop {
        let at = rest.at;
        match rest.take(1)?[0] {
            // The version of the format, the length of what follows, which only helps a reader of streams, and names for
            // what is on the stack, which nothing here asks for.
            0x80 | b'q' => drop(rest.take(1)?),
            b'r' => drop(rest.take(4)?),
            0x95 => drop(rest.take(8)?),
            0x94 => {}
            instruction @ (0x8c | b'X' | 0x8d) if text.is_none() => {
                let width = match instruction {
                    0x8c => 1,
                    b'X' => 4,
                    _ => 8,
                };
                let len = rest.take(width)?.iter().rev().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
                let bytes = rest.take(usize::try_from(len).unwrap_or(usize::MAX))?;
                text = Some(std::str::from_utf8(bytes).map_err(|e| format!("its text is not UTF-8: {e}"))?);
            }
            b'.' if rest.at == pickle.len() => return text.ok_or_else(|| "it holds no text".to_owned()),
            b'.' => return Err("something follows behind its end".to_owned()),
            other => {
                return Err(format!(
                    "it has instruction {other:#04x} at byte {at}, which a single text does not need; nothing was run"
                ));
            }
        }
    }
}

struct Rest<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("it ends too early, at byte {}", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_in_the_form_of_every_protocol() {
        // pickle.dumps("[1]", protocol=p) for p = 2 to 5.
        assert_eq!(text(b"\x80\x02X\x03\0\0\0[1]q\0."), Ok("[1]"));
        assert_eq!(text(b"\x80\x03X\x03\0\0\0[1]q\0."), Ok("[1]"));
        assert_eq!(text(b"\x80\x04\x95\x07\0\0\0\0\0\0\0\x8c\x03[1]\x94."), Ok("[1]"));
        assert_eq!(text(b"\x80\x05\x95\x07\0\0\0\0\0\0\0\x8c\x03[1]\x94."), Ok("[1]"));
        assert_eq!(text(b"\x80\x04\x8d\x02\0\0\0\0\0\0\0ok\x94."), Ok("ok"));
    }

    #[test]
    fn everything_else_is_refused() {
        let wrong: [(&[u8], &str); 11] = [
            (b"", "too early"),
            (b"\x80\x04.", "no text"),
            (b"\x80\x04K\x01.", "instruction 0x4b"),
            // os.system("true"), in protocols 0 and 4.
            (b"cos\nsystem\n(S'true'\ntR.", "instruction 0x63 at byte 0"),
            (b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x8c\x04true\x94\x85R.", "instruction 0x8c"),
            (b"\x80\x04\x8c\x02ok\x94.more", "behind its end"),
            (b"\x80\x04\x8c\x02ok\x94", "too early"),
            (b"\x80\x04\x8c\xffok.", "too early"),
            (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffok.", "too early"),
            (b"\x80\x04\x8c\x01\xff\x94.", "UTF-8"),
            (b"\x80\x04]\x94\x8c\x01a\x94a.", "instruction 0x5d"),
        ];
        for (pickle, reason) in wrong {
            let found = text(pickle).unwrap_err();
            assert!(found.contains(reason), "{pickle:?}: {found}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..40)) {
            let _ = text(&bytes);
        }
    }
}
