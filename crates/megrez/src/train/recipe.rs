//! What a training run is made of: a recipe in TOML.

use std::path::{Path, PathBuf};

use nics_base::settings;
use nics_core::Result;
use nics_core::train::TrainConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A training run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What is trained on.
    pub data: Data,
    /// What is trained.
    pub model: Start,
    /// The optimiser and its schedule.
    #[serde(default)]
    pub train: TrainConfig,
    /// Evaluation on the way.
    #[serde(default)]
    pub eval: Evaluation,
}

/// What is trained on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Where conversations come from.
    pub source: Source,
    /// Conversations of a micro batch.
    pub batch: usize,
    /// Batches' worth of conversations that are sorted by length together, so that little is padded.
    #[serde(default = "default_bucket")]
    pub bucket: usize,
    /// Longer conversations are cut here, in tokens.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: usize,
}

fn default_bucket() -> usize {
    16
}

fn default_max_tokens() -> usize {
    2048
}

/// Where conversations come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Source {
    /// The project's own word problems (train split), without end.
    WordProblems {
        /// Seed of the problems.
        seed: u64,
    },
    /// A JSON Lines file of `{"conversations": [{"role", "content"}, …]}`, gone through in a new order each time.
    Conversations {
        /// The file; relative to the recipe.
        file: PathBuf,
    },
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Start {
    /// A new model with a new vocabulary.
    Scratch {
        /// Fields of a Llama config.json; `vocab_size`, token ids and what every Megrez has alike are filled in.
        config: Map<String, Value>,
        /// Deviation of the initial weights.
        #[serde(default = "default_std")]
        initializer_range: f64,
        /// Seed of the initial weights.
        #[serde(default)]
        seed: u64,
        /// Entries of the vocabulary, special tokens included.
        vocab_size: usize,
        /// Conversations from which the vocabulary is learned.
        vocabulary_conversations: usize,
    },
    /// An existing checkpoint, fine-tuned.
    From {
        /// Folder or hub id.
        checkpoint: String,
        /// Parameters whose name starts with one of these stay as they are.
        #[serde(default)]
        freeze: Vec<String>,
    },
}

fn default_std() -> f64 {
    0.02
}

/// Evaluation on the way, on the validation split of the word problems.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluation {
    /// Problems; 0 evaluates nothing.
    pub problems: usize,
    /// Seed of the problems.
    pub seed: u64,
}

impl Recipe {
    /// Reads a recipe; file names in it are relative to it.
    ///
    /// # Errors
    /// A file that cannot be read, or what is wrong in it, naming the line.
    pub fn read(path: &Path) -> Result<Self> {
        let mut recipe = settings::read(path, Self::parse)?;
        if let Source::Conversations { file } = &mut recipe.data.source
            && let Some(dir) = path.parent()
        {
            *file = dir.join(&*file);
        }
        Ok(recipe)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let recipe: Self = settings::parse(text)?;
        recipe.train.validate().map_err(|e| e.to_string())?;
        for (name, value) in [
            ("data.batch", recipe.data.batch),
            ("data.bucket", recipe.data.bucket),
            ("data.max_tokens", recipe.data.max_tokens),
        ] {
            if value == 0 {
                return Err(format!("{name} is 0, expected at least 1"));
            }
        }
        Ok(recipe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r"
        [data]
        source = { word-problems = { seed = 1 } }
        batch = 8
        [model.scratch]
        config = { hidden_size = 8 }
        vocab_size = 300
        vocabulary_conversations = 10
        [train]
        steps = 10
        warmup = 1
    ";

    #[test]
    fn a_recipe_is_read_strictly() {
        let recipe = Recipe::parse(GOOD).unwrap();
        assert_eq!(recipe.data.source, Source::WordProblems { seed: 1 });
        assert!(matches!(recipe.model, Start::Scratch { vocab_size: 300, .. }));
        let error = |text: &str| Recipe::parse(text).unwrap_err();
        assert!(error(&GOOD.replace("batch = 8", "batch = 0")).contains("data.batch"));
        assert!(error(&GOOD.replace("steps", "stepz")).contains("stepz"));
        assert!(error(&GOOD.replace("steps = 10", "steps = 0")).contains("steps"));
    }
}
