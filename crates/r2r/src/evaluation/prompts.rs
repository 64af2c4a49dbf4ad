//! The questions as models get to see them; the texts are in `templates/`.

use crate::labels::judge::fill;

const GPQA: &str = include_str!("../../templates/gpqa.txt");
const CODE: &str = include_str!("../../templates/live_code_bench.txt");
const CODE_STDIN: &str = include_str!("../../templates/live_code_bench_stdin.txt");
const CODE_STARTER: &str = include_str!("../../templates/live_code_bench_starter.txt");
const MMLU_PRO: &str = include_str!("../../templates/mmlu_pro.txt");

/// An AIME problem: the question and nothing else.
pub fn aime(question: &str) -> String {
    question.to_owned()
}

/// A GPQA question with its four options in the order in which they are shown.
pub fn gpqa(question: &str, options: [&str; 4]) -> String {
    let [a, b, c, d] = options;
    fill(GPQA.trim_end(), &[("question", question), ("a", a), ("b", b), ("c", c), ("d", d)])
}

/// A LiveCodeBench problem: with starter code to be completed, else a program from standard input to standard output.
pub fn live_code_bench(question: &str, starter: Option<&str>) -> String {
    let form = match starter {
        Some(code) => fill(CODE_STARTER.trim_end(), &[("code", code)]),
        None => CODE_STDIN.trim_end().to_owned(),
    };
    // Two newlines end it: what a person's editor does with the end of a file must not count.
    fill(CODE.trim_end(), &[("question", question), ("form", &form)]) + "\n\n"
}

/// A question of MMLU-Pro or MMLU-Redux with its options, lettered from A on.
pub fn mmlu_pro(question: &str, options: &[&str]) -> String {
    let lettered = options.iter().zip('A'..).map(|(option, letter)| format!("{letter}. {option}"));
    fill(
        MMLU_PRO.trim_end(),
        &[("question", question), ("options", &lettered.collect::<Vec<_>>().join("\n"))],
    )
}
