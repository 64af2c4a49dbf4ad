//! What a router is built from: its type and the arguments that official checkpoints call `init_args`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The types of router, by the class names of official checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Architecture {
    /// `[h ; e ; Wl z]`: hidden state, embedding of the small model's token, its largest logits. The paper's router.
    #[serde(rename = "HiddenStatesTokenLMHeadLogitsClassifier")]
    HiddenTokenLogits,
    /// `z`.
    #[serde(rename = "LogitsClassifier")]
    Logits,
    /// `h`.
    #[serde(rename = "HiddenStatesClassifier")]
    Hidden,
    /// `[h ; e]`.
    #[serde(rename = "HiddenStatesTokenLMHeadClassifier")]
    HiddenToken,
    /// `[h ; Wl z]`.
    #[serde(rename = "HiddenStatesLogitsClassifier")]
    HiddenLogits,
    /// `h` through a language-model head of the router's own, then its largest logits.
    #[serde(rename = "HiddenStatesClassifierWithLMHead")]
    HiddenLmHead,
    /// The logits of the last few positions, oldest first.
    #[serde(rename = "MultiLogitsClassifier")]
    MultiLogits,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::HiddenTokenLogits,
        Self::Logits,
        Self::Hidden,
        Self::HiddenToken,
        Self::HiddenLogits,
        Self::HiddenLmHead,
        Self::MultiLogits,
    ];

    /// The class name in official checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Self::HiddenTokenLogits => "HiddenStatesTokenLMHeadLogitsClassifier",
            Self::Logits => "LogitsClassifier",
            Self::Hidden => "HiddenStatesClassifier",
            Self::HiddenToken => "HiddenStatesTokenLMHeadClassifier",
            Self::HiddenLogits => "HiddenStatesLogitsClassifier",
            Self::HiddenLmHead => "HiddenStatesClassifierWithLMHead",
            Self::MultiLogits => "MultiLogitsClassifier",
        }
    }

    /// The type of a class name.
    ///
    /// # Errors
    /// [`Error::UnknownArchitecture`].
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| Error::UnknownArchitecture {
            found: name.to_owned(),
            known: Self::ALL.map(Self::name).join(", "),
            note: if name == "MultiHiddenStatesClassifier" {
                " (the official class of that name fails on its own normalised form, so no checkpoint can be held against it)"
            } else {
                ""
            },
        })
    }

    /// Whether it reads the hidden state.
    pub fn takes_hidden(self) -> bool {
        !matches!(self, Self::Logits | Self::MultiLogits)
    }

    /// Whether it reads the embedding of the small model's token.
    pub fn takes_token(self) -> bool {
        matches!(self, Self::HiddenTokenLogits | Self::HiddenToken)
    }

    /// Whether it reads the largest logits.
    pub fn takes_logits(self) -> bool {
        matches!(self, Self::HiddenTokenLogits | Self::Logits | Self::HiddenLogits | Self::MultiLogits)
    }
}

/// The arguments of a router, under the names of official checkpoints; what is absent has the official class's default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InitArgs {
    /// Width of the small model's hidden state.
    pub hidden_states_size: Option<i64>,
    /// Logits that the router takes, of all slots together.
    pub logits_size: Option<i64>,
    /// Width of each block of the backbone.
    pub hidden_dims: Vec<i64>,
    /// How much wider a block is inside.
    pub expansion_factor: i64,
    /// Share of values dropped in training.
    pub dropout_rate: f64,
    /// Whether hidden state and embedding are layer-normed and logits become probabilities.
    pub normalize_input: bool,
    /// Whether a sinusoidal table of positions is added behind the backbone's first projection.
    pub use_position_embedding: bool,
    /// Rows of that table.
    pub max_position_embeddings: i64,
    /// Columns of the result: 1 (a logit) or 3 (classes, of which the last is divergent).
    pub output_dim: i64,
    /// Slots of [`Architecture::MultiLogits`].
    pub neural_window_size: i64,
    /// How many logits of its own head [`Architecture::HiddenLmHead`] keeps; all when absent.
    pub topk: Option<i64>,
    /// Whether the embedding table is left alone in training; kept for the file's sake, it always is.
    pub freeze_lm_head: bool,
    /// Where the embedding table comes from.
    pub pretrained_model_name: Option<String>,
}

