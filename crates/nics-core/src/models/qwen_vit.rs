//! What the towers of Qwen2-VL and Qwen2.5-VL share, beside transformers' `modeling_qwen2_vl.py`: the embedding of patches,
//! attention within segments, rotary rows of a grid, the merger. Their blocks are in [`super::qwen2_vl`] and
//! [`super::qwen2_5_vl`].

use tch::{Device, Kind, Tensor};

use super::vit::{MAX_LAYERS, MAX_SIZE, linear, sdpa};
use super::{DecoderConfig, ProjectionVisitor, visit_below, visit_linears};
use crate::Result;
use crate::checkpoint::TensorPath;
use crate::nn::{Activation, Norm, Rope};
use crate::seam::Projection;
use crate::vision::{Layout, Prepared, VisionError, senseless};

/// Larger than any edge of a patch or token.
const MAX_EDGE: i64 = 1 << 10;

/// What both towers are built from.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Width of the MLP.
    pub intermediate: i64,
    /// Width of the language model.
    pub out: i64,
    /// Heads.
    pub heads: i64,
    /// Edge of a patch, in pixels.
    pub patch: i64,
    /// Frames of a patch.
    pub temporal: i64,
    /// Patches along the edge of a token.
    pub merge: i64,
    /// In the MLP.
    pub activation: Activation,
}

impl VisionConfig {
    pub(super) fn checked(self, text: &DecoderConfig) -> Result<Self> {
        let sizes = [
            ("vision_config.hidden_size", self.hidden, MAX_SIZE),
            ("vision_config.intermediate_size", self.intermediate, MAX_SIZE),
            ("vision_config.num_heads", self.heads, MAX_SIZE),
            ("vision_config.patch_size", self.patch, MAX_EDGE),
            ("vision_config.temporal_patch_size", self.temporal, MAX_EDGE),
            ("vision_config.spatial_merge_size", self.merge, MAX_EDGE),
        ];
        if let Some((field, found, most)) = sizes.into_iter().find(|(_, n, most)| !(1..=*most).contains(n)) {
            return Err(senseless(field, format!("is {found}, expected 1 to {most}")));
        }
        if !(1..=MAX_LAYERS).contains(&self.depth) {
            let reason = format!("is {}, expected 1 to {MAX_LAYERS}", self.depth);
            return Err(senseless("vision_config.depth", reason));
        }
        if self.hidden % self.heads != 0 || (self.hidden / self.heads) % 4 != 0 {
            let reason = format!("is {}: heads of width {} / {0} cannot be turned", self.heads, self.hidden);
            return Err(senseless("vision_config.num_heads", reason));
        }
        if self.out != text.hidden {
            let reason = format!("is {}, but the language model is {} wide", self.out, text.hidden);
            return Err(senseless("vision_config.out_hidden_size", reason));
        }
        Ok(self)
    }

    /// Numbers of a patch's pixels.
    pub fn patch_len(&self) -> i64 {
        3 * self.temporal * self.patch * self.patch
    }
}

/// Patches to the tower's width: a convolution whose kernel is as large as its step, over patches that are cut already.
pub struct PatchEmbed {
    /// `proj.weight`, `[hidden, 3, temporal, patch, patch]`.
    pub proj: Tensor,
}

impl PatchEmbed {
    pub(super) fn load(at: &TensorPath, c: &VisionConfig) -> Result<Self> {
        let proj = at.at("proj").tensor("weight", &[c.hidden, 3, c.temporal, c.patch, c.patch])?;
        Ok(Self { proj })
    }

    /// `[patches, 3 * temporal * patch * patch]` to `[patches, hidden]`.
    pub(super) fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let pixels = pixels.f_to_device(self.proj.device())?.f_to_kind(self.proj.kind())?;
        let none: Option<&Tensor> = None;
        Ok(pixels.f_linear(&self.proj.f_flatten(1, -1)?, none)?)
    }
}

/// Attention of patches within segments.
pub struct VisionAttention {
    /// `[3 * hidden, hidden]`.
    pub qkv: Box<dyn Projection>,
    /// `[hidden, hidden]`.
    pub proj: Box<dyn Projection>,
    heads: i64,
}

