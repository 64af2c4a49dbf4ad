//! Keys and values of one sequence in one layer as they are, in storage that grows in steps: what caches that keep rows of
//! tensors share.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::seam::{Bytes, Snapshot};
use crate::{Error, Result};

/// Rows by which the storage grows at least.
const GROWTH: usize = 64;
/// Layers are numbered below this. No model comes near it; a number from a damaged snapshot must not fill the memory.
pub(super) const MAX_LAYERS: usize = 1 << 16;

/// The rows that a layer keeps of a sequence.
#[derive(Debug, Default)]
pub struct KeptRows {
    /// Keys and values, `[kv_heads, capacity, head_dim]` each; rows past `positions.len()` are unused.
    storage: Option<(Tensor, Tensor)>,
    /// Position of each kept row, ascending.
    positions: Vec<i64>,
}

/// Storage of a layer, in huge pages where it is large and on the CPU: it is read in every step.
fn room(shape: [i64; 3], like: &Tensor) -> Result<Tensor> {
    const LARGE: usize = 256 << 10;
    let own = like.f_new_empty(shape, (like.kind(), like.device()))?;
    let bytes = own.numel() * own.kind().elt_size_in_bytes();
    if own.device() == Device::Cpu && bytes >= LARGE {
        nics_kernels::memory::prefer_huge_pages(own.data_ptr().cast_const().cast(), bytes);
    }
    Ok(own)
}

fn copied(t: &Tensor) -> Result<Tensor> {
    let mut own = t.f_new_empty(t.size(), (t.kind(), t.device()))?;
    own.f_copy_(t)?;
    Ok(own)
}

