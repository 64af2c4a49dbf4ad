//! A linear layer whose weights are kept in 2, 3, 4 or 8 bits.

mod on_device;
mod panels;

use std::cell::RefCell;
use std::sync::Once;

use nics_kernels::ValuesMut;
use nics_kernels::packed::{Packed, PackedProduct, Rounding, packed};
use tch::{Device, Kind, Tensor};

pub use on_device::DeviceWeight;
pub use panels::by_panels;

use super::memory::{values, values_mut};
use crate::seam::{Projection, one_by_one};
use crate::{Error, Result};

/// `y = x Wᵀ + b`, where `W` is codes in groups with a scale and a zero each, and `x` is rounded to integers on the way
/// ([`Rounding`]). On the CPU rows go through [`nics_kernels::packed`], which needs no dequantized copy, but for hundreds of rows
/// in bfloat16, which [`by_panels`] multiplies. On another device the weight is laid out there when the first x comes from it
/// ([`DeviceWeight`]), and x is not rounded. Where gradients are asked for, the weight is dequantized for every call.
#[derive(Debug)]
pub struct PackedLinear {
    weight: Packed,
    /// `[out]`.
    bias: Option<Tensor>,
    rounding: Rounding,
    /// Inputs are taken as they are.
    exact: bool,
    /// What [`Projection::dense`] gives.
    kind: Kind,
    /// The weight where x came from, if that is not the CPU.
    elsewhere: RefCell<Option<DeviceWeight>>,
}

impl PackedLinear {
    /// A layer over codes `[out, in]`, uint8, with scales and zeros `[out, in / group]` (any float and uint8), and a bias
    /// `[out]`. `kind` is the dtype of the layer's inputs.
    ///
    /// # Errors
    /// [`Error::Input`]: shapes that do not fit each other, codes beyond `bits`, scales that are negative or no numbers.
    pub fn new(
        bits: u32,
        codes: &Tensor,
        scales: &Tensor,
        zeros: &Tensor,
        bias: Option<Tensor>,
        rounding: Rounding,
        kind: Kind,
    ) -> Result<Self> {
        let (out, input) = codes.size2()?;
        let (_, groups) = scales.size2()?;
        if groups == 0
            || input % groups != 0
            || scales.size() != [out, groups]
            || zeros.size() != [out, groups]
        {
            return Err(Error::Input(format!(
                "codes are {:?}, scales {:?} and zeros {:?}, expected [out, in], [out, groups] and [out, groups]",
                codes.size(),
                scales.size(),
                zeros.size()
            )));
        }
        if let Some(bias) = &bias
            && bias.size() != [out]
        {
            return Err(Error::Input(format!("the bias is {:?}, expected [{out}]", bias.size())));
        }
        let bytes = |t: &Tensor| -> Result<Vec<u8>> {
            Ok(Vec::try_from(&t.f_to_device(Device::Cpu)?.f_to_kind(Kind::Uint8)?.f_reshape([-1])?)?)
        };
        let scales = scales.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_reshape([-1])?;
        let scales: Vec<f32> = Vec::try_from(&scales)?;
        let (shape, group) = ([out as usize, input as usize], (input / groups) as usize);
        let weight = Packed::new(bits, shape, group, &bytes(codes)?, &scales, &bytes(zeros)?)
            .map_err(|e| Error::Input(e.to_string()))?;
        Ok(Self { weight, bias, rounding, exact: false, kind, elsewhere: RefCell::new(None) })
    }

    /// The same layer with inputs that are not rounded: the weight is dequantized for every call, which takes the memory of one
    /// dense layer at a time.
    #[must_use]
    pub fn with_exact_inputs(self) -> Self {
        Self { exact: true, ..self }
    }

    /// The weight as kernels read it.
    pub fn weight(&self) -> &Packed {
        &self.weight
    }

    /// How inputs are rounded; `None` when they are not.
    pub fn rounding(&self) -> Option<Rounding> {
        (!self.exact).then_some(self.rounding)
    }
}

