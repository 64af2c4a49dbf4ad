//! The vision transformer of CLIP and SigLIP: patches, positions, layers of attention and MLP before which a layer norm
//! stands.
//!
//! Reads beside transformers' `modeling_clip.py` and `modeling_siglip.py`, whose layers are the same: [`EncoderLayer`] is
//! `CLIPEncoderLayer` and `SiglipEncoderLayer`, [`Tower`] their `…VisionTransformer` as far as LLaVA uses it, that is
//! without what comes behind the last layer. [`super::clip`] and [`super::siglip`] say in what their tower differs.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::{ProjectionVisitor, visit_below, visit_linears};
use crate::checkpoint::TensorPath;
use crate::nn::{Activation, LayerNorm, projection};
use crate::seam::Projection;
use crate::vision::{VisionError, senseless};
use crate::{Error, Result};

/// What a tower is built from.
#[derive(Debug, Clone, PartialEq)]
pub struct TowerConfig {
    /// Width of the residual stream.
    pub hidden: i64,
    /// Width of the MLP.
    pub intermediate: i64,
    /// Layers that the checkpoint has.
    pub layers: usize,
    /// Heads.
    pub heads: i64,
    /// Edge of a picture, in pixels.
    pub image_size: i64,
    /// Edge of a patch, in pixels.
    pub patch_size: i64,
    /// Added to the variance in every norm.
    pub eps: f64,
    /// In the MLP.
    pub activation: Activation,
    /// In what the family's tower differs.
    pub family: TowerFamily,
}

/// In what the towers of the families differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TowerFamily {
    /// Whether a class token stands before the patches and a norm before the first layer (CLIP).
    pub class_token: bool,
    /// Whether the patches' projection has a bias (SigLIP).
    pub patch_bias: bool,
}

/// The fields of a `vision_config`, under transformers' names.
#[derive(Deserialize)]
struct Raw {
    hidden_size: Option<i64>,
    intermediate_size: Option<i64>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<i64>,
    image_size: Option<i64>,
    patch_size: Option<i64>,
    num_channels: Option<i64>,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
}

/// More layers than any tower has.
pub(super) const MAX_LAYERS: usize = 1 << 10;
/// Wider than anything that is looked at.
pub(super) const MAX_SIZE: i64 = 1 << 20;

/// Refuses sizes of a tower over square pictures that make no sense: width of the residual stream and of the MLP, heads, edges
/// of a picture and of a patch.
pub(super) fn check_sizes(sizes: [i64; 5], layers: usize) -> Result<()> {
    const FIELDS: [&str; 5] = [
        "vision_config.hidden_size",
        "vision_config.intermediate_size",
        "vision_config.num_attention_heads",
        "vision_config.image_size",
        "vision_config.patch_size",
    ];
    if let Some((field, found)) = FIELDS.into_iter().zip(sizes).find(|(_, n)| !(1..=MAX_SIZE).contains(n)) {
        return Err(senseless(field, format!("is {found}, expected a positive number")));
    }
    if !(1..=MAX_LAYERS).contains(&layers) {
        let reason = format!("is {layers}, expected 1 to {MAX_LAYERS}");
        return Err(senseless("vision_config.num_hidden_layers", reason));
    }
    let [hidden, _, heads, image, patch] = sizes;
    if hidden % heads != 0 {
        let reason = format!("is {heads}, not a divisor of hidden_size {hidden}");
        return Err(senseless("vision_config.num_attention_heads", reason));
    }
    if patch > image {
        let reason = format!("is {patch}, more than image_size {image}");
        return Err(senseless("vision_config.patch_size", reason));
    }
    Ok(())
}

impl TowerConfig {
    /// Reads a `vision_config`, whose absent fields are those of `base`.
    pub(super) fn parse(json: &Map<String, Value>, base: &Self) -> Result<Self> {
        let raw: Raw = serde_path_to_error::deserialize(Value::Object(json.clone()))
            .map_err(|e| Error::Config(format!("`vision_config.{}`: {}", e.path(), e.inner())))?;
        let config = Self {
            hidden: raw.hidden_size.unwrap_or(base.hidden),
            intermediate: raw.intermediate_size.unwrap_or(base.intermediate),
            layers: raw.num_hidden_layers.unwrap_or(base.layers),
            heads: raw.num_attention_heads.unwrap_or(base.heads),
            image_size: raw.image_size.unwrap_or(base.image_size),
            patch_size: raw.patch_size.unwrap_or(base.patch_size),
            eps: raw.layer_norm_eps.unwrap_or(base.eps),
            activation: match &raw.hidden_act {
                Some(name) => Activation::parse("vision_config.hidden_act", name)?,
                None => base.activation,
            },
            family: base.family,
        };
        let Self { hidden, intermediate, layers, heads, image_size, patch_size, .. } = config;
        check_sizes([hidden, intermediate, heads, image_size, patch_size], layers)?;
        if raw.num_channels.is_some_and(|n| n != 3) {
            return Err(senseless("vision_config.num_channels", "is not 3: images are RGB"));
        }
        Ok(config)
    }