impl KeptRows {
    /// Position of each row, ascending.
    pub fn positions(&self) -> &[i64] {
        &self.positions
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Rows that there is memory for.
    pub fn capacity(&self) -> usize {
        self.storage.as_ref().map_or(0, |(k, _)| k.size()[1] as usize)
    }

    /// Keys and values, `[kv_heads, rows, head_dim]` each, as views: what is written into them is kept. `None` when there
    /// is none.
    pub fn tensors(&self) -> Option<(Tensor, Tensor)> {
        self.tensors_with(0)
    }

    /// As [`tensors`](Self::tensors) with `more` rows that were [written](Self::write) and not yet counted.
    pub fn tensors_with(&self, more: usize) -> Option<(Tensor, Tensor)> {
        let (k, v) = self.storage.as_ref()?;
        let rows = (self.positions.len() + more) as i64;
        Some((k.f_narrow(1, 0, rows).ok()?, v.f_narrow(1, 0, rows).ok()?))
    }

    /// Keys and values with all room behind them, `[kv_heads, capacity, head_dim]` each.
    pub(super) fn storage(&self) -> Option<&(Tensor, Tensor)> {
        self.storage.as_ref()
    }

    /// Writes `k` and `v` (`[rows, kv_heads, head_dim]`) behind the kept rows without counting them yet.
    ///
    /// # Errors
    /// More than `max_tokens` rows, or rows of another shape or dtype than the kept ones.
    pub fn write(&mut self, k: &Tensor, v: &Tensor, max_tokens: usize) -> Result<()> {
        self.make_room(k.size()[0] as usize, k, v, max_tokens)?;
        let (kept, more) = (self.positions.len() as i64, k.size()[0]);
        if let Some((keys, values)) = &self.storage {
            keys.f_narrow(1, kept, more)?.f_copy_(&k.f_transpose(0, 1)?)?;
            values.f_narrow(1, kept, more)?.f_copy_(&v.f_transpose(0, 1)?)?;
        }
        Ok(())
    }

    /// Counts rows that were written, at these positions.
    pub fn count(&mut self, positions: &[i64]) {
        self.positions.extend_from_slice(positions);
    }

    /// Forgets the rows past the first `rows`.
    pub fn keep_first(&mut self, rows: usize) {
        self.positions.truncate(rows);
    }

    /// Rows whose positions are before `position`.
    pub fn before(&self, position: usize) -> usize {
        self.positions.partition_point(|&p| p < position as i64)
    }

    /// Whether the rows begin with those at positions 0 to `position`, none of them missing.
    pub fn begins_with(&self, position: usize) -> bool {
        // Positions ascend from 0, so the row of that number tells of all before it.
        position > 0 && self.positions.get(position - 1) == Some(&(position as i64 - 1))
    }

    /// A copy of the first `rows` rows, with room to grow within `max_tokens`.
    pub fn first(&self, rows: usize, max_tokens: usize) -> Result<Self> {
        let capacity = (rows + GROWTH).next_multiple_of(GROWTH).min(max_tokens) as i64;
        let copied = |t: &Tensor| -> Result<Tensor> {
            let (heads, _, d) = t.size3()?;
            let own = room([heads, capacity, d], t)?;
            own.f_narrow(1, 0, rows as i64)?.f_copy_(&t.f_narrow(1, 0, rows as i64)?)?;
            Ok(own)
        };
        let storage = match &self.storage {
            Some((k, v)) => Some((copied(k)?, copied(v)?)),
            None => None,
        };
        Ok(Self { storage, positions: self.positions[..rows].to_vec() })
    }

    /// Makes room for `more` rows like those of `k` and `v` (`[.., kv_heads, head_dim]`) behind the kept ones.
    pub(super) fn make_room(&mut self, more: usize, k: &Tensor, v: &Tensor, max_tokens: usize) -> Result<()> {
        let (_, heads, d) = k.size3()?;
        if let Some((keys, _)) = &self.storage {
            let (kept_heads, _, kept_d) = keys.size3()?;
            if (kept_heads, kept_d, keys.kind()) != (heads, d, k.kind()) {
                return Err(Error::Input(format!(
                    "the cache keeps {kept_heads} heads of {kept_d} channels ({:?}), new rows have {heads} of {d} ({:?})",
                    keys.kind(),
                    k.kind()
                )));
            }
        }
        let kept = self.positions.len();
        let need = kept + more;
        if need > max_tokens {
            return Err(Error::ContextOverflow { need, max: max_tokens, what: "the sequence's cache" });
        }
        let capacity = self.capacity();
        if need > capacity {
            // A quarter more each time keeps the copying linear in the length.
            let capacity =
                need.max(capacity + (capacity / 4).max(GROWTH)).next_multiple_of(GROWTH).min(max_tokens);
            let grow = |new: &Tensor, old: Option<&Tensor>| -> Result<Tensor> {
                let (_, heads, d) = new.size3()?;
                let grown = room([heads, capacity as i64, d], new)?;
                if let Some(old) = old {
                    let kept = kept as i64;
                    grown.f_narrow(1, 0, kept)?.f_copy_(&old.f_narrow(1, 0, kept)?)?;
                }
                Ok(grown)
            };
            let old = self.storage.as_ref();
            let grown = (grow(k, old.map(|o| &o.0))?, grow(v, old.map(|o| &o.1))?);
            self.storage = Some(grown);
        }
        Ok(())
    }

    /// Memory of the rows in the dtype that they have.
    pub fn bytes(&self) -> Bytes {
        let mut bytes = Bytes::default();
        for t in self.storage.iter().flat_map(|(k, v)| [k, v]) {
            let (heads, capacity, d) = (t.size()[0], t.size()[1], t.size()[2]);
            let row = (heads * d) as usize * t.kind().elt_size_in_bytes();
            bytes.payload += row * self.positions.len();
            bytes.allocated += row * capacity as usize;
        }
        bytes
    }

    /// Adds copies of the rows of layer `layer` to the tensors of a snapshot; [`restored`](Self::restored) reads them.
    pub fn save(&self, layer: usize, into: &mut Vec<(String, Tensor)>) -> Result<()> {
        if let Some((k, v)) = self.tensors() {
            into.push((format!("{layer}.k"), copied(&k)?));
            into.push((format!("{layer}.v"), copied(&v)?));
            into.push((format!("{layer}.positions"), Tensor::f_from_slice(&self.positions)?));
        }
        Ok(())
    }

    /// The rows of every layer of a snapshot.
    ///
    /// # Errors
    /// A layer that is incomplete or damaged.
    pub fn restored(snapshot: &Snapshot) -> Result<Vec<Self>> {
        let by_name: HashMap<&str, &Tensor> = snapshot.tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let mut layers = Vec::new();
        for (name, positions) in &by_name {
            let Some(l) = name.strip_suffix(".positions") else { continue };
            let damaged = || Error::Input(format!("the snapshot of layer {l} is incomplete or damaged"));
            let index = l.parse().ok().filter(|&index: &usize| index < MAX_LAYERS).ok_or_else(damaged)?;
            let k = by_name.get(format!("{l}.k").as_str()).ok_or_else(damaged)?;
            let v = by_name.get(format!("{l}.v").as_str()).ok_or_else(damaged)?;
            if positions.kind() != Kind::Int64 || k.size() != v.size() || k.dim() != 3 {
                return Err(damaged());
            }
            let positions = Vec::<i64>::try_from(*positions).map_err(|_| damaged())?;
            let ascending = positions.windows(2).all(|p| p[0] < p[1]);
            if k.size()[1] != positions.len() as i64 || positions.len() > snapshot.max_tokens || !ascending {
                return Err(damaged());
            }
            if layers.len() <= index {
                layers.resize_with(index + 1, Self::default);
            }
            layers[index] = Self { storage: Some((copied(k)?, copied(v)?)), positions };
        }
        Ok(layers)
    }
}
