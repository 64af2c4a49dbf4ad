//! Chat templates: a conversation as the text that a model was trained on, to the byte as transformers renders it.
//!
//! Templates are Jinja2 programs that come with a checkpoint. They run in minijinja with what transformers gives them:
//! trimmed blocks, loop controls, `raise_exception`, `strftime_now`, `tojson` without HTML escapes, Python's methods of
//! strings, lists and dictionaries, and the special tokens by role. `{% generation %}` blocks, which mark what the
//! assistant said for training, render as their content.
//!
//! ```no_run,standalone_crate
//! use nics_core::template::{ChatTemplate, Message, RenderOptions};
//! let template = ChatTemplate::parse("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")?;
//! let text = template.render(&[Message::new("user", "Hi")], &RenderOptions::default())?;
//! assert_eq!(text, "[user] Hi\n");
//! # Ok::<(), nics_core::template::TemplateError>(())
//! ```

mod clock;
mod message;
mod python;
mod rewrite;

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment};
use serde_json::{Map, Value};

use crate::checkpoint::{Checkpoint, CheckpointError, read_bounded};
use crate::tokenizer::{SpecialTokens, TokenizerError, read_settings};

pub use message::{Content, Message};

/// Longest template that is read; the largest published ones take 50 kB.
const MAX_TEMPLATE: u64 = 4 << 20;
/// Steps that a rendering may take: a template is a program of a stranger's, and must end.
const FUEL: u64 = 10_000_000;

/// What can be wrong with a chat template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// A file of the checkpoint could not be read.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// The settings beside the tokenizer have the wrong form.
    #[error(transparent)]
    Settings(#[from] TokenizerError),
    /// The `chat_template` of `tokenizer_config.json` is neither a text nor a list of named texts.
    #[error(
        "chat_template in tokenizer_config.json is {found}, expected a string or a list of {{name, template}}"
    )]
    Form {
        /// What it is.
        found: String,
    },
    /// The template does not parse.
    #[error("the chat template is wrong in line {line}: {detail}")]
    Syntax {
        /// Line, counted from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// There is no template of the name that was asked for.
    #[error("there is no chat template {name}, only {}", .there.join(", "))]
    NoSuchTemplate {
        /// The name.
        name: String,
        /// The names that there are.
        there: Vec<String>,
    },
    /// The template refuses the conversation (`raise_exception`).
    #[error("the chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template failed on the conversation.
    #[error("the chat template fails on this conversation in line {line}: {detail}")]
    Render {
        /// Line, counted from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
}

/// What a template is given beside the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// Whether the text ends with the begin of the assistant's reply.
    pub add_generation_prompt: bool,
    /// Functions that the model may call, as JSON schemas.
    pub tools: Option<Value>,
    /// Documents to answer from.
    pub documents: Option<Value>,
    /// Which of several named templates. By default `tool_use` when there are tools and such a template, else `default`.
    pub template: Option<String>,
    /// Further variables, e.g. `enable_thinking`. They win over the special tokens.
    pub extra: Map<String, Value>,
    /// What `strftime_now` takes for now; the local time by default.
    pub now: Option<time::OffsetDateTime>,
}

/// The chat templates of a checkpoint, parsed.
pub struct ChatTemplate {
    env: Environment<'static>,
    sources: BTreeMap<String, String>,
    tokens: SpecialTokens,
}

