//! The router: a small feed-forward network that reads what the small model computed at a position and gives the
//! probability that the large model should choose the token there.
//!
//! The paper's form ([`Architecture::HiddenTokenLogits`]), with `h` the hidden state after the final norm, `e` the
//! embedding of the token that the small model chose and `z` its largest raw logits, descending:
//!
//! ```text
//! x = Wc [h ; e ; Wl z + bl] + bc          if normalised: h = LN(h), e = LN(e), z = softmax(z) before
//! x = Wi x + bi
//! x = r + W2 gelu(W1 LN(x) + b1) + b2      for every block; r = x, or Wd x + bd where the width changes
//! p = sigmoid(wo . LN(x) + bo)             the large model is asked when p >= threshold
//! ```
//!
//! Tensors have the names of official checkpoints.

mod backbone;
mod config;
mod dense;
mod init;
mod int8;
mod route;

use nics_core::checkpoint::TensorPath;
use tch::{Device, Kind, Tensor};

pub use backbone::Dropout;
pub use config::{Architecture, InitArgs, RouterConfig};
pub use dense::{Dense, LayerNorm, Storage};
pub(crate) use int8::quantize;
pub use route::{Routed, largest_logits, route};

use backbone::Backbone;

use crate::{Error, Result};

/// What a router reads; a router takes what its [`Architecture`] names and ignores the rest.
#[derive(Debug, Clone, Copy, Default)]
pub struct Features<'a> {
    /// Hidden state of the small model after the final norm, `[rows, hidden]`.
    pub hidden: Option<&'a Tensor>,
    /// The token that the small model chose, int64 `[rows]`.
    pub token: Option<&'a Tensor>,
    /// Its largest raw logits, descending, `[rows, K]`.
    pub logits: Option<&'a Tensor>,
    /// Positions in the sequence, int64 `[rows]`, for routers with a table of positions.
    pub positions: Option<&'a Tensor>,
}

