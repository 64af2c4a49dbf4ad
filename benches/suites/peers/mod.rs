//! Who takes part: ours, libtorch alone, candle, ggml, transformers. All with the same weights, inputs and number of threads.

pub mod candle;
pub mod ggml;
pub mod libtorch;
pub mod ours;
pub mod transformers;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use nics_core::cache::DenseCache;
use nics_core::checkpoint::{TensorPath, save};
use nics_core::models::{Batch, Decoder, Input, Model};
use nics_core::seam::{KvCache, Ragged};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::settings::{SEED, Settings};
use crate::shapes::{Shape, ids};

/// A language model of somebody's.
pub trait Peer {
    /// Its name in tables.
    fn name(&self) -> &'static str;

    /// Forgets everything and takes in `batch` sequences that all begin with `past`, with room for `room` rows more.
    fn begin(&mut self, batch: usize, past: &Past, room: usize) -> Result<()>;

    /// One call: the next rows `ids` (`[batch, rows]`) of all sequences, to the logits of each one's last row. Gives the
    /// seconds that it took.
    fn call(&mut self, ids: &[i64]) -> Result<f64>;

    /// The logits of the last call, `[batch, vocab]`.
    fn logits(&mut self) -> Result<Vec<f32>>;
}

/// What sequences begin with.
pub struct Past {
    /// Its tokens.
    pub ids: Vec<i64>,
    /// Rotated keys and values of each layer, `[kv_heads, rows, head_dim]`; empty when there is no token.
    pub kept: Vec<(Tensor, Tensor)>,
    /// The same as a safetensors file, `0.k`, `0.v`, `1.k` …, where a peer in another process takes part.
    pub file: Option<PathBuf>,
}

impl Past {
    /// No past.
    pub fn none() -> Self {
        Self { ids: Vec::new(), kept: Vec::new(), file: None }
    }

    /// `rows` random tokens as `model` reads them; written under `folder` when given.
    pub fn read(model: &Decoder, rows: usize, folder: Option<&std::path::Path>) -> Result<Self> {
        if rows == 0 {
            return Ok(Self::none());
        }
        let ids = ids(model.dims().vocab, rows, SEED);
        let mut cache = DenseCache::new();
        let seq = cache.open(rows)?;
        for (i, chunk) in ids.chunks(512).enumerate() {
            let rows = Ragged::contiguous(&[(seq, i * 512, chunk.len())]);
            model.forward(&Batch::new(rows, Input::Ids(&Tensor::f_from_slice(chunk)?)), &mut cache, None)?;
        }
        let kept = (0..model.dims().layers)
            .map(|l| cache.rows(seq, l).context("the cache kept nothing"))
            .collect::<Result<Vec<_>>>()?;
        let file = match folder {
            None => None,
            Some(folder) => {
                let folder = folder.join(format!("past-{rows}"));
                let named = kept.iter().enumerate().flat_map(|(l, (k, v))| {
                    [(format!("{l}.k"), k.shallow_clone()), (format!("{l}.v"), v.shallow_clone())]
                });
                save(&folder, named, &json!({}), u64::MAX)?;
                Some(folder.join("model.safetensors"))
            }
        };
        Ok(Self { ids, kept, file })
    }
}

/// The decoder with weights drawn from [`SEED`].
pub fn decoder(shape: &Shape, kind: Kind) -> Result<Decoder> {
    Ok(Decoder::load(shape.config()?, &TensorPath::random(SEED, 0.02, Device::Cpu, kind))?)
}

/// The model's parameters by their checkpoint keys, sharing its memory.
pub fn parameters(model: &mut Decoder) -> Result<Vec<(String, Tensor)>> {
    let mut all = Vec::new();
    model.visit_parameters(&mut |name, t| {
        all.push((name.to_owned(), t.shallow_clone()));
        Ok(())
    })?;
    Ok(all)
}

/// The largest difference that rounding explains, as a part of the largest logit. Sums in another order, and in bf16
/// rounded at other places.
fn tolerance(kind: Kind) -> f32 {
    if kind == Kind::Float { 1e-3 } else { 5e-2 }
}

