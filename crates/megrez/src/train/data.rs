//! The conversations of a run, as batches that depend on seed and place alone.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::path::Path;

use nics_core::models::Model;
use nics_core::template::Message;
use nics_core::train::{Loss, Micro, masked_cross_entropy};
use nics_core::{Error, Result};
use nics_core::{
    cache::NoCache,
    models::{Batch as Call, Input},
    seam::{Ragged, SeqId},
};
use nics_datasets::word_problems::{self, Split};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use tch::Tensor;

use super::recipe::{Data, Source};
use crate::labels::{IGNORED, TurnTokens};
use crate::prompt::Prompter;

/// Conversations by their number, without end.
pub struct Conversations {
    source: Opened,
}

enum Opened {
    WordProblems {
        seed: u64,
    },
    /// `order` is that of the pass in hand, with the pass's number.
    File {
        all: Vec<Vec<Message>>,
        seed: u64,
        order: RefCell<(u64, Vec<usize>)>,
    },
}

#[derive(Deserialize)]
struct Line {
    conversations: Vec<Message>,
}

/// The conversation in which a word problem is asked and solved.
pub fn word_problem(split: Split, seed: u64, index: u64) -> [Message; 2] {
    let problem = word_problems::problem(split, seed, index);
    [Message::new("user", problem.question), Message::new("assistant", problem.solution)]
}

impl Conversations {
    /// Opens a source; `seed` orders the conversations of a file.
    ///
    /// # Errors
    /// A file that is missing, empty or has a line that is not a conversation; the line is named.
    pub fn open(source: &Source, seed: u64) -> Result<Self> {
        let source = match source {
            Source::WordProblems { seed } => Opened::WordProblems { seed: *seed },
            Source::Conversations { file } => {
                let all = read(file)?;
                let order = RefCell::new((0, pass(all.len(), seed, 0)));
                Opened::File { all, seed, order }
            }
        };
        Ok(Self { source })
    }

    /// Conversation number `index`.
    pub fn get(&self, index: u64) -> Vec<Message> {
        match &self.source {
            Opened::WordProblems { seed } => word_problem(Split::Train, *seed, index).to_vec(),
            Opened::File { all, seed, order } => {
                let n = all.len() as u64;
                let mut order = order.borrow_mut();
                if order.0 != index / n {
                    *order = (index / n, pass(all.len(), *seed, index / n));
                }
                all[order.1[(index % n) as usize]].clone()
            }
        }
    }
}

/// The order of `n` conversations in a pass over them.
fn pass(n: usize, seed: u64, number: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(number);
    order.shuffle(&mut rng);
    order
}

fn read(path: &Path) -> Result<Vec<Vec<Message>>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let all = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| {
            let bad = |why: String| Error::Input(format!("line {}: {why}", i + 1)).in_file(path);
            let line: Line = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
            if line.conversations.iter().all(|m| m.role != "assistant") {
                return Err(bad("the conversation has no assistant turn to learn from".into()));
            }
            Ok(line.conversations)
        })
        .collect::<Result<Vec<_>>>()?;
    if all.is_empty() {
        return Err(Error::input("there is no conversation in it").in_file(path));
    }
    Ok(all)
}

/// Makes the batches of a run.
pub struct Batches<'a> {
    prompter: &'a Prompter,
    turns: TurnTokens,
    conversations: Conversations,
    data: Data,
    /// The group of conversations in hand: its number and its batches.
    group: Option<(u64, Vec<Vec<Example>>)>,
    warned: bool,
}

#[derive(Clone)]
struct Example {
    ids: Vec<u32>,
    labels: Vec<i64>,
}

impl<'a> Batches<'a> {
    /// Batches of `data` in the tokens of `prompter`.
    pub fn new(prompter: &'a Prompter, conversations: Conversations, data: Data) -> Result<Self> {
        Ok(Self { turns: prompter.turn_tokens()?, prompter, conversations, data, group: None, warned: false })
    }

    /// The cost of `micro`'s batch under `model`.
    pub fn loss(&mut self, model: &dyn Model, micro: Micro) -> Result<Loss> {
        let batch = self.batch(micro)?;
        let longest = batch.iter().map(|e| e.ids.len()).max().unwrap_or(0);
        let (mut ids, mut labels) = (Vec::new(), Vec::new());
        for example in &batch {
            let padding = longest - example.ids.len();
            // Causal attention never lets a row see the padding behind it, and padding has no target.
            ids.extend(example.ids.iter().map(|&id| i64::from(id)).chain(std::iter::repeat_n(0, padding)));
            labels.extend(example.labels.iter().copied().chain(std::iter::repeat_n(IGNORED, padding)));
        }
        let device = model.dims().device;
        let rows: Vec<_> = (0..batch.len()).map(|i| (SeqId(i as u64), 0, longest)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(device)?;
        let out = model.forward(
            &Call::new(Ragged::contiguous(&rows), Input::Ids(&ids)),
            &mut NoCache::new(),
            None,
        )?;
        // The head is the widest layer: only rows with a target go through it.
        let targets: Vec<i64> = (0..labels.len() as i64).filter(|&i| labels[i as usize] != IGNORED).collect();
        let labels: Vec<i64> = targets.iter().map(|&i| labels[i as usize]).collect();
        let hidden = out.hidden.f_index_select(0, &Tensor::f_from_slice(&targets)?.f_to_device(device)?)?;
        let labels = Tensor::f_from_slice(&labels)?.f_to_device(device)?;
        masked_cross_entropy(&model.logits(&hidden)?, &labels).map_err(Error::input)
    }

    fn batch(&mut self, micro: Micro) -> Result<Vec<Example>> {
        let bucket = self.data.bucket as u64;
        let group = micro.index / bucket;
        if self.group.as_ref().is_none_or(|(g, _)| *g != group) {
            self.group = Some((group, self.make(group, micro.seed)?));
        }
        let place = (micro.index % bucket) as usize;
        Ok(self.group.as_ref().map_or_else(Vec::new, |(_, batches)| batches[place].clone()))
    }

    /// `bucket` batches of conversations of like length, in an order of chance.
    fn make(&mut self, group: u64, seed: u64) -> Result<Vec<Vec<Example>>> {
        let n = (self.data.batch * self.data.bucket) as u64;
        let mut examples =
            (group * n..(group + 1) * n).map(|i| self.example(i)).collect::<Result<Vec<Example>>>()?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(u64::MAX - group);
        // Ties in an order of chance, or a batch would always hold the same mixture.
        examples.sort_by_cached_key(|e| (Reverse(e.ids.len()), rng.random::<u64>()));
        let mut batches: Vec<Vec<Example>> =
            examples.chunks(self.data.batch).map(<[Example]>::to_vec).collect();
        batches.shuffle(&mut rng);
        Ok(batches)
    }

    fn example(&mut self, index: u64) -> Result<Example> {
        let messages = self.conversations.get(index);
        let mut ids = self.prompter.encode(&messages, false)?;
        let cut = ids.len() > self.data.max_tokens;
        ids.truncate(self.data.max_tokens);
        let (labels, truncated) = self.turns.labels(&ids)?;
        if (cut || truncated) && !self.warned {
            self.warned = true;
            tracing::warn!(
                "conversation {index} is cut at {} tokens (max_tokens); more may follow unmentioned",
                ids.len()
            );
        }
        if labels.iter().all(|&l| l == IGNORED) {
            return Err(Error::Input(format!("conversation {index} has no target within max_tokens")));
        }
        Ok(Example { ids, labels })
    }
}
