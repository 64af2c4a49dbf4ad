//! Every method on the test problems of one model.
//!
//! A shard takes its part of the list of [`variants`]; points are appended as they are measured, and a run that was stopped
//! goes on behind them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use nics_base::interrupt::Interrupt;
use nics_base::jsonl::{self, JsonlLog};
use nics_base::shard::{Shard, ShardName};
use tch::{Kind, Tensor};

use super::subject::Said;
use super::variants::condition;
use super::{POINTS_FILE, Point, Study, Subject, Variant, variants};
use crate::Result;
use crate::artefact::Origin;
use crate::sensitivity::Ratios;

/// Hears of variants done, all variants, and which is next.
pub type Report<'a> = &'a mut dyn FnMut(usize, usize, &str);

/// What an evaluation works with.
pub struct Inputs<'a> {
    /// Folder of the model.
    pub model: &'a Path,
    /// The settings.
    pub study: &'a Study,
    /// Seed of the model.
    pub seed: u64,
}

/// Where points go.
pub struct Output<'a> {
    /// Folder of the result.
    pub dir: &'a Path,
    /// Which part of the work is done.
    pub shard: Shard,
    /// Asks the run to stop; what was measured is kept.
    pub interrupt: &'a Interrupt,
    /// Called with the variants that are done, all of the shard, and the name of the next one.
    pub report: Report<'a>,
}

/// Measures everything that has not been measured: `dir/points.jsonl`, or a shard's own file, to be merged into that.
///
/// # Errors
/// A model that does not load, an interrupt, what a method refuses.
pub fn evaluate(inputs: &Inputs, output: Output) -> Result<(PathBuf, Vec<Point>)> {
    let Inputs { model, study, seed } = inputs;
    let Output { dir, shard, interrupt, report } = output;
    let origin =
        Origin::of(&nics_core::checkpoint::Checkpoint::open_dir(model).map_err(nics_core::Error::from)?)?;
    let hash = nics_base::hash::value(&(study, seed, &origin))?;
    let name = ShardName::new("points", &hash, shard);
    let done = dir.join(if shard.is_whole() { POINTS_FILE.to_owned() } else { name.file_name() });
    let partial = dir.join(name.partial_name());
    if done.exists() && !partial.exists() {
        let points = jsonl::read(&done)?;
        return Ok((done, points));
    }
    let (mut log, mut points) = JsonlLog::<Point>::open(&partial)?;
    let all = variants(study)?;
    let tasks: Vec<usize> = shard.items(all.len()).collect();
    let mut bench: Option<(usize, Bench)> = None;
    for (i, &task) in tasks.iter().enumerate() {
        let variant = &all[task];
        let condition = condition(study, variant);
        let key = (condition.name.as_str(), &*variant.quant(), variant.name);
        if points.iter().any(|p: &Point| p.key() == key) {
            continue;
        }
        interrupt.check()?;
        report(i, tasks.len(), &format!("{}, {}: {}", key.0, key.1, key.2));
        let same = bench.take().filter(|(of, _)| *of == variant.condition);
        let (_, bench) = bench.insert(if let Some(same) = same {
            same
        } else {
            let subject = Subject::load(model, study, condition, *seed)?;
            (variant.condition, Bench { float: subject.answer()?, subject })
        });
        let point = bench.measure(variant, &condition.name, interrupt)?;
        log.append(&point)?;
        points.push(point);
    }
    report(tasks.len(), tasks.len(), "");
    log.finish(&done)?;
    Ok((done, points))
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
