//! InternVL2 (Chen et al., 2024), beside its `modeling_internvl_chat.py` and `modeling_intern_vit.py`: InternViT, whose
//! layers scale what they add, a pixel shuffle that makes one token of four features, and a projector `mlp1`; a decoder of
//! the InternLM2, Llama or Qwen2 line.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::multimodal::{Positions, Vision, Vlm};
use super::vit::{MAX_LAYERS, MAX_SIZE, linear, sdpa};
use super::{Decoder, DecoderConfig, ProjectionVisitor};
use crate::checkpoint::TensorPath;
use crate::nn::{Activation, LayerNorm, Linear, Norm, RmsNorm};
use crate::seam::Projection;
use crate::vision::{Prepared, VisionError, object, senseless};
use crate::{Error, Result};

#[derive(Deserialize)]
struct Raw {
    force_image_size: Option<i64>,
    downsample_ratio: Option<f64>,
    ps_version: Option<String>,
    select_layer: Option<i64>,
    dynamic_image_size: Option<bool>,
    use_thumbnail: Option<bool>,
    min_dynamic_patch: Option<u32>,
    max_dynamic_patch: Option<u32>,
}

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

/// What InternVL2 is built from.
#[derive(Debug, Clone)]
pub struct Config {
    /// The language model.
    pub text: DecoderConfig,
    /// The tower.
    pub vision: VisionConfig,
    /// Features along the edge of a token.
    pub shuffle: i64,
    /// Whether the shuffled map is turned back upright (`ps_version` v2).
    pub upright: bool,
    /// Tiles of an image: the fewest and the most.
    pub tiles: (u32, u32),
    /// Whether the whole image follows its tiles.
    pub thumbnail: bool,
}

impl Config {
    /// Reads a config.json of InternVL2.
    ///
    /// # Errors
    /// A field that is missing or senseless.
    pub fn parse(json: &Map<String, Value>) -> Result<Self> {
        let parsed = |e: serde_path_to_error::Error<serde_json::Error>, at: &str| {
            Error::Config(format!("`{at}{}`: {}", e.path(), e.inner()))
        };
        let raw: Raw =
            serde_path_to_error::deserialize(Value::Object(json.clone())).map_err(|e| parsed(e, ""))?;
        let text = super::config(object(json, "llm_config")?).map_err(|e| match e {
            Error::Config(reason) => Error::Config(format!("`llm_config`: {reason}")),
            other => other,
        })?;
        let v: RawVision =
            serde_path_to_error::deserialize(Value::Object(object(json, "vision_config")?.clone()))
                .map_err(|e| parsed(e, "vision_config."))?;
        let image_size = raw.force_image_size.unwrap_or(v.image_size);
        let sizes = [
            ("vision_config.hidden_size", v.hidden_size),
            ("vision_config.intermediate_size", v.intermediate_size),
            ("vision_config.num_attention_heads", v.num_attention_heads),
            ("vision_config.patch_size", v.patch_size),
            ("force_image_size", image_size),
        ];
        if let Some((field, found)) = sizes.into_iter().find(|(_, n)| !(1..=MAX_SIZE).contains(n)) {
            return Err(senseless(field, format!("is {found}, expected a positive number")));
        }
        if v.patch_size > image_size {
            let reason = format!("is {}, more than image_size {image_size}", v.patch_size);
            return Err(senseless("vision_config.patch_size", reason));
        }
        if image_size != v.image_size {
            let reason =
                format!("is {image_size}, but the tower's positions are for {} pixels", v.image_size);
            return Err(senseless("force_image_size", reason));
        }
        if !(1..=MAX_LAYERS).contains(&v.num_hidden_layers) {
            let reason = format!("is {}, expected 1 to {MAX_LAYERS}", v.num_hidden_layers);
            return Err(senseless("vision_config.num_hidden_layers", reason));
        }
        if v.hidden_size % v.num_attention_heads != 0 {
            let reason =
                format!("is {}, not a divisor of hidden_size {}", v.num_attention_heads, v.hidden_size);
            return Err(senseless("vision_config.num_attention_heads", reason));
        }
        let layers = v.num_hidden_layers as i64;
        let select = raw.select_layer.unwrap_or(-1);
        let used = if select < 0 { layers + 1 + select } else { select };
        if !(0..=layers).contains(&used) {
            return Err(senseless(
                "select_layer",
                format!("is {select}, beyond the tower's {layers} layers"),
            ));
        }
        let ratio = raw.downsample_ratio.unwrap_or(0.5);
        let shuffle = (1.0 / ratio).round();
        let side = image_size / v.patch_size;
        if !(1.0..=16.0).contains(&shuffle)
            || (shuffle * ratio - 1.0).abs() > 1e-6
            || side % shuffle as i64 != 0
        {
            let reason =
                format!("is {ratio}: one by a number that divides the {side} patches of an edge is expected");
            return Err(senseless("downsample_ratio", reason));
        }
        let dynamic = raw.dynamic_image_size.unwrap_or(false);
        let tiles = if dynamic {
            (raw.min_dynamic_patch.unwrap_or(1), raw.max_dynamic_patch.unwrap_or(12))
        } else {
            (1, 1)
        };
        if tiles.0 < 1 || tiles.1 < tiles.0 || tiles.1 > 256 {
            let reason =
                format!("is {}, expected at least min_dynamic_patch {} and at most 256", tiles.1, tiles.0);
            return Err(senseless("max_dynamic_patch", reason));
        }
        let vision = VisionConfig {
            hidden: v.hidden_size,
            intermediate: v.intermediate_size,
            layers: v.num_hidden_layers,
            used: used as usize,
            heads: v.num_attention_heads,
            image_size,
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
        };
        Ok(Self {
            text,
            vision,
            shuffle: shuffle as i64,
            upright: raw.ps_version.as_deref() != Some("v1"),
            tiles,
            thumbnail: raw.use_thumbnail.unwrap_or(false),
        })
    }

