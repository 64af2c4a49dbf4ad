//! `--judge` and what belongs to it.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nics_base::cli::env_key;
use nics_base::interrupt::Interrupt;
use nics_core::cli::at_least_one;
use nics_core::tokenizer::Tokenizer;
use r2r::evaluation;
use r2r::labels::judges::{
    AnswerJudge, Extract, Judge, LargeChat, RemoteChat, RemoteJudgeSettings, RuleJudge, SynonymTable,
    TextJudge, TextSettings,
};
use r2r::labels::pipeline::{ContinueSettings, Party};
use regex::Regex;
use serde_json::{Map, Value};

use super::variable;

/// The variable that holds the key of the judge's server; keys never come from the command line.
const KEY_VARIABLE: &str = "R2R_JUDGE_KEY";

/// Who judges.
#[derive(Debug, Clone)]
enum Spec {
    Rule(Option<PathBuf>),
    Chat(String),
    Large,
    Answer(String, Kind),
}

/// How an answer is found.
#[derive(Debug, Clone)]
enum Kind {
    Boxed,
    Choice,
    Letter,
    Pattern(Regex),
}

impl FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, rest) = text.split_once(':').map_or((text, None), |(word, rest)| (word, Some(rest)));
        Ok(match (word, rest) {
            ("rule", None) => Self::Rule(None),
            ("rule", Some(path)) if !path.is_empty() => Self::Rule(Some(path.into())),
            ("large", None) => Self::Large,
            ("http" | "https", Some(_)) => Self::Chat(text.to_owned()),
            ("answer", Some(kind)) => {
                let found = match kind {
                    "boxed" => Kind::Boxed,
                    "choice" => Kind::Choice,
                    "letter" => Kind::Letter,
                    _ => {
                        let pattern = kind.strip_prefix("regex=").ok_or_else(|| {
                            format!("{kind:?}: expected boxed, choice, letter or regex=PATTERN")
                        })?;
                        let regex = Regex::new(pattern).map_err(|e| e.to_string())?;
                        if regex.captures_len() != 2 {
                            return Err(format!(
                                "{pattern:?} has no group, or several: one holds the answer"
                            ));
                        }
                        Kind::Pattern(regex)
                    }
                };
                Self::Answer(kind.to_owned(), found)
            }
            _ => {
                return Err(format!(
                    "{text:?}: expected rule, rule:FILE, http://HOST:PORT, large, or answer:boxed|choice|letter|regex=PATTERN"
                ));
            }
        })
    }
}

#[derive(Args)]
pub struct JudgeArgs {
    /// Who judges. rule, rule:FILE: equal sentences mean the same, up to the synonyms of a table (TOML or JSON: `classes`,
    /// a list of lists of tokens; `ignore`). http://HOST:PORT: a chat model on a server that speaks OpenAI's API, its key in
    /// R2R_JUDGE_KEY. large: the large model itself. answer:boxed|choice|letter|regex=PATTERN: both branches are written to
    /// their ends and their answers compared
    #[arg(long, value_name = "SPEC")]
    judge: Spec,
    /// Name of the model on the judge's server; default: its first one
    #[arg(long, value_name = "NAME", help_heading = "Judges that read")]
    judge_model: Option<String>,
    /// Most tokens of a judge's reply
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one, help_heading = "Judges that read")]
    judge_tokens: usize,
    /// The task in place of our own: a text with {{context}}, {{small}} and {{large}}
    #[arg(long, value_name = "FILE", help_heading = "Judges that read")]
    judge_template: Option<PathBuf>,
    /// Sentences before the divergence that are shown; default: all of the thinking
    #[arg(long, value_name = "N", help_heading = "Judges that read")]
    judge_context: Option<usize>,
    /// A variable of the judge's chat template, e.g. enable_thinking=false; JSON values, else text
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable, help_heading = "Judges that read")]
    judge_var: Vec<(String, Value)>,
    /// Seconds that one call of the judge's server may take
    #[arg(long, value_name = "S", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..), help_heading = "Judges that read")]
    judge_timeout: u64,
    /// Calls made again after one that failed
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Judges that read")]
    judge_retries: usize,
    /// Milliseconds before the first of these; twice as long before each further one
    #[arg(long, value_name = "MS", default_value_t = 500, help_heading = "Judges that read")]
    judge_backoff: u64,
    /// Calls of the judge's server at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one, help_heading = "Judges that read")]
    judge_connections: usize,
    /// Most tokens of a branch that is written to its end
    #[arg(long, value_name = "N", default_value_t = 32768, value_parser = at_least_one, help_heading = "Judges that compare answers")]
    answer_tokens: usize,
}

