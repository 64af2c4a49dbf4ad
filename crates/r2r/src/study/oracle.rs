//! The judge of a pair's labels, and the path that it would take: what the router imitates, and an upper bound of it.

use super::Models;
use super::queries::synonyms;
use crate::Result;
use crate::labels::judges::RuleJudge;
use crate::labels::live::{LiveSettings, LiveToken, follow};
use crate::labels::pipeline::ContinueSettings;

/// More tokens than a sentence has.
const SENTENCE_TOKENS: usize = 12;

/// Writes a response to each prompt along the path, `batch` at a time, of at most `limit` tokens.
pub(super) fn path(
    models: &Models,
    prompts: &[Vec<u32>],
    limit: usize,
    batch: usize,
) -> Result<Vec<Vec<LiveToken>>> {
    let stops = ContinueSettings::default().stop_tokens(&models.tokenizer)?;
    let mut judge = RuleJudge::new(&synonyms(), &models.tokenizer, stops.clone())?;
    let settings = LiveSettings {
        max_new_tokens: limit,
        batch,
        eos: vec![models.task.eos()],
        stops,
        // The rule compares the sentences in which the models part.
        sentences: 0,
        max_continuation: SENTENCE_TOKENS,
    };
    follow(&models.small, &models.large, &mut judge, prompts, &settings)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Device;

    use super::*;
    use crate::labels::judges::{Judge, Pair};

    #[test]
    fn sentences_are_compared_by_meaning() {
        let pair = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/nano/r2r-nano/seed-0");
        let models = Models::load(&pair, Device::Cpu).unwrap();
        let ids = |text: &str| models.task.encode(text).unwrap();
        let stops = ContinueSettings::default().stop_tokens(&models.tokenizer).unwrap();
        let mut judge = RuleJudge::new(&synonyms(), &models.tokenizer, stops).unwrap();
        let mut same = |a: &str, b: &str| {
            let (a, b) = (ids(a), ids(b));
            let pair = Pair {
                context: ids("<bos> 1 + 2 ? <think>"),
                small: a[0],
                large: b[0],
                small_continuation: a[1..].to_vec(),
                large_continuation: b[1..].to_vec(),
                written: None,
            };
            let mut verdicts = Vec::new();
            judge.judge(&[pair], &mut verdicts).unwrap();
            verdicts[0].score == 0
        };
        assert!(same("so 1 + 2 = 3 .", "now 1 + 2 = 3 !!"));
        assert!(!same("so 1 + 2 = 3 .", "so 1 + 2 = 4 ."));
        assert!(!same("so 1 + 2 = 3", "so 1 + 2 = 3 ."));
    }
}
