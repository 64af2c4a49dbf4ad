//! Flag groups of binaries that run models. Those without a model (`--seed`, `--out`, `--json`, `--shard`, logging) and
//! the edge of `main` come from `nics-base` and are re-exported.
//!
//! ```no_run,standalone_crate
//! use clap::Parser;
//! use nics_core::cli::{ModelArgs, SamplingArgs, main_exit};
//!
//! #[derive(Parser)]
//! struct Args {
//!     #[command(flatten)]
//!     model: ModelArgs,
//!     #[command(flatten)]
//!     sampling: SamplingArgs,
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     let args = Args::parse();
//!     main_exit(|| {
//!         let device = args.model.device.open()?;
//!         args.model.set_threads()?;
//!         println!("{device:?}");
//!         Ok(())
//!     })
//! }
//! ```

mod prompts;
mod replies;
mod training;

use std::fmt;
use std::str::FromStr;

use clap::Args;

use crate::checkpoint::Checkpoint;
use crate::device::{DeviceSpec, DtypeSpec, set_threads};
use crate::plugin::Plugins;
use crate::sampling::Sampling;
use crate::{Error, Result};

pub use nics_base::cli::*;
pub use prompts::{Given, PromptArgs, PromptLine};
pub use replies::Replies;
pub use training::{ModelsOfRecipeArgs, TrainingBars};

/// `--model`, `--device`, `--dtype`, `--threads`.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Checkpoint: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(long, short, value_name = "FOLDER|ID", value_parser = not_empty)]
    pub model: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run_on: DeviceArgs,
}

impl std::ops::Deref for ModelArgs {
    type Target = DeviceArgs;

    fn deref(&self) -> &DeviceArgs {
        &self.run_on
    }
}

/// `--model` and what is plugged into it: `--weights`, `--kv`, `--hook`, with `--device`, `--dtype`, `--threads`.
#[derive(Debug, Clone, Default, Args)]
pub struct PluggedModelArgs {
    /// Checkpoint: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION; not needed where --weights names one
    #[arg(long, short, value_name = "FOLDER|ID", value_parser = not_empty, required_unless_present = "weights")]
    pub model: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub run_on: DeviceArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub plugins: PluginArgs,
}

impl PluggedModelArgs {
    /// The checkpoint to load, and whether `--weights` is dealt with by that: [`Plugins::checkpoint`].
    pub fn checkpoint(&self, known: &Plugins) -> Result<(Checkpoint, bool)> {
        let model = self.model.as_deref().map(Checkpoint::open).transpose()?;
        let weights = self.plugins.weights.as_ref().map(|p| (p.name.as_str(), p.spec.as_str()));
        known.checkpoint(weights, model)
    }
}

/// `--device`, `--dtype`, `--threads`, for commands that take their model in another way.
#[derive(Debug, Clone, Default, Args)]
pub struct DeviceArgs {
    /// What to compute on: cpu, cuda, cuda:INDEX, or auto (CUDA when it can be used)
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceSpec::Cpu)]
    pub device: DeviceSpec,
    /// What to compute in: f32, bf16, f16, or auto (as the checkpoint is stored)
    #[arg(long, value_name = "DTYPE", default_value_t = DtypeSpec::Auto)]
    pub dtype: DtypeSpec,
    /// Threads of the CPU; default: OMP_NUM_THREADS, else what Slurm or the system allots
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl DeviceArgs {
    /// Sets libtorch's threads of the calling thread and returns their number; see [`set_threads`].
    pub fn set_threads(&self) -> Result<usize> {
        set_threads(self.threads)
    }
}

/// How to choose tokens. A flag that is not given leaves the model's own `generation_config.json` in force.
#[derive(Debug, Clone, Default, Args)]
pub struct SamplingArgs {
    /// Always the likeliest token: the same as --temperature 0
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    pub greedy: bool,
    /// Above 1 more surprising, below 1 less, 0 always the likeliest token [0 to 100]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Draw from the K likeliest tokens alone; 0 is no limit
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Draw from the likeliest tokens that make up this much probability [above 0, up to 1]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Draw from tokens with at least this share of the likeliest one's probability [0 to 1]
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Above 1 makes tokens that were seen less likely, 1 changes nothing
    #[arg(long, value_name = "R")]
    pub repetition_penalty: Option<f32>,
    /// Most tokens to generate for a prompt
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub max_new_tokens: Option<usize>,
    /// Stop where this text would appear; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = not_empty)]
    pub stop: Vec<String>,
}

impl SamplingArgs {
    /// The given flags over a model's own settings.
    ///
    /// # Errors
    /// [`Error::Input`] when a value is out of range, or when a limit on the draw is given where nothing is drawn.
    pub fn over(&self, own: &Sampling) -> Result<Sampling> {
        let mut sampling = own.clone();
        let zero = self.greedy.then_some(0.0);
        put(&mut sampling.temperature, zero.or(self.temperature));
        put(&mut sampling.top_k, self.top_k);
        put(&mut sampling.top_p, self.top_p);
        put(&mut sampling.min_p, self.min_p);
        put(&mut sampling.repetition_penalty, self.repetition_penalty);
        sampling.validate()?;
        let limits = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
        ];
        if let Some((flag, _)) = limits.iter().find(|(_, given)| *given && sampling.temperature == 0.0) {
            return Err(Error::Input(format!(
                "{flag} has no effect because the likeliest token is always chosen: give --temperature above 0 too"
            )));
        }
        Ok(sampling)
    }
}

