//! A decoder layer as the search sees it: its weights in float32, and what they can be exchanged with.

use nics_core::models::decoder::{DecoderLayer, Qkv};
use nics_core::nn::Linear;
use nics_core::seam::Projection;
use tch::{Kind, Tensor};

use crate::quantize::{QuantSpec, RoundedLinear};
use crate::{Error, Result};

/// A linear layer of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Queries, keys and values in one.
    Qkv,
    /// Output of attention.
    O,
    /// Gate of the MLP.
    Gate,
    /// The MLP's other half of what goes in.
    Up,
    /// Output of the MLP.
    Down,
}

impl Role {
    /// The roles that a layer has, in its order.
    pub fn of(layer: &DecoderLayer) -> &'static [Self] {
        match layer.self_attn.qkv_proj {
            Qkv::Apart { .. } => &[Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down],
            Qkv::Fused(_) => &[Self::Qkv, Self::O, Self::Gate, Self::Up, Self::Down],
        }
    }

    /// Its projection in a layer that has it.
    fn projection(self, layer: &mut DecoderLayer) -> Result<&mut Box<dyn Projection>> {
        let attn = &mut layer.self_attn;
        match (self, &mut attn.qkv_proj) {
            (Self::Q, Qkv::Apart { q_proj: p, .. })
            | (Self::K, Qkv::Apart { k_proj: p, .. })
            | (Self::V, Qkv::Apart { v_proj: p, .. })
            | (Self::Qkv, Qkv::Fused(p)) => Ok(p),
            (Self::O, _) => Ok(&mut attn.o_proj),
            (Self::Gate, _) => Ok(&mut layer.mlp.gate_proj),
            (Self::Up, _) => Ok(&mut layer.mlp.up_proj),
            (Self::Down, _) => Ok(&mut layer.mlp.down_proj),
            (role, _) => Err(Error::Input(format!("a layer without a projection {role:?}"))),
        }
    }
}

/// A norm of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Norm {
    /// Before attention.
    Attention,
    /// Before the MLP.
    Mlp,
}

/// Weight `[out, in]` and bias `[out]` of a linear layer.
#[derive(Debug)]
pub struct Weights {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

impl Clone for Weights {
    fn clone(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), bias: self.bias.as_ref().map(Tensor::shallow_clone) }
    }
}

/// The weights of a decoder layer. They are values: nothing here writes into a tensor, so that a copy may share them.
#[derive(Debug)]
pub struct LayerWeights {
    norms: [Tensor; 2],
    linears: Vec<(Role, Weights)>,
    /// Bits of the inputs of all linear layers, once these are quantized with activations.
    act_bits: Option<u8>,
}

impl Clone for LayerWeights {
    fn clone(&self) -> Self {
        Self {
            norms: self.norms.each_ref().map(Tensor::shallow_clone),
            linears: self.linears.clone(),
            act_bits: self.act_bits,
        }
    }
}

impl LayerWeights {
    /// Those of a layer, in float32.
    pub fn of(layer: &mut DecoderLayer) -> Result<Self> {
        let float = |t: &Tensor| -> Result<Tensor> { Ok(t.f_detach()?.f_to_kind(Kind::Float)?) };
        let roles = Role::of(layer);
        let mut linears = Vec::with_capacity(roles.len());
        for &role in roles {
            let p = role.projection(layer)?;
            let bias = p.bias().as_ref().map(float).transpose()?;
            linears.push((role, Weights { weight: float(&p.dense()?)?, bias }));
        }
        let norms = [float(&layer.input_layernorm.weight)?, float(&layer.post_attention_layernorm.weight)?];
        Ok(Self { norms, linears, act_bits: None })
    }

    /// The linear layers, in their order.
    pub fn linears(&self) -> &[(Role, Weights)] {
        &self.linears
    }

