//! InternViT (Chen et al., 2024), beside its `modeling_intern_vit.py`: a vision transformer whose layers scale what they add
//! to the residual stream.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::vit::{check_sizes, embed_patches, linear, sdpa};
use super::{ProjectionVisitor, visit_below, visit_linears};
use crate::checkpoint::TensorPath;
use crate::nn::{Activation, Norm, RmsNorm, projection};
use crate::seam::Projection;
use crate::vision::senseless;
use crate::{Error, Result};

#[derive(Deserialize)]
struct RawVision {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    image_size: i64,
    patch_size: i64,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    norm_type: Option<String>,
    qkv_bias: Option<bool>,
    qk_normalization: Option<bool>,
}

/// What InternViT is built from.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Width of the residual stream.
    pub hidden: i64,
    /// Width of the MLP.
    pub intermediate: i64,
    /// Layers of the checkpoint.
    pub layers: usize,
    /// Layers that run: those up to the one whose output is the features.
    pub used: usize,
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
    /// Whether norms are root-mean-square ones.
    pub rms: bool,
    /// Whether `qkv` has a bias.
    pub qkv_bias: bool,
    /// Whether queries and keys are normed, all heads together.
    pub qk_norm: bool,
}

impl VisionConfig {
    /// Reads a `vision_config`; `select` is the layer whose output is the features, as `select_layer` counts it.
    ///
    /// # Errors
    /// A field that is missing or senseless.
    pub fn parse(json: &Map<String, Value>, select: i64) -> Result<Self> {
        let v: RawVision = serde_path_to_error::deserialize(Value::Object(json.clone()))
            .map_err(|e| Error::Config(format!("`vision_config.{}`: {}", e.path(), e.inner())))?;
        let sizes = [v.hidden_size, v.intermediate_size, v.num_attention_heads, v.image_size, v.patch_size];
        check_sizes(sizes, v.num_hidden_layers)?;
        let layers = v.num_hidden_layers as i64;
        let used = if select < 0 { layers + 1 + select } else { select };
        if !(0..=layers).contains(&used) {
            return Err(senseless(
                "select_layer",
                format!("is {select}, beyond the tower's {layers} layers"),
            ));
        }
        Ok(Self {
            hidden: v.hidden_size,
            intermediate: v.intermediate_size,
            layers: v.num_hidden_layers,
            used: used as usize,
            heads: v.num_attention_heads,
            image_size: v.image_size,
            patch_size: v.patch_size,
            eps: v.layer_norm_eps.unwrap_or(1e-6),
            activation: Activation::parse(
                "vision_config.hidden_act",
                v.hidden_act.as_deref().unwrap_or("gelu"),
            )?,
            rms: match v.norm_type.as_deref().unwrap_or("rms_norm") {
                "rms_norm" => true,
                "layer_norm" => false,
                other => {
                    let reason = format!("is `{other}`, expected `layer_norm` or `rms_norm`");
                    return Err(senseless("vision_config.norm_type", reason));
                }
            },
            qkv_bias: v.qkv_bias.unwrap_or(false),
            qk_norm: v.qk_normalization.unwrap_or(true),
        })
    }

    /// Patches along an edge of a picture.
    pub fn side(&self) -> i64 {
        self.image_size / self.patch_size
    }
}

/// One layer (`InternVisionEncoderLayer`): attention and MLP, each behind a norm, scaled and added to the residual.
pub struct EncoderLayer {
    /// Before attention.
    pub norm1: Norm,
    /// `attn.qkv`, `[3 * hidden, hidden]`.
    pub qkv: Box<dyn Projection>,
    /// `attn.q_norm` and `attn.k_norm`.
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// `attn.proj`, `[hidden, hidden]`.
    pub proj: Box<dyn Projection>,
    /// Scale of the attention's output, `[hidden]`.
    pub ls1: Tensor,
    /// Before the MLP.
    pub norm2: Norm,
    /// `mlp.fc1`, `[intermediate, hidden]`.
    pub fc1: Box<dyn Projection>,
    /// `mlp.fc2`, `[hidden, intermediate]`.
    pub fc2: Box<dyn Projection>,
    /// Scale of the MLP's output, `[hidden]`.
    pub ls2: Tensor,
}

impl EncoderLayer {
    fn load(at: &TensorPath, c: &VisionConfig) -> Result<Self> {
        let attn = at.at("attn");
        let qk_norm = if c.qk_norm {
            let norm = |name: &str| RmsNorm::load(&attn.at(name), c.hidden, c.eps);
            Some((norm("q_norm")?, norm("k_norm")?))
        } else {
            None
        };
        Ok(Self {
            norm1: Norm::load(&at.at("norm1"), c.hidden, c.eps, c.rms)?,
            qkv: projection(&attn.at("qkv"), c.hidden, 3 * c.hidden, c.qkv_bias)?,
            qk_norm,
            proj: linear(&attn.at("proj"), c.hidden, c.hidden)?,
            ls1: at.tensor("ls1", &[c.hidden])?,
            norm2: Norm::load(&at.at("norm2"), c.hidden, c.eps, c.rms)?,
            fc1: linear(&at.at("mlp.fc1"), c.hidden, c.intermediate)?,
            fc2: linear(&at.at("mlp.fc2"), c.intermediate, c.hidden)?,
            ls2: at.tensor("ls2", &[c.hidden])?,
        })
    }

