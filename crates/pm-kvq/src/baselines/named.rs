//! Baselines by name, as command lines and result rows have them: `NAME[-BITS][+rotation][:SETTING=VALUE,…]`.

use std::fmt;
use std::str::FromStr;

use nics_core::models::ModelDims;
use tch::Tensor;

use super::cache::Simulated;
use super::everyday::Block;
use super::format::{Coders, Format};
use super::kivi::Kivi;
use super::mikv::Mikv;
use super::rotatekv::RotateKv;
use super::rtn::{Rtn, When};
use super::transformers::{FrozenFp8, Residual};
use crate::quantize::largest_divisor;
use crate::{Error, Result};

/// Which baseline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    RtnAfter,
    RtnBefore,
    Kivi,
    Mikv,
    RotateKv,
    Block(Block),
    Fp8,
    Transformers,
    TransformersFp8,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::RtnAfter,
        Self::RtnBefore,
        Self::Kivi,
        Self::Mikv,
        Self::RotateKv,
        Self::Block(Block::Q8_0),
        Self::Block(Block::Q4_0),
        Self::Block(Block::Q4_1),
        Self::Block(Block::Q5_0),
        Self::Block(Block::Q5_1),
        Self::Fp8,
        Self::Transformers,
        Self::TransformersFp8,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::RtnAfter => "rtn",
            Self::RtnBefore => "rtn-pre",
            Self::Kivi => "kivi",
            Self::Mikv => "mikv",
            Self::RotateKv => "rotatekv",
            Self::Block(block) => block.name(),
            Self::Fp8 => "fp8",
            Self::Transformers => "hf-int",
            Self::TransformersFp8 => "hf-fp8",
        }
    }

    /// Widths that it is named with; none for formats of one width.
    const fn has_bits(self) -> bool {
        !matches!(self, Self::Block(_) | Self::Fp8 | Self::TransformersFp8)
    }

    const fn can_rotate(self) -> bool {
        matches!(self, Self::RtnAfter | Self::RtnBefore | Self::Block(_))
    }

    /// Its settings with their defaults; a group of 0 is the largest that divides the head, up to 128 (transformers: 64).
    const fn settings(self) -> &'static [(&'static str, usize)] {
        match self {
            Self::RtnAfter | Self::RtnBefore => &[("group", 0)],
            Self::Kivi => &[("tokens", 128), ("group", 0)],
            Self::Mikv => &[("hitters", 0), ("group", 0)],
            Self::RotateKv => &[("pivots", 20), ("group", 0)],
            Self::Transformers => &[("residual", 128), ("group", 0)],
            Self::Block(_) | Self::Fp8 | Self::TransformersFp8 => &[],
        }
    }
}

/// A baseline with its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Baseline {
    kind: Kind,
    bits: u32,
    rotation: bool,
    /// Values of [`Kind::settings`], in that order.
    settings: Vec<usize>,
}

impl Baseline {
    /// Those of a comparison with the method.
    pub const NAMES: &[&str] = &[
        "rtn-4",
        "rtn-2",
        "rtn-pre-4",
        "rtn-4+rotation",
        "kivi-4",
        "kivi-2",
        "mikv-4",
        "mikv-2",
        "mikv-2:hitters=128",
        "rotatekv-4",
        "rotatekv-2",
        "q8_0",
        "q5_1",
        "q5_0",
        "q4_1",
        "q4_0",
        "q4_0+rotation",
        "fp8",
        "hf-int4",
        "hf-int2",
        "hf-fp8",
    ];

