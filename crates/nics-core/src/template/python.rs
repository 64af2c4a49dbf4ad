//! What templates expect of Python: `str` and `json.dumps`, methods of strings and containers, and Jinja2's tests.

use std::fmt::{self, Write};

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// Puts filters, functions and tests of transformers' environment into `env`.
pub(super) fn install(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(method);
    env.set_formatter(|out, _, value| Ok(write!(out, "{}", Str(value))?));
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", raise_exception);
    // Jinja2 asks whether a value behaves so: strings iterate, and dictionaries have a length and items.
    env.add_test("iterable", |v: &Value| v.kind() == ValueKind::String || v.try_iter().is_ok());
    env.add_test("sequence", |v: &Value| {
        matches!(v.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
}

/// A conversation that the template refuses.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
}

/// The message of `raise_exception` where that is what ended the rendering.
pub(super) fn refusal(e: &Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(e) = cause {
        if let Some(Refusal(message)) = e.downcast_ref() {
            return Some(message.clone());
        }
        cause = e.source();
    }
    None
}

/// Methods of Python's strings and containers.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (name, value.as_str()) {
        ("splitlines", Some(text)) => {
            let (keep_ends,): (Option<bool>,) = from_args(args)?;
            Ok(split_lines(text, keep_ends.unwrap_or(false)).into())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `str.splitlines`, which knows more line ends than Rust.
fn split_lines(text: &str, keep_ends: bool) -> Vec<String> {
    let is_end = |c| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let end = if rest[at..].starts_with("\r\n") {
            "\r\n"
        } else {
            &rest[at..at + rest[at..].chars().next().map_or(1, char::len_utf8)]
        };
        let after = at + end.len();
        lines.push(rest[..if keep_ends { after } else { at }].to_owned());
        rest = &rest[after..];
    }
    if !rest.is_empty() {
        lines.push(rest.to_owned());
    }
    lines
}

/// `str(value)`; what minijinja prints differs where a float needs an exponent.
struct Str<'a>(&'a Value);

/// `repr(value)`.
struct Repr<'a>(&'a Value);

impl fmt::Display for Str<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.0.kind() {
            ValueKind::String | ValueKind::Undefined => write!(f, "{}", self.0),
            _ => write!(f, "{}", Repr(self.0)),
        }
    }
}

impl fmt::Display for Repr<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let value = self.0;
        match value.kind() {
            ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
                Ok(x) if x.is_finite() => f.write_str(&float(x)),
                Ok(x) if x.is_nan() => f.write_str("nan"),
                Ok(x) => f.write_str(if x > 0.0 { "inf" } else { "-inf" }),
                Err(_) => write!(f, "{value:?}"),
            },
            // A tuple prints with parentheses; it is told apart by that alone.
            ValueKind::Seq if !format!("{value:?}").starts_with('(') => {
                f.write_char('[')?;
                for (i, item) in value.try_iter().map_err(|_| fmt::Error)?.enumerate() {
                    write!(f, "{}{}", if i > 0 { ", " } else { "" }, Repr(&item))?;
                }
                f.write_char(']')
            }
            ValueKind::Map => {
                f.write_char('{')?;
                for (i, key) in value.try_iter().map_err(|_| fmt::Error)?.enumerate() {
                    let item = value.get_item(&key).map_err(|_| fmt::Error)?;
                    write!(f, "{}{}: {}", if i > 0 { ", " } else { "" }, Repr(&key), Repr(&item))?;
                }
                f.write_char('}')
            }
            ValueKind::String => write!(f, "{value:?}"),
            _ => write!(f, "{value}"),
        }
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
#[expect(clippy::needless_pass_by_value, reason = "the form of a filter")]
fn tojson(value: &Value, indent: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let indent = match indent {
        None => kwargs.get::<Option<Value>>("indent")?,
        some => some,
    };
    kwargs.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(v) if v.is_none() => None,
        Some(v) if v.kind() == ValueKind::String => Some(v.to_string()),
        Some(v) => {
            let n = v.as_i64().ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, "indent of tojson is neither a number nor a string")
            })?;
            Some(" ".repeat(n.clamp(0, 64) as usize))
        }
    };
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "separators of tojson are not two strings"));
        }
    };
    let mut json = Dumps { out: String::new(), ensure_ascii, sort_keys, indent, item, key };
    json.value(value, 0)?;
    Ok(json.out.into())
}

/// Python's JSON writer.
struct Dumps {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Dumps {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > 128 {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson of a value that is nested too deeply",
            ));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.container('{', '}', depth, &keys, |this, k| {
                    this.string(&k.to_string());
                    this.out.push_str(&this.key.clone());
                    this.value(&value.get_item(k)?, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container('[', ']', depth, &items, |this, v| this.value(v, depth + 1))?;
            }
            other => {
                let detail = format!("an object of kind {other} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
        }
        Ok(())
    }

    fn container(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: &[Value],
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.item.clone());
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `repr` of a Python float: the shortest digits that read back, with an exponent from 1e16 on and below 1e-4.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = value.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_python_does() {
        for (value, expected) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.25e-10, "1.25e-10"),
            (f64::INFINITY, "Infinity"),
        ] {
            assert_eq!(float(value), expected);
        }
    }
}
