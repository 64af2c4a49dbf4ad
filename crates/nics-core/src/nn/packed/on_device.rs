//! A packed weight in the memory of a device, and products with it.
//!
//! On a CUDA device with NVRTC the kernels of [`nics_cuda::packed`] multiply up to 64 rows of half precision or bf16 straight from
//! the codes; for more rows a kernel writes the weight out in 16 bits, and the product is libtorch's. Everywhere else both
//! are libtorch's operations over the same tensors, a piece of the weight at a time. x is not rounded to integers here.

use nics_cuda::packed::{
    Addresses, Kernels, Kind as Compiled, Launch, Layout, ROWS, Scales, TILE, Tiles, dequantize, product,
};
use nics_kernels::packed::Packed;
use tch::{Device, Kind, Tensor};

use crate::nn::memory::copied;
use crate::{Error, Result};

/// Codes that operations take apart at a time.
const PIECE: usize = 1 << 24;

/// A weight `[out, in]` of 2, 3, 4 or 8 bits on a device.
#[derive(Debug)]
pub struct DeviceWeight {
    layout: Layout,
    /// Int `[tiles, blocks, bits, 32, 4]`, as [`Tiles::words`].
    codes: Tensor,
    /// Half or float32 `[tiles, groups, 8, 4]`, as [`Tiles::scales`].
    scales: Tensor,
    /// Uint8 `[tiles, groups, 8, 4]`.
    zeros: Tensor,
    by_operations: bool,
}

fn layout_of(weight: &Packed) -> Layout {
    let (out, input, group) = (weight.out(), weight.input(), weight.group());
    Layout { bits: weight.bits(), out, input, group }
}

impl DeviceWeight {
    /// Whether a device's layout takes such a weight: its channels are a multiple of 8.
    pub fn takes(weight: &Packed) -> bool {
        layout_of(weight).check().is_ok()
    }

    /// Lays the weight out on `device`.
    ///
    /// # Errors
    /// [`Error::Input`]: a number of channels that is no multiple of 8; and libtorch's, for lack of memory.
    pub fn new(weight: &Packed, device: Device) -> Result<Self> {
        let layout = layout_of(weight);
        let (scales, zeros) = weight.parameters();
        let tiles = Tiles::pack(layout, &weight.codes(), &scales, &zeros);
        let tiles = tiles.map_err(|e| Error::Input(e.to_string()))?;
        let n = |n: usize| n as i64;
        let words: Vec<i32> = tiles.words().iter().map(|w| w.cast_signed()).collect();
        let codes = [n(layout.tiles()), n(layout.blocks()), i64::from(layout.bits), 32, 4];
        let parameters = [n(layout.tiles()), n(layout.groups()), 8, 4];
        let scales = match tiles.scales() {
            Scales::F16(s) => Tensor::f_from_slice(s)?,
            Scales::F32(s) => Tensor::f_from_slice(s)?,
        };
        Ok(Self {
            layout,
            codes: Tensor::f_from_slice(&words)?.f_reshape(codes)?.f_to_device(device)?,
            scales: scales.f_reshape(parameters)?.f_to_device(device)?,
            zeros: Tensor::f_from_slice(tiles.zeros())?.f_reshape(parameters)?.f_to_device(device)?,
            by_operations: false,
        })
    }

    /// The same weight in memory of its own.
    pub fn copied(&self) -> Result<Self> {
        let Self { codes, scales, zeros, .. } = self;
        Ok(Self { codes: copied(codes)?, scales: copied(scales)?, zeros: copied(zeros)?, ..*self })
    }

    /// The same weight, multiplied by libtorch's operations also where there are kernels.
    #[must_use]
    pub fn by_operations(self) -> Self {
        Self { by_operations: true, ..self }
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.codes.device()
    }