    /// Patches along an edge of a picture; a rest narrower than a patch is not seen.
    pub fn side(&self) -> i64 {
        self.image_size / self.patch_size
    }
}

/// Attention of all tokens of a picture among each other.
pub struct Attention {
    /// `[hidden, hidden]`.
    pub q_proj: Box<dyn Projection>,
    /// `[hidden, hidden]`.
    pub k_proj: Box<dyn Projection>,
    /// `[hidden, hidden]`.
    pub v_proj: Box<dyn Projection>,
    /// `[hidden, hidden]`.
    pub out_proj: Box<dyn Projection>,
    heads: i64,
}

/// `fc2(activation(fc1(x)))`.
pub struct Mlp {
    /// `[intermediate, hidden]`.
    pub fc1: Box<dyn Projection>,
    /// `[hidden, intermediate]`.
    pub fc2: Box<dyn Projection>,
    activation: Activation,
}

/// One layer: attention and MLP, each behind a norm and added to the residual.
pub struct EncoderLayer {
    /// Before attention.
    pub layer_norm1: LayerNorm,
    /// Attention.
    pub self_attn: Attention,
    /// Before the MLP.
    pub layer_norm2: LayerNorm,
    /// MLP.
    pub mlp: Mlp,
}

/// A linear layer with a bias, as every one of a tower is.
pub(super) fn linear(at: &TensorPath, input: i64, output: i64) -> Result<Box<dyn Projection>> {
    projection(at, input, output, true)
}

impl Attention {
    fn load(at: &TensorPath, c: &TowerConfig) -> Result<Self> {
        let square = |name: &str| linear(&at.at(name), c.hidden, c.hidden);
        Ok(Self {
            q_proj: square("q_proj")?,
            k_proj: square("k_proj")?,
            v_proj: square("v_proj")?,
            out_proj: square("out_proj")?,
            heads: c.heads,
        })
    }

    /// `x`: `[pictures, tokens, hidden]`, result: the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, hidden) = x.size3()?;
        let qkv = self.q_proj.forward_many(&[&*self.k_proj, &*self.v_proj], x)?;
        let [q, k, v] = qkv.as_slice() else {
            return Err(Error::input("forward_many gave another number of results than projections"));
        };
        // [b, t, heads * d] -> [b, heads, t, d]
        let split = |x: &Tensor| -> Result<Tensor> {
            Ok(x.f_view([b, t, self.heads, hidden / self.heads])?.f_transpose(1, 2)?)
        };
        let out = sdpa(&split(q)?, &split(k)?, &split(v)?)?;
        self.out_proj.forward(&out.f_transpose(1, 2)?.f_reshape([b, t, hidden])?)
    }
}

/// Patches of square pictures to the tower's width: `[pictures, 3, image, image]` to `[pictures, patches, hidden]`, by
/// `weight`, `[hidden, 3, patch, patch]`. `edges` are those of a picture and of a patch, in pixels.
pub(super) fn embed_patches(
    pixels: &Tensor,
    [image, patch]: [i64; 2],
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let shape = pixels.size();
    if shape.len() != 4 || shape[1..] != [3, image, image] {
        let expected = format!("[pictures, 3, {image}, {image}]");
        return Err(VisionError::Shape { what: "the tower's input", found: shape, expected }.into());
    }
    let pixels = pixels.f_to_device(weight.device())?.f_to_kind(weight.kind())?;
    let x = pixels.f_conv2d(weight, bias, [patch; 2], [0, 0], [1, 1], 1)?;
    Ok(x.f_flatten(2, 3)?.f_transpose(1, 2)?) // [b, hidden, h, w] -> [b, h * w, hidden]
}

/// Attention over everything, `[.., heads, tokens, d]`.
pub(super) fn sdpa(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = (q.size().last().copied().unwrap_or(1) as f64).powf(-0.5);
    let none: Option<&Tensor> = None;
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, none, 0.0, false, scale, false)?)
}

