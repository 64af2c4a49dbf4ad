//! The seams: small traits at the places where a method acts on a language model.
//!
//! | seam | where it sits | default |
//! |---|---|---|
//! | [`Projection`] | every linear layer | [`crate::nn::Linear`] |
//! | [`ProjectionSource`] | where a model reads its linear layers | their dense weights |
//! | [`KvCache`] | takes a layer's new q, k, v and attends over all that is kept | [`crate::cache::DenseCache`] |
//! | [`LayerHook`] | before layer 0 and, in every layer, between attention and MLP | none |
//!
//! Batches are ragged: the rows of all sequences are concatenated and never padded inside a seam ([`Ragged`]).

use tch::Tensor;

use crate::checkpoint::{Checkpoint, TensorPath};
use crate::models::{Model, ModelDims};
use crate::nn::{Linear, PackedLinear, Rope};
use crate::{Error, Result};

/// A sequence in a cache. Given out by [`KvCache::open`], never reused by the same cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// Whose rows a `[rows, ..]` tensor holds: sequence after sequence, oldest row first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ragged {
    seqs: Vec<SeqId>,
    lens: Vec<usize>,
    positions: Vec<i64>,
    planes: Option<Vec<[i64; 3]>>,
}

impl Ragged {
    /// Sequences with the positions of their rows.
    pub fn new(rows: Vec<(SeqId, Vec<i64>)>) -> Self {
        let seqs = rows.iter().map(|(s, _)| *s).collect();
        let lens = rows.iter().map(|(_, p)| p.len()).collect();
        let positions = rows.into_iter().flat_map(|(_, p)| p).collect();
        Self { seqs, lens, positions, planes: None }
    }

    /// Sequences whose `len` rows are at `start`, `start + 1`, …
    pub fn contiguous(rows: &[(SeqId, usize, usize)]) -> Self {
        Self::new(
            rows.iter().map(|&(s, start, len)| (s, (start as i64..(start + len) as i64).collect())).collect(),
        )
    }

    /// The same rows with their positions in time, height and width, by which a model with such rotary embeddings turns
    /// queries and keys. What a cache counts remain the [positions](Self::positions) in the sequence.
    ///
    /// # Errors
    /// `Error::Input` for another number of rows.
    pub fn with_planes(mut self, planes: Vec<[i64; 3]>) -> Result<Self> {
        if planes.len() != self.len() {
            return Err(Error::Input(format!(
                "{} positions in time, height and width for {} rows",
                planes.len(),
                self.len()
            )));
        }
        self.planes = Some(planes);
        Ok(self)
    }

    /// Position of each row in time, height and width, where they are not just the positions.
    pub fn planes(&self) -> Option<&[[i64; 3]]> {
        self.planes.as_deref()
    }

    /// The sequences, in the order of their rows.
    pub fn seqs(&self) -> &[SeqId] {
        &self.seqs
    }

    /// Rows of each sequence.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Position of each row in its sequence, all sequences concatenated.
    pub fn positions(&self) -> &[i64] {
        &self.positions
    }

    /// Rows in all.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Each sequence with its first row and its positions.
    pub fn iter(&self) -> impl Iterator<Item = (SeqId, usize, &[i64])> {
        let mut at = 0;
        self.seqs.iter().zip(&self.lens).map(move |(&s, &len)| {
            let from = at;
            at += len;
            (s, from, &self.positions[from..at])
        })
    }

    /// Index of each sequence's last row, int64 `[seqs]`; sequences without a row are left out.
    pub fn last_rows(&self) -> Vec<i64> {
        self.iter()
            .filter(|(_, _, p)| !p.is_empty())
            .map(|(_, from, p)| (from + p.len() - 1) as i64)
            .collect()
    }

    /// The common length, when all sequences have the same number of rows.
    pub fn even(&self) -> Option<usize> {
        let first = *self.lens.first()?;
        self.lens.iter().all(|&l| l == first).then_some(first)
    }
}

/// Which keys a row may see.
#[derive(Debug, Clone, Copy)]
pub enum Mask<'a> {
    /// Itself and everything older.
    Causal,
    /// Everything kept, younger rows of the same call too.
    Full,
    /// Itself and the keys whose position is less than `0` behind its own.
    Window(usize),
    /// A tensor added to the scores, broadcastable to `[seqs, heads, rows per sequence, kept]`. All sequences have the
    /// same number of rows and of kept keys; for uncached calls (left padding).
    Additive(&'a Tensor),
}