    /// The linear layers, for an exchange.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (Role, &mut Weights)> {
        self.linears.iter_mut().map(|(role, w)| (*role, w))
    }

    /// A linear layer's, where the layer has it.
    ///
    /// # Errors
    /// A role that the layer does not have.
    pub fn linear(&self, role: Role) -> Result<&Weights> {
        let found = self.linears.iter().find(|(r, _)| *r == role);
        found.map(|(_, w)| w).ok_or_else(|| Error::Input(format!("a layer without a projection {role:?}")))
    }

    /// A linear layer's, for an exchange.
    ///
    /// # Errors
    /// A role that the layer does not have.
    pub fn linear_mut(&mut self, role: Role) -> Result<&mut Weights> {
        let found = self.linears.iter_mut().find(|(r, _)| *r == role);
        found.map(|(_, w)| w).ok_or_else(|| Error::Input(format!("a layer without a projection {role:?}")))
    }

    /// Weights of all linear layers, biases aside.
    pub fn numel(&self) -> u64 {
        self.linears.iter().map(|(_, w)| w.weight.numel() as u64).sum()
    }

    /// A norm's, `[hidden]`.
    pub fn norm(&self, norm: Norm) -> &Tensor {
        &self.norms[norm as usize]
    }

    /// A norm's, for an exchange.
    pub fn norm_mut(&mut self, norm: Norm) -> &mut Tensor {
        &mut self.norms[norm as usize]
    }

    /// Every linear layer rounded.
    pub fn quantized(&self, spec: &QuantSpec) -> Result<Self> {
        let mut all = self.clone();
        for (_, w) in &mut all.linears {
            w.weight = spec.weight(&w.weight)?;
        }
        all.act_bits = spec.act_bits;
        Ok(all)
    }

    /// The same with inputs rounded to so many bits, for weights that are rounded already.
    #[must_use]
    pub fn with_act_bits(mut self, bits: Option<u8>) -> Self {
        self.act_bits = bits;
        self
    }

    /// As parts of a layer, in the dtype of its computation.
    pub fn parts(&self, kind: Kind) -> Result<Parts> {
        let cast = |t: &Tensor| t.f_to_kind(kind);
        let mut linears = Vec::with_capacity(self.linears.len());
        for (role, w) in &self.linears {
            let w = Weights { weight: cast(&w.weight)?, bias: w.bias.as_ref().map(cast).transpose()? };
            linears.push((*role, projection(w, self.act_bits)));
        }
        Ok(Parts { norms: Some([cast(&self.norms[0])?, cast(&self.norms[1])?]), linears })
    }
}

/// A projection over some weights, which rounds its input when there is a width for it.
pub fn projection(w: Weights, act_bits: Option<u8>) -> Box<dyn Projection> {
    match act_bits {
        None => Box::new(Linear::new(w.weight, w.bias)),
        Some(bits) => Box::new(RoundedLinear::new(w.weight, w.bias, bits)),
    }
}

/// Parts of a layer, in it or waiting to be.
pub struct Parts {
    norms: Option<[Tensor; 2]>,
    linears: Vec<(Role, Box<dyn Projection>)>,
}

impl Parts {
    /// Some projections alone.
    pub fn linears(linears: Vec<(Role, Box<dyn Projection>)>) -> Self {
        Self { norms: None, linears }
    }

    /// Exchanges these parts for those in the layer.
    ///
    /// # Errors
    /// A part that the layer does not have; nothing is exchanged then.
    pub fn swap(&mut self, layer: &mut DecoderLayer) -> Result<()> {
        for (role, _) in &self.linears {
            role.projection(layer)?;
        }
        if let Some([attention, mlp]) = &mut self.norms {
            std::mem::swap(attention, &mut layer.input_layernorm.weight);
            std::mem::swap(mlp, &mut layer.post_attention_layernorm.weight);
        }
        for (role, p) in &mut self.linears {
            std::mem::swap(p, role.projection(layer)?);
        }
        Ok(())
    }

    /// Runs `f` with these parts in the layer, and puts back what was there.
    pub fn within<T>(
        &mut self,
        layer: &mut DecoderLayer,
        f: impl FnOnce(&mut DecoderLayer) -> Result<T>,
    ) -> Result<T> {
        self.swap(layer)?;
        let result = f(layer);
        self.swap(layer)?;
        result
    }
}
