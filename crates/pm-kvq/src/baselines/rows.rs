//! Rows of one sequence in one layer, with what a baseline knows of each.

use std::collections::BTreeMap;

use nics_core::cache::KeptRows;
use nics_core::seam::Snapshot;
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Keys (rotated) and values as they read back, which of them are stored in the method's format, and the method's own
/// state. A call's changes are taken back when it fails.
#[derive(Debug, Default)]
pub struct Rows {
    kept: KeptRows,
    /// Whether each row is stored in the format; the others are exact.
    stored: Vec<bool>,
    /// A number for each row that the method may keep: attention received.
    scores: Vec<f32>,
    /// Tensors that the method keeps for the sequence.
    state: BTreeMap<String, Tensor>,
    undo: Option<Undo>,
}

/// What the rows were before a call.
#[derive(Debug)]
struct Undo {
    stored: Vec<bool>,
    scores: Vec<f32>,
    state: BTreeMap<String, Tensor>,
    /// Rows that were overwritten, newest last: their numbers, keys and values.
    written: Vec<(Tensor, Tensor, Tensor)>,
}

impl Rows {
    /// The number of rows.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Position of each row, ascending.
    pub fn positions(&self) -> &[i64] {
        self.kept.positions()
    }

    /// Rows that are stored in the format.
    pub fn stored(&self) -> usize {
        self.stored.iter().filter(|s| **s).count()
    }

    /// Whether a row is stored in the format.
    pub fn is_stored(&self, row: usize) -> bool {
        self.stored.get(row).copied().unwrap_or(false)
    }

    /// Keys and values, `[kv_heads, rows, head_dim]` each.
    ///
    /// # Errors
    /// There is no row.
    pub fn tensors(&self) -> Result<(Tensor, Tensor)> {
        self.kept.tensors().ok_or_else(|| Error::Input("a layer without rows was read".into()))
    }

    /// Keys and values of some rows, `[kv_heads, picked, head_dim]` each.
    pub fn pick(&self, rows: &[usize]) -> Result<(Tensor, Tensor)> {
        let (k, v) = self.tensors()?;
        let index = index(rows)?.f_to_device(k.device())?;
        Ok((k.f_index_select(1, &index)?, v.f_index_select(1, &index)?))
    }