/// What stands before the backbone.
#[derive(Debug)]
enum Stem {
    /// `W [inputs]`; the logits go through a projection of their own where there are other inputs beside them.
    Combined { logits_projection: Option<Dense>, combined_projection: Dense },
    /// `W x` of the one input.
    Single { name: &'static str, projection: Dense },
    /// A head of the router's own, of which the largest logits are kept.
    LmHead { lm_head: Dense, post_lm_projection: Dense },
}

/// A router.
#[derive(Debug)]
pub struct Router {
    config: RouterConfig,
    storage: Storage,
    device: Device,
    norm_hidden: Option<(&'static str, LayerNorm)>,
    norm_token: Option<LayerNorm>,
    stem: Stem,
    backbone: Backbone,
    /// The small model's embedding table, `[vocab, hidden]`; frozen.
    embedding: Option<Tensor>,
}

impl Router {
    /// Reads a router under `at`. `embedding` is the small model's table (`[vocab, hidden]`, any floating dtype), for
    /// routers that read tokens; a table that the checkpoint itself holds goes before it.
    ///
    /// # Errors
    /// [`Error::MissingEmbedding`], [`Error::HiddenSizeMismatch`], and tensors that are missing, of another shape, not
    /// finite or not the router's.
    pub fn load(
        config: RouterConfig,
        at: &TensorPath,
        embedding: Option<&Tensor>,
        storage: Storage,
    ) -> Result<Self> {
        config.validate()?;
        let (kind, args) = (config.architecture, &config.args);
        let at = &at.because(format!(
            "{} (hidden_states_size {}, logits_size {}, hidden_dims {:?}, expansion_factor {})",
            kind.name(),
            args.hidden_states_size.unwrap_or(0),
            args.logits_size.unwrap_or(0),
            args.hidden_dims,
            args.expansion_factor
        ));
        let first = args.hidden_dims[0];
        let (h, k) = (args.hidden_states_size.unwrap_or(0), args.logits_size.unwrap_or(0));
        let dense = |name: &str, input, output| Dense::load(&at.at(name), input, output, storage);
        let stem = match kind {
            Architecture::HiddenTokenLogits => Stem::Combined {
                logits_projection: Some(dense("logits_projection", k, h)?),
                combined_projection: dense("combined_projection", 3 * h, first)?,
            },
            Architecture::HiddenLogits => Stem::Combined {
                logits_projection: Some(dense("logits_projection", k, h)?),
                combined_projection: dense("combined_projection", 2 * h, first)?,
            },
            Architecture::HiddenToken => Stem::Combined {
                logits_projection: None,
                combined_projection: dense("combined_projection", 2 * h, first)?,
            },
            Architecture::Logits | Architecture::MultiLogits => {
                Stem::Single { name: "logits_projection", projection: dense("logits_projection", k, first)? }
            }
            Architecture::Hidden => Stem::Single {
                name: "hidden_states_projection",
                projection: dense("hidden_states_projection", h, first)?,
            },
            Architecture::HiddenLmHead => {
                let vocab = at.at("lm_head").shape("weight").and_then(|s| s.first().copied()).unwrap_or(0);
                let kept = args.topk.unwrap_or(vocab);
                if kept > vocab {
                    return Err(Error::TopKTooLarge { k: kept, vocab });
                }
                Stem::LmHead {
                    lm_head: dense("lm_head", h, vocab)?,
                    post_lm_projection: dense("post_lm_projection", kept, first)?,
                }
            }
        };
        let norm_hidden = (args.normalize_input && kind.takes_hidden())
            .then(|| {
                let alone = matches!(kind, Architecture::Hidden | Architecture::HiddenLmHead);
                let name = if alone { "layer_norm" } else { "layer_norm_hidden_states" };
                Ok::<_, Error>((name, LayerNorm::load(&at.at(name), h)?))
            })
            .transpose()?;
        let norm_token = (args.normalize_input && kind.takes_token())
            .then(|| LayerNorm::load(&at.at("layer_norm_token"), h))
            .transpose()?;
        let backbone = Backbone::load(&at.at("backbone"), args, storage)?;
        let embedding = if kind.takes_token() { Some(load_embedding(at, args, h, embedding)?) } else { None };
        if let Some(name) = at.unread().first() {
            return Err(Error::Input(format!("tensor {name} is none of a {}", kind.name())));
        }
        let device = at.device();
        Ok(Self { config, storage, device, norm_hidden, norm_token, stem, backbone, embedding })
    }

    /// Its type and arguments.
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// How its matrices are kept.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// The result before the sigmoid, `[rows, output_dim]`.
    ///
    /// # Errors
    /// Features that are missing, of another shape, or not finite.
    pub fn logits(&self, features: &Features) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        self.forward(features, None)
    }

    /// The probability that the large model should be asked, float32 `[rows]`: the sigmoid of one column, or the last of
    /// three classes.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn probability(&self, features: &Features) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        probability_of(&self.forward(features, None)?)
    }

    /// [`logits`](Self::logits) within a graph, with dropout where given.
    pub fn forward(&self, features: &Features, dropout: Option<&mut Dropout>) -> Result<Tensor> {
        let (kind, args) = (self.config.architecture, &self.config.args);
        let mut rows = None;
        let hidden = if kind.takes_hidden() {
            let x = self.feature(
                "hidden states",
                features.hidden,
                args.hidden_states_size.unwrap_or(0),
                &mut rows,
            )?;
            Some(match &self.norm_hidden {
                Some((_, norm)) => norm.forward(&x)?,
                None => x,
            })
        } else {
            None
        };
        let token = if kind.takes_token() { Some(self.embed(features.token, &mut rows)?) } else { None };
        let logits = if kind.takes_logits() {
            let z = self.feature("logits", features.logits, args.logits_size.unwrap_or(0), &mut rows)?;
            Some(self.normalized(z)?)
        } else {
            None
        };
        let x = match &self.stem {
            Stem::Combined { logits_projection, combined_projection } => {
                let z = match (logits_projection, logits) {
                    (Some(projection), Some(z)) => Some(projection.forward(&z)?),
                    _ => None,
                };
                let parts: Vec<Tensor> = [hidden, token, z].into_iter().flatten().collect();
                combined_projection.forward(&Tensor::f_cat(&parts, 1)?)?
            }
            Stem::Single { projection, .. } => {
                let x = hidden.or(logits).ok_or_else(|| Error::Input("the router has no input".into()))?;
                projection.forward(&x)?
            }
            Stem::LmHead { lm_head, post_lm_projection } => {
                let x = hidden.ok_or_else(|| Error::Input("the router has no input".into()))?;
                let mut z = lm_head.forward(&x)?;
                if let Some(k) = args.topk {
                    z = z.f_topk(k, 1, true, true)?.0;
                }
                post_lm_projection.forward(&z)?
            }
        };
        self.backbone.forward(&x, features.positions, dropout)
    }