/// One call of a layer's attention.
#[derive(Debug)]
pub struct Site<'a> {
    /// Layer, from 0.
    pub layer: usize,
    /// Whose rows these are.
    pub rows: &'a Ragged,
    /// Rotary rows of these positions.
    pub rope: &'a Rope,
    /// The layer's input before its norm, `[rows, hidden]`.
    pub input: &'a Tensor,
    /// Which keys a row may see.
    pub mask: Mask<'a>,
    /// Asks for the attention probabilities of each sequence's last so many rows.
    pub want_scores: Option<usize>,
    /// Factor on `q·k`, usually `head_dim^-1/2`.
    pub scale: f64,
}

/// What attention gives back.
#[derive(Debug)]
pub struct Attended {
    /// `[rows, heads, head_dim]`.
    pub out: Tensor,
    /// When asked for: for each sequence `[heads, last rows, kept]`, float32.
    pub scores: Option<Vec<Tensor>>,
    /// Sequences whose budget is now full: the cache takes no further row of theirs.
    pub exhausted: Vec<SeqId>,
}

/// Memory of a cache, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    /// What the kept rows need.
    pub payload: usize,
    /// What is allocated for them.
    pub allocated: usize,
}

/// A sequence outside its cache: named tensors, so that it can be written to a file.
#[derive(Debug)]
pub struct Snapshot {
    /// Which kind of cache wrote it.
    pub cache: String,
    /// The most tokens that the sequence may hold.
    pub max_tokens: usize,
    /// The state.
    pub tensors: Vec<(String, Tensor)>,
}

/// Where a decoder keeps what it has seen.
///
/// A layer hands over the queries, keys and values of its new rows and gets attention over everything kept so far. How
/// they are kept (dense, quantized, evicted) is the implementation's business. One thread owns a cache.
pub trait KvCache: Send {
    /// A new, empty sequence of at most `max_tokens` rows a layer.
    fn open(&mut self, max_tokens: usize) -> Result<SeqId>;

    /// Forgets a sequence; an unknown one is ignored.
    fn close(&mut self, s: SeqId);

    /// Appends `k`, `v` (`[rows, kv_heads, head_dim]`, not rotated) of `at.layer` and attends `q`
    /// (`[rows, heads, head_dim]`, not rotated) over all that is kept. On an error nothing of the call is kept in that
    /// layer.
    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended>;

    /// Rows that a layer keeps of a sequence; 0 for an unknown one.
    fn kept(&self, s: SeqId, layer: usize) -> usize;

    /// Forgets the rows at `position` and after, in every layer.
    fn truncate(&mut self, s: SeqId, position: usize) -> Result<()>;

    /// Memory in use.
    fn bytes(&self) -> Bytes;

    /// Bytes that a sequence of `tokens` rows a layer takes at most, for admission before it is opened. The default is
    /// that of keys and values kept as they are, in the model's dtype.
    fn forecast(&self, dims: &ModelDims, tokens: usize) -> usize {
        let row = 2 * (dims.kv_heads * dims.head_dim) as usize * dims.kind.elt_size_in_bytes();
        dims.layers.saturating_mul(row).saturating_mul(tokens)
    }

    /// Memory of one sequence, a part of [`bytes`](Self::bytes); `None` for an unknown one or when the cache cannot tell.
    fn held(&self, s: SeqId) -> Option<Bytes> {
        let _ = s;
        None
    }

    /// A new sequence of at most `max_tokens` rows a layer that begins with the rows of `s` before `position`, so that a
    /// prompt which begins like another need not be computed twice. `None`, the default, when the cache cannot give the
    /// state that those rows alone would have led to (it has evicted or rewritten some, or a hook shortened them).
    fn branch(&mut self, s: SeqId, position: usize, max_tokens: usize) -> Result<Option<SeqId>> {
        let _ = (s, position, max_tokens);
        Ok(None)
    }

    /// [`branch`](Self::branch) without the copy: `s` itself forgets what is at `position` and after and may from now on
    /// hold `max_tokens` rows a layer. `false`, the default, when it cannot; `s` is then as it was.
    fn resume(&mut self, s: SeqId, position: usize, max_tokens: usize) -> Result<bool> {
        let _ = (s, position, max_tokens);
        Ok(false)
    }

    /// A copy of a sequence.
    fn fork(&mut self, s: SeqId) -> Result<SeqId>;

    /// The state of a sequence, independent of the cache.
    fn snapshot(&self, s: SeqId) -> Result<Snapshot>;

    /// A new sequence from a snapshot of the same kind of cache.
    fn restore(&mut self, snapshot: &Snapshot) -> Result<SeqId>;
}

/// Where a layer hook is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Before layer 0.
    Embeddings,
    /// Between attention (its residual added) and MLP of a layer.
    AfterAttention(usize),
}

/// The rows that a hook sees.
#[derive(Debug)]
pub struct Rows<'a> {
    /// `[rows, hidden]`.
    pub x: &'a Tensor,
    /// Whose they are.
    pub ragged: &'a Ragged,
}

