//! One step of a [`Generator`]: which rows go into which call, and a token for every sequence whose prompt is read.

use tch::{Device, Kind, Tensor};

use super::{Finish, Generator, Prompt, RequestId, Running, Step, Token};
use crate::models::{Batch, Embedded, Input, Output};
use crate::nn::memory::values;
use crate::seam::{LayerHook, Ragged, SeqId};
use crate::{Error, Result};

/// Rows of one sequence in a call: its index in `running`, and how many.
type Part = (usize, usize);

/// A call that has been made.
struct Called {
    parts: Vec<Part>,
    output: Output,
}

impl Running {
    /// Prompt rows that the cache does not hold yet.
    fn unread(&self) -> usize {
        self.prompt.len() - self.read
    }

    /// Whether its next row is one of a known id and the only one: such rows share the decoding call.
    fn is_single(&self) -> bool {
        match self.prompt {
            Prompt::Ids(_) => self.unread() <= 1,
            Prompt::Embeds(_) | Prompt::Embedded(_) => self.unread() == 0,
        }
    }
}

impl Generator<'_> {
    /// [`advance`](Self::advance) for callers that give up at the first failure.
    ///
    /// # Errors
    /// What `advance` returns, or the first failure of a sequence: it has been ended, the others have moved on.
    pub fn step(&mut self) -> Result<Vec<Token>> {
        let mut step = self.advance()?;
        if step.failed.is_empty() { Ok(step.tokens) } else { Err(step.failed.swap_remove(0).1) }
    }

    /// One step: a row for every sequence that writes, in one call, and the next rows of prompts (see the
    /// [module](super)). Tokens come in the order in which the requests came; none when every sequence is still reading
    /// its prompt or there is no sequence.
    ///
    /// # Errors
    /// A failure that no single sequence can be held to. Every sequence is then where it was before.
    pub fn advance(&mut self) -> Result<Step> {
        let mut step = Step::default();
        if self.running.is_empty() {
            return Ok(step);
        }
        let _no_grad = tch::no_grad_guard();
        let mut made = Vec::new();
        for (parts, alone) in self.calls() {
            match self.call(&parts) {
                Ok(output) => made.push(Called { parts, output }),
                // An own call's failure is its sequence's.
                Err(error) if alone => step.failed.push((self.running[parts[0].0].id, error)),
                Err(error) => {
                    self.undo(&made)?;
                    return Err(error);
                }
            }
        }
        if let Err(error) = self.write(&made, &mut step) {
            self.undo(&made)?;
            return Err(error);
        }
        for (id, _) in &step.failed {
            self.cancel(*id);
        }
        Ok(step)
    }

    /// The calls of this step, each with whether it is a single prompt's own.
    fn calls(&self) -> Vec<(Vec<Part>, bool)> {
        let mut calls = Vec::new();
        let writing: Vec<Part> =
            self.running.iter().enumerate().filter(|(_, r)| r.is_single()).map(|(i, _)| (i, 1)).collect();
        if !writing.is_empty() {
            calls.push((writing, false));
        }
        // Pieces of one size whatever else is read, so that a prompt is always split at the same rows.
        let (chunk, mut budget, apart) = match self.hook {
            Some(_) => (usize::MAX, usize::MAX, false),
            None => (self.prefill_chunk.min(self.prefill_budget), self.prefill_budget, self.last_row_apart),
        };
        let mut reading = Vec::new();
        for (i, r) in self.running.iter().enumerate().filter(|(_, r)| !r.is_single()) {
            let left = match r.prompt {
                Prompt::Ids(_) if apart => r.unread() - 1,
                _ => r.unread(),
            };
            let rows = left.min(chunk - r.read % chunk);
            if rows > budget {
                break; // A younger prompt does not overtake.
            }
            budget -= rows;
            reading.push((i, rows));
        }
        if self.isolate_prompts {
            calls.extend(reading.into_iter().map(|part| (vec![part], true)));
        } else if !reading.is_empty() {
            calls.push((reading, false));
        }
        calls
    }

    /// Runs the model on the next rows of some sequences. On an error the cache holds none of them.
    fn call(&mut self, parts: &[Part]) -> Result<Output> {
        let rows: Vec<(SeqId, usize, usize)> =
            parts.iter().map(|&(i, rows)| (self.running[i].seq, self.running[i].position, rows)).collect();
        let mut ragged = Ragged::contiguous(&rows);
        let turns = |p: &Prompt| matches!(p, Prompt::Embedded(Embedded { rotary: Some(_), .. }));
        if parts.iter().any(|&(i, _)| turns(&self.running[i].prompt)) {
            let planes = parts.iter().flat_map(|&(i, rows)| {
                let r = &self.running[i];
                (r.position..r.position + rows).map(|position| r.prompt.plane(position))
            });
            ragged = ragged.with_planes(planes.collect())?;
        }
        let result = self.forward(parts, ragged);
        if result.is_err() {
            // Some layers may have kept the rows: back to where every layer was.
            for (seq, start, _) in rows {
                self.cache.truncate(seq, start)?;
            }
        }
        result
    }

    fn forward(&mut self, parts: &[Part], rows: Ragged) -> Result<Output> {
        let device = self.model.dims().device;
        let mut ids: Vec<i64> = Vec::with_capacity(rows.len());
        let mut embedded: Vec<Tensor> = Vec::new();
        let tensor = |ids: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(ids)?.f_to_device(device)?) };
        for &(i, rows) in parts {
            let r = &self.running[i];
            match &r.prompt {
                _ if r.unread() == 0 => ids.extend(r.written.last().map(|&id| i64::from(id))),
                Prompt::Ids(prompt) => {
                    ids.extend(prompt[r.read..r.read + rows].iter().map(|&id| i64::from(id)));
                }
                Prompt::Embeds(x) | Prompt::Embedded(Embedded { embeddings: x, .. }) => {
                    if !ids.is_empty() {
                        embedded.push(self.model.embed(&tensor(&ids)?)?);
                        ids.clear();
                    }
                    embedded.push(x.f_narrow(0, r.read as i64, rows as i64)?.f_to_device(device)?);
                }
            }
        }
        let x;
        let input = if embedded.is_empty() {
            x = tensor(&ids)?;
            Input::Ids(&x)
        } else {
            if !ids.is_empty() {
                embedded.push(self.model.embed(&tensor(&ids)?)?);
            }
            x = Tensor::f_cat(&embedded, 0)?;
            Input::Embeds(&x)
        };
        let hook: Option<&mut dyn LayerHook> = match &mut self.hook {
            Some(hook) => Some(&mut **hook),
            None => None,
        };
        self.model.forward(&Batch::new(rows, input), self.cache, hook)
    }

    /// Takes the rows of these calls out of the cache again.
    fn undo(&mut self, made: &[Called]) -> Result<()> {
        for &(i, _) in made.iter().flat_map(|called| &called.parts) {
            self.cache.truncate(self.running[i].seq, self.running[i].position)?;
        }
        Ok(())
    }

    /// Counts the rows of the calls and chooses a token for every sequence whose prompt is read.
    fn write(&mut self, made: &[Called], step: &mut Step) -> Result<()> {
        let (mut picked, mut hidden) = (Vec::new(), Vec::new());
        for Called { parts, output } in made {
            let mut at: Vec<i64> = Vec::with_capacity(parts.len());
            // Sequences of a call's output stand in the order of its parts.
            for (&(i, rows), (seq, from, positions)) in parts.iter().zip(output.rows.iter()) {
                let r = &self.running[i];
                let exhausted = output.exhausted.contains(&seq);
                if r.unread() > rows {
                    if exhausted {
                        let (need, max) = (r.prompt.len() + 1, r.position + rows);
                        let what = "the sequence's cache";
                        step.failed.push((r.id, Error::ContextOverflow { need, max, what }));
                    }
                } else if positions.is_empty() {
                    step.failed.push((r.id, Error::input("a layer hook removed the last row of a sequence")));
                } else {
                    at.push((from + positions.len() - 1) as i64);
                    picked.push((i, exhausted));
                }
            }
            if at.len() as i64 == output.hidden.size2()?.0 {
                hidden.push(output.hidden.shallow_clone());
            } else if !at.is_empty() {
                let at = Tensor::f_from_slice(&at)?.f_to_device(output.hidden.device())?;
                hidden.push(output.hidden.f_index_select(0, &at)?);
            }
        }
        let mut logits = std::mem::take(&mut self.logits);
        let vocab = self.read_logits(&hidden, &mut logits)?;
        for &(i, rows) in made.iter().flat_map(|called| &called.parts) {
            let r = &mut self.running[i];
            r.read += rows.min(r.unread());
            r.position += rows;
        }
        if vocab > 0 {
            for (row, (i, exhausted)) in logits.chunks_mut(vocab).zip(picked) {
                let r = &mut self.running[i];
                match r.choose(row, exhausted) {
                    Ok(token) => step.tokens.push(token),
                    Err(error) => step.failed.push((r.id, error)),
                }
            }
        }
        self.logits = logits;
        step.tokens.sort_by_key(|token| token.request);
        let ended: Vec<RequestId> =
            step.tokens.iter().filter(|t| t.finish.is_some()).map(|t| t.request).collect();
        for id in ended {
            let Some(released) = self.release(id) else { continue };
            if self.release_ended {
                step.ended.push(released);
            } else {
                self.cache.close(released.seq);
            }
        }
        Ok(())
    }

    /// Logits of some hidden states, float32, row after row; gives the length of a row, 0 without rows.
    fn read_logits(&self, hidden: &[Tensor], into: &mut Vec<f32>) -> Result<usize> {
        let logits = match hidden {
            [] => return Ok(0),
            [one] => self.model.logits(one)?,
            several => self.model.logits(&Tensor::f_cat(several, 0)?)?,
        };
        into.resize(logits.numel(), 0.0);
        let vocab = logits.size2()?.1 as usize;
        // In one pass; libtorch would wake its threads for it, which then spin where the kernels' want to run.
        if let Some(values) = values(&logits) {
            values.widen(into);
            return Ok(vocab);
        }
        let logits = logits.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        logits.f_copy_data(into, logits.numel())?;
        Ok(vocab)
    }
}

impl Running {
    /// Chooses the next token from its row of logits.
    fn choose(&mut self, logits: &mut [f32], exhausted: bool) -> Result<Token> {
        let choice = self.sampler.choose(logits)?;
        self.written.push(choice.token);
        let finish = if self.eos.contains(&choice.token) {
            Some(Finish::Eos)
        } else if self.written.len() >= self.limit {
            Some(self.finish_at_limit)
        } else if exhausted {
            Some(Finish::Context)
        } else {
            None
        };
        Ok(Token { request: self.id, token: choice.token, logprob: choice.logprob, top: choice.top, finish })
    }
}