    /// `x`: `[pictures, tokens, hidden]`, result: the same.
    fn attention(&self, x: &Tensor, heads: i64) -> Result<Tensor> {
        let (b, t, hidden) = x.size3()?;
        let qkv = self.qkv.forward(x)?.f_chunk(3, -1)?;
        let [q, k, v] = qkv.as_slice() else {
            return Err(Error::input("qkv gave another width than three times the residual stream's"));
        };
        let (q, k) = match &self.qk_norm {
            Some((q_norm, k_norm)) => {
                (q_norm.forward(&q.f_contiguous()?)?, k_norm.forward(&k.f_contiguous()?)?)
            }
            None => (q.shallow_clone(), k.shallow_clone()),
        };
        // [b, t, heads * d] -> [b, heads, t, d]
        let split = |x: &Tensor| -> Result<Tensor> {
            Ok(x.f_reshape([b, t, heads, hidden / heads])?.f_transpose(1, 2)?)
        };
        let out = sdpa(&split(&q)?, &split(&k)?, &split(v)?)?;
        self.proj.forward(&out.f_transpose(1, 2)?.f_reshape([b, t, hidden])?)
    }

    fn forward(&self, x: &Tensor, c: &VisionConfig) -> Result<Tensor> {
        let x = x.f_add(&self.attention(&self.norm1.forward(x)?, c.heads)?.f_mul(&self.ls1)?)?;
        let inner = c.activation.forward(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        Ok(x.f_add(&self.fc2.forward(&inner)?.f_mul(&self.ls2)?)?)
    }

    fn projections(&mut self) -> [(&'static str, &mut Box<dyn Projection>); 4] {
        [
            ("attn.qkv", &mut self.qkv),
            ("attn.proj", &mut self.proj),
            ("mlp.fc1", &mut self.fc1),
            ("mlp.fc2", &mut self.fc2),
        ]
    }
}

/// The tower (`InternVisionModel`): its embeddings and the layers up to the one that is looked at.
pub struct InternVisionModel {
    /// `embeddings.class_embedding`, `[1, 1, hidden]`.
    pub class_embedding: Tensor,
    /// `embeddings.patch_embedding.weight`, `[hidden, 3, patch, patch]`.
    pub patch_embedding: Tensor,
    /// `embeddings.patch_embedding.bias`, `[hidden]`.
    pub patch_bias: Tensor,
    /// `embeddings.position_embedding`, `[1, tokens, hidden]`.
    pub position_embedding: Tensor,
    /// `encoder.layers`.
    pub layers: Vec<EncoderLayer>,
    config: VisionConfig,
}

impl InternVisionModel {
    /// Reads the tower under `root`, usually `vision_model`.
    pub fn load(c: &VisionConfig, root: &TensorPath) -> Result<Self> {
        let at = root.at("embeddings");
        let patch = at.at("patch_embedding");
        let layers = root.at("encoder.layers");
        let tokens = c.side().pow(2) + 1;
        let loaded = Self {
            class_embedding: at.tensor("class_embedding", &[1, 1, c.hidden])?,
            patch_embedding: patch.tensor("weight", &[c.hidden, 3, c.patch_size, c.patch_size])?,
            patch_bias: patch.tensor("bias", &[c.hidden])?,
            position_embedding: at.tensor("position_embedding", &[1, tokens, c.hidden])?,
            layers: (0..c.used).map(|l| EncoderLayer::load(&layers.at(l), c)).collect::<Result<_>>()?,
            config: c.clone(),
        };
        // Layers behind the one that is looked at are not needed.
        for l in c.used..c.layers {
            let layer = layers.at(l);
            for name in layer.unread() {
                layer.skip(name.strip_prefix(&format!("{}.", layer.path())).unwrap_or(&name));
            }
        }
        Ok(loaded)
    }

    /// Features of pictures without the class token, `[pictures, 3, image_size, image_size]` to
    /// `[pictures, side * side, hidden]`.
    ///
    /// # Errors
    /// `VisionError::Shape` for pixels of another shape.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let edges = [c.image_size, c.patch_size];
        let x = embed_patches(pixels, edges, &self.patch_embedding, Some(&self.patch_bias))?;
        let class = self.class_embedding.f_expand([x.size3()?.0, 1, c.hidden], false)?;
        let mut x = Tensor::f_cat(&[&class, &x], 1)?.f_add(&self.position_embedding)?;
        for layer in &self.layers {
            x = layer.forward(&x, c)?;
        }
        let tokens = x.size3()?.1;
        Ok(x.f_narrow(1, 1, tokens - 1)?)
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
        f(&format!("{prefix}embeddings.class_embedding"), &mut self.class_embedding)?;
        f(&format!("{prefix}embeddings.patch_embedding.weight"), &mut self.patch_embedding)?;
        f(&format!("{prefix}embeddings.patch_embedding.bias"), &mut self.patch_bias)?;
        f(&format!("{prefix}embeddings.position_embedding"), &mut self.position_embedding)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let at = format!("{prefix}encoder.layers.{l}");
            for (norm, name) in [(&mut layer.norm1, "norm1"), (&mut layer.norm2, "norm2")] {
                visit_below(&format!("{at}.{name}"), norm.parameters(), f)?;
            }
            f(&format!("{at}.ls1"), &mut layer.ls1)?;
            f(&format!("{at}.ls2"), &mut layer.ls2)?;
            if let Some((q, k)) = &mut layer.qk_norm {
                f(&format!("{at}.attn.q_norm.weight"), &mut q.weight)?;
                f(&format!("{at}.attn.k_norm.weight"), &mut k.weight)?;
            }
            visit_linears(&at, layer.projections(), f)?;
        }
        Ok(())
    }
}
