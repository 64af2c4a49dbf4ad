//! Properties of the label rules over random texts and tokens.

use proptest::prelude::*;
use r2r::labels::sentences::{Window, branch, marked, segments};
use r2r::labels::stops::{StopTokens, reference_continuation};
use r2r::labels::{Document, Score, ThinkTokens, assemble, judge, mismatches, token_types};

const THINK: ThinkTokens = ThinkTokens { start: 90, end: 91 };

fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(
        prop::sample::select(vec![
            "a", "B", "Dr", "e.g", "12", "3.4", ".", "..", "...", "?", "!", " ", "  ", "\n", "\t", "\"", "'",
            "(", ")", "]", ",", ";", ":", "-", "--", "@", "<<", ">>", "é", "ß", ". ", ".\n", "! A", ". b",
            "<think>",
        ]),
        0..60,
    )
    .prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn segments_are_the_text_in_order(text in text()) {
        let all = segments(&text);
        let chars: Vec<char> = text.chars().collect();
        let mut at = 0;
        for s in &all {
            prop_assert!(s.start == at && s.end >= s.start);
            prop_assert_eq!(&chars[s.start..=s.end].iter().collect::<String>(), &s.text);
            // A newline ends a segment, alone or with one more.
            let inside = s.text.trim_end_matches('\n');
            prop_assert!(!inside.contains('\n') && s.text.len() - inside.len() <= 2);
            at = s.end + 1;
        }
        prop_assert_eq!(at, chars.len());
    }

    #[test]
    fn chinese_segments_stand_where_they_say(text in "[一-龥。！？；…a-z .\n]{0,60}") {
        let chars: Vec<char> = text.chars().collect();
        let mut at = 0;
        for s in segments(&text) {
            prop_assert!(s.start >= at);
            prop_assert_eq!(chars[s.start..=s.end].iter().collect::<String>(), s.text);
            at = s.end + 1;
        }
    }

    #[test]
    fn a_branch_holds_its_token(context in text(), continuation in text(), token in "[a-z]{1,4}") {
        let context = context.replace("<think>", "");
        let branch = branch(&context, &marked(&token), &continuation, false, Window::default());
        prop_assert!(branch.sentence.contains(&format!("<<{token}>>")) || branch.sentence.contains("<<"), "{branch:?}");
        let joined = branch.common + &branch.sentence;
        let whole = format!("{}{}{}", context, marked(&token), continuation);
        prop_assert!(whole.starts_with(&joined));
    }

    #[test]
    fn every_mismatch_finds_its_row(ids in prop::collection::vec(0i64..94, 0..60), seed in 0i64..50) {
        let types = token_types(&ids, THINK);
        let predictions: Vec<i64> = ids.iter().enumerate().map(|(i, t)| (t + i as i64 * seed) % 94).collect();
        let document = Document { tokens: &ids, predictions: &predictions, types: &types };
        let all = mismatches(&document, THINK.end, 50).unwrap();
        prop_assert!(all.is_empty() || ids.len() <= 50);
        let scores: Vec<Score> = all.iter().map(|m| Score { position: m.position, score: 1 }).collect();
        let labels = assemble(&types, &scores).unwrap();
        prop_assert_eq!(labels.is_none(), all.is_empty());
        for m in &all {
            prop_assert!(m.small != m.real && m.real != THINK.end && ids[m.position] == m.real);
            prop_assert!(predictions[m.position - 1] == m.small && m.context == m.position);
            prop_assert!(labels.as_ref().unwrap()[m.position - 1].counts());
        }
        let divergent = labels.iter().flatten().filter(|l| l.divergent == 1).count();
        prop_assert_eq!(divergent, all.len());
    }

    #[test]
    fn a_reference_ends_at_its_stop(ids in prop::collection::vec(0i64..20, 0..40), index in 0usize..40, count in 1usize..4) {
        let stops = StopTokens::of_vocabulary([(3, "."), (5, "?"), (6, ".."), (7, "no")], None);
        let cut = reference_continuation(&ids, index, 10, Some(count), &stops, 19);
        prop_assert!(cut.len() <= 10);
        prop_assert!(cut.iter().filter(|t| stops.contains(**t)).count() <= count);
        if index + 1 < ids.len() {
            prop_assert!(ids[index + 1..].starts_with(&cut));
        } else {
            prop_assert_eq!(cut, vec![19]);
        }
    }

    #[test]
    fn a_reply_never_panics(reply in "\\PC{0,80}") {
        let strict = judge::strict_score(&reply);
        prop_assert!((-1..=1).contains(&strict));
    }
}

#[test]
fn what_a_judge_is_asked_holds_both_sentences() {
    let question = judge::question("{{small}} so far", "one {{large}}", "two");
    assert!(
        question.contains("{{small}} so far")
            && question.contains("one {{large}}")
            && question.contains("two")
    );
    assert!(!question.contains("{{context}}"));
    let wrong = [Score { position: 0, score: 1 }];
    assert!(assemble(&token_types(&[1, 2], THINK), &wrong).is_err());
    let twice = [Score { position: 1, score: 1 }, Score { position: 1, score: 0 }];
    assert!(assemble(&token_types(&[1, 2], THINK), &twice).unwrap_err().to_string().contains("two scores"));
    assert_eq!(marked(" we"), " <<we>>");
}
