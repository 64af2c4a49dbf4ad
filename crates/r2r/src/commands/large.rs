//! The flags that say where the large model is and how it is called.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use r2r::decode::{OnFailure, ReadAhead};
use r2r::remote::{LargeSpec, RemoteSettings};

/// The variable that holds the key of the large model's server; keys never come from the command line.
pub const KEY_VARIABLE: &str = "R2R_LARGE_KEY";

/// What becomes of a sequence that the large model's server fails.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Failure {
    /// It ends with an error, others go on
    Abort,
    /// The small model's token stands and is marked as degraded
    KeepSmall,
}

impl From<Failure> for OnFailure {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Abort => Self::Abort,
            Failure::KeepSmall => Self::KeepSmall,
        }
    }
}

/// `--large` and what concerns a server behind it.
#[derive(Debug, Clone, Args)]
pub struct LargeArgs {
    /// Large model: a folder or hub id (local:PATH), or a server: vllm:URL, sglang:URL, nics:URL. A server's key comes
    /// from the variable `R2R_LARGE_KEY`
    #[arg(long, short, visible_alias = "llm", value_name = "SPEC", value_parser = spec)]
    pub large: LargeSpec,
    /// Name of the model on the server; default: its first one
    #[arg(long, value_name = "NAME", help_heading = "Large model on a server")]
    pub large_model: Option<String>,
    /// Tokens of a sequence there; default: what the server says
    #[arg(long, value_name = "N", help_heading = "Large model on a server")]
    pub large_context: Option<usize>,
    /// Seconds that one call may take
    #[arg(long, value_name = "S", default_value_t = 60.0, value_parser = seconds, help_heading = "Large model on a server")]
    pub large_timeout: f64,
    /// Calls made again, with the same seed, after one that failed
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Large model on a server")]
    pub large_retries: usize,
    /// Most sequences in one call
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Large model on a server")]
    pub large_batch: usize,
    /// Most calls at a time
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Large model on a server")]
    pub large_connections: usize,
    /// Let it read on in the background whenever it is N tokens behind
    #[arg(long, value_name = "N")]
    pub prefetch_window: Option<usize>,
    /// Send prompts to the server when the first token is asked for, not as soon as they come
    #[arg(long, help_heading = "Large model on a server")]
    pub no_eager: bool,
    /// What becomes of a text whose token the server does not give
    #[arg(long, value_enum, default_value_t = Failure::Abort, help_heading = "Large model on a server")]
    pub on_failure: Failure,
    /// Billions of parameters that a token activates in each model, for the usage: SMALL,LARGE. Default: counted where the
    /// model is here
    #[arg(long, value_name = "SMALL,LARGE", value_parser = sizes)]
    pub sizes: Option<(f64, f64)>,
}

impl LargeArgs {
    /// How a server is called.
    pub fn settings(&self) -> Result<RemoteSettings> {
        let settings = RemoteSettings {
            model: self.large_model.clone(),
            key: std::env::var(KEY_VARIABLE).ok().map(|k| k.trim().to_owned()).filter(|k| !k.is_empty()),
            context: self.large_context,
            timeout: Duration::from_secs_f64(self.large_timeout),
            retries: self.large_retries,
            max_batch: self.large_batch,
            connections: self.large_connections,
            read_ahead: ReadAhead { prompt: !self.no_eager, window: self.prefetch_window },
            ..RemoteSettings::default()
        };
        settings.validate()?;
        Ok(settings)
    }

    /// What a model in this process reads ahead.
    pub fn read_ahead_here(&self) -> ReadAhead {
        ReadAhead { prompt: false, window: self.prefetch_window }
    }
}

fn spec(text: &str) -> Result<LargeSpec, String> {
    text.parse().map_err(|e: r2r::Error| e.to_string())
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    if (0.001..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("expected 0.001 to 86400".into()) }
}

fn sizes(text: &str) -> Result<(f64, f64), String> {
    let wrong = || format!("{text:?}: expected two numbers of billions, e.g. 1.5,32");
    let (small, large) = text.split_once(',').ok_or_else(wrong)?;
    let size = |s: &str| s.trim().parse().ok().filter(|n: &f64| n.is_finite() && *n > 0.0).ok_or_else(wrong);
    Ok((size(small)?, size(large)?))
}