    /// The cache for a model of these dimensions. `orders`: RotateKV's channel orders
    /// ([`channel_orders`](super::channel_orders)), empty without.
    ///
    /// # Errors
    /// Settings that do not fit the model's heads.
    pub fn cache(&self, dims: &ModelDims, orders: &[Tensor]) -> Result<Simulated> {
        let setting = |name: &str| -> usize {
            let at = self.kind.settings().iter().position(|(known, _)| *known == name);
            at.map_or(0, |at| self.settings[at])
        };
        let most = if self.kind == Kind::Transformers { 64 } else { 128 };
        let group = match setting("group") {
            0 => largest_divisor(dims.head_dim, most),
            given => given as i64,
        };
        let bits = self.bits;
        let codes = Format::Groups { bits, group };
        let coders = |format: Format| -> Result<Coders> {
            if self.rotation { Coders::rotated(format, dims.head_dim) } else { Ok(format.into()) }
        };
        match self.kind {
            Kind::RtnAfter => Simulated::new(dims, Rtn::new(coders(codes)?, When::After)),
            Kind::RtnBefore => Simulated::new(dims, Rtn::new(coders(codes)?, When::Before)),
            Kind::Kivi => Simulated::new(dims, Kivi::new(bits, setting("tokens"), group)?),
            Kind::Mikv => Simulated::new(dims, Mikv::new(codes, setting("hitters"))),
            Kind::RotateKv => {
                Simulated::new(dims, RotateKv::new(dims, bits, group, setting("pivots"), orders)?)
            }
            Kind::Block(block) => Simulated::new(dims, Rtn::new(coders(Format::Block(block))?, When::Before)),
            Kind::Fp8 => {
                Simulated::new(dims, Rtn::new(Format::Fp8 { scale: 1.0, saturate: true }, When::Before))
            }
            Kind::Transformers => Simulated::new(dims, Residual::new(bits, group, setting("residual"))?),
            Kind::TransformersFp8 => Simulated::new(dims, FrozenFp8),
        }
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.kind.name())?;
        if self.kind.has_bits() {
            // `hf-int4`, but `kivi-4`.
            let dash = if self.kind == Kind::Transformers { "" } else { "-" };
            write!(f, "{dash}{}", self.bits)?;
        }
        if self.rotation {
            f.write_str("+rotation")?;
        }
        let mut before = ':';
        for ((name, default), value) in self.kind.settings().iter().zip(&self.settings) {
            if value != default {
                write!(f, "{before}{name}={value}")?;
                before = ',';
            }
        }
        Ok(())
    }
}

impl FromStr for Baseline {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = |why: String| Error::Setting {
            field: "baseline".into(),
            found: format!("{text:?}{why}"),
            expected: format!("one like {}", Self::NAMES.join(", ")),
        };
        let (head, given) = text.split_once(':').unwrap_or((text, ""));
        let (head, rotation) = match head.strip_suffix("+rotation") {
            Some(head) => (head, true),
            None => (head, false),
        };
        let fits = |kind: &Kind| -> Option<u32> {
            let rest = head.strip_prefix(kind.name())?;
            if !kind.has_bits() {
                return rest.is_empty().then_some(0);
            }
            let rest = if *kind == Kind::Transformers { rest } else { rest.strip_prefix('-')? };
            rest.parse().ok().filter(|bits| (1..=16).contains(bits))
        };
        let Some((kind, bits)) = Kind::ALL.into_iter().find_map(|kind| Some((kind, fits(&kind)?))) else {
            return Err(unknown(String::new()));
        };
        if rotation && !kind.can_rotate() {
            return Err(unknown(format!(", which has no rotation to add to {}", kind.name())));
        }
        let known = kind.settings();
        let mut settings: Vec<usize> = known.iter().map(|(_, default)| *default).collect();
        for setting in given.split(',').filter(|s| !s.is_empty()) {
            let parsed = setting.split_once('=').and_then(|(name, value)| {
                let at = known.iter().position(|(k, _)| *k == name)?;
                Some((at, value.parse().ok()?))
            });
            let Some((at, value)) = parsed else {
                let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
                return Err(unknown(format!(
                    ", whose settings are [{}], each a whole number",
                    names.join(", ")
                )));
            };
            settings[at] = value;
        }
        Ok(Self { kind, bits, rotation, settings })
    }
}
