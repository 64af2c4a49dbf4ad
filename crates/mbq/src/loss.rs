//! The balanced reconstruction loss.
//!
//! With `D = Y − Ŷ` in float32, `C` channels, answer positions `A` and, for each other modality `m`, positions `P_m` whose
//! weight is `r_m`:
//!
//! * MAE: `(Σ_A |D| + Σ_m r_m Σ_{P_m} |D|) / ((|A| + Σ_m |P_m|)·C)`
//! * MSE: `Σ_A D² / (|A|·C) + Σ_m r_m Σ_{P_m} D² / (|P_m|·C)`
//!
//! MSE is normalised for each modality, MAE is not, so that many vision tokens weigh more there. Positions of no modality
//! count for nothing. Without masks the loss is the mean over everything, padding included. Losses are kept as sums, so
//! that samples may come in pieces.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// The norm of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// Absolute error.
    #[default]
    Mae,
    /// Squared error.
    Mse,
}

/// The positions of one modality and what their error weighs.
#[derive(Debug)]
pub struct Part {
    /// Bool, `[samples, positions]`.
    pub mask: Tensor,
    /// Weight; 1 for answers.
    pub weight: f64,
}

/// Which positions count, and how much. Without parts all of them do, alike.
#[derive(Debug, Default)]
pub struct Balance {
    parts: Vec<Part>,
}

impl Balance {
    /// Every position, padding included.
    pub fn everything() -> Self {
        Self::default()
    }

    /// The positions of some parts.
    ///
    /// # Errors
    /// Masks of several shapes, weights that are no positive numbers, not one position in all.
    pub fn of(parts: Vec<Part>) -> Result<Self> {
        let mut positions = 0;
        for part in &parts {
            if part.mask.size() != parts[0].mask.size() || part.mask.kind() != Kind::Bool {
                return Err(Error::Input(format!(
                    "masks of shape {:?} {:?} and {:?}, expected bool masks of one shape",
                    part.mask.size(),
                    part.mask.kind(),
                    parts[0].mask.size()
                )));
            }
            if !(part.weight.is_finite() && part.weight >= 0.0) {
                return Err(Error::Input(format!(
                    "a modality weighs {}, expected a number from 0 on",
                    part.weight
                )));
            }
            positions += part.mask.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        }
        if positions == 0 {
            return Err(Error::Input(
                "no position is in any mask, so that there is nothing to compare".into(),
            ));
        }
        Ok(Self { parts })
    }

    /// What an error on each row of samples `from` to `to` weighs, float32 `[rows]`; 0 where none is compared. `None` when all
    /// rows count alike.
    pub fn weights(&self, from: i64, to: i64) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for part in &self.parts {
            let mask = part.mask.f_narrow(0, from, to - from)?.f_reshape([-1])?.f_to_kind(Kind::Float)?;
            let own = mask.f_mul_scalar(part.weight)?;
            sum = Some(match sum {
                None => own,
                Some(sum) => sum.f_add(&own)?,
            });
        }
        Ok(sum)
    }

    /// The rows of samples `from` to `to` that each part compares: `None` for all of them. Indices are int64.
    fn rows(&self, from: i64, to: i64) -> Result<Option<Vec<Tensor>>> {
        if self.parts.is_empty() {
            return Ok(None);
        }
        let of = |p: &Part| -> Result<Tensor> {
            Ok(p.mask.f_narrow(0, from, to - from)?.f_reshape([-1])?.f_nonzero()?.f_squeeze_dim(1)?)
        };
        Ok(Some(self.parts.iter().map(of).collect::<Result<_>>()?))
    }
}

/// Losses of several candidates, summed piece by piece.
#[derive(Debug)]
pub struct Losses<'a> {
    kind: LossKind,
    balance: &'a Balance,
    /// By candidate and part.
    sums: Vec<Vec<f64>>,
    /// Values compared, by part.
    counts: Vec<f64>,
}

/// One piece of the samples: the target, and which of its rows count.
#[derive(Debug)]
pub struct Piece {
    rows: Option<Vec<Tensor>>,
    targets: Vec<Tensor>,
}

impl<'a> Losses<'a> {
    /// Nothing yet, for so many candidates.
    pub fn new(kind: LossKind, balance: &'a Balance, candidates: usize) -> Self {
        let parts = balance.parts.len().max(1);
        Self { kind, balance, sums: vec![vec![0.0; parts]; candidates], counts: vec![0.0; parts] }
    }

    /// Begins the samples `from` to `to` with their target, `[(to − from)·positions, channels]`.
    pub fn piece(&mut self, from: i64, to: i64, target: &Tensor) -> Result<Piece> {
        let rows = self.balance.rows(from, to)?;
        let targets = pick(target, rows.as_deref())?;
        for (count, t) in self.counts.iter_mut().zip(&targets) {
            *count += t.numel() as f64;
        }
        Ok(Piece { rows, targets })
    }

    /// Adds what a candidate gives in the place of a piece's target.
    pub fn add(&mut self, candidate: usize, piece: &Piece, output: &Tensor) -> Result<()> {
        let outputs = pick(output, piece.rows.as_deref())?;
        for ((sum, target), output) in self.sums[candidate].iter_mut().zip(&piece.targets).zip(&outputs) {
            let error = target.f_sub(output)?;
            let error = match self.kind {
                LossKind::Mae => error.f_abs()?,
                LossKind::Mse => error.f_square()?,
            };
            *sum += error.f_sum(Kind::Double)?.f_double_value(&[])?;
        }
        Ok(())
    }

    /// The loss of each candidate over all pieces.
    pub fn finish(&self) -> Vec<f64> {
        let all: f64 = self.counts.iter().sum();
        let weight = |part: usize| self.balance.parts.get(part).map_or(1.0, |p| p.weight);
        let of = |sums: &Vec<f64>| -> f64 {
            sums.iter()
                .zip(&self.counts)
                .enumerate()
                .filter(|(_, (_, count))| **count > 0.0)
                .map(|(part, (sum, count))| match self.kind {
                    LossKind::Mae => weight(part) * sum / all,
                    LossKind::Mse => weight(part) * sum / count,
                })
                .sum()
        };
        self.sums.iter().map(of).collect()
    }
}

fn pick(x: &Tensor, rows: Option<&[Tensor]>) -> Result<Vec<Tensor>> {
    let x = x.f_to_kind(Kind::Float)?;
    match rows {
        None => Ok(vec![x]),
        Some(rows) => Ok(rows.iter().map(|r| x.f_index_select(0, r)).collect::<Result<_, _>>()?),
    }
}

/// The first smallest loss and by how much, relative to it, the next smallest is above. A NaN never wins.
pub fn best(losses: &[f64]) -> Option<(usize, f64)> {
    let mut best: Option<usize> = None;
    for (k, loss) in losses.iter().enumerate() {
        if !loss.is_nan() && best.is_none_or(|b| *loss < losses[b]) {
            best = Some(k);
        }
    }
    let best = best?;
    let next = losses.iter().enumerate().filter(|(k, l)| *k != best && !l.is_nan()).map(|(_, l)| *l);
    let next = next.fold(f64::INFINITY, f64::min);
    Some((best, (next - losses[best]) / losses[best].max(f64::MIN_POSITIVE)))
}

#[cfg(test)]
mod tests {
    use super::best;

    #[test]
    fn the_first_smallest_wins_and_nan_never() {
        assert_eq!(best(&[f64::NAN, 2.0, 1.0, 1.0, 3.0]).map(|b| b.0), Some(2));
        assert_eq!(best(&[f64::NAN]), None);
        assert_eq!(best(&[]), None);
    }
}
