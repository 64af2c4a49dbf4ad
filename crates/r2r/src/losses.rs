//! What a router is trained to make small. All in float32, all means over the rows.

use tch::{Kind, Reduction, Tensor};

use crate::{Error, Result};

/// A loss with its constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// Binary cross entropy in which a divergent row counts `positive_weight` times.
    Bce {
        /// Weight of divergent rows; see [`positive_weight`].
        positive_weight: f64,
    },
    /// `mean(a_t (1 - e^-l)^gamma l)` with l the row's cross entropy and `a_t` = alpha for divergent rows, 1 - alpha for
    /// others (Lin et al., 2017). With alpha 1, the reference's default, rows that are not divergent do not count at all.
    Focal {
        /// Weight of divergent rows.
        alpha: f64,
        /// How fast easy rows fade.
        gamma: f64,
    },
    /// A choice between two actions, each against how often it is right:
    /// `mean(-log sigmoid(beta (log w) / P - beta (log(1 - w)) / (1 - P)))`, w the probability of the row's class and P
    /// that class's frequency.
    Dpo {
        /// How sharp the preference is.
        beta: f64,
        /// Share of divergent rows.
        positive_share: f64,
    },
}

/// The weight of divergent rows: as many times as the others are more, times `recall_factor`.
///
/// # Errors
/// [`Error::NoPositiveLabels`] when one of the classes is not there.
pub fn positive_weight(divergent: usize, total: usize, recall_factor: f64) -> Result<f64> {
    if divergent == 0 || divergent >= total {
        return Err(Error::NoPositiveLabels { positive: divergent, total });
    }
    Ok((total - divergent) as f64 / divergent as f64 * recall_factor)
}

impl Loss {
    /// # Shapes
    /// `logits` `[rows, 1]`, `divergent` float32 `[rows, 1]` of 0 and 1; a scalar in the graph of `logits`.
    pub fn of(&self, logits: &Tensor, divergent: &Tensor) -> Result<Tensor> {
        if logits.size() != divergent.size() || logits.numel() == 0 {
            let (x, y) = (logits.size(), divergent.size());
            return Err(Error::Input(format!(
                "a loss needs logits and labels of one shape [rows, 1], found {x:?} and {y:?}"
            )));
        }
        match *self {
            Self::Bce { positive_weight } => {
                let weight = Tensor::f_from_slice(&[positive_weight as f32])?.f_to_device(logits.device())?;
                Ok(bce(logits, divergent, Some(&weight), Reduction::Mean)?)
            }
            Self::Focal { alpha, gamma } => {
                let row = bce(logits, divergent, None, Reduction::None)?;
                let weight = divergent.f_mul_scalar(2.0 * alpha - 1.0)?.f_add_scalar(1.0 - alpha)?;
                let hard = row.f_neg()?.f_exp()?.f_neg()?.f_add_scalar(1.0)?.f_pow_tensor_scalar(gamma)?;
                Ok(weight.f_mul(&hard)?.f_mul(&row)?.f_mean(Kind::Float)?)
            }
            Self::Dpo { beta, positive_share } => {
                // log of the right class's probability and of the wrong one's.
                let sign = divergent.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?;
                let right = logits.f_mul(&sign)?;
                let log = |x: &Tensor| -> Result<Tensor> { Ok(x.f_sigmoid()?.f_add_scalar(1e-10)?.f_log()?) };
                let share =
                    divergent.f_mul_scalar(2.0 * positive_share - 1.0)?.f_add_scalar(1.0 - positive_share)?;
                let rest = share.f_neg()?.f_add_scalar(1.0)?;
                let margin = log(&right)?.f_div(&share)?.f_sub(&log(&right.f_neg()?)?.f_div(&rest)?)?;
                let margin = margin.f_mul_scalar(beta)?;
                Ok(margin.f_log_sigmoid()?.f_neg()?.f_mean(Kind::Float)?)
            }
        }
    }
}

fn bce(
    logits: &Tensor,
    divergent: &Tensor,
    positive_weight: Option<&Tensor>,
    reduction: Reduction,
) -> Result<Tensor, tch::TchError> {
    logits.f_binary_cross_entropy_with_logits(divergent, None, positive_weight, reduction)
}

/// Weights of the classes match, neutral, divergent: each as many times as matches are more, the last one times
/// `recall_factor`.
///
/// # Errors
/// [`Error::NoPositiveLabels`] when a class is not there.
pub fn class_weights(counts: [usize; 3], recall_factor: f64) -> Result<[f64; 3]> {
    let [matches, neutral, divergent] = counts;
    if counts.contains(&0) {
        return Err(Error::NoPositiveLabels { positive: divergent, total: counts.iter().sum() });
    }
    let matches = matches as f64;
    Ok([1.0, matches / neutral as f64, matches / divergent as f64 * recall_factor])
}

/// Cross entropy over the three classes, weighted by `weights`.
///
/// # Shapes
/// `logits` `[rows, 3]`, `class` int64 `[rows]` of 0, 1, 2.
pub fn class_cross_entropy(logits: &Tensor, class: &Tensor, weights: [f64; 3]) -> Result<Tensor> {
    let (rows, classes) = logits.size2()?;
    let fits = classes == 3 && rows > 0 && class.size() == [rows] && class.kind() == Kind::Int64;
    if !fits || class.f_min()?.f_int64_value(&[])? < 0 || class.f_max()?.f_int64_value(&[])? > 2 {
        return Err(Error::Input(
            "three-class labels are int64 [rows] of 0, 1, 2 beside logits [rows, 3]".into(),
        ));
    }
    let weights = Tensor::f_from_slice(&weights.map(|w| w as f32))?.f_to_device(logits.device())?;
    Ok(logits.f_cross_entropy_loss(class, Some(&weights), Reduction::Mean, -100, 0.0)?)
}
