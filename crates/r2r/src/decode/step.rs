//! One step of a [`Decoder`]: proposals, the policy's word, questions to the large model and its answers.

use std::collections::HashMap;
use std::time::Duration;

use nics_core::device::OneThread;
use nics_core::models::{self, NewTokens};
use nics_kernels::gemv::MAX_ROWS;
use tch::{Device, Kind, Tensor};

use super::{CHUNK, Decoder, Finish, LargeRequest, LargeToken, OnFailure, Running, Source, Step, TokenEvent};
use crate::policy::{Sequence, StepView};
use crate::{Error, Result};

/// How long a step waits for the large model when every sequence does: short, so that its caller can take in and cancel.
const WAIT: Duration = Duration::from_millis(50);

impl Decoder<'_> {
    /// [`advance`](Self::advance) for callers that give up at the first failure.
    ///
    /// # Errors
    /// What `advance` returns, or the first failure of a sequence: it has been ended, the others have moved on.
    pub fn step(&mut self) -> Result<Vec<TokenEvent>> {
        let mut step = self.advance()?;
        if step.failed.is_empty() { Ok(step.tokens) } else { Err(step.failed.swap_remove(0).1) }
    }

    /// One token of every sequence that is neither waiting for the large model nor reading its prompt. There may be none:
    /// after a short while if all wait for a server, at once if there is no sequence left.
    ///
    /// # Errors
    /// A failure that no single sequence can be held to. No sequence is lost by it and none has written a token: the next
    /// step takes up where this one stopped, with the same proposals and decisions.
    pub fn advance(&mut self) -> Result<Step> {
        let mut step = Step::default();
        if self.running.is_empty() {
            return Ok(step);
        }
        let _guard = tch::no_grad_guard();
        self.propose()?;
        self.ask()?;
        let mut answers: HashMap<Sequence, Result<LargeToken>> = HashMap::new();
        if self.running.iter().any(|r| r.waiting) {
            let wait = if self.running.iter().all(|r| r.waiting) { WAIT } else { Duration::ZERO };
            answers.extend(self.large.answers(wait)?);
        }
        let (vocab, on_failure) = (self.vocab, self.on_failure);
        for r in &mut self.running {
            // Whoever still reads its prompt has no proposal; whoever waits has no answer.
            let Some((proposal, decision)) = r.pending else { continue };
            let mut degraded = false;
            let (token, source) = if decision.large {
                match answers.remove(&r.sequence).map(|answer| answer.and_then(|a| within(a, vocab))) {
                    None => continue,
                    Some(Ok(LargeToken { token, cached, read })) => (token, Source::Large { cached, read }),
                    Some(Err(e)) => match on_failure {
                        OnFailure::Abort => {
                            step.failed.push((r.sequence, e));
                            continue;
                        }
                        OnFailure::KeepSmall => {
                            degraded = true;
                            (proposal, Source::Small)
                        }
                    },
                }
            } else {
                (proposal, Source::Small)
            };
            step.tokens.push(r.accept(token, source, decision.score, degraded));
        }
        let ended = step.tokens.iter().filter(|e| e.finish.is_some()).map(|e| e.sequence);
        let ended: Vec<Sequence> = ended.chain(step.failed.iter().map(|(s, _)| *s)).collect();
        for sequence in ended {
            self.cancel(sequence);
        }
        self.warm();
        Ok(step)
    }

    /// Asks the large model for every sequence whose proposal is not to stand.
    fn ask(&mut self) -> Result<()> {
        let routed = |r: &Running| !r.waiting && r.pending.is_some_and(|(_, decision)| decision.large);
        let requests: Vec<LargeRequest> = self
            .running
            .iter()
            .filter(|r| routed(r))
            .map(|r| LargeRequest { sequence: r.sequence, ids: &r.ids, seen: r.seen })
            .collect();
        if requests.is_empty() {
            return Ok(());
        }
        self.large.ask(&requests)?;
        self.running.iter_mut().filter(|r| routed(r)).for_each(|r| r.waiting = true);
        Ok(())
    }

    /// Lets the large model read what it is far behind with.
    fn warm(&mut self) {
        let Some(window) = self.large.read_ahead().window else { return };
        for r in self.running.iter_mut().filter(|r| !r.waiting) {
            if r.ids.len() - r.seen.max(r.warmed) >= window.max(1) {
                self.large.warm(&LargeRequest { sequence: r.sequence, ids: &r.ids, seen: r.seen });
                r.warmed = r.ids.len();
            }
        }
    }

    /// The small model's token and the policy's word for every sequence that has none yet and whose prompt is read. They
    /// are kept until the token is written, so that a call that failed changes no draw and no state of the policy.
    fn propose(&mut self) -> Result<()> {
        let (fresh, hidden) = self.small_step()?;
        let Some(hidden) = hidden else { return Ok(()) };
        // What lies between the kernels is too small to share (see `OneThread`).
        let few = fresh.len() <= MAX_ROWS && hidden.device() == Device::Cpu;
        let _between_kernels = OneThread::when(few);
        let logits = self.small.logits(&hidden)?;
        let on_cpu = logits.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?;
        // A policy that fails is asked again: the draws are the sequences' once it has spoken.
        let mut proposals = Vec::with_capacity(fresh.len());
        for (row, &i) in fresh.iter().enumerate() {
            let mut logits: Vec<f32> = Vec::try_from(on_cpu.f_get(row as i64)?)?;
            logits.truncate(self.vocab);
            let r = &self.running[i];
            let mut rng = r.rng.clone();
            proposals.push((r.sampling.choose(&logits, &mut rng)?, rng));
        }
        let sequences: Vec<Sequence> = fresh.iter().map(|&i| self.running[i].sequence).collect();
        let token = Tensor::f_from_slice(&proposals.iter().map(|(t, _)| i64::from(*t)).collect::<Vec<_>>())?;
        let view = StepView { logits: &logits, hidden: &hidden, token: &token };
        let decisions = self.policy.decide(&view, &sequences)?;
        if decisions.len() != fresh.len() {
            let (name, found) = (self.policy.name(), decisions.len());
            return Err(Error::Input(format!("policy {name} decided {found} of {} rows", fresh.len())));
        }
        for ((&i, (proposal, rng)), decision) in fresh.iter().zip(proposals).zip(decisions) {
            (self.running[i].pending, self.running[i].rng) = (Some((proposal, decision)), rng);
        }
        Ok(())
    }

    /// Lets the small model read for every sequence without a proposal: its next row, or a piece of its prompt. Gives those
    /// that are read to the end, and hidden states of each one's last row, `[those, hidden]`.
    fn small_step(&mut self) -> Result<(Vec<usize>, Option<Tensor>)> {
        let fresh: Vec<usize> =
            (0..self.running.len()).filter(|&i| self.running[i].pending.is_none()).collect();
        // What a step that failed had read to the end is read again from its last row.
        for &i in &fresh {
            let r = &mut self.running[i];
            if r.read == r.ids.len() {
                r.read -= 1;
                self.cache.truncate(r.seq, r.read)?;
            }
        }
        // Prompts one by one, at the same places whoever else is there, up to their last row or the end of a piece that has
        // it.
        let (mut budget, mut last) = (CHUNK, Vec::new());
        for &i in &fresh {
            let r = &self.running[i];
            let left = r.ids.len() - r.read;
            let rows = left.min(CHUNK - r.read % CHUNK);
            if left == 1 {
                continue;
            }
            if rows > budget {
                break; // A younger prompt does not overtake.
            }
            budget -= rows;
            let hidden = self.read(&[i], rows)?;
            if rows == left {
                last.push((i, hidden));
            }
        }
        let singles: Vec<usize> =
            fresh.into_iter().filter(|&i| self.running[i].ids.len() - self.running[i].read == 1).collect();
        if !singles.is_empty() {
            let hidden = self.read(&singles, 1)?;
            if last.is_empty() {
                return Ok((singles, Some(hidden)));
            }
            for (row, i) in singles.into_iter().enumerate() {
                last.push((i, hidden.f_narrow(0, row as i64, 1)?));
            }
        }
        last.sort_by_key(|(i, _)| *i);
        let (done, rows): (Vec<usize>, Vec<Tensor>) = last.into_iter().unzip();
        let hidden = if rows.is_empty() { None } else { Some(Tensor::f_cat(&rows, 0)?) };
        Ok((done, hidden))
    }

    /// Reads at most `most` rows of some sequences in one call: hidden states of the last row of each.
    fn read(&mut self, which: &[usize], most: usize) -> Result<Tensor> {
        let new: Vec<NewTokens> = which
            .iter()
            .map(|&i| {
                let r = &self.running[i];
                (r.seq, r.read, &r.ids[r.read..r.ids.len().min(r.read + most)])
            })
            .collect();
        let hidden = models::read_last(self.small, &mut *self.cache, &new)?;
        let lens: Vec<usize> = new.iter().map(|(_, _, ids)| ids.len()).collect();
        for (&i, len) in which.iter().zip(lens) {
            self.running[i].read += len;
        }
        Ok(hidden)
    }
}

/// An answer that is a token of both models.
fn within(answer: LargeToken, vocab: usize) -> Result<LargeToken> {
    if (answer.token as usize) < vocab {
        return Ok(answer);
    }
    Err(Error::Input(format!(
        "the large model chose {}, outside the {vocab} ids that both models know",
        answer.token
    )))
}

impl Running {
    fn accept(&mut self, token: u32, source: Source, score: f32, degraded: bool) -> TokenEvent {
        if let Source::Large { .. } = source {
            // Without the token itself, which it reads at its next call.
            self.seen = self.ids.len();
        }
        self.ids.push(token);
        (self.pending, self.waiting) = (None, false);
        let position = self.written;
        self.written += 1;
        let finish = if self.eos.contains(&token) {
            Some(Finish::Eos)
        } else {
            (self.written == self.limit).then_some(self.finish_at_limit)
        };
        let event = TokenEvent { sequence: self.sequence, position, token, source, score, degraded, finish };
        self.usage.note(&event);
        event
    }
}