    /// What it looks like.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes of codes, scales and zeros.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        of(&self.codes) + of(&self.scales) + of(&self.zeros)
    }

    /// Why products of inputs of this dtype are libtorch's operations; `None` where kernels compute them. Where kernels can be
    /// had they are compiled now, once for the process and this kind of matrix.
    pub fn obstacle(&self, kind: Kind) -> Option<String> {
        self.kernels(kind).err()
    }

    /// What the kernels for inputs of this dtype are compiled for; `None` for others than half precision and bf16.
    pub fn compiled_for(&self, kind: Kind) -> Option<Compiled> {
        let bits = if self.scales.kind() == Kind::Half { 16 } else { 32 };
        matches!(kind, Kind::Half | Kind::BFloat16)
            .then(|| Compiled::of(&self.layout, bits, kind == Kind::Half))
    }

    fn kernels(&self, kind: Kind) -> std::result::Result<Kernels, String> {
        if self.by_operations {
            return Err("operations were asked for".into());
        }
        let Device::Cuda(index) = self.device() else {
            return Err(format!("there are kernels for CUDA devices alone, not for {:?}", self.device()));
        };
        match self.compiled_for(kind) {
            Some(own) => Kernels::of(own, index),
            None => Err(format!("the kernels take half precision and bf16, not {kind:?}")),
        }
    }

    /// Addresses of codes, scales and zeros.
    pub fn addresses(&self) -> Addresses {
        Addresses { codes: address(&self.codes), scales: address(&self.scales), zeros: address(&self.zeros) }
    }

    /// `x Wᵀ + b`.
    ///
    /// # Shapes
    /// `x`: `[.., in]` on this device, `bias`: `[out]`, result: `[.., out]` of the dtype of `x`.
    ///
    /// # Errors
    /// [`Error::Input`]: x has another number of channels or is elsewhere; and what the device reports.
    pub fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let Layout { out, input, .. } = self.layout;
        let mut shape = x.size();
        if shape.last() != Some(&(input as i64)) || x.device() != self.device() {
            return Err(Error::Input(format!(
                "the layer takes {input} channels on {:?}, x is {shape:?} on {:?}",
                self.device(),
                x.device()
            )));
        }
        let rows = x.numel() / input;
        if let Some(last) = shape.last_mut() {
            *last = out as i64;
        }
        let options = (x.kind(), x.device());
        if rows == 0 {
            return Ok(Tensor::f_zeros(&shape, options)?);
        }
        let bias =
            bias.map(|b| b.f_to_device(x.device())?.f_to_kind(x.kind())?.f_contiguous()).transpose()?;
        match self.kernels(x.kind()) {
            Ok(kernels) if rows <= ROWS => {
                let x = for_loads(x)?;
                let y = Tensor::f_empty(&shape, options)?;
                let at = [address(&y), address(&x), bias.as_ref().map_or(0, address)];
                queue(&kernels, &product(&self.layout, self.addresses(), at, rows))?;
                Ok(y)
            }
            Ok(_) => Ok(x.f_linear(&self.dequantize(x.kind())?, bias.as_ref())?),
            Err(_) => {
                let y = self.pieces(x.kind(), |w| Ok(x.f_linear(&w, None::<&Tensor>)?))?;
                let y = Tensor::f_cat(&y, -1)?;
                Ok(match bias {
                    Some(bias) => y.f_add(&bias)?,
                    None => y,
                })
            }
        }
    }

    /// What the codes mean, `[out, in]`.
    pub fn dequantize(&self, kind: Kind) -> Result<Tensor> {
        if let Ok(kernels) = self.kernels(kind) {
            let shape = [self.layout.out as i64, self.layout.input as i64];
            let whole = Tensor::f_empty(shape, (kind, self.device()))?;
            queue(&kernels, &dequantize(&self.layout, self.addresses(), address(&whole)))?;
            return Ok(whole);
        }
        Ok(Tensor::f_cat(&self.pieces(kind, Ok)?, 0)?)
    }

    /// `work` over pieces `[outputs, in]` of the weight, by operations.
    fn pieces(&self, kind: Kind, work: impl Fn(Tensor) -> Result<Tensor>) -> Result<Vec<Tensor>> {
        let (tiles, out) = (self.layout.tiles(), self.layout.out);
        let step = (PIECE / (self.layout.blocks() * nics_cuda::packed::BLOCK * TILE)).max(1);
        let piece = |from: usize| {
            let n = step.min(tiles - from);
            let outputs = (n * TILE).min(out - from * TILE);
            work(self.numbers(from as i64, n as i64)?.f_narrow(0, 0, outputs as i64)?.f_to_kind(kind)?)
        };
        (0..tiles).step_by(step).map(piece).collect()
    }

    /// What the codes of `n` tiles mean, float32 `[32 n, in]`.
    fn numbers(&self, from: i64, n: i64) -> Result<Tensor> {
        let bits = i64::from(self.layout.bits);
        let (blocks, groups) = (self.layout.blocks() as i64, self.layout.groups() as i64);
        let (input, group) = (self.layout.input as i64, self.layout.group as i64);
        let device = self.device();
        // Bits from these places on of the vectors: [n, blocks, bits, places, halves of a word, lanes, columns]
        let words = self.codes.f_narrow(0, from, n)?.f_reshape([n, blocks, bits, 1, 1, 32, 4])?;
        let at = |places: &[i32], mask: i64| -> Result<Tensor> {
            let both: Vec<i32> = places.iter().flat_map(|p| [*p, p + 16]).collect();
            let both = Tensor::f_from_slice(&both)?
                .f_reshape([places.len() as i64, 2, 1, 1])?
                .f_to_device(device)?;
            Ok(words.f_bitwise_right_shift(&both)?.f_bitwise_and(mask)?.f_to_kind(Kind::Uint8)?)
        };
        let each = if bits == 3 { 5 } else { 16 / bits };
        let places: Vec<i32> = (0..each).map(|i| (i * bits) as i32).collect();
        let mut codes = at(&places, (1 << bits) - 1)?.f_reshape([n, blocks, bits * each, 2, 32, 4])?;
        if bits == 3 {
            // The bits that are left over, one from each vector.
            let weights =
                Tensor::f_from_slice(&[1u8, 2, 4])?.f_reshape([3, 1, 1, 1, 1])?.f_to_device(device)?;
            let last = at(&[15], 1)?.f_mul(&weights)?;
            let last = last.f_sum_dim_intlist([2].as_slice(), false, Kind::Uint8)?;
            codes = Tensor::f_cat(&[codes, last], 2)?;
        }
        // [n, block, s, m, k, r, half, g, t, column] -> [n, m, r, g; block, column, t, s, k, half]
        let codes = codes.f_reshape([n, blocks, 2, 2, 2, 2, 2, 8, 4, 4])?;
        let codes = codes.f_permute([0, 3, 5, 7, 1, 9, 8, 2, 4, 6])?.f_reshape([n * 32, -1])?;
        let codes = codes.f_narrow(1, 0, input)?.f_to_kind(Kind::Float)?;
        // [n, group, g, i] -> [n, i, g, group]
        let parameters = |t: &Tensor| -> Result<Tensor> {
            let own = t.f_narrow(0, from, n)?.f_permute([0, 3, 2, 1])?.f_reshape([n * 32, groups, 1])?;
            Ok(own.f_to_kind(Kind::Float)?)
        };
        let codes = codes.f_reshape([n * 32, groups, group])?;
        let meant = codes.f_sub(&parameters(&self.zeros)?)?.f_mul(&parameters(&self.scales)?)?;
        Ok(meant.f_reshape([n * 32, input])?)
    }
}

/// Queues a launch over the weight's own addresses and those of tensors that the caller has made for it.
fn queue(kernels: &Kernels, launch: &Launch) -> Result<()> {
    // SAFETY: the addresses are those of contiguous tensors of this device with the shapes of the layout. They live through
    // the call; what is freed after it is used again by libtorch behind the kernel only, on the same stream.
    unsafe { kernels.launch(launch) }.map_err(|e| Error::Device(e.to_string()))
}

fn address(t: &Tensor) -> u64 {
    t.data_ptr() as u64
}

/// The same values as kernels load them: side by side, from a multiple of 16 bytes on.
fn for_loads(x: &Tensor) -> Result<Tensor> {
    let x = x.f_contiguous()?;
    if address(&x).is_multiple_of(16) {
        return Ok(x);
    }
    Ok(copied(&x)?)
}
