//! The arithmetic task: what a problem says is true, splits are disjoint, words are the vocabulary's.

use std::collections::{BTreeMap, BTreeSet};

use nics_datasets::ring::{self, CLOSINGS, CONNECTIVES, EOS, Operator, Ring, SEPARATORS, answer, canonical};
use nics_datasets::word_problems::Split;

fn ring(modulus: u32) -> Ring {
    Ring::new(modulus).unwrap()
}

#[test]
fn every_step_is_true_and_follows_from_the_one_before() {
    for modulus in [19, 31] {
        for index in 0..300 {
            let problem = ring(modulus).problem(Split::Train, 5, index);
            let words: Vec<&str> = problem.response.split_whitespace().collect();
            assert_eq!(words[0], ring::THINK);
            let mut value = problem.operands[0];
            for (i, step) in words[1..=7 * problem.operators.len()].chunks(7).enumerate() {
                let (a, b): (u32, u32) = (step[1].parse().unwrap(), step[3].parse().unwrap());
                let exact = match step[2] {
                    "+" => a + b,
                    "-" => a + modulus - b,
                    _ => a * b,
                };
                assert_eq!((a, b, step[4]), (value, problem.operands[i + 1], "="));
                assert_eq!(step[2], problem.operators[i].word());
                assert!(CONNECTIVES.contains(&step[0]) && SEPARATORS.contains(&step[6]));
                value = step[5].parse().unwrap();
                assert_eq!(value, exact % modulus, "{}", problem.response);
            }
            let end = &words[1 + 7 * problem.operators.len()..];
            assert_eq!((end[0], end[2]), (ring::THINK_END, ring::ANSWER));
            assert!(CLOSINGS.contains(&end[1]));
            assert_eq!(problem.answer, value);
            assert_eq!(answer(&problem.text()), Some(value));
        }
    }
}

#[test]
fn words_are_the_vocabularys_and_each_has_one_place() {
    let vocabulary = ring(19).vocabulary();
    assert_eq!(vocabulary.len(), 40);
    assert_eq!(vocabulary.iter().collect::<BTreeSet<_>>().len(), 40);
    for index in 0..200 {
        let text = ring(19).problem(Split::Validation, 0, index).text();
        assert!(text.split(' ').all(|word| vocabulary.iter().any(|v| v == word)), "{text}");
        assert!(text.ends_with(EOS));
    }
}

#[test]
fn splits_are_disjoint_and_problems_are_functions_of_their_number() {
    let ring = ring(19);
    let mut seen: BTreeMap<String, Split> = BTreeMap::new();
    for split in Split::ALL {
        for seed in [0, 1] {
            for index in 0..1500 {
                let problem = ring.problem(split, seed, index);
                assert_eq!(ring.split(&problem.operands, &problem.operators), split);
                let before = seen.insert(problem.question.clone(), split);
                assert!(before.is_none_or(|b| b == split), "{} is in two splits", problem.question);
            }
        }
    }
    assert_eq!(ring.problem(Split::Test, 3, 77), ring.problem(Split::Test, 3, 77));
    assert_ne!(ring.problem(Split::Test, 3, 77), ring.problem(Split::Test, 4, 77));
}

#[test]
fn shares_are_what_they_are_said_to_be() {
    let problems: Vec<_> = ring(19).problems(Split::Train, 9, 2000).collect();
    let operators: Vec<Operator> = problems.iter().flat_map(|p| p.operators.clone()).collect();
    let share = |o| operators.iter().filter(|x| **x == o).count() as f64 / operators.len() as f64;
    for (operator, expected) in [(Operator::Plus, 0.35), (Operator::Minus, 0.25), (Operator::Times, 0.4)] {
        assert!((share(operator) - expected).abs() < 0.02);
    }
    let operands: Vec<u32> = problems.iter().flat_map(|p| p.operands[1..].to_vec()).collect();
    let easy = operands.iter().filter(|n| **n < 3).count() as f64 / operands.len() as f64;
    assert!((easy - (0.5 + 0.5 * 3.0 / 19.0)).abs() < 0.02);
    // The likeliest connective after 0 is the first, after 1 the last.
    let connectives = |value: &str| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for words in problems.iter().map(|p| p.response.split(' ').collect::<Vec<_>>()) {
            for pair in words.windows(2).filter(|w| CONNECTIVES.contains(&w[0]) && w[1] == value) {
                *counts.entry(pair[0].to_owned()).or_default() += 1;
            }
        }
        counts.into_iter().max_by_key(|(_, n)| *n).unwrap().0
    };
    assert_eq!((connectives("0").as_str(), connectives("1").as_str()), ("so", "now"));
}

#[test]
fn synonyms_are_one_and_numbers_are_not() {
    assert_eq!((canonical("thus"), canonical("!!"), canonical("hence")), ("so", ".", "finally"));
    assert_eq!((canonical("7"), canonical("=")), ("7", "="));
    assert_eq!(answer("<think> so 1 + 1 = 2 . </think> hence answer"), None);
    assert_eq!(answer("answer so"), None);
    assert!(Ring::new(2).unwrap_err().to_string().contains("modulus is 2, expected 3 to 997"));
}
