//! Key scales at run time, for models whose weights cannot take them: in front of any cache, keys are divided and queries
//! multiplied. That commutes with rotary rotation, so it happens before it.

use nics_core::models::ModelDims;
use nics_core::seam::{Attended, Bytes, KvCache, SeqId, Site, Snapshot};
use tch::{Kind, Tensor};

use super::scales::Scales;
use crate::quantize::finite;
use crate::{Error, Result};

/// A cache behind key scales.
pub struct Scaled {
    inner: Box<dyn KvCache>,
    /// What keys are divided by, `[kv_heads, head_dim]`, and queries are multiplied with, `[heads, head_dim]`; float32.
    layers: Vec<(Tensor, Tensor)>,
    /// Of the scales: rows that were scaled otherwise are other rows.
    hash: String,
}

impl Scaled {
    /// `inner` for a model of these dimensions behind `scales`.
    ///
    /// # Errors
    /// [`Error::ScaleShape`].
    pub fn new(inner: Box<dyn KvCache>, scales: &Scales, dims: &ModelDims) -> Result<Self> {
        scales.check(dims)?;
        let layers = (0..dims.layers).map(|layer| {
            let (k, q) = scales.factors(layer, dims.heads)?;
            Ok((k.f_to_device(dims.device)?, q.f_to_device(dims.device)?))
        });
        let mut bytes = Vec::new();
        for t in scales.layers() {
            let values = Vec::<f32>::try_from(t.f_reshape([-1])?)?;
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        let hash = nics_base::hash::bytes(bytes)[..16].to_owned();
        Ok(Self { inner, layers: layers.collect::<Result<_>>()?, hash })
    }

    fn name(&self) -> String {
        format!("scaled {}: ", self.hash)
    }

    fn scaled(&self, at: &Site, q: &Tensor, k: &Tensor) -> Result<(Tensor, Tensor)> {
        let Some((by_k, by_q)) = self.layers.get(at.layer) else {
            return Err(Error::Input(format!("no key scales for layer {}", at.layer)));
        };
        for (what, t, by) in [("queries", q, by_q), ("keys", k, by_k)] {
            if t.dim() != 3 || t.size()[1..] != by.size() {
                return Err(Error::ScaleShape {
                    layer: at.layer,
                    found: format!("{:?} for {what}", by.size()),
                    expected: format!("those of {what} {:?}", t.size()),
                });
            }
        }
        let scaled_q = q.f_mul(by_q)?.f_to_kind(q.kind())?;
        // Scales reach 10,000, and half precision ends at 65,504.
        if q.kind() == Kind::Half && !finite(&scaled_q)? {
            return Err(Error::NonFiniteInput { layer: at.layer });
        }
        Ok((scaled_q, k.f_div(by_k)?.f_to_kind(k.kind())?))
    }
}

impl KvCache for Scaled {
    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> nics_core::Result<Attended> {
        let (q, k) = self.scaled(at, q, k)?;
        self.inner.attend(at, &q, &k, v)
    }

    fn open(&mut self, max_tokens: usize) -> nics_core::Result<SeqId> {
        self.inner.open(max_tokens)
    }

    fn close(&mut self, s: SeqId) {
        self.inner.close(s);
    }

    fn kept(&self, s: SeqId, layer: usize) -> usize {
        self.inner.kept(s, layer)
    }

    fn truncate(&mut self, s: SeqId, position: usize) -> nics_core::Result<()> {
        self.inner.truncate(s, position)
    }

    fn bytes(&self) -> Bytes {
        self.inner.bytes()
    }

    fn forecast(&self, dims: &ModelDims, tokens: usize) -> usize {
        self.inner.forecast(dims, tokens)
    }

    fn held(&self, s: SeqId) -> Option<Bytes> {
        self.inner.held(s)
    }

    fn branch(&mut self, s: SeqId, position: usize, max_tokens: usize) -> nics_core::Result<Option<SeqId>> {
        self.inner.branch(s, position, max_tokens)
    }

    fn resume(&mut self, s: SeqId, position: usize, max_tokens: usize) -> nics_core::Result<bool> {
        self.inner.resume(s, position, max_tokens)
    }

    fn fork(&mut self, s: SeqId) -> nics_core::Result<SeqId> {
        self.inner.fork(s)
    }

    fn snapshot(&self, s: SeqId) -> nics_core::Result<Snapshot> {
        let mut snapshot = self.inner.snapshot(s)?;
        snapshot.cache.insert_str(0, &self.name());
        Ok(snapshot)
    }

    fn restore(&mut self, snapshot: &Snapshot) -> nics_core::Result<SeqId> {
        let Some(cache) = snapshot.cache.strip_prefix(&self.name()) else {
            let found = &snapshot.cache;
            return Err(nics_core::Error::Input(format!(
                "a snapshot of a `{found}` cache cannot go into a cache behind other key scales"
            )));
        };
        let tensors = snapshot.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
        let inner = Snapshot { cache: cache.to_owned(), max_tokens: snapshot.max_tokens, tensors };
        self.inner.restore(&inner)
    }
}
