//! The symbol grid: pictures of 6 by 6 noisy symbols, of which a row or a column is to be read, generated from a seed.
//!
//! ```text
//! <image> row 3        K A A F C L
//! <image> column 6     L B E L D G
//! ```
//!
//! A picture is grey, 48 by 48 pixels, a cell 8 by 8. The upper half of a cell holds its symbol's code, one number a pixel,
//! with noise of deviation [`NOISE`]; the codes of the 12 symbols are drawn once and for all. The lower half holds a
//! [`Nuisance`]: numbers that are louder than the code and say nothing. A model with patches of 8 by 8 pixels sees a cell as
//! one token, and most of what it sees does not matter, as with photographs.
//!
//! **Splits are disjoint by construction**: a hash of the cells and the question says which split a problem belongs to.
//! Problem `index` of a `(split, seed)` is a function of these alone ([`problem`]).

use std::fmt;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::word_problems::{Draws, Split};

/// Cells along an edge of a picture, and symbols of an answer.
pub const SIDE: usize = 6;
/// Cells of a picture.
pub const CELLS: usize = SIDE * SIDE;
/// Different symbols.
pub const SYMBOLS: usize = 12;
/// Pixels along an edge of a cell.
pub const CELL: usize = 8;
/// Pixels along an edge of a picture.
pub const EDGE: usize = SIDE * CELL;
/// Pixels of a cell's code, and of its nuisance.
pub const HALF: usize = CELL * CELL / 2;
/// Deviation of what is added to a code, whose numbers have deviation 1.
pub const NOISE: f64 = 0.9;
/// Grey of the number 0.
pub const ZERO: f64 = 127.5;
/// Levels of grey from one whole number to the next.
pub const LEVELS: f64 = 5.0;

/// Stands for unknown words, and fills batches.
pub const UNKNOWN: &str = "<unk>";
/// Ends an answer.
pub const EOS: &str = "</s>";
/// Stands for the picture.
pub const IMAGE: &str = "<image>";
/// Begins a question.
pub const USER: &str = "USER:";
/// Begins an answer.
pub const ASSISTANT: &str = "ASSISTANT:";

/// Token id of [`EOS`].
pub const EOS_ID: u32 = 1;
/// Token id of [`IMAGE`].
pub const IMAGE_ID: u32 = 2;
const USER_ID: u32 = 3;
const ASSISTANT_ID: u32 = 4;
const ROW_ID: u32 = 5;
const COLUMN_ID: u32 = 6;
/// Token id of the first symbol; the others follow.
pub const SYMBOL_ID: u32 = 13;

/// Every word; a word's place is its token id.
pub fn vocabulary() -> Vec<String> {
    let control = [UNKNOWN, EOS, IMAGE, USER, ASSISTANT, "row", "column"].map(str::to_owned);
    let numbers = (1..=SIDE).map(|n| n.to_string());
    control.into_iter().chain(numbers).chain((0..SYMBOLS).map(symbol)).collect()
}

/// The letter of a symbol.
fn symbol(n: usize) -> String {
    char::from(b'A' + n as u8).to_string()
}

/// What fills the lower half of a cell: so many of its pixels hold numbers of this deviation, the others 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nuisance {
    /// Pixels, from the first on.
    pub pixels: usize,
    /// Deviation of their numbers.
    pub std: f64,
}

/// What is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Line {
    /// A row, counted from 0.
    Row(usize),
    /// A column, counted from 0.
    Column(usize),
}

impl Line {
    /// Its cells, in order.
    pub fn cells(self) -> [usize; SIDE] {
        std::array::from_fn(|i| match self {
            Self::Row(row) => row * SIDE + i,
            Self::Column(column) => i * SIDE + column,
        })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Row(n) => write!(f, "row {}", n + 1),
            Self::Column(n) => write!(f, "column {}", n + 1),
        }
    }
}

/// One problem: a grid and a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SymbolGrid {
    /// `symbol-grid/<split>/<seed>/<index>`.
    pub id: String,
    /// The split that it belongs to.
    pub split: Split,
    /// The symbols, row by row.
    pub cells: Vec<usize>,
    /// What is to be read.
    pub line: Line,
    seed: u64,
    index: u64,
}

impl SymbolGrid {
    /// The symbols that are asked for.
    pub fn answer(&self) -> [usize; SIDE] {
        self.line.cells().map(|cell| self.cells[cell])
    }

    /// The answer in words, e.g. `K A A F C L`.
    pub fn answer_text(&self) -> String {
        self.answer().map(symbol).join(" ")
    }

