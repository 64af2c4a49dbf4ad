//! Formats in which baselines store rows, each with the bytes that it takes.

use nics_core::models::ModelDims;
use tch::Tensor;

use super::everyday::{Block, FP8_LARGEST, fp8};
use super::hadamard::Hadamard;
use super::rows::Rows;
use crate::quantize::{Mode, fake_quant};
use crate::{Error, Result};

/// Bytes of a number that is kept exactly, and of a group's scale or zero: half precision.
pub const HALF: usize = 2;

/// A number format of rows `[.., head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Format {
    /// Codes of 1 to 16 bits; groups of so many channels share a scale and a zero.
    Groups {
        /// Width of a code.
        bits: u32,
        /// Channels of a group; they divide the head.
        group: i64,
    },
    /// ggml's blocks.
    Block(Block),
    /// 8-bit floating point (e4m3) of `x / scale`.
    Fp8 {
        /// What stands for 1.
        scale: f64,
        /// Whether larger magnitudes become the largest one instead of NaN.
        saturate: bool,
    },
}

impl Format {
    /// Its name in results.
    pub fn name(&self) -> String {
        match self {
            Self::Groups { bits, group } => format!("{bits}bit-g{group}"),
            Self::Block(block) => block.name().to_owned(),
            Self::Fp8 { scale, saturate } => {
                format!("fp8-s{scale}{}", if *saturate { "-saturating" } else { "" })
            }
        }
    }

    /// Whether heads of `head_dim` channels can be stored.
    ///
    /// # Errors
    /// Groups or blocks that do not divide the head, a width that no code has, a scale that is no positive number.
    pub fn check(&self, head_dim: i64) -> Result<()> {
        let divides = |group: i64| match group {
            1.. if head_dim % group == 0 => Ok(()),
            _ => Err(Error::GroupMismatch { head_dim, group }),
        };
        match self {
            Self::Groups { bits, group } if (1..=16).contains(bits) => divides(*group),
            Self::Groups { bits, .. } => Err(Error::Width(*bits)),
            Self::Block(_) => divides(Block::VALUES as i64),
            Self::Fp8 { scale, .. } if scale.is_finite() && *scale > 0.0 => Ok(()),
            Self::Fp8 { scale, .. } => Err(Error::Setting {
                field: "the scale of 8-bit floats".into(),
                found: scale.to_string(),
                expected: "a positive number".into(),
            }),
        }
    }

    /// What rows are after they were stored: same shape and dtype.
    pub fn round_trip(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Groups { bits, group } => {
                Ok(fake_quant(x, *bits, *group, Mode::FloatZero)?.f_to_kind(x.kind())?)
            }
            Self::Block(block) => block.round_trip(x),
            Self::Fp8 { scale, saturate } => {
                let scaled = Tensor::f_from_slice(&[*scale])?.f_to_device(x.device())?.f_to_kind(x.kind())?;
                let limit = FP8_LARGEST * scale;
                let x = if *saturate { x.f_clamp(-limit, limit)? } else { x.shallow_clone() };
                fp8(&x, &scaled)
            }
        }
    }

    /// Bytes of a row of `head_dim` channels, its scales among them.
    pub fn row_bytes(&self, head_dim: usize) -> usize {
        match self {
            Self::Groups { bits, group } => {
                (head_dim * *bits as usize).div_ceil(8) + head_dim / *group as usize * 2 * HALF
            }
            Self::Block(block) => head_dim / Block::VALUES * block.bytes(),
            Self::Fp8 { .. } => head_dim,
        }
    }
}

/// A format, behind a Hadamard rotation of each head where one is asked for.
#[derive(Debug, Clone)]
pub struct Coder {
    /// The format.
    pub format: Format,
    rotation: Option<Hadamard>,
}

impl From<Format> for Coder {
    fn from(format: Format) -> Self {
        Self { format, rotation: None }
    }
}

impl Coder {
    /// The format in the rotated basis of heads of `head_dim` channels.
    ///
    /// # Errors
    /// No rotation of that order is known.
    pub fn rotated(format: Format, head_dim: i64) -> Result<Self> {
        Ok(Self { format, rotation: Some(Hadamard::new(head_dim)?) })
    }

    /// Its name in results.
    pub fn name(&self) -> String {
        let rotation = if self.rotation.is_some() { "+rotation" } else { "" };
        format!("{}{rotation}", self.format.name())
    }

    /// As [`Format::check`], the rotation's order included.
    pub fn check(&self, head_dim: i64) -> Result<()> {
        if let Some(rotation) = &self.rotation
            && rotation.order() != head_dim
        {
            let found = rotation.order();
            return Err(Error::Input(format!("a rotation of {found} channels for heads of {head_dim}")));
        }
        self.format.check(head_dim)
    }

    /// What rows `[.., head_dim]` are after they were stored.
    pub fn round_trip(&self, x: &Tensor) -> Result<Tensor> {
        match &self.rotation {
            None => self.format.round_trip(x),
            Some(rotation) => rotation.unrotate(&self.format.round_trip(&rotation.rotate(x)?)?),
        }
    }
}

/// How a method stores keys and values.
#[derive(Debug, Clone)]
pub struct Coders {
    /// Keys.
    pub k: Coder,
    /// Values.
    pub v: Coder,
}

impl From<Format> for Coders {
    fn from(format: Format) -> Self {
        Self { k: format.into(), v: format.into() }
    }
}

impl Coders {
    /// Both in one format, in the rotated basis of each head.
    ///
    /// # Errors
    /// No rotation of that order is known.
    pub fn rotated(format: Format, head_dim: i64) -> Result<Self> {
        let coder = Coder::rotated(format, head_dim)?;
        Ok(Self { k: coder.clone(), v: coder })
    }

    /// Its name in results.
    pub fn name(&self) -> String {
        let (k, v) = (self.k.name(), self.v.name());
        if k == v { k } else { format!("k:{k},v:{v}") }
    }

    /// Whether a model's heads can be stored.
    pub fn check(&self, dims: &ModelDims) -> Result<()> {
        self.k.check(dims.head_dim)?;
        self.v.check(dims.head_dim)
    }

    /// Bytes of one layer's rows, exact ones in half precision.
    pub fn bytes(&self, dims: &ModelDims, stored: usize, exact: usize) -> usize {
        let d = dims.head_dim as usize;
        let row = self.k.format.row_bytes(d) + self.v.format.row_bytes(d);
        dims.kv_heads as usize * (stored * row + exact * 2 * d * HALF)
    }

    /// Stores rows of these numbers.
    pub fn store(&self, rows: &mut Rows, which: &[usize]) -> Result<()> {
        if which.is_empty() {
            return Ok(());
        }
        let (k, v) = rows.pick(which)?;
        rows.store(which, &self.k.round_trip(&k)?, &self.v.round_trip(&v)?)
    }
}