/// A shortened batch.
#[derive(Debug)]
pub struct Reduced {
    /// The rows that go on, `[kept rows, hidden]`.
    pub x: Tensor,
    /// For each sequence the rows that go on, counted from its first, ascending.
    pub kept: Vec<Vec<usize>>,
}

/// Sees, and may shorten, the sequence between attention and MLP.
pub trait LayerHook: Send {
    /// Asks for the attention probabilities of the last so many rows of a layer.
    fn wants_scores(&self, layer: usize) -> Option<usize> {
        let _ = layer;
        None
    }

    /// Called at every [`Point`]. `scores` are those of the layer, when asked for: per sequence
    /// `[heads, last rows, kept]`. `None` leaves the rows as they are.
    fn at(&mut self, p: Point, rows: &Rows, scores: Option<&[Tensor]>) -> Result<Option<Reduced>>;
}

/// What each projection makes of `x`, where they share no work.
pub(crate) fn one_by_one<P: Projection + ?Sized>(
    first: &P,
    others: &[&dyn Projection],
    x: &Tensor,
) -> Result<Vec<Tensor>> {
    std::iter::once(first.forward(x)).chain(others.iter().map(|other| other.forward(x))).collect()
}

/// A linear layer of a model.
pub trait Projection: Send {
    /// `x`: `[.., in]`, result `[.., out]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;

    /// Several projections of one input (q, k, v; gate, up), this one first. An implementation that shares work
    /// between them (quantizing `x` once) overrides this.
    fn forward_many(&self, others: &[&dyn Projection], x: &Tensor) -> Result<Vec<Tensor>> {
        one_by_one(self, others, x)
    }

    /// The projection as a dense layer, when it is one: dense layers over one input share a pass.
    fn as_linear(&self) -> Option<&Linear> {
        None
    }

    /// The projection as a packed layer, when it is one: packed layers over one input share its rounding.
    fn as_packed(&self) -> Option<&PackedLinear> {
        None
    }

    /// The weight that this projection amounts to, `[out, in]`.
    fn dense(&self) -> Result<Tensor>;

    /// The bias, `[out]`.
    fn bias(&self) -> Option<Tensor> {
        None
    }

    /// The stored tensors by their name below the projection's path.
    fn parameters(&mut self) -> Vec<(&'static str, &mut Tensor)>;
}

/// Makes linear layers of what a checkpoint stores in place of their dense weights, while a model is loaded: no dense copy
/// ever exists. [`Checkpoint::with_projections`] puts it into a checkpoint.
pub trait ProjectionSource: Send + Sync {
    /// The linear layer at `at`, e.g. `model.layers.0.self_attn.q_proj`, of these channels and with or without a bias; `None`
    /// when its weight is stored as usual.
    fn load(
        &self,
        at: &TensorPath,
        input: i64,
        output: i64,
        bias: bool,
    ) -> Result<Option<Box<dyn Projection>>>;

    /// Whether a stored tensor is a part of such a layer, so that it says nothing about the dtype of a model.
    fn owns(&self, tensor: &str) -> bool;
}

/// What a method registers with a binary under a name: `--weights NAME:SPEC`, `--kv NAME:SPEC`, `--hook NAME:SPEC`.
///
/// Each default refuses, so that a method implements what it has.
pub trait Plugin: Send + Sync {
    /// The name in front of the colon.
    fn name(&self) -> &str;

    /// The checkpoint that is loaded in place of `model`, for weights that are not held dense first; with it
    /// [`weights`](Self::weights) is not called. `model` is the binary's own, where it has one. `None`, the default, for a
    /// method that changes the weights of a loaded model.
    fn checkpoint(&self, model: Option<&Checkpoint>, spec: &str) -> Result<Option<Checkpoint>> {
        let _ = (model, spec);
        Ok(None)
    }

    /// Replaces weights of a loaded model.
    fn weights(&self, model: &mut dyn Model, spec: &str) -> Result<()> {
        let _ = (model, spec);
        Err(Error::Input(format!("--weights {}: this plug-in has no weights", self.name())))
    }

    /// A cache for a model of these dimensions.
    fn cache(&self, dims: &ModelDims, spec: &str) -> Result<Box<dyn KvCache>> {
        let _ = (dims, spec);
        Err(Error::Input(format!("--kv {}: this plug-in has no cache", self.name())))
    }

    /// A layer hook for a model of these dimensions.
    fn hook(&self, dims: &ModelDims, spec: &str) -> Result<Box<dyn LayerHook>> {
        let _ = (dims, spec);
        Err(Error::Input(format!("--hook {}: this plug-in has no hook", self.name())))
    }
}
