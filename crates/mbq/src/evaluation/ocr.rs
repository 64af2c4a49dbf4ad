//! OCRBench: whether an answer contains one of its references.

use unicode_normalization::UnicodeNormalization;

use super::Rules;

/// The part of OCRBench with formulas, of which spaces do not count.
pub const FORMULAS: &str = "HME100k";

fn one_line(text: &str) -> String {
    text.trim().replace('\n', " ")
}

/// Whether an answer contains one of some references.
///
/// The paper's harness made the answer to a formula lower case, but not its reference; since it was mended, formulas keep
/// their case, and other texts are compared in Unicode's compatibility form.
pub fn contains(answer: &str, references: &[impl AsRef<str>], dataset: &str, rules: Rules) -> bool {
    let formulas = dataset == FORMULAS;
    let lower = |text: &str| text.to_lowercase();
    let prepared = |text: &str, is_answer: bool| match (formulas, rules) {
        (true, Rules::Paper) if is_answer => one_line(&lower(text)).replace(' ', ""),
        (true, _) => one_line(text).replace(' ', ""),
        (false, Rules::Paper) => one_line(&lower(text)),
        (false, Rules::Mended) => one_line(&lower(&text.nfkc().collect::<String>())),
    };
    let answer = prepared(answer, true);
    references.iter().any(|r| answer.contains(&prepared(r.as_ref(), false)))
}