impl ChatTemplate {
    /// Reads the templates of a checkpoint: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`.
    ///
    /// `None` when it has none.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Option<Self>, TemplateError> {
        let settings = read_settings(checkpoint)?;
        let mut sources = BTreeMap::new();
        match settings.config.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => {
                sources.insert("default".to_owned(), source.clone());
            }
            Some(Value::Array(list)) => {
                for entry in list {
                    let text = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                    let (Some(name), Some(source)) = (text("name"), text("template")) else {
                        return Err(TemplateError::Form { found: format!("a list with {entry}") });
                    };
                    sources.insert(name, source);
                }
            }
            Some(other) => return Err(TemplateError::Form { found: other.to_string() }),
        }
        for (name, file) in
            [("default", "chat_template.jinja"), ("tool_use", "additional_chat_templates/tool_use.jinja")]
        {
            if let Some(path) = checkpoint.try_file(file)? {
                let bytes = read_bounded(&path, "the chat template", MAX_TEMPLATE)?;
                sources.insert(name.to_owned(), String::from_utf8_lossy(&bytes).into_owned());
            }
        }
        if sources.is_empty() {
            return Ok(None);
        }
        Self::new(sources, settings.special_tokens()?).map(Some)
    }

    /// Parses a single template that uses no special tokens by role.
    pub fn parse(source: &str) -> Result<Self, TemplateError> {
        Self::new(BTreeMap::from([("default".to_owned(), source.to_owned())]), SpecialTokens::default())
    }

    /// Parses templates by name.
    pub fn new(sources: BTreeMap<String, String>, tokens: SpecialTokens) -> Result<Self, TemplateError> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| TemplateError::Syntax { line: 1, detail: describe(&e) })?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_debug(false);
        python::install(&mut env);
        for (name, source) in &sources {
            let source = rewrite::prepare(source);
            env.add_template_owned(name.clone(), source)
                .map_err(|e| TemplateError::Syntax { line: e.line().unwrap_or(1), detail: describe(&e) })?;
        }
        Ok(Self { env, sources, tokens })
    }

    /// The same templates with other special tokens.
    #[must_use]
    pub fn with_tokens(self, tokens: SpecialTokens) -> Self {
        Self { tokens, ..self }
    }

    /// The source of a template by name; most checkpoints have `default` alone.
    pub fn source(&self, name: &str) -> Option<&str> {
        self.sources.get(name).map(String::as_str)
    }

    /// The text of a conversation.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, TemplateError> {
        let name = match &options.template {
            Some(name) => name.as_str(),
            None if options.tools.is_some() && self.sources.contains_key("tool_use") => "tool_use",
            None if self.sources.len() == 1 => self.sources.keys().next().map_or("default", String::as_str),
            None => "default",
        };
        let template = self.env.get_template(name).map_err(|_| TemplateError::NoSuchTemplate {
            name: name.to_owned(),
            there: self.sources.keys().cloned().collect(),
        })?;
        let mut variables: BTreeMap<String, minijinja::Value> = BTreeMap::new();
        for (role, token) in self.tokens.roles() {
            variables.insert(role.to_owned(), token.into());
        }
        if !self.tokens.additional().is_empty() {
            let additional = self.tokens.additional().to_vec();
            variables.insert("additional_special_tokens".to_owned(), additional.into());
        }
        for (key, value) in &options.extra {
            variables.insert(key.clone(), Serde(value).into());
        }
        // Absent tools and documents are none rather than undefined.
        for (key, value) in [("tools", &options.tools), ("documents", &options.documents)] {
            variables.insert(key.to_owned(), Serde(value).into());
        }
        variables.insert("messages".to_owned(), Serde(messages).into());
        variables.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());
        let now = options.now;
        let strftime = minijinja::Value::from_function(move |format: &str| clock::strftime(format, now));
        variables.insert("strftime_now".to_owned(), strftime);
        template.render(variables).map_err(|e| match python::refusal(&e) {
            Some(message) => TemplateError::Refused(message),
            None => TemplateError::Render { line: e.line().unwrap_or(1), detail: describe(&e) },
        })
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("sources", &self.sources).finish_non_exhaustive()
    }
}

/// What went wrong, without the name and line that the caller adds.
fn describe(e: &minijinja::Error) -> String {
    match e.detail() {
        Some(detail) => format!("{}: {detail}", e.kind()),
        None => e.kind().to_string(),
    }
}
