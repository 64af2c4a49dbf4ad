//! Arithmetic modulo a number, worked from left to right in words that have synonyms, generated from a seed.
//!
//! ```text
//! <bos> 7 + 2 * 11 - 5 ?
//! <think> so 7 + 2 = 9 . then 9 * 11 = 4 ! so 4 - 5 = 18 . </think> finally answer 18 <eos>
//! ```
//!
//! (modulo 19.) A step is `CONNECTIVE a OP b = c SEPARATOR`; the end is `CLOSING answer c`. Connective, separator and
//! closing are drawn among synonyms with fixed probabilities that are rotated by the value at hand, so that a model that
//! knows the task well also knows which word comes next, and one that does not writes another word of the same meaning.
//! Two models can thus disagree without a difference ([`canonical`] makes synonyms equal), or in a number, and then every
//! later step goes wrong.
//!
//! **Splits are disjoint by construction**: a hash of the modulus, the numbers and the operators says which split a
//! computation belongs to. Problem `index` of a `(split, seed)` is a function of these alone ([`Ring::problem`]).

use std::fmt::Write;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use crate::error::{DatasetError, Result};
use crate::word_problems::{Draws, Split};

/// Begins every text.
pub const BOS: &str = "<bos>";
/// Ends every response.
pub const EOS: &str = "<eos>";
/// Stands for unknown words, and fills batches.
pub const UNKNOWN: &str = "<unk>";
/// Begins the worked steps.
pub const THINK: &str = "<think>";
/// Ends the worked steps.
pub const THINK_END: &str = "</think>";
/// Ends the question.
pub const QUESTION: &str = "?";
/// Stands before a step's result.
pub const EQUALS: &str = "=";
/// Stands before the final value.
pub const ANSWER: &str = "answer";
/// Words that begin a step, of one meaning.
pub const CONNECTIVES: [&str; 4] = ["so", "then", "thus", "now"];
/// Words that end a step, of one meaning.
pub const SEPARATORS: [&str; 3] = [".", "!", "!!"];
/// Words that begin the last sentence, of one meaning.
pub const CLOSINGS: [&str; 3] = ["finally", "overall", "hence"];

/// How often each synonym is taken, before rotation; three synonyms share the first three.
const SYNONYM_WEIGHTS: [i64; 4] = [45, 30, 15, 10];
/// How often each operator is taken, in percent.
const OPERATOR_WEIGHTS: [(Operator, i64); 3] =
    [(Operator::Plus, 35), (Operator::Minus, 25), (Operator::Times, 40)];
/// Operators of a problem.
const OPERATORS: [i64; 2] = [3, 6];
/// Half of the operands are below this, the others anywhere.
const EASY: i64 = 3;

/// An operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operator {
    /// Addition.
    Plus,
    /// Subtraction.
    Minus,
    /// Multiplication.
    Times,
}

impl Operator {
    /// Every operator.
    pub const ALL: [Self; 3] = [Self::Plus, Self::Minus, Self::Times];

    /// The word in problems.
    pub fn word(self) -> &'static str {
        match self {
            Self::Plus => "+",
            Self::Minus => "-",
            Self::Times => "*",
        }
    }

    fn apply(self, a: u32, b: u32, modulus: u32) -> u32 {
        let (a, b, p) = (u64::from(a), u64::from(b), u64::from(modulus));
        let c = match self {
            Self::Plus => a + b,
            Self::Minus => a + p - b,
            Self::Times => a * b,
        };
        (c % p) as u32
    }
}

/// One problem with its worked response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingProblem {
    /// `ring-<modulus>/<split>/<seed>/<index>`.
    pub id: String,
    /// The split that the computation belongs to.
    pub split: Split,
    /// The numbers, one more than operators.
    pub operands: Vec<u32>,
    /// The operators.
    pub operators: Vec<Operator>,
    /// What is asked, without the word that begins a text: `7 + 2 * 11 - 5 ?`.
    pub question: String,
    /// From `<think>` to the final value, without the word that ends a response.
    pub response: String,
    /// The final value.
    pub answer: u32,
}

impl RingProblem {
    /// The question as a model reads it.
    pub fn prompt(&self) -> String {
        format!("{BOS} {}", self.question)
    }

    /// Question and response as a model is trained on them.
    pub fn text(&self) -> String {
        format!("{BOS} {} {} {EOS}", self.question, self.response)
    }
}

/// The task modulo a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ring {
    modulus: u32,
}

impl Ring {
    /// Largest modulus: every number is a word of the vocabulary.
    pub const MAX_MODULUS: u32 = 997;

    /// The task modulo `modulus`, usually a prime.
    ///
    /// # Errors
    /// [`DatasetError::Setting`] unless `modulus` is 3 to [`MAX_MODULUS`](Self::MAX_MODULUS).
    pub fn new(modulus: u32) -> Result<Self> {
        if (3..=Self::MAX_MODULUS).contains(&modulus) {
            Ok(Self { modulus })
        } else {
            let expected = format!("3 to {}", Self::MAX_MODULUS);
            Err(DatasetError::Setting { field: "modulus", found: modulus.to_string(), expected })
        }
    }