impl JudgeArgs {
    /// Finds mistakes that need no model.
    pub fn check(&self) -> Result<()> {
        if let Spec::Rule(Some(path)) = &self.judge {
            SynonymTable::read(path)?;
        }
        self.text()?;
        Ok(())
    }

    fn text(&self) -> Result<TextSettings> {
        let mut settings = TextSettings::default();
        settings.window.common = self.judge_context;
        if let Some(path) = &self.judge_template {
            settings.read_task(path)?;
        }
        Ok(settings)
    }

    /// Whether the large model itself is asked.
    pub fn needs_model(&self) -> bool {
        matches!(self.judge, Spec::Large | Spec::Answer(..))
    }

    /// The judge over the pair's tokenizer; a server is greeted. `party` is the large model, where it is asked.
    pub fn open<'m>(
        &self,
        tokenizer: &Tokenizer,
        party: Option<&'m Party<'m>>,
        stops: &[String],
        batch: usize,
        interrupt: &Interrupt,
    ) -> Result<Box<dyn Judge + 'm>> {
        let stops = ContinueSettings { stops: stops.to_vec(), ..ContinueSettings::default() };
        let stops = stops.stop_tokens(tokenizer)?;
        let variables: Map<String, Value> = self.judge_var.iter().cloned().collect();
        let large = || party.context("the large model is not loaded");
        Ok(match &self.judge {
            Spec::Rule(path) => {
                let table = path.as_deref().map(SynonymTable::read).transpose()?.unwrap_or_default();
                Box::new(RuleJudge::new(&table, tokenizer, stops)?)
            }
            Spec::Chat(url) => {
                let mut extra = Map::new();
                if !variables.is_empty() {
                    extra.insert("chat_template_kwargs".into(), variables.into());
                }
                let settings = RemoteJudgeSettings {
                    model: self.judge_model.clone(),
                    key: env_key(KEY_VARIABLE),
                    max_tokens: self.judge_tokens,
                    timeout: Duration::from_secs(self.judge_timeout),
                    retries: self.judge_retries,
                    backoff: Duration::from_millis(self.judge_backoff),
                    connections: self.judge_connections,
                    extra,
                    interrupt: interrupt.clone(),
                };
                let chat = RemoteChat::connect(url, settings).context("the judge's server")?;
                Box::new(TextJudge::new(chat, tokenizer, stops, self.text()?)?)
            }
            Spec::Large => {
                let chat = LargeChat::new(large()?, self.judge_tokens, batch, variables)?;
                Box::new(TextJudge::new(chat, tokenizer, stops, self.text()?)?)
            }
            Spec::Answer(name, kind) => {
                let party = large()?;
                if party.eos.is_empty() {
                    bail!("{} names no token that ends a reply, so no branch would end", party.name);
                }
                let kind = kind.clone();
                let extract: Extract = Box::new(move |text| match &kind {
                    Kind::Boxed => evaluation::boxed(evaluation::graded_part(text)),
                    Kind::Choice => evaluation::choice(evaluation::graded_part(text)),
                    Kind::Letter => evaluation::lone_letter(evaluation::graded_part(text)),
                    Kind::Pattern(regex) => {
                        let found = regex.captures_iter(text).last()?;
                        Some(found.get(1)?.as_str().trim().to_owned())
                    }
                });
                Box::new(AnswerJudge::new(party, name, extract, self.answer_tokens, batch)?)
            }
        })
    }
}
