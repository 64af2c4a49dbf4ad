//! What a token costs when a small model writes and a large one is asked now and then: a step of the small model, the router
//! with the logits that it reads, a call of the large model for the tokens since its last one. Slices of Qwen3-0.6B and
//! Qwen3-8B with random weights in bf16, and the router of the R2R paper; beside each the same graph in plain tch.

use std::hint::black_box;

use anyhow::{Context, Result, bail};
use nics_core::checkpoint::TensorPath;
use nics_core::device::dtype_name;
use nics_core::models::{self, Model};
use nics_core::nn::memory::in_huge_pages;
use r2r::router::{Router, RouterConfig, Storage, route};
use tch::{Device, Kind, Tensor};

use crate::figure::{Case, id};
use crate::memory::{WORKING_SET, random};
use crate::peers::libtorch::{Libtorch, floats};
use crate::peers::ours::Ours;
use crate::peers::{Past, Peer, agree, parameters};
use crate::race::{Contender, race, tell, timed};
use crate::settings::{SEED, Settings, Size};
use crate::shapes::{ids, parameter_bytes};

const SUITE: &str = "route";
const CALL: &str = "tokens in a call";
const ROWS: &str = "rows";
/// Layers of each slice.
const LAYERS: usize = 4;

/// Runs the suite.
pub fn run(settings: &Settings) -> Result<()> {
    for (name, lengths) in
        [("qwen3-0.6b", &[1][..]), ("qwen3-8b", settings.pick(&[1, 4, 8, 20], &[1, 8], &[1, 4]))]
    {
        model(settings, name, lengths)?;
    }
    for storage in [Storage::Int8, Storage::Bf16, Storage::F32] {
        let dtype = match storage {
            Storage::Int8 => "int8",
            Storage::Bf16 => "bf16",
            Storage::F32 => "f32",
        };
        if settings.wants(&id(SUITE, dtype, ROUTER, ROWS, 1.0)) {
            tell(settings, &router(settings, storage, dtype)?)?;
        }
    }
    Ok(())
}

/// A model behind a prompt: calls of so many tokens each.
fn model(settings: &Settings, name: &str, lengths: &[usize]) -> Result<()> {
    let kind = Kind::BFloat16;
    let wanted = |n: usize| settings.wants(&id(SUITE, &dtype_name(kind), name, CALL, n as f64));
    if !lengths.iter().any(|&n| wanted(n)) {
        return Ok(());
    }
    let mut slice = models::shape(name, Some(settings.pick(LAYERS, LAYERS, 1)))?;
    if settings.size == Size::Miniature {
        let config = &mut slice.config;
        (config.hidden, config.intermediate, config.heads, config.kv_heads) = (64, 96, 4, 2);
        (config.head_dim, config.vocab, config.rope.head_dim) = (16, 320, 16);
    }
    let mut decoder = models::random(slice.config, Device::Cpu, kind, SEED)?;
    let bytes = parameter_bytes(&mut decoder)?;
    let mut libtorch = Libtorch::new(decoder.config().clone(), parameters(&mut decoder)?)?;
    let vocab = decoder.dims().vocab;
    let past = Past::read(&decoder, settings.pick(512, 512, 16), None)?;
    let mut ours = Ours::new(decoder);
    for &n in lengths.iter().filter(|n| wanted(**n)) {
        let call = |round: u64| ids(vocab, n, SEED + round);
        for peer in [&mut ours as &mut dyn Peer, &mut libtorch] {
            peer.begin(1, &past, 2 * n)?;
        }
        agree(&mut [&mut ours, &mut libtorch], kind, &call(0))?;
        let turn = |peer: &mut dyn Peer| -> Result<f64> {
            peer.begin(1, &past, 2 * n)?;
            // The first call after a pause finds cold caches and sleeping threads.
            peer.call(&call(1))?;
            peer.call(&call(2))
        };
        let mut contenders = vec![
            Contender::new("ours", || turn(&mut ours)),
            Contender::new("libtorch", || turn(&mut libtorch)),
        ];
        let runs = race(&mut contenders, &settings.budget())?;
        let case = Case {
            suite: SUITE.into(),
            name: name.into(),
            dtype: dtype_name(kind),
            x: n as f64,
            x_label: CALL.into(),
            per: "call".into(),
            model: format!("{} (random weights)", slice.name),
            threads: settings.threads,
            seed: SEED,
            // Of several tokens, arithmetic may be the limit.
            bytes: (n == 1).then_some(bytes),
            device: None,
            bandwidth: None,
            runs,
            absent: Vec::new(),
        };
        tell(settings, &case)?;
    }
    Ok(())
}

const ROUTER: &str = "router with its largest logits";

