//! The number formats of weights and activations.

use half::{bf16, f16};

/// A number format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Kind {
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// A value of one of the formats.
pub trait Element: Copy + Send + Sync + 'static {
    /// Which one.
    const KIND: Kind;
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounded to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const KIND: Kind = Kind::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const KIND: Kind = Kind::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Without a branch, so that loops over it become vector code.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
        Self::from_bits(if is_nan { quiet_nan } else { rounded } as u16)
    }
}

impl Element for f16 {
    const KIND: Kind = Kind::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

/// Values of any format, read.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// 32 bits.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

impl<'a> From<&'a [bf16]> for Values<'a> {
    fn from(values: &'a [bf16]) -> Self {
        Self::Bf16(values)
    }
}

impl<'a> From<&'a [f16]> for Values<'a> {
    fn from(values: &'a [f16]) -> Self {
        Self::F16(values)
    }
}

/// Values of any format, written.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// 32 bits.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
    /// IEEE half precision.
    F16(&'a mut [f16]),
}

/// Runs `$body` with `$v` bound to the slice, whatever its format.
#[macro_export]
macro_rules! each_kind {
    ($values:expr, $of:ident, $v:ident => $body:expr) => {
        match $values {
            $crate::element::$of::F32($v) => $body,
            $crate::element::$of::Bf16($v) => $body,
            $crate::element::$of::F16($v) => $body,
        }
    };
}

impl Values<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        each_kind!(self, Values, v => v.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their format.
    pub fn kind(&self) -> Kind {
        match self {
            Self::F32(_) => Kind::F32,
            Self::Bf16(_) => Kind::Bf16,
            Self::F16(_) => Kind::F16,
        }
    }

    /// Copies them, widened.
    pub fn widen(&self, into: &mut [f32]) {
        each_kind!(self, Values, v => into.iter_mut().zip(*v).for_each(|(to, from)| *to = Element::to_f32(*from)));
    }
}

impl ValuesMut<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        each_kind!(self, ValuesMut, v => v.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their format.
    pub fn kind(&self) -> Kind {
        match self {
            Self::F32(_) => Kind::F32,
            Self::Bf16(_) => Kind::Bf16,
            Self::F16(_) => Kind::F16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bf16_is_that_of_the_half_crate() {
        for bits in
            (0..u32::MAX - 1009).step_by(1009).chain([0x7f80_0000, 0x7f80_0001, 0xff80_0000, 0x7f7f_ffff])
        {
            let value = f32::from_bits(bits);
            let ours = <bf16 as Element>::from_f32(value);
            assert_eq!(ours.to_bits(), bf16::from_f32(value).to_bits(), "{bits:x}");
        }
    }
}
