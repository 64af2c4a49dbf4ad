//! A pair of models ready to write: what `generate` and `chat` begin with.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use clap::Args;
use nics_core::checkpoint::Checkpoint;
use nics_core::cli::{DeviceArgs, PluginSpec, SamplingArgs};
use nics_core::models::{self, Decoder as Model, Model as _, ModelDims};
use nics_core::plugin::Plugins;
use nics_core::sampling::Sampling;
use nics_core::seam::KvCache;
use nics_core::tch::Device;
use nics_core::template::{ChatTemplate, Message, RenderOptions};
use nics_core::tokenizer::Tokenizer;
use r2r::checkpoint::{Official, load, tokenizer_hash};
use r2r::decode::{Decoder, LargeModel, LocalLarge, MeanParameters, Request, Sizes, Usage};
use r2r::policy::{Kind, PolicySpec, SharedRouter};
use r2r::remote::{LargeSpec, RemoteLarge};
use r2r::router::Storage;
use r2r::sampling::SmallSampling;

use super::large::LargeArgs;

/// Two models, a router and a policy.
#[derive(Debug, Clone, Args)]
pub struct PairArgs {
    /// Small model, which writes: a folder, or a hub id ORG/NAME or ORG/NAME@REVISION
    #[arg(long, short, visible_alias = "slm", value_name = "FOLDER|ID")]
    pub small: String,
    #[command(flatten)]
    pub large: LargeArgs,
    /// Router: a folder of ours, or an official .pt file
    #[arg(long, short, value_name = "PATH")]
    pub router: Option<PathBuf>,
    /// Who chooses a token: neural, neural-rolling, entropy, immediate, momentum, rolling, duo-rolling, random,
    /// always-small, always-large; default: neural with a --router
    #[arg(long, value_name = "NAME")]
    pub policy: Option<Kind>,
    /// What the policy's score is held against; default: the router's own, or the policy's
    #[arg(long, value_name = "X")]
    pub threshold: Option<f64>,
    /// Share of tokens that the large model is to choose, held by moving the threshold [0 to 1]
    #[arg(long, value_name = "SHARE")]
    pub target_rate: Option<f64>,
    /// Method that keeps keys and values, of every model that is here: NAME or NAME:SPEC
    #[arg(long, value_name = "NAME[:SPEC]")]
    pub kv: Option<PluginSpec>,
    #[command(flatten)]
    pub run_on: DeviceArgs,
}

impl PairArgs {
    /// The policy that the flags name; nothing is loaded for it.
    pub fn policy(&self, seed: u64) -> Result<PolicySpec> {
        let kind = match self.policy {
            Some(kind) => kind,
            None if self.router.is_some() => Kind::Neural,
            None => {
                bail!("no --router is given: give one, or a --policy that needs none, e.g. --policy entropy")
            }
        };
        let policy =
            PolicySpec { threshold: self.threshold, target: self.target_rate, seed, ..PolicySpec::new(kind) };
        policy.validate()?;
        if kind.needs_router() && self.router.is_none() {
            bail!("the {kind} policy asks a router: give --router");
        }
        Ok(policy)
    }
}

/// How a checkpoint's generation_config.json has tokens drawn, as far as both models of a pair can.
pub fn own_sampling(checkpoint: &Checkpoint) -> Result<Sampling> {
    let generation = checkpoint.generation_config()?.unwrap_or_default();
    let number = |key: &str| generation[key].as_f64();
    if !generation["do_sample"].as_bool().unwrap_or(false) {
        return Ok(Sampling::default());
    }
    Ok(Sampling {
        temperature: number("temperature").unwrap_or(1.0) as f32,
        top_k: generation["top_k"].as_u64().unwrap_or(0) as usize,
        top_p: number("top_p").unwrap_or(1.0) as f32,
        ..Sampling::default()
    })
}

/// The plug-ins that this binary was built with.
fn plugins_of_binary() -> Plugins {
    let plugins = Plugins::default();
    #[cfg(feature = "with-mbq")]
    let plugins = plugins.with(mbq::plugin::Mbq);
    #[cfg(feature = "with-pm-kvq")]
    let plugins = plugins.with(pm_kvq::plugin::PmKvq);
    plugins
}

/// A model's checkpoint, which may be quantized in a way that the binary reads.
fn checkpoint(source: &str) -> Result<Checkpoint> {
    Ok(plugins_of_binary().checkpoint(None, Some(Checkpoint::open(source)?))?.0)
}

/// Where the large model is.
enum Large {
    Here(Box<Model>),
    There(Mutex<Option<RemoteLarge>>),
}

