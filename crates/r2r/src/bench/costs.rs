//! What each part of a token costs, measured in turns.

use std::time::Instant;

use nics_core::cache::DenseCache;
use nics_core::device::OneThread;
use nics_core::models::{Model, read_last};
use nics_core::sampling::argmax;
use nics_core::seam::{KvCache, SeqId};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::Spread;
use crate::router::{Router, route};
use crate::{Error, Result};

/// What is measured: one sequence behind a prompt.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Tokens that both models have before.
    pub context: usize,
    /// Lengths of the large model's calls, ascending, 1 first.
    pub lengths: Vec<usize>,
    /// Rounds that count; one more comes first.
    pub rounds: usize,
}

/// Times in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Costs {
    /// A step of the small model: one token in, logits and its choice out.
    pub small: Spread,
    /// The router: the largest logits, its layers, the decision.
    pub router: Spread,
    /// A call of the large model by the number of tokens that it reads, ascending from 1.
    pub large: Vec<(usize, Spread)>,
}

/// A model behind its prompt.
struct Behind<'m> {
    model: &'m dyn Model,
    cache: DenseCache,
    seq: SeqId,
    context: usize,
}

impl<'m> Behind<'m> {
    fn new(model: &'m dyn Model, context: usize, longest: usize) -> Result<Self> {
        let mut cache = DenseCache::new();
        let seq = cache.open(context + longest)?;
        let mut behind = Self { model, cache, seq, context: 0 };
        let mut done = 0;
        while done < context {
            let rows = (context - done).min(crate::decode::CHUNK);
            let _ = behind.rows(done, rows)?;
            done += rows;
        }
        behind.context = context;
        Ok(behind)
    }

    /// Hidden state of the last of `rows` rows from position `at` on.
    fn rows(&mut self, at: usize, rows: usize) -> Result<Tensor> {
        let dims = self.model.dims();
        // Any ids do: each row of the table costs the same.
        let ids: Vec<u32> = (at..at + rows).map(|i| ((i as i64 * 7919) % dims.vocab) as u32).collect();
        Ok(read_last(self.model, &mut self.cache, &[(self.seq, at, &ids)])?)
    }

    /// A call of `rows` tokens behind the context, to the choice; what it left is cut off again.
    fn call(&mut self, rows: usize) -> Result<(f64, Tensor, Tensor, i64)> {
        let start = Instant::now();
        let hidden = self.rows(self.context, rows)?;
        // As in the loop.
        let _between_kernels = OneThread::when(hidden.device() == Device::Cpu);
        let logits = self.model.logits(&hidden)?;
        let values: Vec<f32> =
            Vec::try_from(logits.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?.f_view([-1])?)?;
        let token = i64::from(argmax(&values));
        let time = start.elapsed().as_secs_f64();
        self.cache.truncate(self.seq, self.context)?;
        Ok((time, hidden, logits, token))
    }
}

/// Measures a pair: in each round every part once, so that a machine that drifts slows all of them. `each` is called after
/// each round and may end the measurement with an error.
///
/// # Errors
/// Settings that make no sense, and what the models or the router return.
pub fn measure(
    small: &dyn Model,
    large: &dyn Model,
    router: &Router,
    what: &Measured,
    each: &mut dyn FnMut() -> Result<()>,
) -> Result<Costs> {
    if what.lengths.first() != Some(&1) || what.lengths.windows(2).any(|w| w[0] >= w[1]) {
        return Err(Error::setting("the lengths", format!("{:?}", what.lengths), "ascending from 1"));
    }
    for (name, value) in [("the context", what.context), ("the number of rounds", what.rounds)] {
        if value == 0 {
            return Err(Error::setting(name, 0, "at least 1"));
        }
    }
    let _guard = tch::no_grad_guard();
    let longest = what.lengths.last().copied().unwrap_or(1);
    let room = small.dims().context.min(large.dims().context);
    if what.context + longest > room {
        return Err(Error::setting(
            "the context",
            what.context,
            format!("at most {}", room - longest.min(room)),
        ));
    }
    let mut small = Behind::new(small, what.context, 1)?;
    let mut large = Behind::new(large, what.context, longest)?;
    let (mut small_s, mut router_s) = (Vec::new(), Vec::new());
    let mut large_s: Vec<Vec<f64>> = vec![Vec::new(); what.lengths.len()];
    let mut write = || -> Result<(f64, f64)> {
        let (time, hidden, logits, token) = small.call(1)?;
        let token = Tensor::f_from_slice(&[token])?;
        let start = Instant::now();
        route(router, &logits, &hidden, &token, 0.5)?;
        Ok((time, start.elapsed().as_secs_f64()))
    };
    for round in 0..=what.rounds {
        // In the loop most steps of the small model follow one of its own; the one behind a call of the large model finds
        // other caches.
        write()?;
        let (time, routing) = write()?;
        let calls = what.lengths.iter().map(|&rows| Ok(large.call(rows)?.0)).collect::<Result<Vec<_>>>()?;
        if round > 0 {
            small_s.push(time);
            router_s.push(routing);
            large_s.iter_mut().zip(calls).for_each(|(all, time)| all.push(time));
        }
        each()?;
    }
    let spread = |times: &[f64]| {
        Spread::of(times).ok_or_else(|| Error::setting("the number of rounds", 0, "at least 1"))
    };
    let lengths = what.lengths.iter().zip(&large_s);
    Ok(Costs {
        small: spread(&small_s)?,
        router: spread(&router_s)?,
        large: lengths.map(|(&rows, times)| Ok((rows, spread(times)?))).collect::<Result<_>>()?,
    })
}
