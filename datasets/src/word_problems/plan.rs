//! The computations: which operations on which numbers, within which bounds.

use serde::{Deserialize, Serialize};

use super::Draws;

/// A computation of one to three operations on two to four given numbers `a`, `b`, `c`, `d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Plan {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a × b`
    Mul,
    /// `a ÷ b`
    Div,
    /// `a + b - c`
    AddSub,
    /// `a × b + c`
    MulAdd,
    /// `a × b - c`
    MulSub,
    /// `(a + b) × c`
    SumMul,
    /// `(a - b) × c`
    DiffMul,
    /// `(a + b) ÷ c`
    SumDiv,
    /// `a - b × c`
    LessMul,
    /// `a × b ÷ c`
    MulDiv,
    /// `a × b + c × d`
    TwoMul,
    /// `(a + b) × c - d`
    SumMulSub,
    /// `(a + b) ÷ c + d`
    SumDivAdd,
}

/// One operation of a plan: an operator between two operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    left: Operand,
    operator: Operator,
    right: Operand,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operand {
    /// A number given in the question.
    Given(usize),
    /// The result of an earlier step.
    Result(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Plus,
    Minus,
    Times,
    Over,
}

impl Operator {
    fn sign(self) -> char {
        match self {
            Self::Plus => '+',
            Self::Minus => '-',
            Self::Times => '×',
            Self::Over => '÷',
        }
    }
}

/// A plan carried out on numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worked {
    /// One equation a step, e.g. `12+30=42`.
    pub equations: Vec<String>,
    /// What each step gives; the last is the answer.
    pub results: Vec<i64>,
}

impl Worked {
    /// The result of the last step.
    pub fn answer(&self) -> i64 {
        *self.results.last().expect("every plan has a step")
    }
}

impl Plan {
    /// Every plan.
    pub const ALL: [Self; 15] = [
        Self::Add,
        Self::Sub,
        Self::Mul,
        Self::Div,
        Self::AddSub,
        Self::MulAdd,
        Self::MulSub,
        Self::SumMul,
        Self::DiffMul,
        Self::SumDiv,
        Self::LessMul,
        Self::MulDiv,
        Self::TwoMul,
        Self::SumMulSub,
        Self::SumDivAdd,
    ];

