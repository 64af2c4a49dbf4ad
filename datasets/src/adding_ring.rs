//! The adding ring: lines of digits, each made from the one before it, generated from a seed.
//!
//! ```text
//! 3 1 4 0 2 2 1 ; 4 0 4 2 4 3 4 ; 4 4 1 1 2 2 3 ; …        ring:   15 lines, 120 tokens
//! 3 1 4 0 2 2 1 ; 4 0 4 2 4 3 4 ; … = 3 1 4 0 2 2 1 ;      recall: the last line repeats the first
//! ```
//!
//! A line is `new_i = prev_i + prev_{i+1} (mod 5)`, the digits standing in a ring. Whoever writes such a text from its
//! first line has to read the line before at every step, so one wrong digit spoils what follows: the task is *local*,
//! and the text is long beside its prompt, as a chain of thought is. In the *recall* form the last but one line ends with
//! `=`, and the first line follows once more, which has to be read from the other end of the text.
//!
//! **Splits are disjoint by construction**: a hash of the first line, from which all others follow, says which split a
//! text belongs to. (A later line of one text may be the first of another.) Problem `index` of a `(split, seed)` is a
//! function of these alone ([`problem`]).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use crate::word_problems::{Draws, Split};

/// Digits are below this.
pub const MODULUS: u32 = 5;
/// Digits of a line.
pub const DIGITS: usize = 7;
/// Lines of a text.
pub const LINES: usize = 15;
/// Tokens of a line, its separator among them.
pub const LINE_TOKENS: usize = DIGITS + 1;
/// Tokens of a text.
pub const TOKENS: usize = LINES * LINE_TOKENS;

/// Stands for unknown words, and fills batches.
pub const UNKNOWN: &str = "<unk>";
/// Would end a text; no text has it, since all are of one length.
pub const EOS: &str = "<eos>";
/// Ends a line.
pub const SEPARATOR: &str = ";";
/// Ends the line before one that repeats the first.
pub const RECALL: &str = "=";

/// Token id of [`SEPARATOR`].
pub const SEPARATOR_ID: u32 = 2;
/// Token id of [`RECALL`].
pub const RECALL_ID: u32 = 3;
/// Token id of the digit 0; the others follow.
pub const ZERO_ID: u32 = 4;

/// Every word; a word's place is its token id.
pub fn vocabulary() -> Vec<String> {
    let control = [UNKNOWN, EOS, SEPARATOR, RECALL].map(str::to_owned);
    control.into_iter().chain((0..MODULUS).map(|n| n.to_string())).collect()
}

/// What the last line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// One more line made from the line before.
    Ring,
    /// The first line again.
    Recall,
}

/// One problem: a first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddingRing {
    /// `adding-ring/<split>/<seed>/<index>`.
    pub id: String,
    /// The split that the first line belongs to.
    pub split: Split,
    /// The first line.
    pub first: [u32; DIGITS],
}

impl AddingRing {
    /// The first `lines` lines of the ring.
    pub fn lines(&self, lines: usize) -> Vec<[u32; DIGITS]> {
        std::iter::successors(Some(self.first), |line| Some(next(*line))).take(lines).collect()
    }

    /// Token ids of a text of `lines` lines; at least 2 for [`Task::Recall`].
    pub fn ids(&self, task: Task, lines: usize) -> Vec<u32> {
        match task {
            Task::Ring => self.ids_recalling(lines, &[]),
            Task::Recall => self.ids_recalling(lines, &[lines.saturating_sub(1)]),
        }
    }

    /// Token ids of a text of `lines` lines, of which those in `places`, counted from 0, are the first one again, asked for
    /// by the line before; the ring goes on from there. Line 0 is the first one anyway.
    pub fn ids_recalling(&self, lines: usize, places: &[usize]) -> Vec<u32> {
        let mut line = self.first;
        let mut ids: Vec<u32> = Vec::with_capacity(lines * LINE_TOKENS);
        for i in 0..lines {
            if places.contains(&i) {
                line = self.first;
                if let Some(separator) = ids.last_mut() {
                    *separator = RECALL_ID;
                }
            }
            ids.extend(line.map(|digit| digit + ZERO_ID));
            ids.push(SEPARATOR_ID);
            line = next(line);
        }
        ids
    }

    /// Token ids of what a text is written from: its first line.
    pub fn prompt(&self) -> Vec<u32> {
        self.ids(Task::Ring, 1)
    }

    /// A whole text in words.
    pub fn text(&self, task: Task) -> String {
        let words = vocabulary();
        let words: Vec<&str> =
            self.ids(task, LINES).into_iter().map(|id| words[id as usize].as_str()).collect();
        words.join(" ")
    }
}

/// The line after a line.
pub fn next(line: [u32; DIGITS]) -> [u32; DIGITS] {
    std::array::from_fn(|i| (line[i] + line[(i + 1) % DIGITS]) % MODULUS)
}

/// The split of a first line.
pub fn split(first: [u32; DIGITS]) -> Split {
    Split::of_bytes(first.into_iter().flat_map(u32::to_le_bytes))
}

/// Problem number `index` of `split` under `seed`.
pub fn problem(wanted: Split, seed: u64, index: u64) -> AddingRing {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // A stream of its own for each problem: no state is carried from one problem to the next.
    rng.set_stream(index.wrapping_mul(4).wrapping_add(wanted as u64));
    let mut draws = Draws(rng);
    let first = loop {
        let first = std::array::from_fn(|_| draws.between(0, i64::from(MODULUS) - 1) as u32);
        if split(first) == wanted {
            break first;
        }
    };
    AddingRing { id: format!("adding-ring/{wanted}/{seed}/{index}"), split: wanted, first }
}

/// The first `n` problems of `split` under `seed`.
pub fn problems(split: Split, seed: u64, n: usize) -> impl Iterator<Item = AddingRing> {
    (0..n as u64).map(move |index| problem(split, seed, index))
}