/// Which methods to plug into the model, each as NAME or NAME:SPEC; what a SPEC holds is the method's own.
#[derive(Debug, Clone, Default, Args)]
pub struct PluginArgs {
    /// Method that replaces the model's weights
    #[arg(long, value_name = "NAME[:SPEC]")]
    pub weights: Option<PluginSpec>,
    /// Method that keeps keys and values
    #[arg(long, value_name = "NAME[:SPEC]")]
    pub kv: Option<PluginSpec>,
    /// Method that acts between layers; may be given several times, in the order in which they act
    #[arg(long, value_name = "NAME[:SPEC]")]
    pub hook: Vec<PluginSpec>,
}

/// The name of a method and what it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginSpec {
    /// The method's name.
    pub name: String,
    /// What follows the first colon; empty when there is none.
    pub spec: String,
}

impl FromStr for PluginSpec {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let (name, spec) = s.split_once(':').unwrap_or((s, ""));
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(plain) {
            return Err(format!(
                "{name:?} is no method's name: expected NAME or NAME:SPEC, e.g. dense or some-method:4bit"
            ));
        }
        if spec.is_empty() && s.contains(':') {
            return Err(format!("nothing follows the colon of {s:?}: give {name}:SPEC, or {name} alone"));
        }
        Ok(Self { name: name.to_owned(), spec: spec.to_owned() })
    }
}

impl fmt::Display for PluginSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.spec.is_empty() { f.write_str(&self.name) } else { write!(f, "{}:{}", self.name, self.spec) }
    }
}

fn put<T>(field: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *field = value;
    }
}

fn not_empty(s: &str) -> std::result::Result<String, String> {
    if s.is_empty() { Err("is empty".into()) } else { Ok(s.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    /// Does all of it.
    #[derive(Debug, Parser)]
    struct All {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        sampling: SamplingArgs,
        #[command(flatten)]
        plugins: PluginArgs,
        #[command(flatten)]
        seed: SeedArg,
        #[command(flatten)]
        out: OutArg,
        #[command(flatten)]
        json: JsonArg,
        #[command(flatten)]
        shard: ShardArg,
        #[command(flatten)]
        log: LogArgs,
    }

    fn parse(flags: &[&str]) -> Result<All, String> {
        All::try_parse_from(["x", "--model", "m"].iter().chain(flags)).map_err(|e| e.to_string())
    }

    fn sampled(flags: &[&str], own: &Sampling) -> Result<Sampling> {
        parse(flags).unwrap().sampling.over(own)
    }

    #[test]
    fn the_groups_fit_together_and_default_to_the_cpu() {
        All::command().debug_assert();
        assert_eq!(All::command().get_about().unwrap().to_string(), "Does all of it");
        let args = parse(&[]).unwrap();
        assert_eq!((args.model.device, args.model.dtype), (DeviceSpec::Cpu, DtypeSpec::Auto));
        let args = parse(&["--device", "cuda:1", "--dtype", "bf16", "--threads", "2"]).unwrap();
        assert_eq!((args.model.device, args.model.dtype), (DeviceSpec::Cuda(1), DtypeSpec::Bf16));
        assert_eq!(args.model.threads, Some(2));
        assert!(parse(&["--device", "gpu"]).unwrap_err().contains("give cpu, cuda, cuda:INDEX or auto"));
        assert!(parse(&["--stop", ""]).unwrap_err().contains("is empty"));
        assert!(parse(&["--max-new-tokens", "0"]).unwrap_err().contains("expected at least 1"));
    }

    #[test]
    fn flags_win_over_the_models_own_settings() {
        let own = Sampling { temperature: 0.7, top_p: 0.9, ..Sampling::default() };
        assert_eq!(sampled(&[], &own).unwrap(), own);
        let mixed = sampled(&["--temperature", "0.3", "--top-k", "5"], &own).unwrap();
        assert_eq!(mixed, Sampling { temperature: 0.3, top_k: 5, ..own.clone() });
        let greedy = sampled(&["--greedy"], &own).unwrap();
        assert_eq!(greedy, Sampling { temperature: 0.0, ..own.clone() });
        assert!(sampled(&["--temperature", "999999"], &own).is_err());
    }

    #[test]
    fn limits_on_a_draw_that_does_not_happen_are_refused() {
        let e = sampled(&["--top-p", "0.5"], &Sampling::default()).unwrap_err().to_string();
        assert!(e.contains("--top-p has no effect") && e.contains("--temperature above 0"), "{e}");
        assert!(parse(&["--greedy", "--top-k", "4"]).unwrap_err().contains("cannot be used with"));
    }

    #[test]
    fn plugins_are_a_name_and_what_follows_the_first_colon() {
        let args = parse(&["--kv", "some-cache:bits=4:file.toml", "--hook", "a", "--hook", "b:0.5"]).unwrap();
        let kv = args.plugins.kv.unwrap();
        assert_eq!((kv.name.as_str(), kv.spec.as_str()), ("some-cache", "bits=4:file.toml"));
        assert_eq!(kv.to_string(), "some-cache:bits=4:file.toml");
        assert_eq!(args.plugins.hook.iter().map(ToString::to_string).collect::<Vec<_>>(), ["a", "b:0.5"]);
        assert!(args.plugins.weights.is_none());
        assert!(parse(&["--weights", ":4bit"]).unwrap_err().contains("NAME or NAME:SPEC"));
        assert!(parse(&["--weights", "packed:"]).unwrap_err().contains("nothing follows the colon"));
    }
}
