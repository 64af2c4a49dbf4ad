//! Benchmarks: how questions are put, responses as they are kept, and the figures that several responses a question give.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::answers::{Judging, equal, extract, pass_at_k_percent, vote};
use crate::watch::Held;

const MATHS: &str = include_str!("../templates/maths.txt");
const PROGRAM: &str = include_str!("../templates/program.txt");
const STARTER: &str = include_str!("../templates/program_starter.txt");
const STDIN: &str = include_str!("../templates/program_stdin.txt");

/// A problem of mathematics as a model gets to see it.
pub fn maths(problem: &str) -> String {
    MATHS.trim_end().replacen("{{problem}}", problem, 1)
}

/// A programming problem as a model gets to see it: with starter code to be completed, else from standard input to standard
/// output.
pub fn program(question: &str, starter: Option<&str>) -> String {
    let form = match starter {
        Some(code) => STARTER.trim_end().replacen("{{code}}", code, 1),
        None => STDIN.trim_end().to_owned(),
    };
    // The question last: what it holds is left alone. Two newlines end it, whatever an editor does with the file's end.
    PROGRAM.trim_end().replacen("{{form}}", &form, 1).replacen("{{question}}", question, 1) + "\n\n"
}

/// A response to a question: a line of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// Of everything that the response depends on beside question and seed.
    pub settings: String,
    /// The benchmark's name.
    pub bench: String,
    /// The question's id in the benchmark.
    pub id: String,
    /// Which response to it, from 0.
    pub response: usize,
    /// Its seed.
    pub seed: u64,
    /// The right answer; empty where tests decide.
    pub gold: String,
    /// Why it ended: `eos`, `stop`, `length`, `context` or `cache_exhausted`.
    pub finish: String,
    /// The text.
    pub text: String,
    /// Tokens.
    pub tokens: usize,
    /// Its cache at the end.
    pub cache: Option<Held>,
}

/// The figures of a benchmark, in per cent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scores {
    /// Questions.
    pub questions: usize,
    /// Responses.
    pub responses: usize,
    /// Right ones.
    pub right: usize,
    /// The mean over all responses.
    pub pass_at_1: f64,
    /// Standard deviation of pass@1 over rounds of one response a question.
    pub deviation: f64,
    /// Questions whose most frequent answer is right; none where answers are programs.
    pub voting: Option<f64>,
    /// At least one of so many is right: k and the figure, for k = 2, 4, … up to the fewest responses of a question.
    pub pass_at_k: Vec<(u64, f64)>,
}

/// The figures of some responses, each with whether it is right. `judging`: how votes are compared; none for programs.
/// `None` without a response.
pub fn scores(judged: &[(&Response, bool)], judging: Option<Judging>) -> Option<Scores> {
    let mut of: BTreeMap<&str, Vec<(&Response, bool)>> = BTreeMap::new();
    let mut rounds: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    for &(response, right) in judged {
        of.entry(&response.id).or_default().push((response, right));
        let (all, correct) = rounds.entry(response.response).or_default();
        (*all, *correct) = (*all + 1, *correct + usize::from(right));
    }
    let fewest = of.values().map(Vec::len).min()? as u64;
    let right = judged.iter().filter(|(_, right)| *right).count();
    let percent = |part: usize, of: usize| 100.0 * part as f64 / of.max(1) as f64;
    let each: Vec<f64> = rounds.values().map(|&(all, right)| percent(right, all)).collect();
    let mean = each.iter().sum::<f64>() / each.len() as f64;
    let deviation = (each.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / each.len() as f64).sqrt();
    let voting = judging.map(|judging| {
        let won = of.values_mut().filter_map(|all| {
            all.sort_by_key(|(response, _)| response.response);
            let answers: Vec<String> = all.iter().map(|(response, _)| extract(&response.text)).collect();
            let (answer, gold) = (vote(&answers)?, all.first()?.0.gold.as_str());
            Some(match judging {
                Judging::Official => answer == gold,
                Judging::Strict => equal(judging, Some(answer), Some(gold)),
            })
        });
        let won = won.filter(|won| *won).count();
        percent(won, of.len())
    });
    let counts: Vec<(u64, u64)> = of
        .values()
        .map(|all| (all.len() as u64, all.iter().filter(|(_, right)| *right).count() as u64))
        .collect();
    let ks = std::iter::successors(Some(2), |k| Some(k * 2)).take_while(|k| *k <= fewest);
    Some(Scores {
        questions: of.len(),
        responses: judged.len(),
        right,
        pass_at_1: percent(right, judged.len()),
        deviation,
        voting,
        pass_at_k: ks.filter_map(|k| Some((k, pass_at_k_percent(&counts, k)?))).collect(),
    })
}

/// Whether the answer in a response is right.
pub fn is_right(judging: Judging, response: &Response) -> bool {
    equal(judging, Some(&extract(&response.text)), Some(&response.gold))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(id: &str, n: usize, text: &str, gold: &str) -> Response {
        Response {
            settings: String::new(),
            bench: "aime".into(),
            id: id.into(),
            response: n,
            seed: 42 + n as u64,
            gold: gold.into(),
            finish: "eos".into(),
            text: text.into(),
            tokens: 1,
            cache: None,
        }
    }

    #[test]
    fn questions_are_put_as_published() {
        let asked = maths("What is {{problem}}?");
        assert_eq!(
            asked,
            "What is {{problem}}?\nPlease reason step by step, and put your final answer within \\boxed{}."
        );
        let asked = program("Add {{form}}.", None);
        assert!(asked.starts_with("### Question:\nAdd {{form}}.\n\n### Format: Read the inputs"), "{asked}");
        assert!(asked.ends_with("### Answer: (use the provided format with backticks)\n\n"), "{asked}");
        assert!(program("q", Some("class Solution:")).contains("```python\nclass Solution:\n```"));
    }

    #[test]
    fn several_responses_make_figures() {
        let all = [
            response("a", 0, "\\boxed{7}", "7"),
            response("a", 1, "\\boxed{8}", "7"),
            response("a", 2, "\\boxed{007}", "7"),
            response("b", 0, "\\boxed{1}", "2"),
            response("b", 1, "\\boxed{2}", "2"),
            response("b", 2, "\\boxed{1}", "2"),
        ];
        let judged: Vec<_> = all.iter().map(|r| (r, is_right(Judging::Strict, r))).collect();
        let found = scores(&judged, Some(Judging::Strict)).unwrap();
        assert_eq!((found.questions, found.responses, found.right), (2, 6, 3));
        assert!((found.pass_at_1 - 50.0).abs() < 1e-9 && found.deviation < 1e-9);
        // `7` comes first of three different answers; two of three say 1 where 2 is right.
        assert_eq!(found.voting, Some(50.0));
        let (k, figure) = found.pass_at_k[0];
        assert!(k == 2 && (figure - 100.0 * (1.0 + 2.0 / 3.0) / 2.0).abs() < 1e-9, "{figure}");
        assert!(!is_right(Judging::Official, &all[2]));
        assert_eq!(scores(&[], None), None);
    }
}