/// The router at batch 1, from the small model's logits and hidden state to a probability.
fn router(settings: &Settings, storage: Storage, dtype: &str) -> Result<Case> {
    let (hidden, vocab) = settings.pick((1024, 151_936), (1024, 151_936), (64, 320));
    let mut config = RouterConfig::paper(hidden);
    if settings.size == Size::Miniature {
        config.args.hidden_dims = vec![64; 2];
    }
    let (top_k, blocks) = (config.top_k().context("the router reads logits")?, config.args.hidden_dims.len());
    let at = TensorPath::random(SEED, 0.02, Device::Cpu, Kind::Float);
    let embedding = random(&[vocab, hidden], Kind::BFloat16, SEED)?;
    let load = || Router::load(config.clone(), &at, Some(&embedding), storage);
    let router = load()?;
    let kind = Kind::BFloat16;
    let (logits, state) = (random(&[1, vocab], kind, SEED + 1)?, random(&[1, hidden], kind, SEED + 2)?);
    let token = Tensor::f_from_slice(&[7i64])?;
    let plain = |kind| Plain::new(&router, &embedding, top_k, blocks, kind);
    let (float, half) = (plain(Kind::Float)?, plain(kind)?);
    let ours = route(&router, &logits, &state, &token, 0.5)?.probability[0];
    for (plain, allowed) in [(&float, 2e-3), (&half, 2e-2)] {
        let theirs = plain.probability(&logits, &state, &token)?;
        if (ours - theirs).abs() > allowed || !theirs.is_finite() {
            bail!("the plain router gives {theirs}, ours {ours}: it computes something else");
        }
    }
    // In a loop the models' weights pass through the caches between two calls: a turn goes through copies of the router.
    let copies = |bytes: usize| settings.pick(WORKING_SET, WORKING_SET, 0).div_ceil(bytes).max(1);
    let mut ours = vec![router];
    for _ in 1..copies(ours[0].bytes()) {
        ours.push(load()?);
    }
    let more = |first: Plain| -> Result<Vec<Plain>> {
        let mut all = vec![first];
        for _ in 1..copies(all[0].bytes()) {
            all.push(all[0].copy()?);
        }
        Ok(all)
    };
    let (float, half) = (more(float)?, more(half)?);
    let plain = |all: &[Plain]| {
        timed(all.len() as f64, || {
            all.iter().try_for_each(|r| r.probability(&logits, &state, &token).map(|p| _ = black_box(p)))
        })
    };
    let mut contenders = vec![
        Contender::new("ours", || {
            timed(ours.len() as f64, || {
                for router in &ours {
                    black_box(route(router, &logits, &state, &token, 0.5)?);
                }
                Ok(())
            })
        }),
        Contender::new("libtorch f32", || plain(&float)),
        Contender::new("libtorch bf16", || plain(&half)),
    ];
    let runs = race(&mut contenders, &settings.short_budget())?;
    Ok(Case {
        suite: SUITE.into(),
        name: ROUTER.into(),
        dtype: dtype.into(),
        x: 1.0,
        x_label: ROWS.into(),
        per: "token".into(),
        model: format!("router of width {hidden}, {vocab} logits"),
        threads: settings.threads,
        seed: SEED,
        bytes: Some(ours[0].bytes() as u64),
        device: None,
        bandwidth: None,
        runs,
        absent: Vec::new(),
    })
}

/// The paper's router as one would write it with tch.
struct Plain {
    kind: Kind,
    top_k: i64,
    blocks: usize,
    embedding: Tensor,
    tensors: std::collections::HashMap<String, Tensor>,
}

impl Plain {
    fn new(router: &Router, embedding: &Tensor, top_k: i64, blocks: usize, kind: Kind) -> Result<Self> {
        let tensors = router.tensors()?.into_iter().map(|(name, t)| Ok((name, t.f_to_kind(kind)?)));
        let tensors = tensors.collect::<Result<_>>()?;
        Ok(Self { kind, top_k, blocks, embedding: embedding.shallow_clone(), tensors })
    }

    /// The same in memory of its own.
    fn copy(&self) -> Result<Self> {
        let copied = |t| in_huge_pages(t, self.kind, Device::Cpu);
        let tensors = self.tensors.iter().map(|(name, t)| Ok((name.clone(), copied(t)?)));
        let embedding = self.embedding.shallow_clone();
        Ok(Self { tensors: tensors.collect::<Result<_>>()?, embedding, ..*self })
    }

    fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum()
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("the router has no {name}"))
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let bias = self.tensor(&format!("{name}.bias"))?;
        Ok(x.f_linear(self.tensor(&format!("{name}.weight"))?, Some(bias))?)
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.tensor(&format!("{name}.weight"))?, self.tensor(&format!("{name}.bias"))?);
        Ok(x.f_layer_norm(weight.size(), Some(weight), Some(bias), 1e-5, false)?)
    }

    fn probability(&self, logits: &Tensor, hidden: &Tensor, token: &Tensor) -> Result<f32> {
        let largest = logits.f_topk(self.top_k, -1, true, true)?.0.f_to_kind(self.kind)?;
        let e = self.embedding.f_index_select(0, token)?.f_to_kind(self.kind)?;
        let h = hidden.f_to_kind(self.kind)?;
        let z = self.linear("logits_projection", &largest)?;
        let x = self.linear("combined_projection", &Tensor::f_cat(&[h, e, z], 1)?)?;
        let mut x = self.linear("backbone.input_projection", &x)?;
        for block in 0..self.blocks {
            let at = format!("backbone.blocks.{block}");
            let inner = self.linear(&format!("{at}.mlp.0"), &self.norm(&format!("{at}.layer_norm"), &x)?)?;
            x = x.f_add(&self.linear(&format!("{at}.mlp.3"), &inner.f_gelu("none")?)?)?;
        }
        let x = self.linear("backbone.output_layer.1", &self.norm("backbone.output_layer.0", &x)?)?;
        Ok(floats(&x.f_sigmoid()?)?[0])
    }
}