    /// A whole text in words; the picture is one of them.
    pub fn text(&self) -> String {
        format!("{USER} {IMAGE} {} {ASSISTANT} {} {EOS}", self.line, self.answer_text())
    }

    /// Token ids of that text.
    pub fn ids(&self) -> Vec<u32> {
        let (line, number) = match self.line {
            Line::Row(n) => (ROW_ID, n),
            Line::Column(n) => (COLUMN_ID, n),
        };
        let mut ids = vec![USER_ID, IMAGE_ID, line, COLUMN_ID + 1 + number as u32, ASSISTANT_ID];
        ids.extend(self.answer().map(|symbol| SYMBOL_ID + symbol as u32));
        ids.push(EOS_ID);
        ids
    }

    /// The picture, row by row, one grey level a pixel. Its noise and nuisance are the problem's own; pictures of one problem
    /// with another nuisance have the same noise.
    pub fn grey(&self, nuisance: Nuisance) -> Vec<u8> {
        let codes = codes();
        let mut noise = Normal::new(stream(self.seed, self.index, self.split, 1));
        let mut loud = Normal::new(stream(self.seed, self.index, self.split, 2));
        let mut picture = vec![0; EDGE * EDGE];
        for (cell, &symbol) in self.cells.iter().enumerate() {
            let (top, left) = (cell / SIDE * CELL, cell % SIDE * CELL);
            for i in 0..2 * HALF {
                let value = if i < HALF {
                    codes[symbol][i] + NOISE * noise.draw()
                } else if i < HALF + nuisance.pixels {
                    nuisance.std * loud.draw()
                } else {
                    0.0
                };
                let level = (ZERO + LEVELS * value).round().clamp(0.0, 255.0) as u8;
                picture[(top + i / CELL) * EDGE + left + i % CELL] = level;
            }
        }
        picture
    }

    /// The picture as RGB, row by row.
    pub fn rgb(&self, nuisance: Nuisance) -> Vec<u8> {
        self.grey(nuisance).into_iter().flat_map(|level| [level; 3]).collect()
    }
}

/// The codes of the symbols: the same in every picture of every seed.
fn codes() -> [[f64; HALF]; SYMBOLS] {
    let mut normal = Normal::new(ChaCha8Rng::seed_from_u64(0x0067_7269_6473));
    std::array::from_fn(|_| std::array::from_fn(|_| normal.draw()))
}

/// Random numbers of a problem: a stream of its own for the grid (0), the noise (1) and the nuisance (2).
fn stream(seed: u64, index: u64, split: Split, part: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream((index.wrapping_mul(4).wrapping_add(split as u64)).wrapping_mul(4).wrapping_add(part));
    rng
}

/// Normal numbers (Box and Muller, 1958), two at a time.
struct Normal {
    rng: ChaCha8Rng,
    spare: Option<f64>,
}

impl Normal {
    fn new(rng: ChaCha8Rng) -> Self {
        Self { rng, spare: None }
    }

    /// Above 0, at most 1.
    fn unit(&mut self) -> f64 {
        ((self.rng.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    fn draw(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (radius, angle) = ((-2.0 * self.unit().ln()).sqrt(), std::f64::consts::TAU * self.unit());
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

/// The split of a grid and a question.
pub fn split(cells: &[usize], line: Line) -> Split {
    let (kind, n) = match line {
        Line::Row(n) => (0, n),
        Line::Column(n) => (1, n),
    };
    Split::of_bytes(cells.iter().chain(&[kind, n]).flat_map(|n| (*n as u64).to_le_bytes()))
}

/// Problem number `index` of `split` under `seed`.
pub fn problem(wanted: Split, seed: u64, index: u64) -> SymbolGrid {
    let mut draws = Draws(stream(seed, index, wanted, 0));
    let mut below = |n: usize| draws.between(0, n as i64 - 1) as usize;
    loop {
        let cells: Vec<usize> = (0..CELLS).map(|_| below(SYMBOLS)).collect();
        let line = if below(2) == 0 { Line::Row(below(SIDE)) } else { Line::Column(below(SIDE)) };
        if split(&cells, line) == wanted {
            let id = format!("symbol-grid/{wanted}/{seed}/{index}");
            return SymbolGrid { id, split: wanted, cells, line, seed, index };
        }
    }
}

/// The first `n` problems of `split` under `seed`.
pub fn problems(split: Split, seed: u64, n: usize) -> impl Iterator<Item = SymbolGrid> {
    (0..n as u64).map(move |index| problem(split, seed, index))
}
