//! The path that a judge would take: both models at every step, both branches continued where they differ.
//!
//! Where the models propose different tokens, the large model goes on from each for a sentence or two, a judge compares
//! them, and the small model's token stands unless they differ in meaning. That is what a router imitates, and the most
//! that one can reach. It costs more than the large model alone: the large model runs at every step, and for two sentences
//! at every difference. Its share of large tokens counts what was taken, not what was computed.

use nics_core::cache::DenseCache;
use nics_core::models::{Model, NewTokens, read_last};
use nics_core::seam::{KvCache, SeqId};
use tch::Kind;

use super::judges::{Judge, Pair};
use super::stops::StopTokens;
use crate::decode::check_prompt;
use crate::{Error, Result};

/// How a path is followed.
#[derive(Debug, Clone)]
pub struct LiveSettings {
    /// The most tokens of a response.
    pub max_new_tokens: usize,
    /// Responses written at once.
    pub batch: usize,
    /// Tokens that end a response.
    pub eos: Vec<u32>,
    /// Tokens that end a sentence.
    pub stops: StopTokens,
    /// Ends of sentences behind the one in which the models part: both branches have so many and one more.
    pub sentences: usize,
    /// The most tokens of a branch beside its first.
    pub max_continuation: usize,
}

/// A token of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveToken {
    /// Its id.
    pub token: u32,
    /// Whether it is the large model's because the judge wanted it so.
    pub large: bool,
    /// The judge's word, where the models differed.
    pub score: Option<i64>,
}

/// A response being written.
struct Running {
    place: usize,
    ids: Vec<u32>,
    /// How many of them both models have.
    read: usize,
    small: SeqId,
    large: SeqId,
    limit: usize,
}

/// A branch off a response, in the large model's cache.
struct Branch {
    seq: SeqId,
    at: usize,
    token: u32,
    rest: Vec<u32>,
    sentences: usize,
    ended: bool,
}

/// Writes a response to each prompt along the judge's path, greedily; a token's source says who chose it. A score of 1 takes
/// the large model's token, and so does one that is unusable.
///
/// # Errors
/// [`Error::EmptyPrompt`], ids outside the vocabulary that both models share, a prompt that leaves no room, and what models
/// and judge refuse.
pub fn follow(
    small: &dyn Model,
    large: &dyn Model,
    judge: &mut dyn Judge,
    prompts: &[Vec<u32>],
    settings: &LiveSettings,
) -> Result<Vec<Vec<LiveToken>>> {
    let _guard = tch::no_grad_guard();
    for (name, value) in [("max_new_tokens", settings.max_new_tokens), ("batch", settings.batch)] {
        if value == 0 {
            return Err(Error::setting(name, 0, "at least 1"));
        }
    }
    let vocab = small.dims().vocab.min(large.dims().vocab);
    let context = small.dims().context.min(large.dims().context);
    for (i, prompt) in prompts.iter().enumerate() {
        check_prompt(prompt, i as u64, vocab as usize, context)?;
    }
    let mut paths = vec![Vec::new(); prompts.len()];
    let mut live = Live { small, large, vocab, settings, caches: [DenseCache::new(), DenseCache::new()] };
    let mut waiting = prompts.iter().enumerate();
    let mut running: Vec<Running> = Vec::new();
    loop {
        while running.len() < settings.batch {
            let Some((place, prompt)) = waiting.next() else { break };
            let limit = settings.max_new_tokens.min(context - prompt.len());
            let [small, large] = &mut live.caches;
            let room = prompt.len() + limit;
            running.push(Running {
                place,
                ids: prompt.clone(),
                read: 0,
                small: small.open(room)?,
                large: large.open(room)?,
                limit,
            });
        }
        if running.is_empty() {
            return Ok(paths);
        }
        let tokens = live.step(&mut running, judge)?;
        let mut left = Vec::with_capacity(running.len());
        for (mut one, token) in running.into_iter().zip(tokens) {
            one.read = one.ids.len();
            one.ids.push(token.token);
            let path: &mut Vec<LiveToken> = &mut paths[one.place];
            path.push(token);
            if settings.eos.contains(&token.token) || path.len() >= one.limit {
                live.caches[0].close(one.small);
                live.caches[1].close(one.large);
            } else {
                left.push(one);
            }
        }
        running = left;
    }
}

struct Live<'a> {
    small: &'a dyn Model,
    large: &'a dyn Model,
    vocab: i64,
    settings: &'a LiveSettings,
    /// Of the small and the large model.
    caches: [DenseCache; 2],
}

