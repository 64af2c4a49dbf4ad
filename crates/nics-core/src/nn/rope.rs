//! Rotary position embeddings (Su et al., 2021) and the ways checkpoints stretch them.
//!
//! [`Rotary`] is a model's table of inverse frequencies; [`Rope`] is the cosine and sine of the rows of one call, which
//! travels to the cache with the unrotated queries and keys. Rotation is half-split: `[x1, x2] -> x cos + [-x2, x1] sin`.

use std::f64::consts::PI;

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::seam::Ragged;
use crate::{Error, Result};

/// How a checkpoint stretches its rotary table beyond the context that it was pretrained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain rotary embeddings.
    None,
    /// Positions divided by `factor` (Chen et al., 2023).
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// The base grows with the length of the sequence at hand ("dynamic NTK").
    ///
    /// Keys keep the rotation of the call that brought them, as in transformers: past the original context, cached
    /// decoding differs from one uncached call.
    Dynamic {
        /// Growth of the base per multiple of the original context.
        factor: f64,
    },
    /// Ramps between interpolated and plain frequencies, with an attention temperature (Peng et al., 2023).
    Yarn {
        /// How many times longer the context becomes.
        factor: f64,
        /// Context of pretraining, in tokens.
        original: f64,
        /// Rotations over the original context above which a frequency stays as it is.
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated in full.
        beta_slow: f64,
        /// Factor on cosine and sine.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1: long wavelengths interpolated, short ones plain, a smooth band between.
    Llama3 {
        /// How many times longer the context becomes.
        factor: f64,
        /// Wavelengths above `original / low` are interpolated.
        low: f64,
        /// Wavelengths below `original / high` stay.
        high: f64,
        /// Context of pretraining, in tokens.
        original: f64,
    },
}

/// What a checkpoint's configuration says about rotary embeddings.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Width of a head that is rotated; even.
    pub head_dim: i64,
    /// `max_position_embeddings` of the configuration, in tokens.
    pub max_positions: usize,
    /// How the table is stretched.
    pub scaling: RopeScaling,
    /// Which angles turn with a row's position in time, height and width, as many of each in this order (Qwen2-VL);
    /// together half of `head_dim`.
    pub sections: Option<[usize; 3]>,
}

#[derive(Deserialize)]
struct RawScaling {
    // The old name and the new one; transformers writes both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    mrope_section: Option<[usize; 3]>,
}

impl RopeConfig {
    /// Reads `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5) of a config.json.
    ///
    /// # Errors
    /// `Error::Input` naming the field: an unknown type, a missing or senseless number.
    pub fn parse(
        theta: f64,
        head_dim: i64,
        max_positions: usize,
        scaling: Option<&serde_json::Value>,
    ) -> Result<Self> {
        let mut config = Self { theta, head_dim, max_positions, scaling: RopeScaling::None, sections: None };
        let Some(value) = scaling.filter(|v| !v.is_null()) else { return config.checked() };
        let raw: RawScaling = serde_json::from_value(value.clone())
            .map_err(|e| Error::Config(format!("rope_scaling {value}: {e}")))?;
        if let Some(theta) = raw.rope_theta {
            config.theta = theta;
        }
        config.sections = raw.mrope_section;
        let need = |name: &str, v: Option<f64>| {
            v.filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| {
                Error::Config(format!("rope_scaling needs a positive `{name}`, found {value}"))
            })
        };
        config.scaling = match raw.rope_type.as_deref().or(raw.old_type.as_deref()).unwrap_or("default") {
            // "mrope" is plain, too: what it adds are the sections.
            "default" | "mrope" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need("factor", raw.factor)? },
            "dynamic" => RopeScaling::Dynamic { factor: need("factor", raw.factor)? },
            "yarn" => {
                let original = raw.original_max_position_embeddings.unwrap_or(max_positions as f64);
                let factor = match raw.factor {
                    None => need("original_max_position_embeddings", Some(max_positions as f64 / original))?,
                    factor => need("factor", factor)?,
                };
                let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let attention_factor = match (raw.attention_factor, raw.mscale, raw.mscale_all_dim) {
                    (Some(given), ..) => given,
                    (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
                    _ => mscale(1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    original: need("original_max_position_embeddings", Some(original))?,
                    beta_fast: raw.beta_fast.unwrap_or(32.0),
                    beta_slow: raw.beta_slow.unwrap_or(1.0),
                    attention_factor,
                    truncate: raw.truncate.unwrap_or(true),
                }
            }
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor", raw.factor)?,
                low: need("low_freq_factor", raw.low_freq_factor)?,
                high: need("high_freq_factor", raw.high_freq_factor)?,
                original: need("original_max_position_embeddings", raw.original_max_position_embeddings)?,
            },
            other => {
                return Err(Error::Config(format!(
                    "rope_scaling type `{other}` is not one of default, linear, dynamic, yarn, llama3"
                )));
            }
        };
        config.checked()
    }

    fn checked(self) -> Result<Self> {
        if self.head_dim <= 0 || self.head_dim % 2 != 0 {
            return Err(Error::Config(format!("head_dim {} is not a positive even number", self.head_dim)));
        }
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return Err(Error::Config(format!("rope_theta {} is not above 1", self.theta)));
        }
        if let Some(sections) = self.sections {
            let angles = sections.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
            if angles != Some((self.head_dim / 2) as usize) {
                return Err(Error::Config(format!(
                    "mrope_section {sections:?} does not add up to half of head_dim {}",
                    self.head_dim
                )));
            }
        }
        Ok(self)
    }
}