/// Makes one call of everybody and holds the logits against the first one's.
///
/// # Errors
/// A peer whose logits differ: it computes something else, and its time would mean nothing.
pub fn agree(peers: &mut [&mut dyn Peer], kind: Kind, ids: &[i64]) -> Result<()> {
    let mut first: Option<Vec<f32>> = None;
    for peer in peers {
        peer.call(ids).with_context(|| format!("{} failed", peer.name()))?;
        let logits = peer.logits()?;
        let Some(ours) = &first else {
            first = Some(logits);
            continue;
        };
        if logits.len() != ours.len() {
            bail!("{} gives {} logits, expected {}", peer.name(), logits.len(), ours.len());
        }
        let largest = ours.iter().fold(0f32, |m, x| m.max(x.abs()));
        // Not `max`, which passes over what is not a number.
        let off = ours
            .iter()
            .zip(&logits)
            .map(|(a, b)| (a - b).abs())
            .fold(0f32, |m, d| if d <= m { m } else { d });
        let allowed = tolerance(kind) * largest;
        if off.is_nan() || off > allowed {
            bail!(
                "{} computes something else: a logit differs by {off}, expected at most {allowed}",
                peer.name()
            );
        }
    }
    Ok(())
}

/// Everybody who takes part with one dtype.
pub struct Field {
    /// The subject.
    pub ours: ours::Ours,
    /// Who it is held against.
    pub peers: Vec<Box<dyn Peer>>,
    /// Peers that take no part, and why.
    pub absent: Vec<crate::figure::Absent>,
    /// Bytes of the parameters.
    pub bytes: u64,
    /// Where files for the peers are.
    pub scratch: Option<tempfile::TempDir>,
}

impl Field {
    /// Everybody that there is for `kind`.
    pub fn gather(settings: &Settings, shape: &Shape, kind: Kind) -> Result<Self> {
        let mut model = decoder(shape, kind)?;
        let bytes = crate::shapes::parameter_bytes(&mut model)?;
        let weights = parameters(&mut model)?;
        let config = model.config().clone();
        let mut absent = Vec::new();
        let mut missing = |who: &str, why: &str| {
            absent.push(crate::figure::Absent { who: who.into(), why: why.into() });
        };
        let with_candle = kind == Kind::Float;
        if !with_candle {
            missing("candle", "measured in f32 alone");
        }
        if settings.python.is_none() {
            missing("transformers", "NICS_PYTHON names no Python");
        }
        let scratch = if with_candle || settings.python.is_some() {
            let scratch = Settings::scratch()?;
            save(
                &scratch.path().join("model"),
                weights.iter().map(|(n, t)| (n.clone(), t.shallow_clone())),
                &shape.json,
                u64::MAX,
            )?;
            Some(scratch)
        } else {
            None
        };
        let mut peers: Vec<Box<dyn Peer>> = vec![Box::new(libtorch::Libtorch::new(config, weights)?)];
        if let Some(folder) = scratch.as_ref().map(|s| s.path().join("model")) {
            if with_candle {
                peers.push(Box::new(candle::Candle::load(&folder, &shape.json)?));
            }
            if let Some(python) = &settings.python {
                peers.push(Box::new(transformers::Transformers::start(
                    python,
                    &folder,
                    kind,
                    settings.threads,
                )?));
            }
        }
        Ok(Self { ours: ours::Ours::new(model), peers, absent, bytes, scratch })
    }
    /// Ours first, then the peers whom `takes` names.
    pub fn everybody(&mut self, takes: impl Fn(&str) -> bool) -> Vec<&mut dyn Peer> {
        let mut all: Vec<&mut dyn Peer> = vec![&mut self.ours];
        for peer in &mut self.peers {
            if takes(peer.name()) {
                all.push(&mut **peer);
            }
        }
        all
    }

    /// The past of `rows` tokens, for everybody.
    pub fn past(&self, rows: usize) -> Result<Past> {
        let others = self.peers.iter().any(|p| p.name() == "transformers");
        Past::read(
            self.ours.model(),
            rows,
            self.scratch.as_ref().filter(|_| others).map(tempfile::TempDir::path),
        )
    }
}
