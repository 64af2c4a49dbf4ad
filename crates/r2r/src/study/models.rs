//! The models of a nano pair.

use std::path::Path;

use nics_core::checkpoint::Checkpoint;
use nics_core::models::{self, Decoder};
use nics_core::tokenizer::Tokenizer;
use tch::{Device, Kind};

use crate::checkpoint::tokenizer_hash;
use crate::nano::{RingTask, Role};
use crate::{Error, Result};

/// The models of one seed, in float32, and their task.
pub struct Models {
    /// Writes.
    pub small: Decoder,
    /// A baseline by itself.
    pub middle: Decoder,
    /// Is asked.
    pub large: Decoder,
    /// What they were trained on.
    pub task: RingTask,
    /// Parameters of small, middle and large.
    pub parameters: [usize; 3],
    /// Hashes of their weights.
    pub weights: [String; 3],
    /// The tokenizer of all three.
    pub tokenizer: Tokenizer,
}

impl Models {
    /// Loads `dir/small`, `dir/middle` and `dir/large`.
    ///
    /// # Errors
    /// A checkpoint that does not load, and [`Error::TokenizerMismatch`].
    pub fn load(dir: &Path, device: Device) -> Result<Self> {
        let (mut loaded, mut weights) = (Vec::new(), Vec::new());
        for role in [Role::Small, Role::Middle, Role::Large] {
            let checkpoint = Checkpoint::open_dir(&dir.join(role.name()))?;
            let tokenizer = Tokenizer::from_checkpoint(&checkpoint).map_err(nics_core::Error::from)?;
            let mut decoder = models::load(&checkpoint, device, Kind::Float)?;
            let parameters = models::parameters(&mut decoder)?;
            weights.push(checkpoint.weights_hash()?);
            loaded.push((role, decoder, parameters, tokenizer));
        }
        let hash = tokenizer_hash(&loaded[0].3);
        for (role, _, _, tokenizer) in &loaded {
            let found = tokenizer_hash(tokenizer);
            if found != hash {
                return Err(Error::TokenizerMismatch { router: hash, model: role.name().to_owned(), found });
            }
        }
        let tokenizer = loaded[0].3.clone();
        let task = RingTask::of_vocabulary(tokenizer.vocab_size())?;
        let parameters = [loaded[0].2, loaded[1].2, loaded[2].2];
        let weights = <[String; 3]>::try_from(weights).unwrap_or_default();
        let mut decoders = loaded.into_iter().map(|(_, decoder, _, _)| decoder);
        let (Some(small), Some(middle), Some(large)) = (decoders.next(), decoders.next(), decoders.next())
        else {
            return Err(Error::Input("a pair has three models".into()));
        };
        Ok(Self { small, middle, large, task, parameters, weights, tokenizer })
    }
}