/// A model's rotary table.
#[derive(Debug)]
pub struct Rotary {
    config: RopeConfig,
    /// `θ^{-2j/d}` as stretched, `[head_dim / 2]`; the one of the original context for dynamic scaling.
    inv_freq: Vec<f32>,
    device: Device,
}

impl Rotary {
    /// The table that `config` asks for.
    pub fn new(config: RopeConfig, device: Device) -> Self {
        let inv_freq = inverse_frequencies(&config);
        Self { config, inv_freq, device }
    }

    /// Cosine and sine of the rows' positions, float32.
    ///
    /// # Errors
    /// Rows in time, height and width where the configuration has no sections for them.
    pub fn rows(&self, rows: &Ragged) -> Result<Rope> {
        let half = self.inv_freq.len();
        let planes = match (rows.planes(), self.config.sections) {
            (None, _) => None,
            (Some(planes), Some(sections)) => Some((planes, plane_of_angles(sections))),
            (Some(_), None) => {
                return Err(Error::input(
                    "the rows have positions in time, height and width, but the model's rope has no mrope_section",
                ));
            }
        };
        let mut angles = Vec::with_capacity(rows.len() * half);
        let mut at = 0;
        for &len in rows.lens() {
            let positions = &rows.positions()[at..at + len];
            let first = at;
            at += len;
            if let Some((planes, plane)) = &planes {
                for position in &planes[first..at] {
                    angles.extend(self.inv_freq.iter().zip(plane).map(|(f, &p)| position[p] as f32 * f));
                }
                continue;
            }
            let stretched = self.dynamic(positions);
            let inv_freq = stretched.as_deref().unwrap_or(&self.inv_freq);
            for &p in positions {
                angles.extend(inv_freq.iter().map(|f| p as f32 * f));
            }
        }
        let angles = Tensor::f_from_slice(&angles)?.f_view([rows.len() as i64, half as i64])?;
        let angles = Tensor::f_cat(&[&angles, &angles], -1)?.f_to_device(self.device)?;
        let (mut cos, mut sin) = (angles.f_cos()?, angles.f_sin()?);
        if let RopeScaling::Yarn { attention_factor, .. } = self.config.scaling {
            cos = cos.f_mul_scalar(attention_factor)?;
            sin = sin.f_mul_scalar(attention_factor)?;
        }
        Ok(Rope { cos, sin })
    }

    /// Frequencies of one sequence under dynamic scaling, when it is past the original context.
    fn dynamic(&self, positions: &[i64]) -> Option<Vec<f32>> {
        let RopeScaling::Dynamic { factor } = self.config.scaling else { return None };
        let (len, original) = ((positions.iter().max()? + 1) as f64, self.config.max_positions as f64);
        if len <= original {
            return None;
        }
        let d = self.config.head_dim as f64;
        let grown = (factor * len / original) - (factor - 1.0);
        Some(plain(self.config.theta * grown.powf(d / (d - 2.0)), self.config.head_dim))
    }
}

/// Which of time, height and width each angle turns with.
fn plane_of_angles(sections: [usize; 3]) -> Vec<usize> {
    sections.iter().enumerate().flat_map(|(plane, &angles)| std::iter::repeat_n(plane, angles)).collect()
}

fn plain(theta: f64, head_dim: i64) -> Vec<f32> {
    // In float32 throughout, as the reference: the exponent, the power, the reciprocal.
    (0..head_dim / 2).map(|j| 1.0 / (theta as f32).powf(2.0 * j as f32 / head_dim as f32)).collect()
}