    /// Tokens of a picture.
    pub fn tokens(&self) -> i64 {
        (self.vision.image_size / self.vision.patch_size / self.shuffle).pow(2)
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
            qkv: Box::new(Linear::load(&attn.at("qkv"), c.hidden, 3 * c.hidden, c.qkv_bias)?),
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

/// InternViT with the projector.
pub struct InternVlVision {
    /// `vision_model.embeddings.class_embedding`, `[1, 1, hidden]`.
    pub class_embedding: Tensor,
    /// `vision_model.embeddings.patch_embedding.weight`, `[hidden, 3, patch, patch]`.
    pub patch_embedding: Tensor,
    /// `vision_model.embeddings.patch_embedding.bias`, `[hidden]`.
    pub patch_bias: Tensor,
    /// `vision_model.embeddings.position_embedding`, `[1, tokens, hidden]`.
    pub position_embedding: Tensor,
    /// `vision_model.encoder.layers`.
    pub layers: Vec<EncoderLayer>,
    /// `mlp1.0`, over the features of a token.
    pub mlp1_norm: LayerNorm,
    /// `mlp1.1`, `[text hidden, hidden * shuffle²]`.
    pub mlp1_first: Box<dyn Projection>,
    /// `mlp1.3`, `[text hidden, text hidden]`.
    pub mlp1_second: Box<dyn Projection>,
    config: Config,
}

impl InternVlVision {
    /// Reads both under `root`.
    pub fn load(config: &Config, root: &TensorPath) -> Result<Self> {
        let c = &config.vision;
        let root = &root.because(format!(
            "config.json (vision_config: hidden_size {}, intermediate_size {}, num_hidden_layers {}, image_size {}, \
             patch_size {}; llm_config.hidden_size {})",
            c.hidden, c.intermediate, c.layers, c.image_size, c.patch_size, config.text.hidden
        ));
        let at = root.at("vision_model.embeddings");
        let side = c.image_size / c.patch_size;
        let layers = root.at("vision_model.encoder.layers");
        let mlp1 = root.at("mlp1");
        let width = c.hidden * config.shuffle.pow(2);
        let loaded = Self {
            class_embedding: at.tensor("class_embedding", &[1, 1, c.hidden])?,
            patch_embedding: at
                .at("patch_embedding")
                .tensor("weight", &[c.hidden, 3, c.patch_size, c.patch_size])?,
            patch_bias: at.at("patch_embedding").tensor("bias", &[c.hidden])?,
            position_embedding: at.tensor("position_embedding", &[1, side * side + 1, c.hidden])?,
            layers: (0..c.used).map(|l| EncoderLayer::load(&layers.at(l), c)).collect::<Result<_>>()?,
            mlp1_norm: LayerNorm::load(&mlp1.at(0), width, 1e-5)?,
            mlp1_first: linear(&mlp1.at(1), width, config.text.hidden)?,
            mlp1_second: linear(&mlp1.at(3), config.text.hidden, config.text.hidden)?,
            config: config.clone(),
        };
        // Layers behind the one that is looked at are not needed.
        for l in c.used..c.layers {
            for name in layers.at(l).unread() {
                root.skip(&name);
            }
        }
        Ok(loaded)
    }

    /// The tower's features of pictures without the class token, `[pictures, side * side, hidden]`.
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor> {
        let c = &self.config.vision;
        let shape = pixels.size();
        if shape.len() != 4 || shape[1..] != [3, c.image_size, c.image_size] {
            let expected = format!("[pictures, 3, {0}, {0}]", c.image_size);
            return Err(VisionError::Shape { what: "the tower's input", found: shape, expected }.into());
        }
        let pixels =
            pixels.f_to_device(self.patch_embedding.device())?.f_to_kind(self.patch_embedding.kind())?;
        let stride = [c.patch_size; 2];
        let x = pixels.f_conv2d(&self.patch_embedding, Some(&self.patch_bias), stride, [0, 0], [1, 1], 1)?;
        let x = x.f_flatten(2, 3)?.f_transpose(1, 2)?; // [b, hidden, h, w] -> [b, h * w, hidden]
        let class = self.class_embedding.f_expand([shape[0], 1, c.hidden], false)?;
        let mut x = Tensor::f_cat(&[&class, &x], 1)?.f_add(&self.position_embedding)?;
        for layer in &self.layers {
            x = layer.forward(&x, c)?;
        }
        let tokens = x.size3()?.1;
        Ok(x.f_narrow(1, 1, tokens - 1)?)
    }

    /// `shuffle * shuffle` neighbouring features side by side: `[pictures, side * side, hidden]` to
    /// `[pictures, tokens, hidden * shuffle²]`.
    fn shuffled(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, hidden) = x.size3()?;
        let n = self.config.shuffle;
        let side = self.config.vision.image_size / self.config.vision.patch_size;
        // Along rows, then along columns, which leaves the map lying on its side.
        let x = x.f_reshape([b, side, side / n, hidden * n])?.f_permute([0, 2, 1, 3])?;
        let mut x = x.f_reshape([b, side / n, side / n, hidden * n * n])?;
        if self.config.upright {
            x = x.f_permute([0, 2, 1, 3])?;
        }
        Ok(x.f_reshape([b, (side / n).pow(2), hidden * n * n])?)
    }
}

impl Vision for InternVlVision {
    fn encode(&self, media: &Prepared) -> Result<Tensor> {
        let x = self.mlp1_norm.forward(&self.shuffled(&self.features(&media.pixels)?)?)?;
        let x = self.mlp1_second.forward(&Activation::Gelu.forward(&self.mlp1_first.forward(&x)?)?)?;
        Ok(x.f_flatten(0, 1)?)
    }