    /// Puts what the format makes of some rows in their place.
    pub fn store(&mut self, rows: &[usize], k: &Tensor, v: &Tensor) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let (mut keys, mut values) = self.tensors()?;
        let index = index(rows)?.f_to_device(k.device())?;
        if let Some(undo) = &mut self.undo {
            let old = (keys.f_index_select(1, &index)?, values.f_index_select(1, &index)?);
            undo.written.push((index.shallow_clone(), old.0, old.1));
        }
        let _ = keys.f_index_copy_(1, &index, k)?;
        let _ = values.f_index_copy_(1, &index, v)?;
        for &row in rows {
            self.stored[row] = true;
        }
        Ok(())
    }

    /// A number for each row, 0 for new ones.
    pub fn scores_mut(&mut self) -> &mut [f32] {
        &mut self.scores
    }

    /// A tensor that the method keeps for the sequence.
    pub fn state(&self, name: &str) -> Option<&Tensor> {
        self.state.get(name)
    }

    /// Keeps a tensor for the sequence.
    pub fn set_state(&mut self, name: &str, t: Tensor) {
        self.state.insert(name.to_owned(), t);
    }

    /// Bytes of the tensors that the method keeps for the sequence.
    pub fn state_bytes(&self) -> usize {
        self.state.values().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum()
    }

    /// Bytes that this process holds for the rows.
    pub fn allocated(&self) -> usize {
        self.kept.bytes().allocated + self.state_bytes()
    }

    /// Appends new rows as they are, `[rows, kv_heads, head_dim]`; from here on changes can be taken back.
    pub(super) fn begin(&mut self, k: &Tensor, v: &Tensor, positions: &[i64], most: usize) -> Result<()> {
        self.kept.write(k, v, most)?;
        // A sequence that stands twice in a call is taken back as a whole.
        if self.undo.is_none() {
            self.undo = Some(Undo {
                stored: self.stored.clone(),
                scores: self.scores.clone(),
                state: shallow(&self.state),
                written: Vec::new(),
            });
        }
        self.kept.count(positions);
        self.stored.resize(self.kept.len(), false);
        self.scores.resize(self.kept.len(), 0.0);
        Ok(())
    }

    /// The call has succeeded.
    pub(super) fn commit(&mut self) {
        self.undo = None;
    }

    /// The call has failed: the rows are as before it.
    pub(super) fn roll_back(&mut self) -> Result<()> {
        let Some(undo) = self.undo.take() else { return Ok(()) };
        let (mut keys, mut values) = self.tensors()?;
        for (index, k, v) in undo.written.iter().rev() {
            let _ = keys.f_index_copy_(1, index, k)?;
            let _ = values.f_index_copy_(1, index, v)?;
        }
        self.kept.keep_first(undo.stored.len());
        (self.stored, self.scores, self.state) = (undo.stored, undo.scores, undo.state);
        Ok(())
    }

    /// Whether the rows begin with those at positions 0 to `position`, none of them missing.
    pub(super) fn begins_with(&self, position: usize) -> bool {
        self.kept.begins_with(position)
    }

    /// A copy of the first `rows` rows, with room to grow within `max_tokens`.
    pub(super) fn first(&self, rows: usize, max_tokens: usize) -> Result<Self> {
        Ok(Self {
            kept: self.kept.first(rows, max_tokens)?,
            stored: self.stored[..rows].to_vec(),
            scores: self.scores[..rows].to_vec(),
            state: shallow(&self.state),
            undo: None,
        })
    }

    /// Forgets the rows at `position` and after.
    pub(super) fn truncate(&mut self, position: usize) {
        let rows = self.kept.before(position);
        self.kept.keep_first(rows);
        self.stored.truncate(rows);
        self.scores.truncate(rows);
        if rows == 0 {
            self.state.clear();
        }
    }

    /// Adds copies of everything to a snapshot's tensors.
    pub(super) fn save(&self, layer: usize, into: &mut Vec<(String, Tensor)>) -> Result<()> {
        self.kept.save(layer, into)?;
        into.push((format!("{layer}.stored"), Tensor::f_from_slice(&self.stored)?));
        into.push((format!("{layer}.scores"), Tensor::f_from_slice(&self.scores)?));
        for (name, t) in &self.state {
            into.push((format!("{layer}.state.{name}"), t.f_detach_copy()?));
        }
        Ok(())
    }

    /// The layers of a snapshot.
    ///
    /// # Errors
    /// A layer that is incomplete or damaged.
    pub(super) fn restored(snapshot: &Snapshot) -> Result<Vec<Self>> {
        let mut layers: Vec<Self> = KeptRows::restored(snapshot)?
            .into_iter()
            .map(|kept| Self {
                stored: vec![false; kept.len()],
                scores: vec![0.0; kept.len()],
                kept,
                ..Self::default()
            })
            .collect();
        for (name, t) in &snapshot.tensors {
            let damaged = || Error::Input(format!("the snapshot's {name} is damaged"));
            let Some((layer, what)) = name.split_once('.') else { return Err(damaged()) };
            let index: usize = layer.parse().map_err(|_| damaged())?;
            let Some(rows) = layers.get_mut(index) else {
                // A layer without rows says nothing.
                continue;
            };
            let fits = |kind: Kind| (t.kind() == kind && t.size() == [rows.kept.len() as i64]).then_some(());
            match what {
                "stored" => {
                    fits(Kind::Bool).ok_or_else(damaged)?;
                    rows.stored = Vec::try_from(t)?;
                }
                "scores" => {
                    fits(Kind::Float).ok_or_else(damaged)?;
                    rows.scores = Vec::try_from(t)?;
                }
                _ => {
                    if let Some(state) = what.strip_prefix("state.") {
                        rows.state.insert(state.to_owned(), t.f_detach_copy()?);
                    }
                }
            }
        }
        Ok(layers)
    }
}

fn index(rows: &[usize]) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(&rows.iter().map(|r| *r as i64).collect::<Vec<_>>())?)
}

fn shallow(state: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    state.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect()
}