    /// Logits as probabilities where the router wants them so, slot by slot.
    fn normalized(&self, z: Tensor) -> Result<Tensor> {
        if !self.config.args.normalize_input {
            return Ok(z);
        }
        let (rows, all) = z.size2()?;
        let k = self.config.top_k().unwrap_or(all);
        Ok(z.f_reshape([rows, all / k, k])?.f_softmax(-1, Kind::Float)?.f_reshape([rows, all])?)
    }

    /// A feature as float32 `[rows, width]` on the router's device, once it is known to be sound.
    fn feature(
        &self,
        what: &'static str,
        x: Option<&Tensor>,
        width: i64,
        rows: &mut Option<i64>,
    ) -> Result<Tensor> {
        let x = x.ok_or_else(|| {
            Error::Input(format!(
                "a {} needs {what} of shape [rows, {width}]",
                self.config.architecture.name()
            ))
        })?;
        let Ok((found, columns)) = x.size2() else {
            return Err(Error::Input(format!("{what} have shape {:?}, expected [rows, {width}]", x.size())));
        };
        if columns != width {
            return Err(if what == "hidden states" {
                Error::HiddenSizeMismatch { router: width, slm: columns }
            } else {
                Error::Input(format!("{what} have shape {:?}, expected [rows, {width}]", x.size()))
            });
        }
        same_rows(what, found, rows)?;
        let x = x.f_to_device(self.device)?.f_to_kind(Kind::Float)?;
        // One sum tells: anything not finite makes it so, and finite features sum up to a finite number.
        if !x.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite() {
            return Err(Error::NonFiniteFeatures { what });
        }
        Ok(x)
    }

    /// Embeddings of the tokens, float32 `[rows, hidden]`.
    fn embed(&self, token: Option<&Tensor>, rows: &mut Option<i64>) -> Result<Tensor> {
        let table = self
            .embedding
            .as_ref()
            .ok_or_else(|| Error::MissingEmbedding { model: "the small model".into() })?;
        let token = token.filter(|t| t.dim() == 1 && t.kind() == Kind::Int64).ok_or_else(|| {
            Error::Input(format!("a {} needs tokens, int64 [rows]", self.config.architecture.name()))
        })?;
        same_rows("tokens", token.size()[0], rows)?;
        if token.numel() > 0 {
            let vocab = table.size()[0];
            let (low, high) = (token.f_min()?.f_int64_value(&[])?, token.f_max()?.f_int64_value(&[])?);
            if low < 0 || high >= vocab {
                let found = if low < 0 { low } else { high };
                return Err(Error::Input(format!("token {found} is outside the embedding table of {vocab}")));
            }
        }
        let e = table.f_index_select(0, &token.f_to_device(self.device)?)?.f_to_kind(Kind::Float)?;
        match &self.norm_token {
            Some(norm) => norm.forward(&e),
            None => Ok(e),
        }
    }

