//! Widths of stored codes.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Width of a stored code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Bits {
    /// 2 bits.
    B2,
    /// 4 bits.
    B4,
    /// 8 bits.
    B8,
    /// 16 bits.
    B16,
}

impl Bits {
    /// Every width, narrowest first.
    pub const ALL: [Self; 4] = [Self::B2, Self::B4, Self::B8, Self::B16];

    /// The number of bits.
    pub const fn get(self) -> u32 {
        match self {
            Self::B2 => 2,
            Self::B4 => 4,
            Self::B8 => 8,
            Self::B16 => 16,
        }
    }

    /// The largest code, `2^b − 1`.
    pub const fn levels(self) -> u32 {
        (1 << self.get()) - 1
    }

    /// Half the width; `None` below 2 bits.
    pub const fn half(self) -> Option<Self> {
        match self {
            Self::B16 => Some(Self::B8),
            Self::B8 => Some(Self::B4),
            Self::B4 => Some(Self::B2),
            Self::B2 => None,
        }
    }

    /// Bytes of `values` codes; `values` fills whole bytes.
    pub const fn bytes(self, values: usize) -> usize {
        values * self.get() as usize / 8
    }
}

impl TryFrom<u32> for Bits {
    type Error = Error;

    fn try_from(bits: u32) -> Result<Self> {
        Self::ALL.into_iter().find(|b| b.get() == bits).ok_or(Error::Width(bits))
    }
}

impl From<Bits> for u32 {
    fn from(bits: Bits) -> Self {
        bits.get()
    }
}
