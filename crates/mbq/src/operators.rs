//! What is scaled together: the operators of a decoder layer, and the names of its parts in a checkpoint.
//!
//! | # | before it | linear layers | their input | output compared | weight |
//! |---|---|---|---|---|---|
//! | 1 | attention norm | q, k, v | normed rows | attention, with its output projection | attention |
//! | 2 | v | o | attended rows | o | attention |
//! | 3 | MLP norm | gate, up | normed rows | MLP | MLP |
//! | 4 | up | down | gated rows | down | MLP |
//!
//! Operator 2 exists where v and o are of one shape: with grouped queries, and where q, k and v are one layer, the output
//! projection is rounded unscaled.

use nics_core::models::{Decoder, ModelDims, decoder};
use serde::{Deserialize, Serialize};

use crate::layer::{LayerWeights, Norm, Role};
use crate::{QuantSpec, Result};

/// What stands before an operator and takes the inverse of its scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Previous {
    /// A norm.
    Norm(Norm),
    /// A linear layer, scaled by row.
    Linear(Role),
}

/// The branch of a layer whose sensitivity weighs an operator's errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Branch {
    /// Attention.
    Attention,
    /// MLP.
    Mlp,
}

/// Where an operator's input is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tap {
    /// Normed rows before attention.
    Attention,
    /// What the output projection of attention sees.
    Output,
    /// Normed rows before the MLP.
    Mlp,
    /// What the output of the MLP sees.
    Down,
}

impl Tap {
    /// All of them, in the order of a layer.
    pub const ALL: [Self; 4] = [Self::Attention, Self::Output, Self::Mlp, Self::Down];
}

/// Linear layers that share an input and its scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operator {
    /// What takes the inverse.
    pub previous: Previous,
    /// The linear layers.
    pub linears: &'static [Role],
    /// Their input.
    pub tap: Tap,
    /// Whose sensitivity weighs the error; its output is compared.
    pub branch: Branch,
}

const QKV: Operator = Operator {
    previous: Previous::Norm(Norm::Attention),
    linears: &[Role::Q, Role::K, Role::V],
    tap: Tap::Attention,
    branch: Branch::Attention,
};
const FUSED: Operator = Operator { linears: &[Role::Qkv], ..QKV };
const O: Operator = Operator {
    previous: Previous::Linear(Role::V),
    linears: &[Role::O],
    tap: Tap::Output,
    branch: Branch::Attention,
};
const GATE_UP: Operator = Operator {
    previous: Previous::Norm(Norm::Mlp),
    linears: &[Role::Gate, Role::Up],
    tap: Tap::Mlp,
    branch: Branch::Mlp,
};
const DOWN: Operator = Operator {
    previous: Previous::Linear(Role::Up),
    linears: &[Role::Down],
    tap: Tap::Down,
    branch: Branch::Mlp,
};

/// The operators of a layer.
///
/// # Errors
/// A layer without the projections that every decoder has.
pub fn operators(weights: &LayerWeights) -> Result<Vec<Operator>> {
    if weights.linear(Role::Qkv).is_ok() {
        return Ok(vec![FUSED, GATE_UP, DOWN]);
    }
    let (v, o) = (&weights.linear(Role::V)?.weight, &weights.linear(Role::O)?.weight);
    Ok(if v.size() == o.size() { vec![QKV, O, GATE_UP, DOWN] } else { vec![QKV, GATE_UP, DOWN] })
}

/// How a checkpoint names the parts of its layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// What stands before the number of a layer, e.g. `model.layers` or `language_model.model.layers`.
    layers: String,
    attention: String,
    /// Queries, keys and values, apart or in one.
    qkv: Vec<String>,
    o: String,
    mlp: String,
    gate_up_down: [String; 3],
    norms: [String; 2],
}

impl Names {
    /// Those of a decoder in whose checkpoint `layers` stands before the number of a layer.
    pub fn of(decoder: &Decoder, layers: &str) -> Self {
        Self::new(decoder.config().family.names, layers)
    }

    /// Those of a family.
    pub fn new(family: &decoder::Names, layers: &str) -> Self {
        let qkv = match family.wqkv {
            Some(name) => vec![name.to_owned()],
            None => ["q_proj", "k_proj", "v_proj"].map(str::to_owned).to_vec(),
        };
        Self {
            layers: layers.to_owned(),
            attention: family.self_attn.to_owned(),
            qkv,
            o: family.o_proj.to_owned(),
            mlp: family.mlp.to_owned(),
            gate_up_down: family.gate_up_down.map(str::to_owned),
            norms: family.norms.map(str::to_owned),
        }
    }

    /// What stands before the number of a layer.
    pub fn layers(&self) -> &str {
        &self.layers
    }

    /// The name of a linear layer.
    pub fn linear(&self, layer: usize, role: Role) -> String {
        let [gate, up, down] = &self.gate_up_down;
        let (part, name) = match role {
            Role::Q | Role::Qkv => (&self.attention, &self.qkv[0]),
            Role::K => (&self.attention, &self.qkv[1 % self.qkv.len()]),
            Role::V => (&self.attention, &self.qkv[2 % self.qkv.len()]),
            Role::O => (&self.attention, &self.o),
            Role::Gate => (&self.mlp, gate),
            Role::Up => (&self.mlp, up),
            Role::Down => (&self.mlp, down),
        };
        format!("{}.{layer}.{part}.{name}", self.layers)
    }

    /// The name of a norm.
    pub fn norm(&self, layer: usize, norm: Norm) -> String {
        format!("{}.{layer}.{}", self.layers, self.norms[norm as usize])
    }

    /// The name of what stands before an operator.
    pub fn previous(&self, layer: usize, op: &Operator) -> String {
        match op.previous {
            Previous::Norm(norm) => self.norm(layer, norm),
            Previous::Linear(role) => self.linear(layer, role),
        }
    }

    /// The names of an operator's linear layers.
    pub fn linears(&self, layer: usize, op: &Operator) -> Vec<String> {
        op.linears.iter().map(|r| self.linear(layer, *r)).collect()
    }
}

/// Whether every linear layer of a decoder of these dimensions can be cut into a specification's groups: asked before a long
/// calibration begins.
///
/// # Errors
/// [`crate::Error::GroupDoesNotDivide`], naming the layer.
pub fn check_groups(dims: &ModelDims, names: &Names, spec: &QuantSpec) -> Result<()> {
    spec.check()?;
    let attended = dims.heads * dims.head_dim;
    for (role, input) in [
        (Role::Q, dims.hidden),
        (Role::O, attended),
        (Role::Gate, dims.hidden),
        (Role::Down, dims.intermediate),
    ] {
        spec.fits(&names.linear(0, role), input)?;
    }
    Ok(())
}