fn inverse_frequencies(config: &RopeConfig) -> Vec<f32> {
    let base = plain(config.theta, config.head_dim);
    match config.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => base,
        RopeScaling::Linear { factor } => base.into_iter().map(|f| f / factor as f32).collect(),
        RopeScaling::Llama3 { factor, low, high, original } => base
            .into_iter()
            .map(|f| {
                let f = f64::from(f);
                let wavelength = 2.0 * PI / f;
                let stretched = if wavelength > original / low {
                    f / factor
                } else if wavelength < original / high {
                    f
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                };
                stretched as f32
            })
            .collect(),
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
            let d = config.head_dim as f64;
            let dimension =
                |rotations: f64| d * (original / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln());
            let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(d - 1.0));
            if (high - low).abs() < f64::EPSILON {
                high += 0.001;
            }
            base.into_iter()
                .enumerate()
                .map(|(j, f)| {
                    let f = f64::from(f);
                    let extrapolate = 1.0 - ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    (f / factor * (1.0 - extrapolate) + f * extrapolate) as f32
                })
                .collect()
        }
    }
}

/// Cosine and sine of the rows of one call.
#[derive(Debug)]
pub struct Rope {
    /// `[rows, head_dim]`, float32.
    pub cos: Tensor,
    /// `[rows, head_dim]`, float32.
    pub sin: Tensor,
}

impl Rope {
    /// Rotates `x`, `[rows, heads, head_dim]`; the result is of the same shape and dtype.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, d) = x.size3()?;
        let half = d / 2;
        let cos = self.cos.f_to_kind(x.kind())?.f_unsqueeze(1)?;
        let sin = self.sin.f_to_kind(x.kind())?.f_unsqueeze(1)?;
        let (x1, x2) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
        let rotated = Tensor::f_cat(&[&x2.f_neg()?, &x1], -1)?;
        Ok(x.f_mul(&cos)?.f_add(&rotated.f_mul(&sin)?)?)
    }

    /// The rows that `kept` (int64 row indices) names, in that order.
    pub fn select(&self, kept: &Tensor) -> Result<Self> {
        Ok(Self { cos: self.cos.f_index_select(0, kept)?, sin: self.sin.f_index_select(0, kept)? })
    }

    /// Rows `[from, from + len)`.
    pub fn narrow(&self, from: i64, len: i64) -> Result<Self> {
        Ok(Self { cos: self.cos.f_narrow(0, from, len)?, sin: self.sin.f_narrow(0, from, len)? })
    }

    /// The dtype of the tables.
    pub fn kind(&self) -> Kind {
        self.cos.kind()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn scaling_is_refused_with_the_field_named() {
        let parse = |v| RopeConfig::parse(1e4, 8, 64, Some(&v)).unwrap_err().to_string();
        assert!(parse(json!({"rope_type": "longrope"})).contains("longrope"));
        assert!(parse(json!({"type": "linear"})).contains("`factor`"));
        assert!(parse(json!({"rope_type": "llama3", "factor": 8.0})).contains("low_freq_factor"));
        assert!(parse(json!({"rope_type": "linear", "factor": -1.0})).contains("positive"));
        assert!(RopeConfig::parse(1e4, 7, 64, None).unwrap_err().to_string().contains("head_dim 7"));
    }

    #[test]
    fn rotation_keeps_lengths_and_depends_on_distance_alone() {
        let rotary = Rotary::new(RopeConfig::parse(1e4, 8, 64, None).unwrap(), Device::Cpu);
        let rows = Ragged::new(vec![(crate::seam::SeqId(0), vec![3, 10])]);
        let rope = rotary.rows(&rows).unwrap();
        let x = Tensor::arange(8, (Kind::Float, Device::Cpu)).view([1, 1, 8]).repeat([2, 1, 1]);
        let y = rope.apply(&x).unwrap();
        let norm = |t: &Tensor| t.norm().double_value(&[]);
        assert!((norm(&y) - norm(&x)).abs() < 1e-4);
        let rope2 = rotary.rows(&Ragged::new(vec![(crate::seam::SeqId(0), vec![20, 27])])).unwrap();
        let y2 = rope2.apply(&x).unwrap();
        let dot = |t: &Tensor| t.get(0).dot_(&t.get(1));
        assert!((dot(&y) - dot(&y2)).abs() < 1e-3);
    }

    trait Dot {
        fn dot_(&self, other: &Tensor) -> f64;
    }
    impl Dot for Tensor {
        fn dot_(&self, other: &Tensor) -> f64 {
            (self * other).sum(Kind::Float).double_value(&[])
        }
    }
}