    /// The name in template names, files and the hash behind the splits.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Sub => "sub",
            Self::Mul => "mul",
            Self::Div => "div",
            Self::AddSub => "add-sub",
            Self::MulAdd => "mul-add",
            Self::MulSub => "mul-sub",
            Self::SumMul => "sum-mul",
            Self::DiffMul => "diff-mul",
            Self::SumDiv => "sum-div",
            Self::LessMul => "less-mul",
            Self::MulDiv => "mul-div",
            Self::TwoMul => "two-mul",
            Self::SumMulSub => "sum-mul-sub",
            Self::SumDivAdd => "sum-div-add",
        }
    }

    /// Inclusive bounds of the given numbers. All start at 2: a template may put any of them before a plural.
    pub fn bounds(self) -> &'static [(i64, i64)] {
        const TERM: (i64, i64) = (2, 99);
        const FACTOR: (i64, i64) = (2, 9);
        const MULTIPLICAND: (i64, i64) = (2, 50);
        match self {
            Self::Add | Self::Sub => &[TERM, TERM],
            Self::Mul => &[FACTOR, MULTIPLICAND],
            Self::Div => &[(6, 450), FACTOR],
            Self::AddSub => &[TERM, TERM, TERM],
            Self::MulAdd | Self::MulSub => &[FACTOR, MULTIPLICAND, MULTIPLICAND],
            Self::SumMul => &[MULTIPLICAND, MULTIPLICAND, FACTOR],
            Self::DiffMul | Self::SumDiv => &[TERM, TERM, FACTOR],
            Self::LessMul => &[(20, 200), FACTOR, MULTIPLICAND],
            Self::MulDiv => &[FACTOR, MULTIPLICAND, FACTOR],
            Self::TwoMul => &[FACTOR, MULTIPLICAND, FACTOR, MULTIPLICAND],
            Self::SumMulSub => &[MULTIPLICAND, MULTIPLICAND, FACTOR, MULTIPLICAND],
            Self::SumDivAdd => &[TERM, TERM, FACTOR, TERM],
        }
    }

    /// The operations, in the order in which a solution writes them.
    pub fn steps(self) -> &'static [Step] {
        use Operand::{Given, Result};
        use Operator::{Minus, Over, Plus, Times};
        const fn step(left: Operand, operator: Operator, right: Operand) -> Step {
            Step { left, operator, right }
        }
        const A_PLUS_B: Step = step(Given(0), Plus, Given(1));
        const A_TIMES_B: Step = step(Given(0), Times, Given(1));
        match self {
            Self::Add => const { &[A_PLUS_B] },
            Self::Sub => const { &[step(Given(0), Minus, Given(1))] },
            Self::Mul => const { &[A_TIMES_B] },
            Self::Div => const { &[step(Given(0), Over, Given(1))] },
            Self::AddSub => const { &[A_PLUS_B, step(Result(0), Minus, Given(2))] },
            Self::MulAdd => const { &[A_TIMES_B, step(Result(0), Plus, Given(2))] },
            Self::MulSub => const { &[A_TIMES_B, step(Result(0), Minus, Given(2))] },
            Self::SumMul => const { &[A_PLUS_B, step(Result(0), Times, Given(2))] },
            Self::DiffMul => const { &[step(Given(0), Minus, Given(1)), step(Result(0), Times, Given(2))] },
            Self::SumDiv => const { &[A_PLUS_B, step(Result(0), Over, Given(2))] },
            Self::LessMul => const { &[step(Given(1), Times, Given(2)), step(Given(0), Minus, Result(0))] },
            Self::MulDiv => const { &[A_TIMES_B, step(Result(0), Over, Given(2))] },
            Self::TwoMul => {
                const { &[A_TIMES_B, step(Given(2), Times, Given(3)), step(Result(0), Plus, Result(1))] }
            }
            Self::SumMulSub => {
                const { &[A_PLUS_B, step(Result(0), Times, Given(2)), step(Result(1), Minus, Given(3))] }
            }
            Self::SumDivAdd => {
                const { &[A_PLUS_B, step(Result(0), Over, Given(2)), step(Result(1), Plus, Given(3))] }
            }
        }
    }

    /// Carries the plan out, or `None` where `numbers` do not fit it: out of bounds, a result below 2, a
    /// division that leaves a remainder, a product or quotient beyond 9 times 50.
    pub fn work(self, numbers: &[i64]) -> Option<Worked> {
        let bounds = self.bounds();
        let fits = numbers.len() == bounds.len()
            && numbers.iter().zip(bounds).all(|(n, (low, high))| (low..=high).contains(&n));
        if !fits {
            return None;
        }
        let mut worked = Worked { equations: Vec::new(), results: Vec::new() };
        for step in self.steps() {
            let value = |o| match o {
                Operand::Given(i) => numbers[i],
                Operand::Result(i) => worked.results[i],
            };
            let (left, right) = (value(step.left), value(step.right));
            let result = match step.operator {
                Operator::Plus => left + right,
                Operator::Minus => left - right,
                Operator::Times if left.min(right) <= 9 && left.max(right) <= 50 => left * right,
                Operator::Over if left % right == 0 && left / right <= 50 => left / right,
                Operator::Times | Operator::Over => return None,
            };
            if result < 2 {
                return None;
            }
            worked.equations.push(format!("{left}{}{right}={result}", step.operator.sign()));
            worked.results.push(result);
        }
        Some(worked)
    }

    /// Numbers within the bounds; [`Plan::work`] says whether they fit.
    pub(super) fn draw(self, draws: &mut Draws) -> Vec<i64> {
        self.bounds().iter().map(|&(low, high)| number(low, high, draws)).collect()
    }
}

/// A number in `low..=high` as people choose them: half of the time round (tens, fives) or small.
///
/// This is more than taste. Over uniform digits, a digit of a sum says nothing about either digit that it comes from
/// alone, and a model learns nothing from them until it has found both at once. Round and small numbers break this tie.
fn number(low: i64, high: i64, draws: &mut Draws) -> i64 {
    let multiple = |of: i64, draws: &mut Draws| of * draws.between((low + of - 1) / of, high / of);
    match draws.between(0, 9) {
        0..=1 if high >= 20 => multiple(10, draws),
        2 if high >= 20 => multiple(5, draws),
        3..=4 if low < 9 => draws.between(low, high.min(9)),
        _ => draws.between(low, high),
    }
}
