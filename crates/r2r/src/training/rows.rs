//! Labelled rows in memory.

use tch::{Kind, Tensor};

use crate::router::Features;
use crate::{Error, Result};

/// Features of the small model with their labels, a row for each position that counts.
#[derive(Debug)]
pub struct Rows {
    /// `[rows, hidden]`, any floating dtype.
    pub hidden: Option<Tensor>,
    /// int64 `[rows]`.
    pub token: Option<Tensor>,
    /// The largest logits, descending, `[rows, K]`.
    pub logits: Option<Tensor>,
    /// int64 `[rows]`, for routers with a table of positions.
    pub positions: Option<Tensor>,
    /// 1 for a divergent row, else 0; float32 `[rows]`.
    pub divergent: Tensor,
}

impl Rows {
    /// Rows with their labels, int64 or float `[rows]` of 0 and 1.
    ///
    /// # Errors
    /// Features with another number of rows, or labels beyond 0 and 1.
    pub fn new(
        hidden: Option<Tensor>,
        token: Option<Tensor>,
        logits: Option<Tensor>,
        positions: Option<Tensor>,
        divergent: &Tensor,
    ) -> Result<Self> {
        let rows = divergent.size1().map_err(|_| {
            Error::Input(format!("labels have shape {:?}, expected [rows]", divergent.size()))
        })?;
        for (name, feature) in
            [("hidden states", &hidden), ("tokens", &token), ("logits", &logits), ("positions", &positions)]
        {
            if let Some(found) = feature.as_ref().map(Tensor::size).filter(|s| s.first() != Some(&rows)) {
                return Err(Error::Input(format!("{name} have shape {found:?}, the labels {rows} rows")));
            }
        }
        let divergent = divergent.f_to_kind(Kind::Float)?;
        let sound = divergent.f_eq(0.0)?.f_logical_or(&divergent.f_eq(1.0)?)?;
        if rows > 0 && sound.f_all()?.f_int64_value(&[])? == 0 {
            return Err(Error::Input(
                "labels are 0 or 1; leave rows that the judge could not tell out".into(),
            ));
        }
        Ok(Self { hidden, token, logits, positions, divergent })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.divergent.numel()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Divergent rows, where there are some and others too.
    pub(super) fn check_classes(&self) -> Result<usize> {
        let positive = self.divergent.f_sum(Kind::Double)?.f_double_value(&[])? as usize;
        let total = self.len();
        if positive == 0 || positive == total {
            Err(Error::NoPositiveLabels { positive, total })
        } else {
            Ok(positive)
        }
    }

    /// Some of the rows, in this order.
    pub fn select(&self, rows: &[i64]) -> Result<Self> {
        let index = Tensor::f_from_slice(rows)?.f_to_device(self.divergent.device())?;
        let pick = |t: &Option<Tensor>| -> Result<Option<Tensor>> {
            Ok(t.as_ref().map(|t| t.f_index_select(0, &index)).transpose()?)
        };
        Ok(Self {
            hidden: pick(&self.hidden)?,
            token: pick(&self.token)?,
            logits: pick(&self.logits)?,
            positions: pick(&self.positions)?,
            divergent: self.divergent.f_index_select(0, &index)?,
        })
    }

    /// What a router reads.
    pub fn features(&self) -> Features<'_> {
        Features {
            hidden: self.hidden.as_ref(),
            token: self.token.as_ref(),
            logits: self.logits.as_ref(),
            positions: self.positions.as_ref(),
        }
    }
}