impl VisionAttention {
    pub(super) fn load(at: &TensorPath, c: &VisionConfig) -> Result<Self> {
        Ok(Self {
            qkv: linear(&at.at("qkv"), c.hidden, 3 * c.hidden)?,
            proj: linear(&at.at("proj"), c.hidden, c.hidden)?,
            heads: c.heads,
        })
    }

    /// `x`: `[patches, hidden]`, divided into segments of these lengths that do not see each other; result: the same.
    pub(super) fn forward(&self, x: &Tensor, rope: &Rope, segments: &[i64]) -> Result<Tensor> {
        let (patches, hidden) = x.size2()?;
        let d = hidden / self.heads;
        let qkv = self.qkv.forward(x)?.f_view([patches, 3, self.heads, d])?;
        // The rotation is in float32 whatever the dtype, as the reference does it.
        let turned = |i: i64| -> Result<Tensor> {
            let x = qkv.f_select(1, i)?;
            Ok(rope.apply(&x.f_to_kind(Kind::Float)?)?.f_to_kind(x.kind())?)
        };
        let (q, k, v) = (turned(0)?, turned(1)?, qkv.f_select(1, 2)?);
        let mut outs = Vec::new();
        let mut at = 0;
        // Neighbours of one length go together.
        for same in segments.chunk_by(|a, b| a == b) {
            let (n, len) = (same.len() as i64, same[0]);
            // [n * len, heads, d] -> [n, heads, len, d]
            let part = |x: &Tensor| -> Result<Tensor> {
                let x = x.f_narrow(0, at, n * len)?.f_reshape([n, len, self.heads, d])?;
                Ok(x.f_transpose(1, 2)?)
            };
            let out = sdpa(&part(&q)?, &part(&k)?, &part(&v)?)?;
            outs.push(out.f_transpose(1, 2)?.f_reshape([n * len, hidden])?);
            at += n * len;
        }
        self.proj.forward(&Tensor::f_cat(&outs, 0)?)
    }
}

/// Neighbouring patches to a token of the language model: `mlp.2(gelu(mlp.0(patches side by side)))`.
pub struct PatchMerger {
    /// Over each patch.
    pub ln_q: Norm,
    /// `mlp.0`, `[hidden * merge², hidden * merge²]`.
    pub first: Box<dyn Projection>,
    /// `mlp.2`, `[out, hidden * merge²]`.
    pub second: Box<dyn Projection>,
    width: i64,
}

impl PatchMerger {
    pub(super) fn load(at: &TensorPath, c: &VisionConfig, rms: bool) -> Result<Self> {
        let width = c.hidden * c.merge * c.merge;
        Ok(Self {
            ln_q: Norm::load(&at.at("ln_q"), c.hidden, EPS, rms)?,
            first: linear(&at.at("mlp.0"), width, width)?,
            second: linear(&at.at("mlp.2"), width, c.out)?,
            width,
        })
    }

    /// `[patches, hidden]` to `[tokens, out]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.first.forward(&self.ln_q.forward(x)?.f_reshape([-1, self.width])?)?;
        self.second.forward(&Activation::Gelu.forward(&x)?)
    }

    /// The projections by their names below the merger.
    pub(super) fn projections(&mut self) -> [(&'static str, &mut Box<dyn Projection>); 2] {
        [("mlp.0", &mut self.first), ("mlp.2", &mut self.second)]
    }
}

/// Added in every norm of the towers.
pub(super) const EPS: f64 = 1e-6;
/// Base of the towers' rotary embeddings.
const THETA: f32 = 10_000.0;

