//! What a calibration runs on: embedded samples, padded to one length, with a mask for each modality.

use nics_core::models::Decoder;
use nics_core::nn::Rope;
use nics_core::seam::{Ragged, SeqId};
use nics_core::train::IGNORED;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Positions of one modality, e.g. `vision`.
#[derive(Debug)]
pub struct Modality {
    /// Its name.
    pub name: String,
    /// Bool, `[samples, positions]`.
    pub mask: Tensor,
}

/// Embedded samples. Answers are the positions whose label counts; prompt text is of no modality.
#[derive(Debug)]
pub struct CalibBatch {
    embeds: Tensor,
    attention: Tensor,
    labels: Tensor,
    modalities: Vec<Modality>,
    /// Positions in time, height and width, sample after sample; `None` when each is the place in its row.
    planes: Option<Vec<[i64; 3]>>,
}

impl CalibBatch {
    /// Samples as a decoder sees them, images inserted.
    ///
    /// # Shapes
    /// `embeds`: `[samples, positions, hidden]`; `attention`: bool `[samples, positions]`, false where padded, on either
    /// side; `labels`: int64 `[samples, positions]`, −100 where there is no answer.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit, or nothing to run on.
    pub fn new(
        embeds: &Tensor,
        attention: Tensor,
        labels: Tensor,
        modalities: Vec<Modality>,
    ) -> Result<Self> {
        let (samples, positions, _) = embeds.size3()?;
        if samples == 0 || positions < 2 {
            return Err(Error::NoData(format!(
                "{samples} samples of {positions} positions; a calibration takes at least one of at least 2"
            )));
        }
        let shaped = |name: &str, t: &Tensor, kind: Kind| -> Result<()> {
            if t.size() == [samples, positions] && t.kind() == kind {
                return Ok(());
            }
            Err(Error::Input(format!(
                "{name}: {:?} {:?}, expected {kind:?} [{samples}, {positions}]",
                t.kind(),
                t.size()
            )))
        };
        shaped("the attention mask", &attention, Kind::Bool)?;
        shaped("the labels", &labels, Kind::Int64)?;
        for m in &modalities {
            shaped(&format!("the mask of modality {}", m.name), &m.mask, Kind::Bool)?;
        }
        let embeds = embeds.f_detach()?.f_to_kind(Kind::Float)?;
        let batch = Self { embeds, attention, labels, modalities, planes: None };
        for sample in 0..samples {
            let x = batch.embeds.f_get(sample)?;
            if x.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                let (layer, sample) = (0, sample as usize);
                return Err(Error::NonFinite { layer, tensor: "its embeddings".into(), sample });
            }
        }
        Ok(batch)
    }

    /// The same samples at positions in time, height and width, one for each position of each sample, for models that place
    /// images so.
    ///
    /// # Errors
    /// Another number of them.
    pub fn with_planes(self, planes: Vec<[i64; 3]>) -> Result<Self> {
        let wanted = self.labels.numel();
        if planes.len() != wanted {
            return Err(Error::Input(format!(
                "{} positions in space for {wanted} of all samples",
                planes.len()
            )));
        }
        Ok(Self { planes: Some(planes), ..self })
    }

    /// Samples.
    pub fn samples(&self) -> i64 {
        self.labels.size()[0]
    }

    /// Positions of each sample, padding included.
    pub fn positions(&self) -> i64 {
        self.labels.size()[1]
    }

    /// Float32 `[samples, positions, hidden]`.
    pub fn embeds(&self) -> &Tensor {
        &self.embeds
    }

    /// Bool `[samples, positions]`, false where padded.
    pub fn attention(&self) -> &Tensor {
        &self.attention
    }

    /// Int64 `[samples, positions]`.
    pub fn labels(&self) -> &Tensor {
        &self.labels
    }

    /// The modalities besides answers.
    pub fn modalities(&self) -> &[Modality] {
        &self.modalities
    }

    /// Positions with an answer, bool `[samples, positions]`.
    pub fn answers(&self) -> Result<Tensor> {
        Ok(self.labels.f_ne(IGNORED)?)
    }

    /// Positions of each modality over all samples, answers first: what a report of the data says.
    pub fn counts(&self) -> Result<Vec<(String, i64)>> {
        let count = |mask: &Tensor| -> Result<i64> { Ok(mask.f_sum(Kind::Int64)?.f_int64_value(&[])?) };
        let mut all = vec![("answer".to_owned(), count(&self.answers()?)?)];
        for m in &self.modalities {
            all.push((m.name.clone(), count(&m.mask)?));
        }
        Ok(all)
    }

    /// A hash of everything that a calibration reads.
    pub fn hash(&self) -> Result<String> {
        let mut bytes = Vec::new();
        let mut put = |name: &str, t: &Tensor| -> Result<()> {
            let t = t.f_contiguous()?.f_to_device(Device::Cpu)?;
            let mut raw = vec![0u8; t.numel() * t.kind().elt_size_in_bytes()];
            t.f_copy_data_u8(&mut raw, t.numel())?;
            bytes.extend(format!("{name} {:?} {}\n", t.size(), nics_base::hash::bytes(raw)).into_bytes());
            Ok(())
        };
        put("embeds", &self.embeds)?;
        put("attention", &self.attention)?;
        put("labels", &self.labels)?;
        for m in &self.modalities {
            put(&m.name, &m.mask)?;
        }
        if let Some(planes) = &self.planes {
            let flat: Vec<i64> = planes.iter().flatten().copied().collect();
            put("planes", &Tensor::f_from_slice(&flat)?)?;
        }
        Ok(nics_base::hash::bytes(bytes))
    }
}