impl EncoderLayer {
    fn load(at: &TensorPath, c: &TowerConfig) -> Result<Self> {
        let mlp = at.at("mlp");
        Ok(Self {
            layer_norm1: LayerNorm::load(&at.at("layer_norm1"), c.hidden, c.eps)?,
            self_attn: Attention::load(&at.at("self_attn"), c)?,
            layer_norm2: LayerNorm::load(&at.at("layer_norm2"), c.hidden, c.eps)?,
            mlp: Mlp {
                fc1: linear(&mlp.at("fc1"), c.hidden, c.intermediate)?,
                fc2: linear(&mlp.at("fc2"), c.intermediate, c.hidden)?,
                activation: c.activation,
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.f_add(&self.self_attn.forward(&self.layer_norm1.forward(x)?)?)?;
        let inner = self.mlp.fc1.forward(&self.layer_norm2.forward(&x)?)?;
        Ok(x.f_add(&self.mlp.fc2.forward(&self.mlp.activation.forward(&inner)?)?)?)
    }

    /// The projections by their names below the layer.
    pub fn projections(&mut self) -> [(&'static str, &mut Box<dyn Projection>); 6] {
        let (a, m) = (&mut self.self_attn, &mut self.mlp);
        [
            ("self_attn.q_proj", &mut a.q_proj),
            ("self_attn.k_proj", &mut a.k_proj),
            ("self_attn.v_proj", &mut a.v_proj),
            ("self_attn.out_proj", &mut a.out_proj),
            ("mlp.fc1", &mut m.fc1),
            ("mlp.fc2", &mut m.fc2),
        ]
    }
}

/// Names of a layer's projections and norms, for those that are passed over.
const PARTS: [&str; 8] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm1",
    "layer_norm2",
];

/// A tower: its embeddings and the layers up to the last that somebody looks at.
pub struct Tower {
    /// `embeddings.class_embedding`, `[hidden]` (CLIP).
    pub class_embedding: Option<Tensor>,
    /// `embeddings.patch_embedding.weight`, `[hidden, 3, patch, patch]`.
    pub patch_embedding: Tensor,
    /// `embeddings.patch_embedding.bias`, `[hidden]` (SigLIP).
    pub patch_bias: Option<Tensor>,
    /// `embeddings.position_embedding.weight`, `[tokens, hidden]`.
    pub position_embedding: Tensor,
    /// `pre_layrnorm`, as transformers spells it (CLIP).
    pub pre_layernorm: Option<LayerNorm>,
    /// `encoder.layers`.
    pub layers: Vec<EncoderLayer>,
    config: TowerConfig,
    /// Before which layers the residual stream is looked at; the number of layers is behind the last.
    looked_at: Vec<usize>,
}

impl Tower {
    /// Reads the tower under `at` (e.g. `vision_tower.vision_model`) as far as `looked_at` asks: transformers'
    /// `vision_feature_layer`, where 0 is the embeddings and negative numbers count from behind the last layer.
    pub fn load(config: &TowerConfig, looked_at: &[i64], at: &TensorPath) -> Result<Self> {
        let c = config;
        let at = &at.because(format!(
            "config.json (vision_config: hidden_size {}, intermediate_size {}, num_hidden_layers {}, image_size {}, \
             patch_size {})",
            c.hidden, c.intermediate, c.layers, c.image_size, c.patch_size
        ));
        let looked_at = looked_at
            .iter()
            .map(|&l| {
                let states = c.layers as i64 + 1;
                let l = if l < 0 { states + l } else { l };
                if (0..states).contains(&l) { Ok(l as usize) } else { Err(l) }
            })
            .collect::<Result<Vec<_>, i64>>()
            .map_err(|l| {
                senseless("vision_feature_layer", format!("is beyond the tower's {} layers ({l})", c.layers))
            })?;
        let used = looked_at
            .iter()
            .max()
            .copied()
            .ok_or_else(|| senseless("vision_feature_layer", "is an empty list, expected a layer"))?;
        let embeddings = at.at("embeddings");
        let patch = embeddings.at("patch_embedding");
        let tokens = c.side().pow(2) + i64::from(c.family.class_token);
        let tower = Self {
            class_embedding: if c.family.class_token {
                Some(embeddings.tensor("class_embedding", &[c.hidden])?)
            } else {
                None
            },
            patch_embedding: patch.tensor("weight", &[c.hidden, 3, c.patch_size, c.patch_size])?,
            patch_bias: if c.family.patch_bias { Some(patch.tensor("bias", &[c.hidden])?) } else { None },
            position_embedding: embeddings.at("position_embedding").tensor("weight", &[tokens, c.hidden])?,
            pre_layernorm: if c.family.class_token {
                Some(LayerNorm::load(&at.at("pre_layrnorm"), c.hidden, c.eps)?)
            } else {
                None
            },
            layers: (0..used)
                .map(|l| EncoderLayer::load(&at.at("encoder.layers").at(l), c))
                .collect::<Result<_>>()?,
            looked_at,
            config: config.clone(),
        };
        pass_over(at, used, c.layers);
        Ok(tower)
    }

    /// What it was built from.
    pub fn config(&self) -> &TowerConfig {
        &self.config
    }

    /// The residual stream of pictures at the layers that are looked at, side by side.
    ///
    /// # Shapes
    /// `pixels`: `[pictures, 3, image_size, image_size]`, result `[pictures, tokens, hidden * layers looked at]`.
    ///
    /// # Errors
    /// [`VisionError::Shape`] for pixels of another shape.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let edges = [c.image_size, c.patch_size];
        let mut x = embed_patches(pixels, edges, &self.patch_embedding, self.patch_bias.as_ref())?;
        if let Some(class) = &self.class_embedding {
            let class = class.f_view([1, 1, c.hidden])?.f_expand([x.size3()?.0, 1, c.hidden], false)?;
            x = Tensor::f_cat(&[&class, &x], 1)?;
        }
        x = x.f_add(&self.position_embedding)?;
        if let Some(norm) = &self.pre_layernorm {
            x = norm.forward(&x)?;
        }
        let mut seen: Vec<Option<Tensor>> = self.looked_at.iter().map(|_| None).collect();
        for l in 0..=self.layers.len() {
            for (seen, _) in seen.iter_mut().zip(&self.looked_at).filter(|(_, at)| **at == l) {
                *seen = Some(x.shallow_clone());
            }
            if let Some(layer) = self.layers.get(l) {
                x = layer.forward(&x)?;
            }
        }
        let mut seen: Vec<Tensor> = seen.into_iter().flatten().collect();
        if seen.len() == 1 { Ok(seen.remove(0)) } else { Ok(Tensor::f_cat(&seen, -1)?) }
    }

    /// Hands every linear layer to `f`, with its path below `prefix`.
    pub fn visit_projections(&mut self, prefix: &str, f: &mut ProjectionVisitor) -> Result<()> {
        for (l, layer) in self.layers.iter_mut().enumerate() {
            for (name, projection) in layer.projections() {
                f(&format!("{prefix}encoder.layers.{l}.{name}"), projection)?;
            }
        }
        Ok(())
    }

    /// Hands every parameter to `f`, with its key below `prefix`.
    pub fn visit_parameters(
        &mut self,
        prefix: &str,
        f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut named = vec![
            ("embeddings.patch_embedding.weight", &mut self.patch_embedding),
            ("embeddings.position_embedding.weight", &mut self.position_embedding),
        ];
        named.extend(self.class_embedding.as_mut().map(|t| ("embeddings.class_embedding", t)));
        named.extend(self.patch_bias.as_mut().map(|t| ("embeddings.patch_embedding.bias", t)));
        if let Some(norm) = &mut self.pre_layernorm {
            named.push(("pre_layrnorm.weight", &mut norm.weight));
            named.push(("pre_layrnorm.bias", &mut norm.bias));
        }
        for (name, tensor) in named {
            f(&format!("{prefix}{name}"), tensor)?;
        }
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let at = format!("{prefix}encoder.layers.{l}");
            for (norm, name) in
                [(&mut layer.layer_norm1, "layer_norm1"), (&mut layer.layer_norm2, "layer_norm2")]
            {
                visit_below(&format!("{at}.{name}"), norm.parameters(), f)?;
            }
            visit_linears(&at, layer.projections(), f)?;
        }
        Ok(())
    }
}

/// Counts what no feature needs as read: layers behind the last that is looked at, the final norm, SigLIP's pooling head.
fn pass_over(at: &TensorPath, used: usize, layers: usize) {
    let both = |at: &TensorPath| {
        at.skip("weight");
        at.skip("bias");
    };
    for l in used..layers {
        for part in PARTS {
            both(&at.at("encoder.layers").at(l).at(part));
        }
    }
    for part in
        ["post_layernorm", "head.attention.out_proj", "head.layernorm", "head.mlp.fc1", "head.mlp.fc2"]
    {
        both(&at.at(part));
    }
    at.at("head.attention").skip("in_proj_weight");
    at.at("head.attention").skip("in_proj_bias");
    at.skip("head.probe");
    at.at("embeddings").skip("position_ids");
}
