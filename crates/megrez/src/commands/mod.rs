//! The subcommands: parse, call the library, print.

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "bench")]
pub mod bench;
pub mod chat;
pub mod eval;
pub mod generate;
pub mod inspect;
mod lines;
#[cfg(feature = "serve")]
pub mod serve;
pub mod train;

use anyhow::Result;
use megrez::Megrez;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::{PluggedModelArgs, PluginArgs, PluginSpec};
use nics_core::device::{device_name, dtype_name};
use nics_core::models::{self, Decoder, Model};
use nics_core::plugin::Plugins;
use nics_core::seam::{KvCache, LayerHook};

/// The plug-ins that this binary was built with.
fn plugins_of_binary() -> Plugins {
    let plugins = Plugins::default();
    #[cfg(feature = "with-mbq")]
    let plugins = plugins.with(mbq::plugin::Mbq);
    #[cfg(feature = "with-pm-kvq")]
    let plugins = plugins.with(pm_kvq::plugin::PmKvq);
    plugins
}

/// What the plug-in flags ask for beside the weights.
pub struct Plugged {
    pub cache: Box<dyn KvCache>,
    pub hook: Option<Box<dyn LayerHook>>,
    /// The plug-ins in force, e.g. `weights=shuffle:0`; empty without.
    pub variant: String,
}

impl Plugged {
    /// Plugs what the flags ask for into a model. `weights_are_in` when those of `--weights` were loaded with it.
    pub fn into(decoder: &mut Decoder, plugins: &PluginArgs, weights_are_in: bool) -> Result<Self> {
        let known = plugins_of_binary();
        if let Some(PluginSpec { name, spec }) = plugins.weights.as_ref().filter(|_| !weights_are_in) {
            known.weights(name, spec, decoder)?;
        }
        let kv = plugins.kv.as_ref().map(|p| (p.name.as_str(), p.spec.as_str()));
        let cache = known.cache(kv, decoder.dims())?;
        let hook = match plugins.hook.as_slice() {
            [] => None,
            [one] => Some(known.hook(&one.name, &one.spec, decoder.dims())?),
            more => anyhow::bail!("{} layer hooks are given; at most one can act on a model", more.len()),
        };
        let asked = plugins.weights.iter().map(|p| format!("weights={p}"));
        let asked = asked.chain(plugins.kv.iter().map(|p| format!("kv={p}")));
        let variant =
            asked.chain(plugins.hook.iter().map(|p| format!("hook={p}"))).collect::<Vec<_>>().join(" ");
        Ok(Self { cache, hook, variant })
    }
}

/// A loaded model with what the plug-in flags asked for.
pub struct Loaded {
    pub megrez: Megrez,
    pub checkpoint: Checkpoint,
    pub cache: Box<dyn KvCache>,
    pub hook: Option<Box<dyn LayerHook>>,
    /// The plug-ins in force, e.g. `weights=shuffle:0`; empty without.
    pub variant: String,
}

impl Loaded {
    /// Loads the model of `args`.
    pub fn open(args: &PluggedModelArgs) -> Result<Self> {
        args.run_on.set_threads()?;
        let (checkpoint, weights_are_in) = args.checkpoint(&plugins_of_binary())?;
        let device = args.run_on.device.open()?;
        let stored = models::stored_kind(&checkpoint);
        let mut megrez = Megrez::load(&checkpoint, device, args.run_on.dtype.resolve(stored))?;
        let Plugged { cache, hook, variant } =
            Plugged::into(&mut megrez.decoder, &args.plugins, weights_are_in)?;
        Ok(Self { megrez, checkpoint, cache, hook, variant })
    }

    /// Device and dtype as rows name them.
    pub fn place(&self) -> (String, String) {
        let dims = self.megrez.decoder.dims();
        (device_name(dims.device), dtype_name(dims.kind))
    }

    /// What decides the model's answers: part of the hash that names a result.
    pub fn identity(&self) -> Result<serde_json::Value> {
        let (device, dtype) = self.place();
        Ok(serde_json::json!({
            "arch_hash": self.checkpoint.arch_hash(),
            "weights_hash": self.checkpoint.weights_hash()?,
            "variant": self.variant,
            "device": device,
            "dtype": dtype,
        }))
    }
}