impl Live<'_> {
    /// The next token of every response.
    fn step(&mut self, running: &mut [Running], judge: &mut dyn Judge) -> Result<Vec<LiveToken>> {
        let rows = |of: fn(&Running) -> SeqId| -> Vec<NewTokens> {
            running.iter().map(|r| (of(r), r.read, &r.ids[r.read..])).collect()
        };
        let small = next(self.small, &mut self.caches[0], &rows(|r| r.small), self.vocab)?;
        let large = next(self.large, &mut self.caches[1], &rows(|r| r.large), self.vocab)?;
        let differ: Vec<usize> = (0..running.len()).filter(|&i| small[i] != large[i]).collect();
        let mut pairs = Vec::with_capacity(differ.len());
        // Two branches of each: as many as are written at once in any case.
        for part in differ.chunks(self.settings.batch.div_ceil(2)) {
            let mut branches = Vec::with_capacity(2 * part.len());
            for &i in part {
                for token in [small[i], large[i]] {
                    branches.push(self.branch(&running[i], token)?);
                }
            }
            self.write(&mut branches)?;
            let mut branches = branches.into_iter();
            for &i in part {
                if let (Some(a), Some(b)) = (branches.next(), branches.next()) {
                    pairs.push(Pair {
                        context: running[i].ids.clone(),
                        small: a.token,
                        large: b.token,
                        small_continuation: a.rest,
                        large_continuation: b.rest,
                        written: None,
                    });
                }
            }
        }
        let mut verdicts = Vec::with_capacity(pairs.len());
        for part in pairs.chunks(judge.batch().max(1)) {
            judge.judge(part, &mut verdicts)?;
        }
        let mut tokens: Vec<LiveToken> =
            small.iter().map(|&token| LiveToken { token, large: false, score: None }).collect();
        for (&i, verdict) in differ.iter().zip(&verdicts) {
            let take = verdict.score != 0;
            let token = if take { large[i] } else { small[i] };
            tokens[i] = LiveToken { token, large: take, score: Some(verdict.score) };
        }
        Ok(tokens)
    }

    /// A branch of the large model's sequence that begins with `token`.
    fn branch(&mut self, of: &Running, token: u32) -> Result<Branch> {
        let at = of.ids.len();
        let room = (at + 1 + self.settings.max_continuation).min(self.large.dims().context);
        let seq = match self.caches[1].branch(of.large, at, room)? {
            Some(seq) => seq,
            None => self.caches[1].fork(of.large)?,
        };
        // As in the pipeline, the first token itself is no end of a sentence.
        let ended = self.settings.eos.contains(&token);
        Ok(Branch { seq, at, token, rest: Vec::new(), sentences: 0, ended })
    }

    /// Writes branches to the ends of their sentences and forgets their sequences.
    fn write(&mut self, branches: &mut [Branch]) -> Result<()> {
        let (settings, context) = (self.settings, self.large.dims().context);
        for _ in 0..settings.max_continuation {
            let going: Vec<usize> =
                (0..branches.len()).filter(|&b| !branches[b].ended && branches[b].at < context).collect();
            if going.is_empty() {
                break;
            }
            let last: Vec<[u32; 1]> =
                going.iter().map(|&b| [*branches[b].rest.last().unwrap_or(&branches[b].token)]).collect();
            let rows: Vec<NewTokens> =
                going.iter().zip(&last).map(|(&b, id)| (branches[b].seq, branches[b].at, &id[..])).collect();
            let tokens = next(self.large, &mut self.caches[1], &rows, self.vocab)?;
            for (b, token) in going.into_iter().zip(tokens) {
                let branch = &mut branches[b];
                branch.at += 1;
                if settings.eos.contains(&token) {
                    branch.ended = true;
                    continue;
                }
                branch.rest.push(token);
                branch.sentences += usize::from(settings.stops.contains(i64::from(token)));
                branch.ended = branch.sentences > settings.sentences;
            }
        }
        for branch in branches {
            self.caches[1].close(branch.seq);
        }
        Ok(())
    }
}

/// The likeliest next token of each sequence below `vocab`, after its new tokens.
fn next(model: &dyn Model, cache: &mut DenseCache, new: &[NewTokens], vocab: i64) -> Result<Vec<u32>> {
    let logits = model.logits(&read_last(model, cache, new)?)?.f_to_kind(Kind::Float)?;
    // Rows of padding behind the shared vocabulary are nobody's tokens.
    let tokens = logits.f_narrow(1, 0, vocab)?.f_argmax(1, false)?.f_to_device(tch::Device::Cpu)?;
    Ok(Vec::<i64>::try_from(tokens)?.into_iter().map(|t| t as u32).collect())
}
