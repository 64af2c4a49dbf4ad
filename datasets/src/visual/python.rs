//! A Python list of texts, as `str(list)` writes it: MMMU keeps its options so.

/// The texts of a list; numbers in it are texts too.
///
/// # Errors
/// What is wrong, and where.
pub(super) fn list(text: &str) -> Result<Vec<String>, String> {
    let mut reader = Reader { chars: text.chars().collect(), at: 0 };
    let items = reader.list()?;
    reader.space();
    if reader.at < reader.chars.len() {
        return Err(reader.wrong("something follows the list"));
    }
    Ok(items)
}

struct Reader {
    chars: Vec<char>,
    at: usize,
}

impl Reader {
    fn wrong(&self, reason: &str) -> String {
        format!("not a Python list of texts: {reason} at character {}", self.at + 1)
    }

    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn take(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += 1;
        Some(next)
    }

    fn space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.at += 1;
        }
    }

    fn list(&mut self) -> Result<Vec<String>, String> {
        self.space();
        if self.take() != Some('[') {
            self.at = self.at.saturating_sub(1);
            return Err(self.wrong("no `[`"));
        }
        let mut items = Vec::new();
        loop {
            self.space();
            match self.peek() {
                Some(']') => break,
                Some(quote @ ('\'' | '"')) => {
                    self.at += 1;
                    items.push(self.text(quote)?);
                }
                Some(c) if c.is_ascii_digit() || matches!(c, '-' | '+' | '.') => items.push(self.number()?),
                _ => return Err(self.wrong("no text")),
            }
            self.space();
            match self.peek() {
                Some(',') => self.at += 1,
                Some(']') => {}
                _ => return Err(self.wrong("no `,` and no `]`")),
            }
        }
        self.at += 1;
        Ok(items)
    }

    fn number(&mut self) -> Result<String, String> {
        let from = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.' | '_')) {
            self.at += 1;
        }
        let text: String = self.chars[from..self.at].iter().collect();
        if text.parse::<f64>().is_err() {
            self.at = from;
            return Err(self.wrong("no number"));
        }
        Ok(text)
    }

    fn text(&mut self, quote: char) -> Result<String, String> {
        let mut text = String::new();
        loop {
            match self.take() {
                None => return Err(self.wrong("a text without an end")),
                Some(c) if c == quote => return Ok(text),
                Some('\\') => self.escaped(&mut text)?,
                Some(c) => text.push(c),
            }
        }
    }

    fn escaped(&mut self, text: &mut String) -> Result<(), String> {
        let c = self.take().ok_or_else(|| self.wrong("a text without an end"))?;
        let plain = match c {
            '\n' => return Ok(()),
            '\\' | '\'' | '"' => c,
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'a' => '\x07',
            'b' => '\x08',
            'f' => '\x0c',
            'v' => '\x0b',
            'x' => self.code(2)?,
            'u' => self.code(4)?,
            'U' => self.code(8)?,
            '0'..='7' => {
                self.at -= 1;
                let from = self.at;
                while self.at < from + 3 && self.peek().is_some_and(|c| c.is_digit(8)) {
                    self.at += 1;
                }
                let digits: String = self.chars[from..self.at].iter().collect();
                u32::from_str_radix(&digits, 8).ok().and_then(char::from_u32).unwrap_or('\u{fffd}')
            }
            // Python leaves what it does not know as it is.
            other => {
                text.push('\\');
                other
            }
        };
        text.push(plain);
        Ok(())
    }

    fn code(&mut self, digits: usize) -> Result<char, String> {
        let end = self.at + digits;
        let code = self.chars.get(self.at..end).map(|all| all.iter().collect::<String>());
        let code = code.and_then(|c| u32::from_str_radix(&c, 16).ok()).and_then(char::from_u32);
        let code = code.ok_or_else(|| self.wrong("an escape that is no character"))?;
        self.at = end;
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_str_of_a_list_writes() {
        assert_eq!(list("['$6', '$7']").unwrap(), ["$6", "$7"]);
        assert_eq!(list(r#"["it's", 'a "b"', 'c\'d "e"']"#).unwrap(), ["it's", "a \"b\"", "c'd \"e\""]);
        assert_eq!(
            list(r"['\\frac{1}{2}', 'a\nb', '\xb5', '\u03b1', 'a\d', '\0']").unwrap(),
            ["\\frac{1}{2}", "a\nb", "µ", "α", "a\\d", "\0"]
        );
        assert_eq!(list(" [ 1, -2.5e3 , 'x', ] ").unwrap(), ["1", "-2.5e3", "x"]);
        assert!(list("[]").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_list() {
        for (text, says) in [
            ("", "no `[` at character 1"),
            ("('a',)", "no `[` at character 1"),
            ("['a'", "no `,` and no `]` at character 5"),
            ("['a", "a text without an end"),
            ("['a' 'b']", "no `,` and no `]`"),
            ("[None]", "no text at character 2"),
            ("['a'] + []", "something follows the list at character 7"),
            (r"['\ud800']", "an escape that is no character"),
            ("[1.2.3]", "no number"),
            ("[\\", "no text"),
            ("['\\", "a text without an end"),
        ] {
            assert!(list(text).unwrap_err().contains(says), "{text}: {}", list(text).unwrap_err());
        }
    }
}
