//! The questions as they are put to a model.

use super::choice::letter;

/// How a choice is asked for.
pub const LETTER: &str = "Answer with the option's letter from the given choices directly.";
/// How a short answer is asked for.
pub const SHORT: &str = "Answer the question using a single word or phrase.";
/// VizWiz: what to say to a question that the image does not answer.
pub const UNANSWERABLE: &str = "When the provided information is insufficient, respond with 'Unanswerable'.";

fn listed(options: &[impl AsRef<str>]) -> String {
    let line = |(n, option): (usize, &_)| format!("{}. {}", letter(n), AsRef::<str>::as_ref(option));
    options.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
}

/// Python's `str.capitalize`: the first letter large, the others small.
fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return String::new() };
    first.to_uppercase().chain(chars.as_str().to_lowercase().chars()).collect()
}

/// MMMU, with options or without.
pub fn mmmu(question: &str, options: &[impl AsRef<str>]) -> String {
    if options.is_empty() {
        return format!("{question}\n\n{SHORT}");
    }
    format!("{question}\n{}\n\n{LETTER}", listed(options))
}

/// SEED-Bench.
pub fn seed(question: &str, options: &[impl AsRef<str>]) -> String {
    format!("{question}\n{}\n{LETTER}", listed(options))
}

/// ScienceQA, with a hint or without.
pub fn science_qa(hint: &str, question: &str, options: &[impl AsRef<str>]) -> String {
    let context = if hint.is_empty() { String::new() } else { format!("Context: {hint}\n") };
    format!("{context}{question}\n{}\n{LETTER}", listed(options))
}

/// VizWiz.
pub fn viz_wiz(question: &str) -> String {
    format!("{}\n{UNANSWERABLE}\n{SHORT}", capitalized(question))
}

/// TextVQA.
pub fn text_vqa(question: &str) -> String {
    format!("{}\n{SHORT}", capitalized(question))
}