/// What was loaded.
pub struct Opened {
    pub small: Model,
    pub tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    pub eos: Vec<u32>,
    own: Sampling,
    pub name: String,
    large: Large,
    router: Option<(SharedRouter, f64)>,
    pub policy: PolicySpec,
    /// Parameters of the models and the router, where they are known.
    pub sizes: Option<Sizes>,
    args: PairArgs,
    pub context: usize,
}

impl Opened {
    /// Loads the pair, greets the server if there is one, and holds the tokenizers against each other.
    pub fn open(args: &PairArgs, seed: u64) -> Result<Self> {
        args.run_on.set_threads()?;
        let device = args.run_on.device.open()?;
        // What is cheap to find wrong comes before anything is loaded.
        let policy = args.policy(seed)?;
        let settings = args.large.settings()?;
        let checkpoint = checkpoint(&args.small)?;
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint)?;
        let (small, small_size) = load_model(args, &checkpoint, device)?;
        let (large, size) = match &args.large.large {
            LargeSpec::Local(path) => {
                let other = self::checkpoint(path)?;
                same_tokenizer(&checkpoint, &tokenizer, &other, &Tokenizer::from_checkpoint(&other)?)?;
                let (model, size) = load_model(args, &other, device)?;
                (Large::Here(Box::new(model)), Some(size))
            }
            LargeSpec::Remote { engine, url } => {
                let dims = small.dims();
                let (vocab, context) = (dims.vocab as usize, dims.context);
                let large = RemoteLarge::connect(*engine, url, settings, &tokenizer, vocab, context)?;
                (Large::There(Mutex::new(Some(large))), None)
            }
        };
        let context = match &large {
            Large::Here(model) => model.dims().context,
            Large::There(large) => {
                large.lock().ok().and_then(|l| l.as_ref().map(LargeModel::context)).unwrap_or(0)
            }
        };
        let context = context.min(small.dims().context);
        let router = match &args.router {
            Some(path) if policy.kind.needs_router() => {
                Some(open_router(path, &checkpoint, &small, &tokenizer)?)
            }
            _ => None,
        };
        let router_size = match &router {
            Some((router, _)) => {
                let router = router.lock().map_err(|_| anyhow::anyhow!("the router is in use"))?;
                router.parameters()?.iter().map(|(_, t)| t.numel() as f64).sum::<f64>() / 1e9
            }
            None => 0.0,
        };
        let sizes = match (args.large.sizes, size) {
            (Some((small, large)), _) => Some(Sizes { small, large, router: router_size }),
            (None, Some(large)) => Some(Sizes { small: small_size, large, router: router_size }),
            (None, None) => None,
        };
        let own = own_sampling(&checkpoint)?;
        Ok(Self {
            template: ChatTemplate::from_checkpoint(&checkpoint)?,
            eos: tokenizer.special_ids().eos.clone(),
            own,
            name: checkpoint.name().to_owned(),
            small,
            tokenizer,
            large,
            router,
            policy,
            sizes,
            args: args.clone(),
            context,
        })
    }

    /// Shape of the large model where it is in this process.
    pub fn large_dims(&self) -> Option<&ModelDims> {
        match &self.large {
            Large::Here(model) => Some(model.dims()),
            Large::There(_) => None,
        }
    }

    /// A decoder over the pair; a server is greeted once, so there is one of them there.
    pub fn decoder(&self) -> Result<Decoder<'_>> {
        let large: Box<dyn LargeModel + '_> = match &self.large {
            Large::Here(model) => {
                let large = LocalLarge::new(&**model).with_cache(self.cache(model.dims())?);
                Box::new(large.with_read_ahead(self.args.large.read_ahead_here()))
            }
            Large::There(large) => {
                let large = large.lock().ok().and_then(|mut large| large.take());
                Box::new(large.context("the connection to the large model is in use")?)
            }
        };
        let router = self.router.as_ref().map(|(router, threshold)| (Arc::clone(router), *threshold));
        let policy = self.policy.build(router)?;
        let decoder = Decoder::new(&self.small, large, policy).with_cache(self.cache(self.small.dims())?);
        Ok(decoder.on_failure(self.args.large.on_failure.into()))
    }

    /// A cache as the flags have it.
    fn cache(&self, dims: &ModelDims) -> Result<Box<dyn KvCache>> {
        let asked = self.args.kv.as_ref().map(|kv| (kv.name.as_str(), kv.spec.as_str()));
        Ok(plugins_of_binary().cache(asked, dims)?)
    }

    /// A conversation as token ids, up to where the reply begins.
    pub fn conversation(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template.as_ref().with_context(|| {
            format!("{} has no chat template: give --raw to continue texts as they are", self.name)
        })?;
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        let text = template.render(messages, &options)?;
        Ok(self.tokenizer.encode(&text, false)?)
    }

    /// Refuses a prompt that no token could follow.
    pub fn check_prompt(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.small.dims().vocab;
        if ids.is_empty() {
            bail!("the prompt is empty");
        }
        if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= vocab) {
            bail!("token {id} is outside the vocabulary of {vocab}");
        }
        if ids.len() >= self.context {
            bail!(
                "the prompt has {} tokens, which leaves no room in the context of {}",
                ids.len(),
                self.context
            );
        }
        Ok(())
    }

    /// A request as the flags have it.
    pub fn request(&self, prompt: Vec<u32>, flags: &SamplingArgs, seed: u64) -> Result<Request> {
        for (flag, given) in
            [("--min-p", flags.min_p.is_some()), ("--repetition-penalty", flags.repetition_penalty.is_some())]
        {
            if given {
                bail!("{flag}: the small model chooses by temperature, top-k and top-p alone");
            }
        }
        let large = Sampling { seed, ..flags.over(&self.own)? };
        let small = SmallSampling::from(&large);
        let max_new_tokens = flags.max_new_tokens.unwrap_or(1024);
        let mut request = Request::greedy(prompt, max_new_tokens, &self.eos);
        (request.small, request.large, request.seed) = (small, large, seed);
        // A policy that draws does so by the request, not by its place in the run.
        request.settings.seed = Some(seed);
        Ok(request)
    }

    /// What was written, in a line for people.
    pub fn summary(&self, usage: &Usage) -> String {
        let mut parts = vec![format!(
            "{} tokens, {} of the large model ({:.1} %)",
            usage.tokens(),
            usage.large_tokens,
            100.0 * usage.large_share()
        )];
        if usage.degraded_tokens > 0 {
            parts.push(format!("{} degraded", usage.degraded_tokens));
        }
        if let Some(MeanParameters { exclusive, additive }) = self.sizes.map(|s| usage.mean_parameters(&s)) {
            parts.push(format!(
                "parameters a token: {exclusive:.3} B counting who chose it, {additive:.3} B counting what ran"
            ));
        }
        parts.join("; ")
    }
}