    /// Its tensors under their official names, without the frozen embedding; the router's own where it keeps float32.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = self.parameters()?;
        all.extend(self.backbone.positions().map(|t| ("backbone.position_embedding".to_owned(), t)));
        Ok(all)
    }

    /// What is trained: [`tensors`](Self::tensors) without the table of positions.
    pub fn parameters(&self) -> Result<Vec<(String, Tensor)>> {
        let all = std::cell::RefCell::new(Vec::new());
        let error = std::cell::Cell::new(None);
        {
            let mut dense = |name: &str, layer: &Dense| match layer.dense() {
                Ok(weight) => all
                    .borrow_mut()
                    .extend([(format!("{name}.weight"), weight), (format!("{name}.bias"), layer.bias())]),
                Err(e) => error.set(Some(e)),
            };
            let mut norm = |name: &str, layer: &LayerNorm| {
                all.borrow_mut().extend([
                    (format!("{name}.weight"), layer.weight.shallow_clone()),
                    (format!("{name}.bias"), layer.bias.shallow_clone()),
                ]);
            };
            self.visit(&mut dense, &mut norm);
        }
        match error.take() {
            Some(e) => Err(e),
            None => Ok(all.into_inner()),
        }
    }

    /// Bytes that a call reads: matrices as they are stored, biases and norms; not the embedding table, of which it reads a
    /// row.
    pub fn bytes(&self) -> usize {
        let sum = std::cell::Cell::new(0);
        let norms = |layer: &LayerNorm| layer.weight.numel() + layer.bias.numel();
        self.visit(&mut |_, layer| sum.set(sum.get() + layer.bytes()), &mut |_, layer| {
            sum.set(sum.get() + norms(layer) * Kind::Float.elt_size_in_bytes());
        });
        sum.get()
    }

    /// Hands every layer with its name to `dense` or `norm`.
    fn visit(&self, dense: &mut dyn FnMut(&str, &Dense), norm: &mut dyn FnMut(&str, &LayerNorm)) {
        if let Some((name, layer)) = &self.norm_hidden {
            norm(name, layer);
        }
        if let Some(layer) = &self.norm_token {
            norm("layer_norm_token", layer);
        }
        match &self.stem {
            Stem::Combined { logits_projection, combined_projection } => {
                if let Some(layer) = logits_projection {
                    dense("logits_projection", layer);
                }
                dense("combined_projection", combined_projection);
            }
            Stem::Single { name, projection } => dense(name, projection),
            Stem::LmHead { lm_head, post_lm_projection } => {
                dense("lm_head", lm_head);
                dense("post_lm_projection", post_lm_projection);
            }
        }
        self.backbone.visit(dense, norm);
    }
}

/// [`Router::probability`] of a result `[rows, 1 or 3]`.
pub fn probability_of(logits: &Tensor) -> Result<Tensor> {
    match logits.size2()? {
        (_, 1) => Ok(logits.f_sigmoid()?.f_squeeze_dim(1)?),
        (_, 3) => Ok(logits.f_softmax(1, Kind::Float)?.f_select(1, 2)?),
        (_, found) => Err(Error::setting("columns of the router's result", found, "1 or 3")),
    }
}

fn same_rows(what: &str, found: i64, rows: &mut Option<i64>) -> Result<()> {
    let expected = *rows.get_or_insert(found);
    if found == expected {
        return Ok(());
    }
    Err(Error::Input(format!("{what} have {found} rows, the features before them {expected}")))
}

fn load_embedding(at: &TensorPath, args: &InitArgs, hidden: i64, given: Option<&Tensor>) -> Result<Tensor> {
    let own = at.at("token_embeddings");
    if let Some(shape) = own.shape("weight") {
        let rows = shape.first().copied().unwrap_or(0);
        return Ok(own.tensor("weight", &[rows, hidden])?);
    }
    let model = args.pretrained_model_name.clone().unwrap_or_else(|| "the small model".into());
    let table = given.ok_or(Error::MissingEmbedding { model })?;
    let Ok((_, width)) = table.size2() else {
        return Err(Error::Input(format!(
            "the embedding table has shape {:?}, expected [vocab, hidden]",
            table.size()
        )));
    };
    if width != hidden {
        return Err(Error::HiddenSizeMismatch { router: hidden, slm: width });
    }
    Ok(table.f_detach()?.f_to_device(at.device())?)
}
