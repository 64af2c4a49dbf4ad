//! Every method on the test problems of one model: the list of [`variants`].

use std::path::{Path, PathBuf};
use std::time::Instant;

use nics_base::interrupt::Interrupt;
use nics_base::study::{Output, Points};
use tch::{Kind, Tensor};

use super::subject::Said;
use super::variants::condition;
use super::{Point, Study, Subject, Variant, variants};
use crate::Result;
use crate::artefact::Origin;
use crate::sensitivity::Ratios;

/// What an evaluation works with.
pub struct Inputs<'a> {
    /// Folder of the model.
    pub model: &'a Path,
    /// The settings.
    pub study: &'a Study,
    /// Seed of the model.
    pub seed: u64,
}

/// Measures everything that has not been measured: `dir/points.jsonl`, or a shard's own file, to be merged into that.
///
/// # Errors
/// A model that does not load, an interrupt, what a method refuses.
pub fn evaluate(inputs: &Inputs, output: Output) -> Result<(PathBuf, Vec<Point>)> {
    let Inputs { model, study, seed } = inputs;
    let origin =
        Origin::of(&nics_core::checkpoint::Checkpoint::open_dir(model).map_err(nics_core::Error::from)?)?;
    let hash = nics_base::hash::value(&(study, seed, &origin))?;
    let interrupt = output.interrupt;
    output.measure(&hash, |points: &mut Points<Point>| {
        let all = variants(study)?;
        let mut bench: Option<(usize, Bench)> = None;
        for task in points.tasks(all.len()) {
            let variant = &all[task];
            let condition = condition(study, variant);
            let key = (condition.name.as_str(), &*variant.quant(), variant.name);
            if points.any(|p| p.key() == key) {
                continue;
            }
            points.begin(task, &format!("{}, {}: {}", key.0, key.1, key.2))?;
            let same = bench.take().filter(|(of, _)| *of == variant.condition);
            let (_, bench) = bench.insert(if let Some(same) = same {
                same
            } else {
                let subject = Subject::load(model, study, condition, *seed)?;
                (variant.condition, Bench { float: subject.answer()?, subject })
            });
            points.add(bench.measure(variant, &condition.name, interrupt)?)?;
        }
        Ok(())
    })
}

/// A model under a condition, and what it says before it is quantized.
struct Bench {
    subject: Subject,
    float: Said,
}

impl Bench {
    fn measure(&mut self, variant: &Variant, condition: &str, interrupt: &Interrupt) -> Result<Point> {
        let start = Instant::now();
        let quantized = self.subject.quantize(variant, interrupt)?;
        let seconds = start.elapsed().as_secs_f64();
        let said = self.subject.answer()?;
        self.subject.restore()?;
        let ratios =
            quantized.and_then(|q| q.scales).map_or_else(Vec::new, |scales| by_layer(&scales.ratios));
        Ok(Point {
            condition: condition.to_owned(),
            quant: variant.quant(),
            method: variant.name.to_owned(),
            kl: Vec::try_from(divergence(&self.float, &said)?)?,
            right: right(&said)?,
            ratios,
            seconds,
        })
    }
}

/// `KL(float || quantized)`, mean over an answer's tokens: float32 `[samples]`.
fn divergence(float: &Said, said: &Said) -> Result<Tensor> {
    let difference = float.log_probs.f_sub(&said.log_probs)?;
    let each = float.log_probs.f_exp()?.f_mul(&difference)?.f_sum_dim_intlist(-1i64, false, Kind::Float)?;
    Ok(each.f_mean_dim(-1i64, false, Kind::Float)?)
}

fn right(said: &Said) -> Result<Vec<u8>> {
    let counts = said.right.f_sum_dim_intlist(-1i64, false, Kind::Int64)?;
    Ok(Vec::<i64>::try_from(counts)?.into_iter().map(|n| n as u8).collect())
}

/// The weights of the first modality.
fn by_layer(ratios: &[Ratios]) -> Vec<[f64; 2]> {
    let Some(first) = ratios.first() else { return Vec::new() };
    first.attention.iter().zip(&first.mlp).map(|(a, m)| [*a, *m]).collect()
}
