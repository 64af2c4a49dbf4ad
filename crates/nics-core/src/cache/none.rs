//! No cache: attention over the rows of one call, differentiable, for training, calibration and scoring.

use tch::Tensor;

use super::{attend_even, attend_one, check_qkv, probabilities};
use crate::seam::{Attended, Bytes, KvCache, Mask, SeqId, Site, Snapshot};
use crate::{Error, Result};

/// Keeps nothing. Each call attends over its own rows alone; gradients flow to q, k and v.
///
/// Any [`SeqId`] may stand in a call; [`open`](KvCache::open) only counts.
#[derive(Debug, Default)]
pub struct NoCache {
    next: u64,
}

impl NoCache {
    /// A cache that keeps nothing.
    pub fn new() -> Self {
        Self::default()
    }
}

impl KvCache for NoCache {
    fn open(&mut self, _max_tokens: usize) -> Result<SeqId> {
        self.next += 1;
        Ok(SeqId(self.next - 1))
    }

    fn close(&mut self, _s: SeqId) {}

    fn attend(&mut self, at: &Site, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        let (_, heads, kv_heads, d) = check_qkv(at, q, k, v)?;
        let (q, k) = (at.rope.apply(q)?, at.rope.apply(k)?);
        let one = |from: usize, len: usize| -> Result<[Tensor; 3]> {
            let (from, len) = (from as i64, len as i64);
            Ok([
                q.f_narrow(0, from, len)?,
                k.f_narrow(0, from, len)?.f_transpose(0, 1)?,
                v.f_narrow(0, from, len)?.f_transpose(0, 1)?,
            ])
        };
        let out = if let Some(rows) = at.rows.even() {
            let (seqs, rows) = (at.rows.seqs().len() as i64, rows as i64);
            // [seqs * rows, heads, d] -> [seqs, heads, rows, d]
            let split = |x: &Tensor, heads: i64| -> Result<Tensor> {
                Ok(x.f_view([seqs, rows, heads, d])?.f_transpose(1, 2)?)
            };
            let v = split(&v.f_contiguous()?, kv_heads)?;
            let (q, k) = (split(&q, heads)?, split(&k, kv_heads)?);
            let out = attend_even(&q, &k, &v, at.rows.positions(), at.mask, at.scale)?;
            out.f_transpose(1, 2)?.f_reshape([seqs * rows, heads, d])?
        } else {
            if matches!(at.mask, Mask::Additive(_)) {
                return Err(Error::input("an additive mask asks for sequences of one length"));
            }
            let mut outs = Vec::new();
            for (_, from, positions) in at.rows.iter().filter(|(.., p)| !p.is_empty()) {
                let [q, k, v] = one(from, positions.len())?;
                outs.push(attend_one(&q, &k, &v, positions, positions, at.mask, at.scale)?);
            }
            Tensor::f_cat(&outs, 0)?
        };
        let scores = match at.want_scores {
            None => None,
            Some(last) => {
                let mut all = Vec::new();
                for (i, (_, from, positions)) in at.rows.iter().filter(|(.., p)| !p.is_empty()).enumerate() {
                    let [q, k, _] = one(from, positions.len())?;
                    let own; // this sequence's part of an additive mask
                    let mask = match at.mask {
                        Mask::Additive(m) if m.size()[0] > 1 => {
                            own = m.f_narrow(0, i as i64, 1)?;
                            Mask::Additive(&own)
                        }
                        mask => mask,
                    };
                    all.push(probabilities(&q, &k, positions, positions, mask, at.scale, last)?);
                }
                Some(all)
            }
        };
        Ok(Attended { out, scores, exhausted: Vec::new() })
    }

    fn kept(&self, _s: SeqId, _layer: usize) -> usize {
        0
    }

    fn truncate(&mut self, _s: SeqId, _position: usize) -> Result<()> {
        Ok(())
    }

    fn bytes(&self) -> Bytes {
        Bytes::default()
    }

    fn fork(&mut self, _s: SeqId) -> Result<SeqId> {
        self.open(0)
    }

    fn snapshot(&self, _s: SeqId) -> Result<Snapshot> {
        Ok(Snapshot { cache: "none".into(), max_tokens: 0, tensors: Vec::new() })
    }

    fn restore(&mut self, _snapshot: &Snapshot) -> Result<SeqId> {
        self.open(0)
    }
}
