//! What all routers share behind their inputs: a projection, residual blocks, a head.

use nics_core::checkpoint::TensorPath;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use super::{Dense, InitArgs, LayerNorm, Storage};
use crate::{Error, Result};

/// Dropout with random numbers of its own, so that a step's masks follow from seed and step alone.
#[derive(Debug)]
pub struct Dropout {
    rate: f64,
    rng: ChaCha8Rng,
}

impl Dropout {
    /// Masks of one training step.
    pub fn new(rate: f64, seed: u64, step: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Apart from the streams of the shuffles, which count epochs.
        rng.set_stream(step | 1 << 63);
        Self { rate, rng }
    }

    fn apply(&mut self, x: &Tensor) -> Result<Tensor> {
        if self.rate <= 0.0 {
            return Ok(x.shallow_clone());
        }
        let kept = 1.0 / (1.0 - self.rate) as f32;
        let mask: Vec<f32> =
            (0..x.numel()).map(|_| if self.rng.random::<f64>() < self.rate { 0.0 } else { kept }).collect();
        Ok(x.f_mul(&Tensor::f_from_slice(&mask)?.f_reshape(x.size())?.f_to_device(x.device())?)?)
    }
}

/// `r + W2 gelu(W1 LN(x))` with `r = x`, or `Wd x` where the width changes.
#[derive(Debug)]
struct Block {
    layer_norm: LayerNorm,
    expand: Dense,
    contract: Dense,
    dim_change: Option<Dense>,
}

/// The backbone: `input_projection`, optional positions, `blocks`, `output_layer`.
#[derive(Debug)]
pub struct Backbone {
    input_projection: Dense,
    /// `[positions, d0]`.
    position_embedding: Option<Tensor>,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Dense,
}

impl Backbone {
    /// Reads everything under `at`, e.g. `backbone`.
    pub fn load(at: &TensorPath, args: &InitArgs, storage: Storage) -> Result<Self> {
        let dims = &args.hidden_dims;
        let (first, last) = (dims[0], dims[dims.len() - 1]);
        let mut blocks = Vec::with_capacity(dims.len());
        for (i, &from) in dims.iter().enumerate() {
            let to = dims.get(i + 1).copied().unwrap_or(last);
            let at = at.at("blocks").at(i);
            let inner = from * args.expansion_factor;
            blocks.push(Block {
                layer_norm: LayerNorm::load(&at.at("layer_norm"), from)?,
                expand: Dense::load(&at.at("mlp.0"), from, inner, storage)?,
                contract: Dense::load(&at.at("mlp.3"), inner, to, storage)?,
                dim_change: if from == to {
                    None
                } else {
                    Some(Dense::load(&at.at("dim_change"), from, to, storage)?)
                },
            });
        }
        let position_embedding = if args.use_position_embedding {
            let rows = args.max_position_embeddings;
            Some(if at.has("position_embedding") {
                at.tensor("position_embedding", &[rows, first])?
            } else {
                sinusoids(rows, first)?.f_to_device(at.device())?
            })
        } else {
            None
        };
        Ok(Self {
            input_projection: Dense::load(&at.at("input_projection"), first, first, storage)?,
            position_embedding,
            blocks,
            norm: LayerNorm::load(&at.at("output_layer.0"), last)?,
            head: Dense::load(&at.at("output_layer.1"), last, args.output_dim, storage)?,
        })
    }

    /// # Shapes
    /// `x`: `[rows, d0]`; `positions`: int64 `[rows]`, where the router has positions; result: `[rows, output_dim]`.
    pub fn forward(
        &self,
        x: &Tensor,
        positions: Option<&Tensor>,
        mut drop: Option<&mut Dropout>,
    ) -> Result<Tensor> {
        let mut x = self.input_projection.forward(x)?;
        if let Some(table) = &self.position_embedding {
            let rows = x.size()[0];
            let positions =
                positions.filter(|p| p.size() == [rows] && p.kind() == Kind::Int64).ok_or_else(|| {
                    Error::Input(format!("this router needs the positions of its {rows} rows, int64"))
                })?;
            let limit = table.size()[0];
            if rows > 0 {
                let (low, high) =
                    (positions.f_min()?.f_int64_value(&[])?, positions.f_max()?.f_int64_value(&[])?);
                if low < 0 || high >= limit {
                    let found = if low < 0 { low } else { high };
                    return Err(Error::Input(format!(
                        "position {found} is outside the router's table of {limit}"
                    )));
                }
            }
            x = x.f_add(&table.f_index_select(0, positions)?)?;
        }
        for block in &self.blocks {
            let mut inner = block.expand.forward(&block.layer_norm.forward(&x)?)?.f_gelu("none")?;
            if let Some(drop) = drop.as_deref_mut() {
                inner = drop.apply(&inner)?;
            }
            let mut added = block.contract.forward(&inner)?;
            if let Some(drop) = drop.as_deref_mut() {
                added = drop.apply(&added)?;
            }
            let residual = match &block.dim_change {
                Some(change) => change.forward(&x)?,
                None => x,
            };
            x = residual.f_add(&added)?;
        }
        self.head.forward(&self.norm.forward(&x)?)
    }

    /// Hands every layer, with its name under the backbone, to `f`.
    pub(super) fn visit(&self, dense: &mut dyn FnMut(&str, &Dense), norm: &mut dyn FnMut(&str, &LayerNorm)) {
        dense("backbone.input_projection", &self.input_projection);
        for (i, block) in self.blocks.iter().enumerate() {
            let at = format!("backbone.blocks.{i}");
            norm(&format!("{at}.layer_norm"), &block.layer_norm);
            dense(&format!("{at}.mlp.0"), &block.expand);
            dense(&format!("{at}.mlp.3"), &block.contract);
            if let Some(change) = &block.dim_change {
                dense(&format!("{at}.dim_change"), change);
            }
        }
        norm("backbone.output_layer.0", &self.norm);
        dense("backbone.output_layer.1", &self.head);
    }

    /// The table of positions, where there is one.
    pub(super) fn positions(&self) -> Option<Tensor> {
        self.position_embedding.as_ref().map(Tensor::shallow_clone)
    }
}

/// The table of Vaswani et al. (2017): sine in even columns, cosine in odd ones, base 10,000. `[rows, width]`.
pub(super) fn sinusoids(rows: i64, width: i64) -> Result<Tensor, tch::TchError> {
    let mut table = vec![0f32; (rows * width) as usize];
    for (at, value) in table.iter_mut().enumerate() {
        let (row, column) = (at as i64 / width, at as i64 % width);
        let angle = row as f64 / 10_000f64.powf((column / 2 * 2) as f64 / width as f64);
        *value = if column % 2 == 0 { angle.sin() } else { angle.cos() } as f32;
    }
    Tensor::f_from_slice(&table)?.f_reshape([rows, width])
}
