//! What the harness does with a question of a benchmark: how it is put, how long a reply may be, what it scores.

use nics_datasets::{Gold, Visual, VisualQuestion};
use serde::{Deserialize, Serialize};

use super::choice::{self, Fallback, letter};
use super::{Rules, ocr, open, prompts, vqa};

/// Where a reply to a question of SEED-Bench, VizWiz or TextVQA ends.
const STOP: &str = "ASSISTANT:";

/// The question as it is put to a model, behind its images.
pub fn prompt(of: Visual, question: &VisualQuestion) -> String {
    let VisualQuestion { question: text, options, hint, .. } = question;
    match of {
        Visual::Mmmu => prompts::mmmu(text, options),
        Visual::SeedBench | Visual::SeedBenchImage => prompts::seed(text, options),
        Visual::OcrBench => text.clone(),
        Visual::VizWiz => prompts::viz_wiz(text),
        Visual::ScienceQa | Visual::ScienceQaImg => prompts::science_qa(hint, text, options),
        Visual::TextVqa => prompts::text_vqa(text),
    }
}

/// The most tokens of a reply, where the benchmark says; elsewhere the model's own default holds.
pub fn longest(of: Visual, rules: Rules) -> Option<usize> {
    match (of, rules) {
        (Visual::Mmmu, Rules::Paper) | (Visual::ScienceQa | Visual::ScienceQaImg, _) => Some(16),
        (Visual::Mmmu, Rules::Mended) | (Visual::OcrBench, _) => Some(128),
        _ => None,
    }
}

/// Texts at which a reply ends.
pub fn stops(of: Visual) -> Vec<String> {
    match of {
        Visual::SeedBench | Visual::SeedBenchImage | Visual::VizWiz | Visual::TextVqa => {
            vec![STOP.to_owned()]
        }
        _ => Vec::new(),
    }
}

/// What a reply is worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// What was taken for the answer; `None` where none was found in the reply.
    pub answer: Option<String>,
    /// 0 to 1.
    pub score: f64,
}

/// Scores a reply.
pub fn score(of: Visual, question: &VisualQuestion, reply: &str, rules: Rules, fallback: Fallback) -> Scored {
    let right = |answer: Option<String>, right: bool| Scored { answer, score: f64::from(u8::from(right)) };
    match (of, &question.gold) {
        (Visual::Mmmu, Gold::Option(gold)) => {
            let found = choice::mmmu(reply, &question.options, fallback);
            right(found.map(String::from), found == Some(letter(*gold)))
        }
        (Visual::SeedBench | Visual::SeedBenchImage, Gold::Option(gold)) => {
            let first = reply.trim().chars().next().map(String::from);
            right(first, choice::seed(reply, &letter(*gold).to_string()))
        }
        (Visual::ScienceQa | Visual::ScienceQaImg, Gold::Option(gold)) => {
            let answer = (!reply.trim().is_empty()).then(|| reply.trim().to_owned());
            right(answer, choice::science_qa(reply, letter(*gold), rules))
        }
        (Visual::Mmmu, Gold::Texts(references)) => {
            let parsed = open::parse(reply);
            let shown: Vec<String> = parsed.iter().map(ToString::to_string).collect();
            right(Some(shown.join("; ")), open::correct(&parsed, references))
        }
        (Visual::OcrBench, Gold::Texts(references)) => {
            right(Some(reply.trim().to_owned()), ocr::contains(reply, references, &question.origin, rules))
        }
        (_, Gold::Texts(people)) => {
            Scored { answer: Some(vqa::normalize(reply)), score: vqa::accuracy(reply, people) }
        }
        // No loader gives an option to a benchmark of free answers.
        (_, Gold::Option(_)) => right(None, false),
    }
}

/// What is right, for the one who reads the replies.
pub fn gold(question: &VisualQuestion) -> Vec<String> {
    match &question.gold {
        Gold::Option(n) => vec![letter(*n).to_string()],
        Gold::Texts(texts) => texts.clone(),
    }
}
