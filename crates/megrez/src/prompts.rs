//! The texts that the model is given around a conversation: announcement of tools, search and summaries.
//!
//! They are embedded (`prompts.toml`); a file of the same form replaces them, e.g. with the exact wording that a
//! checkpoint was trained with.

use std::path::Path;

use nics_base::settings;
use nics_core::Result;
use regex::{Captures, Regex};
use serde::Deserialize;

/// The embedded file.
const DEFAULT: &str = include_str!("prompts.toml");

/// Texts with names in braces, e.g. `{question}`, for [`fill`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompts {
    /// First line of the agent's system turn.
    pub role: String,
    /// Its second line: `{datetime}`, `{weekday}`.
    pub date: String,
    /// Announces the functions that the model may call.
    pub functions: String,
    /// Observation after a call of a tool that there is not: `{name}`.
    pub unknown_tool: String,
    /// What the search tool does.
    pub search_description: String,
    /// What its parameter `query` is.
    pub search_query: String,
    /// System turn of a summary.
    pub summary_system: String,
    /// Asks for a summary: `{question}`, `{title}`, `{page}`.
    pub summary_user: String,
    /// Observation after a search: `{question}`, `{keywords}`, `{citations}`.
    pub observation: String,
    /// Observation when nothing could be read: `{keywords}`, `{reason}`.
    pub failed: String,
}

impl Default for Prompts {
    fn default() -> Self {
        toml::from_str(DEFAULT).expect("the embedded prompts are well formed")
    }
}

impl Prompts {
    /// The embedded texts with those of a TOML file in their place.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown key, a text without a name that it has to hold, or with an unknown one.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(settings::read(path, Self::parse)?)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut all: toml::Table = toml::from_str(DEFAULT).expect("the embedded prompts are well formed");
        let given: toml::Table = settings::parse(text)?;
        all.extend(given);
        let prompts: Self = all.try_into().map_err(|e: toml::de::Error| e.to_string())?;
        prompts.validate()?;
        Ok(prompts)
    }

    /// Every text holds the names that it cannot do without, and no others.
    fn validate(&self) -> Result<(), String> {
        let rules: [(&str, &str, &[&str], &[&str]); 10] = [
            ("role", &self.role, &[], &[]),
            ("date", &self.date, &[], &["datetime", "weekday"]),
            ("functions", &self.functions, &[], &[]),
            ("unknown_tool", &self.unknown_tool, &["name"], &[]),
            ("search_description", &self.search_description, &[], &[]),
            ("search_query", &self.search_query, &[], &[]),
            ("summary_system", &self.summary_system, &[], &[]),
            ("summary_user", &self.summary_user, &["page"], &["question", "title"]),
            ("observation", &self.observation, &["citations"], &["question", "keywords"]),
            ("failed", &self.failed, &[], &["keywords", "reason"]),
        ];
        for (key, text, needed, optional) in rules {
            let there: Vec<String> = name().captures_iter(text).map(|n| n[1].to_owned()).collect();
            if let Some(missing) = needed.iter().find(|n| !there.iter().any(|t| t == *n)) {
                return Err(format!("{key} lacks {{{missing}}}, where what it is about is filled in"));
            }
            let known = |n: &String| needed.iter().chain(optional).any(|k| k == n);
            if let Some(unknown) = there.iter().find(|n| !known(n)) {
                let known: Vec<String> = needed.iter().chain(optional).map(|n| format!("{{{n}}}")).collect();
                let known = if known.is_empty() { "no name in braces".to_owned() } else { known.join(", ") };
                return Err(format!("{key} has {{{unknown}}}, expected {known}"));
            }
        }
        Ok(())
    }
}

fn name() -> Regex {
    Regex::new(r"\{([a-z_]+)\}").expect("the pattern is well formed")
}

/// `text` with `{name}` replaced by its value; what a value holds in braces stays as it is.
pub fn fill(text: &str, values: &[(&str, &str)]) -> String {
    let replace = |found: &Captures| {
        let value = values.iter().find(|(name, _)| *name == &found[1]);
        value.map_or_else(|| found[0].to_owned(), |(_, value)| (*value).to_owned())
    };
    name().replace_all(text, replace).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_texts_are_valid() {
        Prompts::default().validate().unwrap();
        assert_eq!(Prompts::parse("").unwrap(), Prompts::default());
    }

    #[test]
    fn a_file_replaces_what_it_names() {
        let own = Prompts::parse("role = \"Be brief.\"").unwrap();
        assert_eq!((own.role.as_str(), own.date), ("Be brief.", Prompts::default().date));
        for (text, why) in [
            ("rule = \"x\"", "rule"),
            ("observation = \"{question}\"", "observation lacks {citations}"),
            ("failed = \"{why}\"", "failed has {why}, expected {keywords}, {reason}"),
            ("role = \"{name}\"", "expected no name in braces"),
            ("role = 3", "role"),
            ("role = ", "role"),
        ] {
            let e = Prompts::parse(text).unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn a_value_is_not_filled_in_turn() {
        assert_eq!(fill("{a} {b} {c}", &[("a", "{b}"), ("b", "2")]), "{b} 2 {c}");
    }
}
