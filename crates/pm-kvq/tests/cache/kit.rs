//! A layer's rows by a seed, and calls with them.

use nics_core::models::ModelDims;
use nics_core::nn::{Rope, RopeConfig, Rotary};
use nics_core::seam::{Attended, KvCache, Mask, Ragged, SeqId, Site};
use pm_kvq::cache::{CacheConfig, PagedCache};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

/// Dimensions of a model that there is not.
pub fn dims(layers: usize, heads: i64, kv_heads: i64, head_dim: i64, kind: Kind) -> ModelDims {
    ModelDims {
        layers,
        hidden: 8,
        intermediate: 8,
        heads,
        kv_heads,
        head_dim,
        vocab: 8,
        context: 4096,
        kind,
        device: Device::Cpu,
    }
}

/// Queries, keys and values of a sequence, by its seed: the same whatever calls they come in.
pub struct Sequence {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl Sequence {
    pub fn new(dims: &ModelDims, rows: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut of = |heads: i64| {
            let n = rows as i64 * heads * dims.head_dim;
            let values: Vec<f32> = (0..n).map(|_| rng.random_range(-4.0..4.0)).collect();
            Tensor::from_slice(&values).view([rows as i64, heads, dims.head_dim]).to_kind(dims.kind)
        };
        Self { q: of(dims.heads), k: of(dims.kv_heads), v: of(dims.kv_heads) }
    }

    /// Rows `from .. to`.
    pub fn part(&self, from: usize, to: usize) -> [Tensor; 3] {
        [&self.q, &self.k, &self.v].map(|t| t.narrow(0, from as i64, (to - from) as i64).copy())
    }
}

pub fn rope(dims: &ModelDims, rows: &Ragged) -> Rope {
    let config = RopeConfig::parse(1e4, dims.head_dim, dims.context, None).unwrap();
    Rotary::new(config, Device::Cpu).rows(rows).unwrap()
}

/// Brings rows `from .. to` of some sequences in one call of a layer.
pub fn call<C: KvCache + ?Sized>(
    cache: &mut C,
    dims: &ModelDims,
    layer: usize,
    parts: &[(SeqId, &Sequence, usize, usize)],
    want_scores: Option<usize>,
) -> nics_core::Result<Attended> {
    let rows: Vec<(SeqId, usize, usize)> =
        parts.iter().map(|(s, _, from, to)| (*s, *from, to - from)).collect();
    let rows = Ragged::contiguous(&rows);
    let own: Vec<[Tensor; 3]> = parts.iter().map(|(_, seq, from, to)| seq.part(*from, *to)).collect();
    let [q, k, v] = [0, 1, 2].map(|i| Tensor::cat(&own.iter().map(|o| &o[i]).collect::<Vec<_>>(), 0));
    let rope = rope(dims, &rows);
    let input = Tensor::zeros([rows.len() as i64, dims.hidden], (dims.kind, Device::Cpu));
    let scale = (dims.head_dim as f64).powf(-0.5);
    let site =
        Site { layer, rows: &rows, rope: &rope, input: &input, mask: Mask::Causal, want_scores, scale };
    cache.attend(&site, &q, &k, &v)
}

/// Brings rows `from .. to` of one sequence to every layer.
pub fn feed(cache: &mut PagedCache, dims: &ModelDims, s: SeqId, seq: &Sequence, from: usize, to: usize) {
    for layer in 0..dims.layers {
        if from < to {
            call(cache, dims, layer, &[(s, seq, from, to)], None).unwrap();
        }
    }
}

pub fn config(words: &str) -> CacheConfig {
    words.parse().unwrap()
}

/// What is stored, to the bit: the books, and keys and values as they read.
pub fn assert_same_state(cache: &PagedCache, a: SeqId, b: SeqId, layers: usize) {
    for layer in 0..layers {
        assert_eq!(cache.ledger(a, layer), cache.ledger(b, layer), "layer {layer}");
        assert_eq!(cache.kept(a, layer), cache.kept(b, layer));
        let (a, b) = (cache.rows(a, layer).unwrap(), cache.rows(b, layer).unwrap());
        for (a, b) in a.iter().zip(&b) {
            assert!(a.equal(b), "layer {layer}: rows differ");
        }
    }
}
