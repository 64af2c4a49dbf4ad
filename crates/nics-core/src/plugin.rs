//! The plug-ins of a binary, found by the name in `--weights`, `--kv` and `--hook`; and the control experiment that needs
//! no method.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use crate::cache::DenseCache;
use crate::checkpoint::Checkpoint;
use crate::models::{Model, ModelDims};
use crate::seam::{KvCache, LayerHook, Plugin};
use crate::{Error, Result};

/// The plug-ins that a binary knows.
pub struct Plugins(Vec<Box<dyn Plugin>>);

impl Default for Plugins {
    /// What every binary knows: `dense` caches and the `shuffle` control.
    fn default() -> Self {
        Self(vec![Box::new(Dense), Box::new(Shuffle)])
    }
}

impl Plugins {
    /// Adds a method's plug-in.
    #[must_use]
    pub fn with(mut self, plugin: impl Plugin + 'static) -> Self {
        self.0.push(Box::new(plugin));
        self
    }

    fn find(&self, flag: &str, name: &str) -> Result<&dyn Plugin> {
        self.0.iter().map(|p| &**p).find(|p| p.name() == name).ok_or_else(|| {
            let known: Vec<&str> = self.0.iter().map(|p| p.name()).collect();
            Error::Input(format!("{flag} {name}: this binary knows {}", known.join(", ")))
        })
    }

    /// The checkpoint to load: that of `--weights NAME:SPEC`, where its method has one, else `model`, the binary's own. A
    /// quantized `model` is read by the method that can, without being asked. The flag says whether the weights are dealt with;
    /// if not, [`weights`](Self::weights) is to change them once they are loaded.
    pub fn checkpoint(
        &self,
        asked: Option<(&str, &str)>,
        model: Option<Checkpoint>,
    ) -> Result<(Checkpoint, bool)> {
        if let Some((name, spec)) = asked {
            if let Some(own) = self.find("--weights", name)?.checkpoint(model.as_ref(), spec)? {
                return Ok((own, true));
            }
        } else if let Some(model) = model.as_ref().filter(|m| m.is_quantized()) {
            for plugin in &self.0 {
                if let Some(own) = plugin.checkpoint(Some(model), "")? {
                    return Ok((own, true));
                }
            }
        }
        let name = asked.map_or("", |(name, _)| name);
        let model = model.ok_or_else(|| {
            Error::Input(format!("--weights {name} changes the weights of a model: give --model, too"))
        })?;
        Ok((model, asked.is_none()))
    }

    /// `--weights NAME:SPEC`: changes the weights of `model`.
    pub fn weights(&self, name: &str, spec: &str, model: &mut dyn Model) -> Result<()> {
        self.find("--weights", name)?.weights(model, spec)
    }

    /// `--kv NAME:SPEC`: a cache; the dense one when nothing is asked for.
    pub fn cache(&self, asked: Option<(&str, &str)>, dims: &ModelDims) -> Result<Box<dyn KvCache>> {
        let (name, spec) = asked.unwrap_or(("dense", ""));
        self.find("--kv", name)?.cache(dims, spec)
    }

    /// `--hook NAME:SPEC`: a layer hook.
    pub fn hook(&self, name: &str, spec: &str, dims: &ModelDims) -> Result<Box<dyn LayerHook>> {
        self.find("--hook", name)?.hook(dims, spec)
    }
}

/// `--kv dense`: [`DenseCache`].
struct Dense;

impl Plugin for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn cache(&self, _dims: &ModelDims, spec: &str) -> Result<Box<dyn KvCache>> {
        if !spec.is_empty() {
            return Err(Error::Input(format!("--kv dense takes no setting, found `{spec}`")));
        }
        Ok(Box::new(DenseCache::new()))
    }
}

/// `--weights shuffle:SEED`: every parameter's values in an order of chance. Its distribution stays, what it has learned
/// is gone: an evaluation that still succeeds measures something else than the model.
struct Shuffle;

impl Plugin for Shuffle {
    fn name(&self) -> &'static str {
        "shuffle"
    }

    fn weights(&self, model: &mut dyn Model, spec: &str) -> Result<()> {
        let seed: u64 = spec.parse().map_err(|_| {
            Error::Input(format!("--weights shuffle:{spec}: expected a seed, e.g. shuffle:0"))
        })?;
        let mut stream = 0;
        model.visit_parameters(&mut |_, tensor| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(stream);
            stream += 1;
            let mut order: Vec<i64> = (0..tensor.numel() as i64).collect();
            order.shuffle(&mut rng);
            let order = Tensor::f_from_slice(&order)?.f_to_device(tensor.device())?;
            let shuffled =
                tensor.f_reshape([-1])?.f_index_select(0, &order)?.f_view(tensor.size().as_slice())?;
            // In place: a tied head shares the storage.
            let _no_grad = tch::no_grad_guard();
            tensor.f_copy_(&shuffled)?;
            Ok(())
        })
    }
}
