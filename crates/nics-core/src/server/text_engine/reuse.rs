//! Where a prompt starts from: nothing, a kept sequence, or one that runs; and what is kept of a sequence that ends.

use super::prefix::{Entry, common};
use super::{Held, TextEngine};
use crate::Result;
use crate::generate::Released;
use crate::seam::SeqId;

/// Rows that a prompt can start from.
#[derive(Clone, Copy)]
struct Beginning {
    source: Source,
    rows: usize,
}

#[derive(Clone, Copy)]
enum Source {
    Kept {
        seq: SeqId,
        /// It is of no more use once the prompt's own sequence is there.
        covered: bool,
    },
    Running(SeqId),
}

impl TextEngine<'_> {
    /// The best beginning that there is for a prompt, and whether an older prompt that is being read will be a better one.
    fn beginning(&self, index: usize, min: usize) -> (Option<Beginning>, bool) {
        let (job, rule) = (&self.jobs[index], self.settings.rule());
        let mine = job.prompt.len() - 1; // The last one's logits are needed.
        let mut best = self
            .kept
            .best(&job.prompt, rule, min)
            .map(|m| Beginning { source: Source::Kept { seq: m.seq, covered: m.covers }, rows: m.rows });
        let mut coming = 0;
        for (i, other) in self.jobs.iter().enumerate().filter(|(i, _)| *i != index) {
            let theirs = rule.offered(other.prompt.len(), other.prompt.len() - 1);
            let rows = rule.rows(common(&other.prompt, &job.prompt), theirs, mine);
            if i < index {
                coming = coming.max(rows);
            }
            let now = rows.min(other.read);
            let running = other.running.and_then(|id| self.generator.reading(id));
            if let Some((seq, _)) = running.filter(|_| now >= min && now > best.map_or(0, |b| b.rows)) {
                best = Some(Beginning { source: Source::Running(seq), rows: now });
            }
        }
        (best, coming >= min && coming > best.map_or(0, |b| b.rows))
    }

    /// Gives a waiting job to the generator, unless it should wait longer. With `take_over`, a kept sequence is never
    /// copied.
    pub(super) fn enter(&mut self, index: usize, take_over: bool) -> Result<()> {
        let room = self.jobs[index].room;
        let mut from = None;
        if let Some(min) = self.settings.min_prefix {
            let (best, better_coming) = self.beginning(index, min.max(1));
            if better_coming {
                return Ok(());
            }
            if let Some(best) = best {
                from = self.begin_from(best, room, take_over)?.map(|seq| (seq, best.rows));
                if from.is_none() {
                    self.give_up_reuse();
                }
            }
        }
        let job = &mut self.jobs[index];
        let Some(request) = job.waiting.take() else { return Ok(()) };
        let id = match from {
            None => self.generator.add(request)?,
            Some((seq, rows)) => match self.generator.add_from(request, seq, rows) {
                Ok(id) => {
                    job.cached = rows;
                    job.read = rows;
                    self.stats.prompt_tokens_reused_total += rows as u64;
                    id
                }
                Err(error) => {
                    self.close(seq);
                    return Err(error);
                }
            },
        };
        job.running = Some(id);
        Ok(())
    }

    /// A sequence that begins with these rows; `None` when the cache cannot.
    fn begin_from(&mut self, beginning: Beginning, room: usize, take_over: bool) -> Result<Option<SeqId>> {
        let rows = beginning.rows;
        match beginning.source {
            Source::Running(seq) => self.generator.cache_mut().branch(seq, rows, room),
            Source::Kept { seq, covered } if take_over || covered => {
                self.kept.remove(seq);
                match self.generator.cache_mut().resume(seq, rows, room) {
                    Ok(true) => Ok(Some(seq)),
                    otherwise => {
                        self.close(seq);
                        otherwise.map(|_| None)
                    }
                }
            }
            Source::Kept { seq, .. } => {
                self.kept.touch(seq);
                self.generator.cache_mut().branch(seq, rows, room)
            }
        }
    }

    /// The cache does not give beginnings of sequences: nothing more is kept.
    fn give_up_reuse(&mut self) {
        tracing::info!("this cache cannot give the beginning of a sequence: prefixes are not reused");
        self.settings.min_prefix = None;
        while let Some(entry) = self.kept.evict(None) {
            self.close(entry.seq);
        }
    }

    /// Lets waiting jobs go on whose wait is over.
    pub(super) fn enter_waiting(&mut self) {
        let mut index = 0;
        while index < self.jobs.len() {
            if self.jobs[index].waiting.is_some()
                && let Err(error) = self.enter(index, false)
            {
                let job = self.jobs.remove(index);
                self.reserved -= job.reserved;
                self.failed.push((job.id, error));
                continue;
            }
            index += 1;
        }
    }

    /// Keeps what prompts can begin with of the sequence of a job that has ended; closes it when that is nothing. The
    /// job's reservation is gone by now.
    pub(super) fn keep(&mut self, released: Released, job: &Held) {
        let Released { seq, ids, .. } = released;
        let cache = self.generator.cache();
        let whole = |ids: &Vec<u32>| (0..self.dims.layers).all(|l| cache.kept(seq, l) == ids.len());
        let (Some(min), Some(mut ids)) = (self.settings.min_prefix, ids.filter(whole)) else {
            return self.close(seq);
        };
        let rows = self.settings.rule().offered(ids.len(), job.prompt.len() - 1);
        if rows < min.max(1) {
            return self.close(seq);
        }
        if rows < ids.len() {
            // Cut to size: the rows of the reply are nobody's any more.
            match self.generator.cache_mut().resume(seq, rows, rows) {
                Ok(true) => ids.truncate(rows),
                cannot => {
                    if let Err(error) = cannot {
                        tracing::debug!("a sequence could not be cut to its prompt: {error}");
                    }
                    return self.close(seq);
                }
            }
        }
        let bytes = self.generator.cache().held(seq).map_or(job.reserved, |held| held.allocated);
        for entry in self.kept.insert(Entry { seq, ids, bytes }) {
            self.close(entry.seq);
        }
        self.make_room(0, None);
    }
}
