//! Bilingual (English, Chinese) arithmetic word problems with worked steps, generated from a seed.
//!
//! A problem is a [`Plan`] (which operations, in which order), its numbers, and a template that dresses both in words,
//! names and items. The solution writes every operation as an equation and ends as GSM8K answers do:
//!
//! ```text
//! Emma has 12 apples and buys 30 more. How many apples does Emma have now?
//! Emma now has 12+30=42 apples.
//! #### 42
//! ```
//!
//! **Splits are disjoint by construction.** A hash of the plan and its numbers, and of nothing else, says which split a
//! computation belongs to ([`Split::of`]); a generator keeps drawing numbers until they belong to the split that was
//! asked for. So a held-out problem is never a training problem with other names, another wording, or in the other
//! language.
//!
//! Problem `index` of a `(split, seed)` is a function of these three alone, so a run can resume, or a shard can start,
//! anywhere ([`problem`]).

mod plan;
mod templates;

use std::fmt;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

pub use plan::{Plan, Step, Worked};
pub use templates::{Template, templates};

/// Which part of the computations a problem is drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// 18 of 20 computations.
    Train,
    /// 1 of 20 computations, for decisions made while training.
    Validation,
    /// 1 of 20 computations, for figures that are reported.
    Test,
}

impl Split {
    /// Every split.
    pub const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];

    /// The split that the computation of `plan` on `numbers` belongs to.
    pub fn of(plan: Plan, numbers: &[i64]) -> Self {
        Self::of_bytes(plan.name().bytes().chain(numbers.iter().flat_map(|n| n.to_le_bytes())))
    }

    /// The split of a computation that is written as bytes.
    pub(crate) fn of_bytes(bytes: impl Iterator<Item = u8>) -> Self {
        // FNV-1a: fixed for good, unlike the standard library's hasher, so that a checkpoint's test set stays its test
        // set. The final mix is there because the low bits of FNV alone follow the low bits of the last number.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        hash ^= hash >> 33;
        hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 33;
        match hash % 20 {
            0 => Self::Test,
            1 => Self::Validation,
            _ => Self::Train,
        }
    }

    /// The name in file names and on command lines: `train`, `validation`, `test`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|s| s.name() == text)
            .ok_or_else(|| format!("no split is named `{text}`; the splits are train, validation and test"))
    }
}

/// The language of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lang {
    /// English.
    En,
    /// Simplified Chinese.
    Zh,
}

impl Lang {
    /// The ISO 639-1 code.
    pub fn name(self) -> &'static str {
        match self {
            Self::En => "en",
            Self::Zh => "zh",
        }
    }
}

/// One word problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `word-problems/<split>/<seed>/<index>`.
    pub id: String,
    /// The split its computation belongs to.
    pub split: Split,
    /// The language of question and solution.
    pub lang: Lang,
    /// The template's name, `<lang>/<plan>/<wording>`.
    pub template: String,
    /// The computation that the template asks for.
    pub plan: Plan,
    /// The numbers given in the question, in the plan's order.
    pub numbers: Vec<i64>,
    /// What is asked.
    pub question: String,
    /// Worked steps, one a line, then `#### <answer>`.
    pub solution: String,
    /// The number asked for.
    pub answer: i64,
}

/// Problem number `index` of `split` under `seed`.
pub fn problem(split: Split, seed: u64, index: u64) -> Problem {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // A stream of its own for each problem: no state is carried from one problem to the next.
    rng.set_stream(index.wrapping_mul(4).wrapping_add(split as u64));
    let mut draws = Draws(rng);
    let all = templates();
    let template = draws.pick(all);
    let (numbers, worked) = loop {
        let numbers = template.plan.draw(&mut draws);
        if let Some(worked) = template.plan.work(&numbers)
            && Split::of(template.plan, &numbers) == split
        {
            break (numbers, worked);
        }
    };
    let (question, solution) = template.dress(&numbers, &worked, &mut draws);
    Problem {
        id: format!("word-problems/{split}/{seed}/{index}"),
        split,
        lang: template.lang,
        template: template.name(),
        plan: template.plan,
        numbers,
        question,
        solution,
        answer: worked.answer(),
    }
}

/// The first `n` problems of `split` under `seed`; `generate(..).skip(k)` starts at problem `k` without making those
/// before it.
pub fn generate(split: Split, n: usize, seed: u64) -> Generate {
    Generate { split, seed, indices: 0..n as u64 }
}

/// The iterator of [`generate`].
#[derive(Debug, Clone)]
pub struct Generate {
    split: Split,
    seed: u64,
    indices: std::ops::Range<u64>,
}

impl Iterator for Generate {
    type Item = Problem;

    fn next(&mut self) -> Option<Problem> {
        self.indices.next().map(|i| problem(self.split, self.seed, i))
    }

    fn nth(&mut self, n: usize) -> Option<Problem> {
        self.indices.nth(n).map(|i| problem(self.split, self.seed, i))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.indices.size_hint()
    }
}

impl ExactSizeIterator for Generate {}

/// Draws from the raw output of ChaCha, whose values are fixed by its definition; how a random-number crate maps them
/// to ranges may change with its releases, and a test set must not.
pub(crate) struct Draws(pub(crate) ChaCha8Rng);

impl Draws {
    /// A number in `low..=high`.
    pub(crate) fn between(&mut self, low: i64, high: i64) -> i64 {
        let width = (high - low + 1).cast_unsigned();
        // The bias of the remainder is below 2^-50 for the widths used here.
        low + (self.0.next_u64() % width).cast_signed()
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.between(0, of.len() as i64 - 1) as usize]
    }
}
