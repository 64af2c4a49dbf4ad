//! Public benchmarks as questions that can be asked and graded.

use nics_datasets::live_code_bench::Problem;
use nics_datasets::{Reasoned, Reasoning};

use super::{
    AnswerKind, OptionShuffle, SHUFFLE_SEED, aime, boxed, choice, gpqa, graded_part, is_correct,
    last_fenced_code, live_code_bench, lone_letter, mmlu_pro,
};
use crate::{Error, Result};

/// A question as a model gets to see it, and what grades the reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Its id in the benchmark.
    pub id: String,
    /// Its field; may be empty.
    pub subject: String,
    /// The text of the user's turn.
    pub prompt: String,
    /// The right answer; empty where tests decide.
    pub gold: String,
    /// How an answer is found and compared.
    pub kind: AnswerKind,
}

impl Question {
    /// The answer that a reply gives, if it gives one, and whether it is right: of a program only its tests can tell.
    pub fn grade(&self, reply: &str) -> (Option<String>, Option<bool>) {
        let part = graded_part(reply);
        let answer = match self.kind {
            AnswerKind::Boxed => boxed(part),
            AnswerKind::Choice => choice(part),
            AnswerKind::LongChoice => lone_letter(part),
            AnswerKind::Program => Some(last_fenced_code(part)).filter(|program| !program.trim().is_empty()),
        };
        let right = match (&answer, self.kind) {
            (None, _) => Some(false),
            (Some(_), AnswerKind::Program) => None,
            (Some(answer), kind) => Some(is_correct(kind, answer, &self.gold)),
        };
        (answer, right)
    }
}

/// Turns a benchmark's rows into questions. GPQA's options are shuffled as numpy does with the seed of published runs, row by
/// row, so the rows have to be all of them, in the file's order.
///
/// # Errors
/// A row of another benchmark.
pub fn questions(benchmark: Reasoning, rows: &[Reasoned]) -> Result<Vec<Question>> {
    let mut shuffle = OptionShuffle::new(SHUFFLE_SEED);
    let question = |row: &Reasoned| {
        let (prompt, gold, kind) = match benchmark {
            Reasoning::Aime => (aime(&row.question), row.answer.clone(), AnswerKind::Boxed),
            Reasoning::GpqaDiamond => {
                let order = shuffle.permutation(row.options.len());
                let shown: Vec<&str> = order.iter().map(|&i| row.options[i].as_str()).collect();
                let shown: [&str; 4] = shown.try_into().map_err(|_| {
                    Error::Input(format!("{}: {} options, GPQA has 4", row.id, row.options.len()))
                })?;
                let right = order.iter().position(|&i| i == 0).unwrap_or(0);
                let gold = char::from(b'A' + right as u8).to_string();
                (gpqa(&row.question, shown), gold, AnswerKind::Choice)
            }
            Reasoning::MmluPro | Reasoning::MmluRedux => {
                let options: Vec<&str> = row.options.iter().map(String::as_str).collect();
                (mmlu_pro(&row.question, &options), row.answer.clone(), AnswerKind::LongChoice)
            }
        };
        Ok(Question { id: row.id.clone(), subject: row.subject.clone(), prompt, gold, kind })
    };
    rows.iter().map(question).collect()
}

/// Turns problems into questions that ask for a program.
pub fn programs(problems: &[Problem]) -> Vec<Question> {
    let question = |problem: &Problem| Question {
        id: problem.id.clone(),
        subject: problem.difficulty.clone(),
        prompt: live_code_bench(&problem.question, problem.starter.as_deref()),
        gold: String::new(),
        kind: AnswerKind::Program,
    };
    problems.iter().map(question).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, options: &[&str], answer: &str) -> Reasoned {
        Reasoned {
            id: id.into(),
            subject: String::new(),
            question: "Which?".into(),
            options: options.iter().map(|&o| o.to_owned()).collect(),
            answer: answer.into(),
        }
    }

    #[test]
    fn the_right_option_is_found_wherever_the_shuffle_put_it() {
        let rows: Vec<Reasoned> =
            (0..20).map(|i| row(&i.to_string(), &["right", "w1", "w2", "w3"], "A")).collect();
        let asked = questions(Reasoning::GpqaDiamond, &rows).unwrap();
        for q in &asked {
            let line = q.prompt.lines().find(|l| l.contains("right")).unwrap();
            assert!(line.trim_start().starts_with(&q.gold), "{line} for {}", q.gold);
            assert!(q.grade(&format!("<think>Answer: A</think> Answer: {}", q.gold)).1 == Some(true));
        }
        let letters: std::collections::BTreeSet<&str> = asked.iter().map(|q| q.gold.as_str()).collect();
        assert_eq!(letters.len(), 4);
        // numpy.random.seed(42); numpy.random.permutation(4) is [1, 3, 0, 2].
        assert_eq!(asked[0].gold, "C");
        assert!(questions(Reasoning::GpqaDiamond, &[row("x", &["a", "b"], "A")]).is_err());
    }

    #[test]
    fn replies_are_graded_behind_the_thinking_part() {
        let q = &questions(Reasoning::Aime, &[row("a", &[], "33")]).unwrap()[0];
        assert_eq!(q.grade("<think>\\boxed{1}</think> so \\boxed{ 33 }"), (Some("33".into()), Some(true)));
        assert_eq!(q.grade("<think>\\boxed{33}</think> no idea"), (None, Some(false)));
        let q = &questions(Reasoning::MmluPro, &[row("m", &["3", "4"], "B")]).unwrap()[0];
        assert_eq!(q.grade("the answer is (B)"), (Some("B".into()), Some(true)));
        assert_eq!(q.grade("the answer is (A)"), (Some("A".into()), Some(false)));
    }
    #[test]
    fn a_program_is_found_and_not_yet_right_or_wrong() {
        let q = Question {
            kind: AnswerKind::Program,
            ..questions(Reasoning::Aime, &[row("a", &[], "")]).unwrap().remove(0)
        };
        let reply = "<think>```python\nprint(0)\n```</think> So:\n```python\nprint(1)\n```\nor rather\n```python\nprint(2)\n```";
        assert_eq!(q.grade(reply), (Some("print(2)".into()), None));
        assert_eq!(q.grade("print(2)"), (None, Some(false)));
        assert_eq!(q.grade("```\n\n```"), (None, Some(false)));
    }
}