/// A model and its billions of parameters.
fn load_model(args: &PairArgs, checkpoint: &Checkpoint, device: Device) -> Result<(Model, f64)> {
    let dtype = args.run_on.dtype.resolve(models::stored_kind(checkpoint));
    let mut model = models::load(checkpoint, device, dtype)?;
    let count = models::parameters(&mut model)?;
    Ok((model, count as f64 / 1e9))
}

fn same_tokenizer(a: &Checkpoint, ours: &Tokenizer, b: &Checkpoint, theirs: &Tokenizer) -> Result<()> {
    if tokenizer_hash(ours) == tokenizer_hash(theirs) {
        return Ok(());
    }
    let differs =
        (0..ours.vocab_size().max(theirs.vocab_size()) as u32).find(|&id| ours.token(id) != theirs.token(id));
    let said =
        |t: &Tokenizer| differs.and_then(|id| t.token(id)).map_or("nothing".into(), |t| format!("{t:?}"));
    bail!(
        "{} and {} have different tokenizers: id {} is {} for the one and {} for the other; both models of a pair need the \
         same",
        a.name(),
        b.name(),
        differs.unwrap_or(0),
        said(ours),
        said(theirs)
    )
}

/// A router and its threshold.
fn open_router(
    path: &std::path::Path,
    checkpoint: &Checkpoint,
    small: &Model,
    tokenizer: &Tokenizer,
) -> Result<(SharedRouter, f64)> {
    let dims = small.dims();
    let embedding = Some(&small.embed_tokens);
    let (router, threshold) = if path.is_dir() {
        let (router, card) = load(path, embedding, Storage::Bf16, dims.device)?;
        card.check_tokenizer(checkpoint.name(), tokenizer)?;
        (router, card.common_args.threshold)
    } else {
        let official = Official::open(path)?;
        (official.router(embedding, Storage::Bf16, dims.device)?, official.common.threshold)
    };
    // Now, not at the first token.
    let config = router.config();
    if let Some(width) = config.hidden().filter(|width| *width != dims.hidden) {
        return Err(r2r::Error::HiddenSizeMismatch { router: width, slm: dims.hidden }.into());
    }
    if let Some(k) = config.top_k().filter(|k| *k > dims.vocab) {
        return Err(r2r::Error::TopKTooLarge { k, vocab: dims.vocab }.into());
    }
    Ok((Arc::new(Mutex::new(router)), threshold))
}
