//! MiKV (arXiv 2402.18096): outliers of the keys are shared with the queries, and the tokens that get most attention stay
//! exact.

use nics_core::models::ModelDims;
use nics_core::seam::Mask;
use tch::{Kind, Tensor};

use super::cache::{Arrived, Method};
use super::format::Coders;
use super::rows::Rows;
use crate::Result;

/// The state that a sequence keeps: the factor of each key channel, `[kv_heads, 1, head_dim]`.
const BALANCE: &str = "balance";

/// Rows are stored after they have attended, all but the heavy hitters.
///
/// Keys are stored as `k·λ` with `λ = sqrt(max|q| / max|k|)` of the sequence's first call, per key/value head and channel.
/// A later row takes the place of the weakest hitter when it has received more attention.
#[derive(Debug)]
pub struct Mikv {
    coders: Coders,
    hitters: usize,
    causal: bool,
}

impl Mikv {
    /// Rows of these formats, `hitters` of each sequence exact.
    pub fn new(coders: impl Into<Coders>, hitters: usize) -> Self {
        Self { coders: coders.into(), hitters, causal: true }
    }

    /// With a prompt whose rows see each other both ways, as the reference implementation has it by mistake when there are
    /// hitters: for parity alone.
    #[must_use]
    pub fn bidirectional(mut self) -> Self {
        self.causal = false;
        self
    }

    fn store(&self, rows: &mut Rows, which: &[usize]) -> Result<()> {
        if which.is_empty() {
            return Ok(());
        }
        let (k, v) = rows.pick(which)?;
        let k = match rows.state(BALANCE) {
            Some(balance) => self.coders.k.round_trip(&k.f_mul(balance)?)?.f_div(balance)?,
            None => self.coders.k.round_trip(&k)?,
        };
        rows.store(which, &k, &self.coders.v.round_trip(&v)?)
    }
}

/// `sqrt(max|q| / max|k|)` of rotated queries `[rows, heads, d]` and keys `[kv_heads, rows, d]`, `[kv_heads, 1, d]`.
fn balance(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let (kv_heads, _, d) = k.size3()?;
    let rows = q.size()[0];
    let q = q.f_reshape([rows, kv_heads, -1, d])?.f_abs()?.f_amax([0, 2].as_slice(), false)?;
    let k = k.f_abs()?.f_amax([1].as_slice(), false)?;
    // A channel of zeros needs no balance, and must not be divided by.
    let (q, k) = (q.f_clamp_min(1e-5)?, k.f_clamp_min(1e-5)?);
    Ok(q.f_div(&k)?.f_sqrt()?.f_unsqueeze(1)?)
}

impl Method for Mikv {
    fn name(&self) -> String {
        let prompt = if self.causal { "" } else { ",bidirectional" };
        format!("mikv:{},hitters={}{prompt}", self.coders.name(), self.hitters)
    }

    fn check(&self, dims: &ModelDims) -> Result<()> {
        self.coders.check(dims)
    }

    fn bytes(&self, dims: &ModelDims, stored: usize, exact: usize) -> usize {
        // With hitters, each row carries the attention that it has received.
        let received = if self.hitters > 0 { size_of::<f32>() } else { 0 };
        self.coders.bytes(dims, stored, exact) + (stored + exact) * received
    }

    fn state_bytes(&self, dims: &ModelDims) -> usize {
        (dims.kv_heads * dims.head_dim) as usize * dims.kind.elt_size_in_bytes()
    }

    fn mask<'a>(&self, given: Mask<'a>, new: &Arrived) -> Mask<'a> {
        if self.causal || new.first > 0 { given } else { Mask::Full }
    }

    fn wants_received(&self) -> bool {
        self.hitters > 0
    }

    fn after(&self, new: &Arrived, rows: &mut Rows, received: Option<&Tensor>) -> Result<()> {
        if new.first == 0 {
            let balance = balance(new.q, &rows.tensors()?.0)?;
            rows.set_state(BALANCE, balance);
        }
        if let Some(received) = received {
            let received = Vec::<f32>::try_from(received.f_to_kind(Kind::Float)?)?;
            for (score, more) in rows.scores_mut().iter_mut().zip(received) {
                *score += more;
            }
        }
        // One row after the other: exact while there is room, else the weaker of it and the weakest hitter is stored.
        let mut hitters: Vec<usize> = (0..new.first).filter(|&r| !rows.is_stored(r)).collect();
        let mut leaving = Vec::new();
        let scores = rows.scores_mut();
        for row in new.rows() {
            hitters.push(row);
            if hitters.len() > self.hitters {
                let weakest = (0..hitters.len())
                    .min_by(|&a, &b| {
                        let (a, b) = (hitters[a], hitters[b]);
                        // Of equal ones the younger leaves.
                        scores[a].total_cmp(&scores[b]).then(b.cmp(&a))
                    })
                    .unwrap_or_default();
                leaving.push(hitters.swap_remove(weakest));
            }
        }
        leaving.sort_unstable();
        self.store(rows, &leaving)
    }

    fn exact(&self, tokens: usize) -> usize {
        tokens.min(self.hitters)
    }
}
