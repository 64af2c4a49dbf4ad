//! Running one decoder layer, with a look at what its linear layers see.

use nics_core::cache::NoCache;
use nics_core::models::decoder::DecoderLayer;
use nics_core::seam::{KvCache, Mask, Site};
use tch::Tensor;

use crate::batch::Seats;
use crate::operators::Tap;
use crate::{Error, Result};

/// What a layer computes on some rows: the inputs of its operators, and its branches' outputs.
#[derive(Debug)]
pub struct Taps {
    inputs: [Tensor; 4],
    /// Output of attention, behind its projection, `[rows, hidden]`.
    pub attention: Tensor,
    /// Output of the MLP, `[rows, hidden]`.
    pub mlp: Tensor,
    /// Output of the layer, `[rows, hidden]`.
    pub output: Tensor,
}

impl Taps {
    /// The input of an operator, `[rows, channels]`.
    pub fn input(&self, tap: Tap) -> &Tensor {
        &self.inputs[tap as usize]
    }
}

fn site<'a>(seats: &'a Seats, input: &'a Tensor, window: Option<usize>) -> Result<Site<'a>> {
    if let Some(window) = window {
        return Err(Error::Input(format!(
            "a layer attends over a window of {window} tokens; the method covers full attention alone"
        )));
    }
    Ok(Site {
        layer: 0,
        rows: &seats.rows,
        rope: &seats.rope,
        input,
        mask: Mask::Additive(&seats.mask),
        want_scores: None,
        scale: seats.scale,
    })
}

/// Runs a layer on rows `x`, `[rows, hidden]`.
pub fn layer(layer: &DecoderLayer, seats: &Seats, x: &Tensor) -> Result<Taps> {
    let site = site(seats, x, layer.window)?;
    let before = layer.input_layernorm.forward(x)?;
    let attn = &layer.self_attn;
    let (q, k, v) = attn.qkv(&before)?;
    let rows = x.size()[0];
    let attended = NoCache::new().attend(&site, &q, &k, &v)?.out.f_reshape([rows, -1])?;
    let attention = attn.o_proj.forward(&attended)?;
    let middle = x.f_add(&attention)?;
    let after = layer.post_attention_layernorm.forward(&middle)?;
    let gated = gated(layer, &after)?;
    let mlp = layer.mlp.down_proj.forward(&gated)?;
    let output = middle.f_add(&mlp)?;
    Ok(Taps { inputs: [before, attended, after, gated], attention, mlp, output })
}

/// What the MLP's output projection sees of normed rows.
fn gated(layer: &DecoderLayer, x: &Tensor) -> Result<Tensor> {
    let both = layer.mlp.gate_proj.forward_many(&[&*layer.mlp.up_proj], x)?;
    let [gate, up] = both.as_slice() else {
        return Err(Error::Input("forward_many gave another number of results than projections".into()));
    };
    Ok(gate.f_silu()?.f_mul(up)?)
}

/// What an operator's module gives for its input `x`, `[rows, channels]` to `[rows, hidden]`.
pub fn module(layer: &DecoderLayer, seats: &Seats, tap: Tap, x: &Tensor) -> Result<Tensor> {
    match tap {
        Tap::Attention => {
            let site = site(seats, x, layer.window)?;
            Ok(layer.self_attn.forward(x, &site, &mut NoCache::new())?.out)
        }
        Tap::Output => Ok(layer.self_attn.o_proj.forward(x)?),
        Tap::Mlp => Ok(layer.mlp.down_proj.forward(&gated(layer, x)?)?),
        Tap::Down => Ok(layer.mlp.down_proj.forward(x)?),
    }
}