/// The product on a device that is not the CPU; `None` when x needs a gradient, or the device's layout does not take the weight.
fn elsewhere(layer: &PackedLinear, x: &Tensor) -> Result<Option<Tensor>> {
    let device = x.device();
    if device == Device::Cpu || x.requires_grad() || !DeviceWeight::takes(&layer.weight) {
        return Ok(None);
    }
    let mut kept = layer.elsewhere.borrow_mut();
    let own = match kept.take().filter(|own| own.device() == device) {
        Some(own) => own,
        None => DeviceWeight::new(&layer.weight, device)?,
    };
    if let (Device::Cuda(_), Some(why)) = (device, own.obstacle(x.kind())) {
        static TOLD: Once = Once::new();
        TOLD.call_once(|| {
            tracing::warn!(
                "packed weights are multiplied by libtorch's operations, which are slower than kernels: {why}"
            );
        });
    }
    kept.insert(own).forward(x, layer.bias.as_ref()).map(Some)
}

/// Several layers over one `x`; `None` when that is not a case for the kernel.
fn by_kernel(layers: &[&PackedLinear], x: &Tensor) -> Result<Option<Vec<Tensor>>> {
    if layers.iter().any(|layer| layer.exact) {
        return Ok(None);
    }
    let x = if x.is_contiguous() { x.shallow_clone() } else { x.f_contiguous()? };
    let Some(xs) = values(&x) else { return Ok(None) };
    let mut shape = x.size();
    let Some(last) = shape.len().checked_sub(1) else { return Ok(None) };
    let input = shape[last] as usize;
    if xs.is_empty() {
        return Ok(None);
    }
    if let Some(other) = layers.iter().find(|layer| layer.weight.input() != input) {
        let own = other.weight.input();
        return Err(Error::Input(format!("the layer takes {own} channels, x has {input}")));
    }
    let rows = xs.len() / input;
    if panels::pay(rows, layers[0].rounding, x.kind()) {
        let flat = x.f_view([rows as i64, input as i64])?;
        let all = layers.iter().map(|layer| {
            shape[last] = layer.weight.out() as i64;
            Ok(by_panels(&layer.weight, layer.bias.as_ref(), &flat)?.f_view(&shape[..])?)
        });
        return all.collect::<Result<_>>().map(Some);
    }
    let mut ys = Vec::with_capacity(layers.len());
    for layer in layers {
        shape[last] = layer.weight.out() as i64;
        ys.push(x.f_new_empty(&shape, (x.kind(), x.device()))?);
    }
    let mut products = Vec::with_capacity(layers.len());
    for (layer, y) in layers.iter().zip(&mut ys) {
        let bias = match &layer.bias {
            None => None,
            Some(bias) => match values(bias) {
                Some(bias) => Some(bias),
                None => return Ok(None),
            },
        };
        let Some(y) = values_mut(y) else { return Ok(None) };
        products.push(PackedProduct { weight: &layer.weight, bias, y });
    }
    packed(&nics_kernels::pool::own(), xs, rows, layers[0].rounding, &mut products);
    Ok(Some(ys))
}

impl Projection for PackedLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = by_kernel(&[self], x)?.and_then(|mut ys| ys.pop()) {
            return Ok(y);
        }
        if let Some(y) = elsewhere(self, x)? {
            return Ok(y);
        }
        let weight = self.dense()?.f_to_device(x.device())?.f_to_kind(x.kind())?;
        Ok(x.f_linear(&weight, self.bias.as_ref())?)
    }

    fn forward_many(&self, others: &[&dyn Projection], x: &Tensor) -> Result<Vec<Tensor>> {
        let layers: Option<Vec<&Self>> =
            std::iter::once(Some(self)).chain(others.iter().map(|o| o.as_packed())).collect();
        if let Some(layers) = layers
            && layers.iter().all(|layer| layer.rounding == self.rounding)
            && let Some(ys) = by_kernel(&layers, x)?
        {
            return Ok(ys);
        }
        one_by_one(self, others, x)
    }

    fn as_packed(&self) -> Option<&PackedLinear> {
        Some(self)
    }

    fn dense(&self) -> Result<Tensor> {
        let (out, input) = (self.weight.out(), self.weight.input());
        let mut whole = vec![0f32; out * input];
        self.weight.dequantize_panel(&nics_kernels::pool::own(), 0, ValuesMut::F32(&mut whole));
        let whole = Tensor::f_from_slice(&whole)?.f_view([out as i64, input as i64])?;
        Ok(whole.f_to_kind(self.kind)?)
    }

    fn bias(&self) -> Option<Tensor> {
        self.bias.as_ref().map(Tensor::shallow_clone)
    }

    fn parameters(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        self.bias.as_mut().map(|bias| ("bias", bias)).into_iter().collect()
    }
}