    fn visit_projections(&mut self, f: &mut ProjectionVisitor) -> Result<()> {
        for (l, layer) in self.layers.iter_mut().enumerate() {
            for (name, projection) in layer.projections() {
                f(&format!("vision_model.encoder.layers.{l}.{name}"), projection)?;
            }
        }
        f("mlp1.1", &mut self.mlp1_first)?;
        f("mlp1.3", &mut self.mlp1_second)
    }

    fn visit_parameters(&mut self, f: &mut dyn FnMut(&str, &mut Tensor) -> Result<()>) -> Result<()> {
        f("vision_model.embeddings.class_embedding", &mut self.class_embedding)?;
        f("vision_model.embeddings.patch_embedding.weight", &mut self.patch_embedding)?;
        f("vision_model.embeddings.patch_embedding.bias", &mut self.patch_bias)?;
        f("vision_model.embeddings.position_embedding", &mut self.position_embedding)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let at = format!("vision_model.encoder.layers.{l}");
            for (norm, name) in [(&mut layer.norm1, "norm1"), (&mut layer.norm2, "norm2")] {
                for (parameter, tensor) in norm.parameters() {
                    f(&format!("{at}.{name}.{parameter}"), tensor)?;
                }
            }
            f(&format!("{at}.ls1"), &mut layer.ls1)?;
            f(&format!("{at}.ls2"), &mut layer.ls2)?;
            if let Some((q, k)) = &mut layer.qk_norm {
                f(&format!("{at}.attn.q_norm.weight"), &mut q.weight)?;
                f(&format!("{at}.attn.k_norm.weight"), &mut k.weight)?;
            }
            for (name, projection) in layer.projections() {
                for (parameter, tensor) in projection.parameters() {
                    f(&format!("{at}.{name}.{parameter}"), tensor)?;
                }
            }
        }
        for (parameter, tensor) in self.mlp1_norm.parameters() {
            f(&format!("mlp1.0.{parameter}"), tensor)?;
        }
        for (name, projection) in [("mlp1.1", &mut self.mlp1_first), ("mlp1.3", &mut self.mlp1_second)] {
            for (parameter, tensor) in projection.parameters() {
                f(&format!("{name}.{parameter}"), tensor)?;
            }
        }
        Ok(())
    }
}

pub(super) fn load(json: &Map<String, Value>, root: &TensorPath) -> Result<Vlm> {
    let config = Config::parse(json)?;
    let vision = InternVlVision::load(&config, root)?;
    let language_model = Decoder::load(config.text, &root.at("language_model"))?;
    Ok(Vlm::new(language_model, Box::new(vision), "language_model.", Positions::Sequential))
}
