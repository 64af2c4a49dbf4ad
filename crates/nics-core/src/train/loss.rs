//! What a batch costs.

use tch::{Kind, Reduction, Tensor};

use super::{Result, TrainError};

/// The label of a row that does not count, as in transformers.
pub const IGNORED: i64 = -100;

/// The cost of one micro batch: a sum and not a mean, so that micro batches of different sizes add up to the mean over
/// one big batch.
#[derive(Debug)]
pub struct Loss {
    /// The cost summed over its target tokens, a scalar in the autograd graph.
    pub sum: Tensor,
    /// How many target tokens it was summed over.
    pub tokens: i64,
}

/// Cross-entropy summed over the rows whose label is not [`IGNORED`], in float32 whatever the dtype of `logits`.
///
/// Labels belong to their rows as they are: a caller that predicts the next token shifts them beforehand.
///
/// # Shapes
/// `logits`: `[rows, vocab]`; `labels`: `[rows]`, int64.
pub fn masked_cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Loss> {
    let (shape, target) = (logits.size(), labels.size());
    let [rows, vocab] = shape[..] else {
        return Err(TrainError::Input(format!("logits have shape {shape:?}, expected [rows, vocab]")));
    };
    if target != [rows] || labels.f_kind()? != Kind::Int64 {
        let kind = labels.f_kind()?;
        return Err(TrainError::Input(format!(
            "labels are {kind:?} of shape {target:?}, but logits of shape {shape:?} ask for Int64 of shape [{rows}]"
        )));
    }
    if rows == 0 {
        return Ok(Loss { sum: logits.f_sum(Kind::Float)?, tokens: 0 });
    }
    let counted = labels.f_ne(IGNORED)?;
    // libtorch checks labels on the CPU; a CUDA device would stop for good at one out of range.
    let beyond = labels.f_lt(0)?.f_logical_or(&labels.f_ge(vocab)?)?.f_logical_and(&counted)?;
    if beyond.f_any()?.f_int64_value(&[])? != 0 {
        let label = labels.f_masked_select(&beyond)?.f_int64_value(&[0])?;
        return Err(TrainError::Input(format!(
            "label {label} is neither below the vocabulary of {vocab} nor {IGNORED}"
        )));
    }
    let sum = logits.f_to_kind(Kind::Float)?.f_cross_entropy_loss(
        labels,
        None::<Tensor>,
        Reduction::Sum,
        IGNORED,
        0.0,
    )?;
    Ok(Loss { sum, tokens: counted.f_sum(Kind::Int64)?.f_int64_value(&[])? })
}
