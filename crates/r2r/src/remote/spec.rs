//! Where the large model is, as users write it.

use std::fmt;
use std::str::FromStr;

use ureq::http::Uri;

use crate::{Error, Result};

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// vLLM's `/v1/completions`.
    Vllm,
    /// SGLang's `/generate`.
    Sglang,
    /// `/v1/completions` of this project's server.
    Nics,
}

impl Engine {
    /// Its name in a spec.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Nics => "nics",
        }
    }
}

/// Where the large model is: `local:PATH|ID`, `vllm:URL`, `sglang:URL`, `nics:URL`. Without one of these words it is a folder
/// or a hub id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LargeSpec {
    /// In this process: a folder or a hub id.
    Local(String),
    /// On a server.
    Remote {
        /// What it speaks.
        engine: Engine,
        /// Its address, without a slash or `/v1` at the end.
        url: String,
    },
}

impl FromStr for LargeSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let expected = "local:PATH or a hub id, vllm:URL, sglang:URL, nics:URL";
        let wrong = || Error::setting("the large model", format!("{text:?}"), expected);
        let (word, rest) = text.split_once(':').unwrap_or(("local", text));
        let engine = match word {
            "vllm" => Engine::Vllm,
            "sglang" => Engine::Sglang,
            "nics" => Engine::Nics,
            "http" | "https" => {
                let expected =
                    format!("the server's kind before it: vllm:{text}, sglang:{text} or nics:{text}");
                return Err(Error::setting("the large model", format!("{text:?}"), expected));
            }
            "local" if !rest.is_empty() => return Ok(Self::Local(rest.to_owned())),
            _ if rest.is_empty() || !word.contains(['/', '\\']) => return Err(wrong()),
            _ => return Ok(Self::Local(text.to_owned())),
        };
        let url = rest.trim_end_matches('/');
        let url = url.strip_suffix("/v1").unwrap_or(url);
        let parsed: Uri = url.parse().map_err(|_| wrong())?;
        let known = matches!(parsed.scheme_str(), Some("http" | "https"));
        if !known || parsed.host().is_none_or(str::is_empty) || parsed.query().is_some() {
            let expected = format!("{word}:http://HOST:PORT");
            return Err(Error::setting("the large model", format!("{text:?}"), expected));
        }
        Ok(Self::Remote { engine, url: url.to_owned() })
    }
}

impl fmt::Display for LargeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "local:{path}"),
            Self::Remote { engine, url } => write!(f, "{}:{url}", engine.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_read_and_written() {
        for (text, expected) in [
            ("local:./qwen", "local:./qwen"),
            ("./qwen", "local:./qwen"),
            ("org/name@v1", "local:org/name@v1"),
            ("/a:b/c", "local:/a:b/c"),
            ("vllm:http://host:8000/v1/", "vllm:http://host:8000"),
            ("sglang:https://host/x", "sglang:https://host/x"),
            ("nics:http://127.0.0.1:1", "nics:http://127.0.0.1:1"),
        ] {
            assert_eq!(text.parse::<LargeSpec>().unwrap().to_string(), expected);
        }
    }

    #[test]
    fn wrong_specs_are_refused() {
        for (text, said) in [
            ("", "local:PATH"),
            ("local:", "local:PATH"),
            ("vllm:", "local:PATH"),
            ("vllm:host:8000", "vllm:http://HOST:PORT"),
            ("nics:ftp://host", "nics:http://HOST:PORT"),
            ("http://host:8000", "vllm:http://host:8000"),
            ("ollama:http://host", "sglang:URL"),
        ] {
            let error = text.parse::<LargeSpec>().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
