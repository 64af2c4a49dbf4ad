//! Problems as a model reads them: real pictures through its processor, all in one call.

use std::ops::Range;

use nics_core::cache::NoCache;
use nics_core::models::{Batch, Input, Model, Vlm};
use nics_core::seam::{Ragged, SeqId};
use nics_core::vision::{Layout, Media, MediaPrompt, Placed, Prepared, Processor, RgbImage, TokenKind};
use nics_datasets::symbol_grid::{CELLS, EDGE, Nuisance, SIDE, SymbolGrid};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Positions of a problem with its answer and the end of it.
pub const POSITIONS: usize = CELLS + 4 + SIDE + 1;
/// Positions of an answer's symbols; behind them is its end.
pub const ANSWER: Range<usize> = CELLS + 4..CELLS + 4 + SIDE;

/// Problems, each with its picture and its answer, prepared.
pub struct Sheet {
    /// All problems as one prompt, one behind the other.
    prompt: MediaPrompt,
    samples: usize,
}

impl Sheet {
    /// Prepares problems with their pictures.
    ///
    /// # Errors
    /// No problem, or a processor that makes another number of tokens of a picture than cells.
    pub fn new(processor: &Processor, problems: &[(SymbolGrid, Nuisance)]) -> Result<Self> {
        if problems.is_empty() {
            return Err(Error::NoData("there is no problem to read".into()));
        }
        let (mut ids, mut kinds, mut pixels, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (problem, nuisance) in problems {
            let picture = RgbImage::from_raw(EDGE as u32, EDGE as u32, problem.rgb(*nuisance))
                .ok_or_else(|| Error::Input("a picture of another size than its pixels".into()))?;
            let one = processor.prompt(&problem.ids(), &[Media::Image(picture)])?;
            if one.ids.len() != POSITIONS {
                return Err(Error::Input(format!(
                    "a problem takes {} positions, expected {POSITIONS}: the model is not one of the symbol grid",
                    one.ids.len()
                )));
            }
            let from = ids.len();
            ids.extend(one.ids);
            kinds.extend(one.kinds);
            for placed in one.media {
                rows.extend(placed.rows.iter().map(|row| from + row));
                pixels.push(placed.media.pixels);
            }
        }
        let pixels = Tensor::f_cat(&pixels, 0)?;
        let (pictures, tokens) = (pixels.size()[0] as usize, rows.len());
        let layout = Layout::Frames(pictures);
        let media = Prepared { kind: TokenKind::Image, pixels, layout, tokens, parts: 1 };
        let prompt = MediaPrompt { ids, kinds, media: vec![Placed { media, rows }] };
        Ok(Self { prompt, samples: problems.len() })
    }

    /// How many problems there are.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Token ids, int64 `[samples, positions]`, placeholders repeated.
    pub fn ids(&self) -> Result<Tensor> {
        let ids: Vec<i64> = self.prompt.ids.iter().map(|id| i64::from(*id)).collect();
        Ok(Tensor::f_from_slice(&ids)?.f_view([self.samples as i64, POSITIONS as i64])?)
    }

    /// Positions of pictures, bool `[samples, positions]`.
    pub fn seen(&self) -> Result<Tensor> {
        let seen: Vec<i64> = self.prompt.kinds.iter().map(|k| i64::from(*k == TokenKind::Image)).collect();
        let seen = Tensor::f_from_slice(&seen)?.f_view([self.samples as i64, POSITIONS as i64])?;
        Ok(seen.f_to_kind(Kind::Bool)?)
    }

    /// Embeddings, `[samples, positions, hidden]`.
    ///
    /// # Errors
    /// A picture that the tower does not take.
    pub fn embed(&self, model: &Vlm) -> Result<Tensor> {
        let embedded = model.embed_prompt(&self.prompt)?.embeddings;
        Ok(embedded.f_view([self.samples as i64, POSITIONS as i64, model.dims().hidden])?)
    }
}

/// What a model expects at some positions behind the first, from embeddings `[samples, positions, hidden]`: logits
/// `[samples, places, vocabulary]`.
///
/// # Errors
/// What the model refuses.
pub(crate) fn logits(model: &dyn Model, embeds: &Tensor, places: Range<usize>) -> Result<Tensor> {
    let (samples, _, hidden) = embeds.size3()?;
    // What stands behind the places decides nothing, and a position is foretold by the one before it.
    let read = places.end - 1;
    let x = embeds.f_narrow(1, 0, read as i64)?.f_reshape([-1, hidden])?;
    let rows: Vec<_> = (0..samples).map(|i| (SeqId(i as u64), 0, read)).collect();
    let batch = Batch::new(Ragged::contiguous(&rows), Input::Embeds(&x));
    let out = model.forward(&batch, &mut NoCache::new(), None)?.hidden;
    let out = out.f_view([samples, read as i64, hidden])?;
    let out = out.f_narrow(1, places.start as i64 - 1, places.len() as i64)?;
    Ok(model.logits(&out.f_contiguous()?)?)
}
