//! What is compared: methods at widths under conditions.

use super::{Condition, Study};
use crate::Result;
use crate::calibrate::{BalanceMode, CalibConfig};
use crate::gptq::GptqConfig;
use crate::loss::LossKind;
use crate::methods::{Awq, Gptq, Mbq, Method, Rtn, SmoothQuant};
use crate::quantize::QuantSpec;
use crate::search::SearchConfig;

/// The name of the model before quantization, and of its width.
pub const FLOAT: &str = "float";
/// Rounding.
pub(super) const RTN: &str = "RTN";
/// The search as the paper compares it: all tokens alike, squared error. Where weights alone are rounded it is AWQ's.
pub(super) const BLIND: &str = "all tokens alike, MSE (AWQ)";
/// The method, by absolute error as published.
pub(super) const MBQ: &str = "MBQ, MAE";

/// How a model is quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum How {
    /// Not at all.
    Float,
    /// [`Rtn`].
    Rtn,
    /// [`Gptq`].
    Gptq,
    /// [`SmoothQuant`].
    Smooth,
    /// [`Awq`] as AutoAWQ has it.
    AwqFull,
    /// The search with this loss and balance, and whether it sees what the layers before have become.
    Search(LossKind, BalanceMode, bool),
}

/// One thing that is measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// The number of its condition.
    pub condition: usize,
    /// The width; `None` of the float model.
    pub spec: Option<QuantSpec>,
    /// The method, as results name it.
    pub name: &'static str,
    /// The method.
    pub how: How,
}

impl Variant {
    /// The width as results name it.
    pub fn quant(&self) -> String {
        self.spec.map_or_else(|| FLOAT.to_owned(), |spec| spec.to_string())
    }

    /// The method at its width; `None` of the float model.
    pub(super) fn method(&self) -> Option<Box<dyn Method>> {
        let spec = self.spec?;
        Some(match self.how {
            How::Float => return None,
            How::Rtn => Box::new(Rtn { spec }),
            How::Gptq => Box::new(Gptq { config: GptqConfig::new(spec.bits, spec.group) }),
            How::Smooth => Box::new(SmoothQuant::new(spec)),
            How::AwqFull => Box::new(Awq::full(spec)),
            How::Search(loss, balance, distort) => {
                let search = SearchConfig { loss, distort, ..SearchConfig::new(spec) };
                Box::new(Mbq { config: CalibConfig { search, balance }, clip: None })
            }
        })
    }
}

const SEARCHES: [(&str, How); 4] = [
    (BLIND, How::Search(LossKind::Mse, BalanceMode::Off, false)),
    ("fixed weight 0.1, MSE", How::Search(LossKind::Mse, BalanceMode::Fixed(0.1), false)),
    ("MBQ, MSE", How::Search(LossKind::Mse, BalanceMode::Auto, false)),
    (MBQ, How::Search(LossKind::Mae, BalanceMode::Auto, false)),
];

/// What is measured under every condition at a width. Distortion is published for weights with activations.
fn methods(spec: &QuantSpec) -> Vec<(&'static str, How)> {
    let own = if spec.act_bits.is_some() {
        let distorted = How::Search(LossKind::Mae, BalanceMode::Auto, true);
        vec![(RTN, How::Rtn), ("SmoothQuant", How::Smooth), ("MBQ, MAE, distortion", distorted)]
    } else {
        vec![(RTN, How::Rtn), ("GPTQ", How::Gptq), ("AWQ, duo scaling and clipping", How::AwqFull)]
    };
    own.into_iter().chain(SEARCHES).collect()
}

/// Everything that a study measures of a model, condition by condition.
///
/// # Errors
/// A width that is none.
pub fn variants(study: &Study) -> Result<Vec<Variant>> {
    let specs = study.specs()?;
    let mut all = Vec::new();
    for condition in 0..study.condition.len() {
        all.push(Variant { condition, spec: None, name: FLOAT, how: How::Float });
        for spec in &specs {
            all.extend(methods(spec).into_iter().map(|(name, how)| Variant {
                condition,
                spec: Some(*spec),
                name,
                how,
            }));
        }
    }
    Ok(all)
}

/// The condition of a variant.
pub(super) fn condition<'a>(study: &'a Study, variant: &Variant) -> &'a Condition {
    &study.condition[variant.condition]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_of_a_kind_and_every_method_makes_sense_at_its_width() {
        let study = Study::parse(include_str!("../../recipes/study.toml")).unwrap();
        let all = variants(&study).unwrap();
        for (i, v) in all.iter().enumerate() {
            let key = |v: &Variant| (v.condition, v.quant(), v.name);
            assert!(!all[..i].iter().any(|w| key(w) == key(v)), "{}", v.name);
            let Some(method) = v.method() else { continue };
            assert_eq!(Some(method.spec()), v.spec, "{}", v.name);
        }
    }
}
