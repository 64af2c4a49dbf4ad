//! A checkpoint's language model, whether or not it sees.

use nics_core::checkpoint::Checkpoint;
use nics_core::models::{self, Decoder, Model, VLM_ARCHITECTURES, Vlm, vlm_architecture};
use tch::{Device, Kind, Tensor};

use crate::layer::Role;
use crate::operators::Names;
use crate::{Error, Result};

/// A loaded model.
pub enum Language {
    /// A decoder alone.
    Text(Box<Decoder>),
    /// A decoder behind a tower.
    Seeing(Box<Vlm>),
}

impl Language {
    /// Loads a checkpoint of any family that the core reads.
    pub fn load(checkpoint: &Checkpoint, device: Device, kind: Kind) -> Result<Self> {
        if Self::sees(checkpoint) {
            return Ok(Self::Seeing(Box::new(models::load_vlm(checkpoint, device, kind)?)));
        }
        Ok(Self::Text(Box::new(models::load(checkpoint, device, kind)?)))
    }

    /// Whether a checkpoint's model sees.
    pub fn sees(checkpoint: &Checkpoint) -> bool {
        vlm_architecture(checkpoint.config_json()).is_ok_and(|a| VLM_ARCHITECTURES.contains(&a))
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        match self {
            Self::Text(decoder) => decoder,
            Self::Seeing(vlm) => &vlm.language_model,
        }
    }

    /// The decoder, to be quantized.
    pub fn decoder_mut(&mut self) -> &mut Decoder {
        match self {
            Self::Text(decoder) => decoder,
            Self::Seeing(vlm) => &mut vlm.language_model,
        }
    }

    /// All of it, to be run.
    pub fn model(&self) -> &dyn Model {
        match self {
            Self::Text(decoder) => &**decoder,
            Self::Seeing(vlm) => &**vlm,
        }
    }

    /// All of it.
    pub fn model_mut(&mut self) -> &mut dyn Model {
        match self {
            Self::Text(decoder) => &mut **decoder,
            Self::Seeing(vlm) => &mut **vlm,
        }
    }

    /// How the checkpoint names the decoder's layers.
    pub fn names(&mut self) -> Result<Names> {
        // The head comes last in both; what stands before it is where the decoder is.
        let last = |model: &mut dyn Model| -> Result<String> {
            let mut last = String::new();
            model.visit_projections(&mut |path, _| {
                path.clone_into(&mut last);
                Ok(())
            })?;
            Ok(last)
        };
        let whole = last(self.model_mut())?;
        let own = last(self.decoder_mut())?;
        let prefix = whole.strip_suffix(&own).unwrap_or_default().to_owned();
        Ok(Names::of(self.decoder(), &format!("{prefix}model.layers")))
    }

    /// Linear layers that stay as they are: the tower's, the projector's, the head.
    pub fn untouched(&mut self, names: &Names) -> Result<Vec<String>> {
        let quantized = self.quantized(names);
        let mut all = Vec::new();
        self.model_mut().visit_projections(&mut |path, _| {
            if !quantized.iter().any(|q| q == path) {
                all.push(path.to_owned());
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// Linear layers inside the decoder's layers, in their order.
    pub fn quantized(&self, names: &Names) -> Vec<String> {
        let layers = self.decoder().layers.iter().enumerate();
        layers.flat_map(|(l, layer)| Role::of(layer).iter().map(move |r| names.linear(l, *r))).collect()
    }

    /// Embeddings of token ids, `[tokens, hidden]`.
    pub fn embed(&self, ids: &[i64]) -> Result<Tensor> {
        let device = self.decoder().dims().device;
        Ok(self.decoder().embed(&Tensor::f_from_slice(ids)?.f_to_device(device)?)?)
    }

    /// # Errors
    /// A model that does not see.
    pub fn vlm(&self) -> Result<&Vlm> {
        match self {
            Self::Seeing(vlm) => Ok(vlm),
            Self::Text(_) => Err(Error::Input("the model does not see, the sample shows an image".into())),
        }
    }
}