/// What attention needs to know of some samples of a batch that run together.
#[derive(Debug)]
pub struct Seats {
    /// Whose rows: sample after sample.
    pub rows: Ragged,
    /// Their rotary rows, at positions from 0 on in every sample, padding on the left included.
    pub rope: Rope,
    /// Added to the scores, float32 `[samples, 1, positions, positions]`: the least float32 where a key is younger than the
    /// query or padding.
    pub mask: Tensor,
    /// Factor on `q·k`.
    pub scale: f64,
}

impl Seats {
    /// Of one sample of `n` positions without padding.
    pub fn unpadded(decoder: &Decoder, s: SeqId, n: i64, device: Device) -> Result<Self> {
        let rows = Ragged::contiguous(&[(s, 0, n as usize)]);
        let keys = Tensor::f_ones([1, n], (Kind::Bool, device))?;
        Ok(Self { rope: decoder.rope(&rows)?, rows, mask: additive(&keys)?, scale: decoder.scale() })
    }
}

/// The [`Seats`] of any samples of a batch.
#[derive(Debug)]
pub struct Seating {
    /// Rotary rows: of one sample where all are placed alike, else of each.
    rope: Rope,
    apart: bool,
    attention: Tensor,
    scale: f64,
}

impl Seating {
    /// Of a batch in front of a decoder.
    pub fn of(decoder: &Decoder, batch: &CalibBatch) -> Result<Self> {
        let positions = batch.positions() as usize;
        let rows = match &batch.planes {
            None => Ragged::contiguous(&[(SeqId(0), 0, positions)]),
            Some(planes) => {
                let each: Vec<_> = (0..batch.samples()).map(|i| (SeqId(i as u64), 0, positions)).collect();
                Ragged::contiguous(&each).with_planes(planes.clone())?
            }
        };
        let attention = batch.attention.shallow_clone();
        Ok(Self {
            rope: decoder.rope(&rows)?,
            apart: batch.planes.is_some(),
            attention,
            scale: decoder.scale(),
        })
    }

    /// Of the samples `from` to `to`.
    pub fn seats(&self, from: i64, to: i64) -> Result<Seats> {
        let length = self.attention.size()[1];
        let each: Vec<_> = (from..to).map(|i| (SeqId(i as u64), 0, length as usize)).collect();
        let of = |t: &Tensor| {
            if self.apart {
                t.f_narrow(0, from * length, (to - from) * length)
            } else {
                t.f_repeat([to - from, 1])
            }
        };
        let rope = Rope { cos: of(&self.rope.cos)?, sin: of(&self.rope.sin)? };
        let keys = self.attention.f_narrow(0, from, to - from)?;
        Ok(Seats { rows: Ragged::contiguous(&each), rope, mask: additive(&keys)?, scale: self.scale })
    }
}

/// Causal attention over keys that are there, as an additive mask. A row that sees no key attends to all of them alike.
fn additive(keys: &Tensor) -> Result<Tensor> {
    let (samples, positions) = keys.size2()?;
    let options = (Kind::Bool, keys.device());
    let causal = Tensor::f_ones([positions, positions], options)?.f_tril(0)?;
    let seen = causal.f_view([1, 1, positions, positions])?;
    let seen = seen.f_logical_and(&keys.f_view([samples, 1, 1, positions])?)?;
    let mask = Tensor::f_zeros(seen.size(), (Kind::Float, keys.device()))?;
    Ok(mask.f_masked_fill(&seen.f_logical_not()?, f64::from(f32::MIN))?)
}
