//! A training run in TOML: the router, the labels, the optimiser.

use std::path::Path;

use nics_base::settings;
use serde::{Deserialize, Serialize};

use super::TrainingConfig;
use crate::labels::pipeline::LabelColumn;
use crate::router::{Architecture, InitArgs, RouterConfig};
use crate::{Error, Result};

/// Everything that a training run is told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainRecipe {
    /// What the router is built like.
    pub router: RouterShape,
    /// What it learns.
    pub labels: LabelChoice,
    /// How it learns.
    pub training: TrainingConfig,
}

/// What a router is built like; the defaults are the paper's. The width of hidden states is that of the labels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterShape {
    /// Class name of the official project: which inputs it reads. Default the three-input one.
    pub architecture: Architecture,
    /// The largest logits that it reads. Default 100.
    pub top_k: i64,
    /// Width of each block. Default six of 1024.
    pub hidden_dims: Vec<i64>,
    /// How much wider a block is inside. Default 4.
    pub expansion_factor: i64,
    /// Share of values dropped in training. Default 0.1.
    pub dropout_rate: f64,
    /// Whether inputs are normalised. Default false.
    pub normalize_input: bool,
    /// Whether a table of positions is added. Default false.
    pub use_position_embedding: bool,
    /// Rows of that table. Default 32768.
    pub max_position_embeddings: i64,
}

impl Default for RouterShape {
    fn default() -> Self {
        Self {
            architecture: Architecture::HiddenTokenLogits,
            top_k: 100,
            hidden_dims: vec![1024; 6],
            expansion_factor: 4,
            dropout_rate: 0.1,
            normalize_input: false,
            use_position_embedding: false,
            max_position_embeddings: 32768,
        }
    }
}

/// What a router learns.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LabelChoice {
    /// Which column. Default `divergent`.
    pub column: LabelColumn,
    /// Share of the documents that are validated on, where there is no set of their own. Default 0.1.
    pub held_out: f64,
    /// Seed of the choice of these documents. Default 0.
    pub split_seed: u64,
}

impl Default for LabelChoice {
    fn default() -> Self {
        Self { column: LabelColumn::Divergent, held_out: 0.1, split_seed: 0 }
    }
}

impl TrainRecipe {
    /// Reads a recipe.
    ///
    /// # Errors
    /// A file that cannot be read, and what is wrong in it.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(settings::read(path, |text| {
            let recipe: Self = settings::parse(text)?;
            recipe.validate().map_err(|e| e.to_string())?;
            Ok(recipe)
        })?)
    }

    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self) -> Result<()> {
        let share = self.labels.held_out;
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::setting("labels.held_out", share, "a number between 0 and 1"));
        }
        self.training.validate()?;
        self.router(1)?;
        Ok(())
    }

    /// The router's type and arguments, for hidden states of this width.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn router(&self, hidden: i64) -> Result<RouterConfig> {
        let shape = &self.router;
        let kind = shape.architecture;
        let args = InitArgs {
            hidden_states_size: kind.takes_hidden().then_some(hidden),
            logits_size: kind.takes_logits().then_some(shape.top_k),
            hidden_dims: shape.hidden_dims.clone(),
            expansion_factor: shape.expansion_factor,
            dropout_rate: shape.dropout_rate,
            normalize_input: shape.normalize_input,
            use_position_embedding: shape.use_position_embedding,
            max_position_embeddings: shape.max_position_embeddings,
            ..InitArgs::default()
        };
        let config = RouterConfig { architecture: kind, args };
        match kind {
            Architecture::MultiLogits | Architecture::HiddenLmHead => Err(Error::setting(
                "router.architecture",
                kind.name(),
                "one that reads a single position and has no head of its own",
            )),
            _ => config.validate().map(|()| config),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<TrainRecipe> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        std::fs::write(&path, text).unwrap();
        TrainRecipe::read(&path)
    }

    #[test]
    fn nothing_said_is_the_papers_run() {
        let recipe = read("").unwrap();
        assert_eq!(recipe, TrainRecipe::default());
        let mut paper = RouterConfig::paper(1536);
        paper.args.pretrained_model_name = None;
        assert_eq!(recipe.router(1536).unwrap(), paper);
        let ablation = read("[router]\narchitecture = \"LogitsClassifier\"\ntop_k = 20").unwrap();
        assert_eq!(ablation.router(8).unwrap().args.hidden_states_size, None);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, why) in [
            ("[router]\nhidden_dims = []", "hidden_dims"),
            ("[router]\narchitecture = \"MultiLogitsClassifier\"", "single position"),
            ("[router]\ndims = [1]", "dims"),
            ("[labels]\nheld_out = 1.0", "held_out"),
            ("[labels]\ncolumn = \"neutral\"", "column"),
            ("[training]\nlr = 0.0", "lr"),
            ("[training]\nloss = { kind = \"focal\", alpha = 2.0, gamma = 1.0 }", "alpha"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("recipe.toml"), "{error}");
        }
    }
}