impl Default for InitArgs {
    fn default() -> Self {
        Self {
            hidden_states_size: None,
            logits_size: None,
            hidden_dims: vec![256, 512, 256],
            expansion_factor: 4,
            dropout_rate: 0.3,
            normalize_input: false,
            use_position_embedding: false,
            max_position_embeddings: 32768,
            output_dim: 1,
            neural_window_size: 3,
            topk: None,
            freeze_lm_head: true,
            pretrained_model_name: None,
        }
    }
}

/// The type of a router and its arguments.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterConfig {
    /// Its type.
    pub architecture: Architecture,
    /// Its arguments.
    pub args: InitArgs,
}

/// No layer of a router is wider: a width beyond is a damaged file.
const MAX_WIDTH: i64 = 1 << 20;
/// No router has more blocks.
const MAX_BLOCKS: usize = 256;

impl RouterConfig {
    /// The paper's router for a small model of width `hidden`: 100 logits, six blocks of 1,024.
    pub fn paper(hidden: i64) -> Self {
        let args = InitArgs {
            hidden_states_size: Some(hidden),
            logits_size: Some(100),
            hidden_dims: vec![1024; 6],
            dropout_rate: 0.1,
            ..InitArgs::default()
        };
        Self { architecture: Architecture::HiddenTokenLogits, args }
    }

    /// Reads the arguments as a checkpoint has them and checks them.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the argument.
    pub fn from_json(architecture: Architecture, args: &Map<String, Value>) -> Result<Self> {
        let mut args = args.clone();
        // Old files carry the dtype that the embedding was loaded in; storage is the reader's choice here.
        args.remove("dtype");
        let args: InitArgs = serde_path_to_error::deserialize(Value::Object(args)).map_err(|e| {
            let path = e.path().to_string();
            Error::setting(&format!("init_args.{path}"), e.inner(), "an argument of this router type")
        })?;
        let config = Self { architecture, args };
        config.validate()?;
        Ok(config)
    }

    /// Whether every argument is there and in its range.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the argument.
    pub fn validate(&self) -> Result<()> {
        let (kind, a) = (self.architecture, &self.args);
        let width = |name: &str, value: i64| {
            let fits = (1..=MAX_WIDTH).contains(&value);
            if fits { Ok(()) } else { Err(Error::setting(name, value, format!("1 to {MAX_WIDTH}"))) }
        };
        if kind.takes_hidden() {
            width("hidden_states_size", a.hidden_states_size.unwrap_or(0))?;
        }
        if kind.takes_logits() {
            width("logits_size", a.logits_size.unwrap_or(0))?;
        }
        if a.hidden_dims.is_empty() || a.hidden_dims.len() > MAX_BLOCKS {
            return Err(Error::setting(
                "hidden_dims",
                format!("{} widths", a.hidden_dims.len()),
                "1 to 256 widths",
            ));
        }
        for &dim in &a.hidden_dims {
            width("hidden_dims", dim)?;
        }
        if !(1..=64).contains(&a.expansion_factor) {
            return Err(Error::setting("expansion_factor", a.expansion_factor, "1 to 64"));
        }
        if !(0.0..1.0).contains(&a.dropout_rate) {
            return Err(Error::setting("dropout_rate", a.dropout_rate, "0 or more, below 1"));
        }
        if a.output_dim != 1 && a.output_dim != 3 {
            return Err(Error::setting("output_dim", a.output_dim, "1, or 3 classes"));
        }
        if a.use_position_embedding {
            width("max_position_embeddings", a.max_position_embeddings)?;
        }
        if let Some(k) = a.topk {
            width("topk", k)?;
        }
        if kind == Architecture::MultiLogits {
            let (size, window) = (a.logits_size.unwrap_or(0), a.neural_window_size);
            if window < 1 || size % window != 0 {
                return Err(Error::setting(
                    "neural_window_size",
                    window,
                    format!("a divisor of logits_size, which is {size}"),
                ));
            }
        }
        Ok(())
    }

    /// Width of the hidden state, where the router reads it.
    pub fn hidden(&self) -> Option<i64> {
        self.args.hidden_states_size.filter(|_| self.architecture.takes_hidden())
    }

    /// How many of a position's largest logits the router reads; `None` when it reads none.
    pub fn top_k(&self) -> Option<i64> {
        let all = self.args.logits_size.filter(|_| self.architecture.takes_logits())?;
        let slots =
            if self.architecture == Architecture::MultiLogits { self.args.neural_window_size } else { 1 };
        Some(all / slots)
    }
}