/// Rotary rows of a grid's patches, in their order: of a head's angles the first half turns with the row, the second with
/// the column; `[patches, head_dim]`.
pub(super) fn rope_of([t, h, w]: [usize; 3], c: &VisionConfig, device: Device) -> Result<Rope> {
    let (merge, head_dim) = (c.merge as usize, (c.hidden / c.heads) as usize);
    let frequencies: Vec<f32> =
        (0..head_dim / 4).map(|j| 1.0 / THETA.powf(2.0 * j as f32 / (head_dim / 2) as f32)).collect();
    let mut angles = Vec::with_capacity(h * w * head_dim / 2);
    for (row, column) in cells(h, w, merge) {
        angles.extend(frequencies.iter().map(|f| row as f32 * f));
        angles.extend(frequencies.iter().map(|f| column as f32 * f));
    }
    let angles = Tensor::f_from_slice(&angles)?.f_view([(h * w) as i64, (head_dim / 2) as i64])?;
    let angles = Tensor::f_cat(&[&angles, &angles], -1)?.f_repeat([t as i64, 1])?.f_to_device(device)?;
    Ok(Rope { cos: angles.f_cos()?, sin: angles.f_sin()? })
}

/// Rows and columns of the patches of one moment in their order: block by block of those that become one token.
pub(crate) fn cells(h: usize, w: usize, merge: usize) -> impl Iterator<Item = (usize, usize)> {
    let blocks = (0..h / merge).flat_map(move |y| (0..w / merge).map(move |x| (y, x)));
    blocks.flat_map(move |(y, x)| {
        (0..merge).flat_map(move |dy| (0..merge).map(move |dx| (y * merge + dy, x * merge + dx)))
    })
}

/// The grid of prepared patches, checked against the tower.
pub(super) fn grid_of(media: &Prepared, c: &VisionConfig) -> Result<[usize; 3]> {
    let refused = || {
        let expected = format!(
            "[patches, {}] with a grid of time, height and width whose edges are multiples of {}",
            c.patch_len(),
            c.merge
        );
        VisionError::Shape { what: "the tower's input", found: media.pixels.size(), expected }
    };
    let Layout::Patches { grid: [t, h, w], .. } = media.layout else { return Err(refused().into()) };
    let merge = c.merge as usize;
    let patches = t.checked_mul(h).and_then(|n| n.checked_mul(w)).unwrap_or(0);
    if patches == 0
        || h % merge != 0
        || w % merge != 0
        || media.pixels.size() != [patches as i64, c.patch_len()]
    {
        return Err(refused().into());
    }
    Ok([t, h, w])
}

/// What messages about missing tensors and wrong shapes give as their reason.
pub(super) fn because(c: &VisionConfig) -> String {
    format!(
        "config.json (vision_config: width {}, intermediate {}, depth {}, patch_size {}, temporal_patch_size {}, \
         spatial_merge_size {}, output {})",
        c.hidden, c.intermediate, c.depth, c.patch, c.temporal, c.merge, c.out
    )
}

/// A block, as visitors see it.
pub(super) trait Block {
    /// The parameters of its norms, by their names below the block.
    fn norms(&mut self) -> Vec<(&'static str, &mut Tensor)>;

    /// Its linear layers, by their names below the block.
    fn projections(&mut self) -> Vec<(&'static str, &mut Box<dyn Projection>)>;
}

/// Hands every linear layer of a tower to `f`.
pub(super) fn visit_projections(
    blocks: &mut [impl Block],
    merger: &mut PatchMerger,
    f: &mut ProjectionVisitor,
) -> Result<()> {
    for (l, block) in blocks.iter_mut().enumerate() {
        for (name, projection) in block.projections() {
            f(&format!("visual.blocks.{l}.{name}"), projection)?;
        }
    }
    for (name, projection) in merger.projections() {
        f(&format!("visual.merger.{name}"), projection)?;
    }
    Ok(())
}

/// Hands every parameter of a tower to `f`.
pub(super) fn visit_parameters(
    patch_embed: &mut PatchEmbed,
    blocks: &mut [impl Block],
    merger: &mut PatchMerger,
    f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>,
) -> Result<()> {
    f("visual.patch_embed.proj.weight", &mut patch_embed.proj)?;
    for (l, block) in blocks.iter_mut().enumerate() {
        let at = format!("visual.blocks.{l}");
        visit_below(&at, block.norms(), f)?;
        visit_linears(&at, block.projections(), f)?;
    }
    visit_below("visual.merger.ln_q", merger.ln_q.parameters(), f)?;
    visit_linears("visual.merger", merger.projections(), f)
}