    /// The modulus.
    pub fn modulus(self) -> u32 {
        self.modulus
    }

    /// Its name in ids and results.
    pub fn name(self) -> String {
        format!("ring-{}", self.modulus)
    }

    /// Every word of the task; a word's place is its token id. 40 words modulo 19.
    pub fn vocabulary(self) -> Vec<String> {
        let control = [UNKNOWN, BOS, EOS, THINK, THINK_END, QUESTION, EQUALS, ANSWER];
        let words = control
            .into_iter()
            .chain(Operator::ALL.map(Operator::word))
            .chain(CONNECTIVES)
            .chain(SEPARATORS)
            .chain(CLOSINGS);
        words.map(str::to_owned).chain((0..self.modulus).map(|n| n.to_string())).collect()
    }

    /// The first `n` problems of `split` under `seed`.
    pub fn problems(self, split: Split, seed: u64, n: usize) -> impl Iterator<Item = RingProblem> {
        (0..n as u64).map(move |index| self.problem(split, seed, index))
    }

    /// Problem number `index` of `split` under `seed`.
    pub fn problem(self, split: Split, seed: u64, index: u64) -> RingProblem {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // A stream of its own for each problem: no state is carried from one problem to the next.
        rng.set_stream(index.wrapping_mul(4).wrapping_add(split as u64));
        let mut draws = Draws(rng);
        let (operands, operators) = loop {
            let (operands, operators) = self.draw(&mut draws);
            if self.split(&operands, &operators) == split {
                break (operands, operators);
            }
        };
        let mut question = operands[0].to_string();
        for (operator, operand) in operators.iter().zip(&operands[1..]) {
            let _ = write!(question, " {} {operand}", operator.word());
        }
        let _ = write!(question, " {QUESTION}");
        let (response, answer) = self.work(&operands, &operators, &mut draws);
        let id = format!("{}/{split}/{seed}/{index}", self.name());
        RingProblem { id, split, operands, operators, question, response, answer }
    }

    /// The split of a computation.
    pub fn split(self, operands: &[u32], operators: &[Operator]) -> Split {
        let numbers = operands.iter().flat_map(|n| n.to_le_bytes());
        let words = operators.iter().flat_map(|o| o.word().bytes());
        Split::of_bytes(self.modulus.to_le_bytes().into_iter().chain(numbers).chain(words))
    }

    fn draw(self, draws: &mut Draws) -> (Vec<u32>, Vec<Operator>) {
        let largest = i64::from(self.modulus) - 1;
        let count = draws.between(OPERATORS[0], OPERATORS[1]);
        let mut operands = vec![draws.between(0, largest) as u32];
        let mut operators = Vec::new();
        for _ in 0..count {
            let mut left = draws.between(0, 99);
            let mut pick = OPERATOR_WEIGHTS.iter().filter(|(_, weight)| {
                left -= weight;
                left < 0
            });
            operators.push(pick.next().map_or(Operator::Times, |(operator, _)| *operator));
            let easy = draws.between(0, 1) == 0;
            operands.push(draws.between(0, if easy { EASY - 1 } else { largest }) as u32);
        }
        (operands, operators)
    }

    fn work(self, operands: &[u32], operators: &[Operator], draws: &mut Draws) -> (String, u32) {
        let mut value = operands[0];
        let mut text = THINK.to_owned();
        for (operator, &operand) in operators.iter().zip(&operands[1..]) {
            let result = operator.apply(value, operand, self.modulus);
            let (connective, separator) =
                (synonym(&CONNECTIVES, value, draws), synonym(&SEPARATORS, result, draws));
            let word = operator.word();
            let _ = write!(text, " {connective} {value} {word} {operand} {EQUALS} {result} {separator}");
            value = result;
        }
        let closing = synonym(&CLOSINGS, value, draws);
        let _ = write!(text, " {THINK_END} {closing} {ANSWER} {value}");
        (text, value)
    }
}

/// One of some words of one meaning: word `k` has weight `(k + value) mod n` of the list.
fn synonym(words: &[&'static str], value: u32, draws: &mut Draws) -> &'static str {
    let n = words.len();
    let weights = &SYNONYM_WEIGHTS[..n];
    let mut left = draws.between(0, weights.iter().sum::<i64>() - 1);
    let weight = |k: usize| weights[(k + value as usize) % n];
    let mut chosen = n - 1;
    for k in 0..n {
        left -= weight(k);
        if left < 0 {
            chosen = k;
            break;
        }
    }
    words[chosen]
}

/// The first word of a word's meaning; a word without synonyms stands for itself.
pub fn canonical(word: &str) -> &str {
    let lists: [&[&'static str]; 3] = [&CONNECTIVES, &SEPARATORS, &CLOSINGS];
    lists.into_iter().find(|list| list.contains(&word)).map_or(word, |list| list[0])
}

/// The number behind the last `answer` of a response; `None` where there is none.
pub fn answer(response: &str) -> Option<u32> {
    let words: Vec<&str> = response.split_whitespace().collect();
    let at = words.iter().rposition(|word| *word == ANSWER)?;
    words.get(at + 1)?.parse().ok()
}
