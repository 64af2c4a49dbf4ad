//! The generator's promises: splits that share no computation, arithmetic that holds, wording that is filled in.

use std::collections::{HashMap, HashSet};

use nics_datasets::word_problems::{Lang, Plan, Problem, Split, Template, generate, problem, templates};
use proptest::prelude::*;

/// Every integer in `text`, in order.
fn integers(text: &str) -> Vec<i64> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|s| !s.is_empty()).map(|s| s.parse().unwrap()).collect()
}

/// Evaluates `12+30=42`; the sides must agree.
fn holds(equation: &str) -> bool {
    let (left, right) = equation.split_once('=').unwrap();
    let at = left.find(['+', '-', '×', '÷']).unwrap();
    let sign = left[at..].chars().next().unwrap();
    let a: i64 = left[..at].parse().unwrap();
    let b: i64 = left[at + sign.len_utf8()..].parse().unwrap();
    let c: i64 = right.parse().unwrap();
    match sign {
        '+' => a + b == c,
        '-' => a - b == c,
        '×' => a * b == c,
        _ => b * c == a,
    }
}

/// The equations inside a solution.
fn equations(solution: &str) -> Vec<&str> {
    solution
        .split(|c: char| !(c.is_ascii_digit() || "+-×÷=".contains(c)))
        .filter(|s| s.contains('='))
        .collect()
}

/// What a problem computes, whatever its words.
fn computation(p: &Problem) -> (Plan, Vec<i64>) {
    (p.plan, p.numbers.clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_problem_belongs_to_its_split_and_no_other(seed: u64, index: u64, which in 0_usize..3) {
        let split = Split::ALL[which];
        let p = problem(split, seed, index);
        prop_assert_eq!(Split::of(p.plan, &p.numbers), split);
    }

    #[test]
    fn every_step_and_the_answer_hold(seed: u64, index: u64) {
        let p = problem(Split::Train, seed, index);
        let steps = equations(&p.solution);
        prop_assert_eq!(steps.len(), p.plan.steps().len());
        for step in &steps {
            prop_assert!(holds(step), "{} in {:?}", step, p);
        }
        let last = steps.last().unwrap().split_once('=').unwrap().1;
        prop_assert_eq!(last, p.answer.to_string());
        let line = format!("\n#### {}", p.answer);
        prop_assert!(p.solution.ends_with(&line));
    }

    #[test]
    fn the_question_gives_the_numbers_and_nothing_of_the_answer(seed: u64, index: u64) {
        let p = problem(Split::Test, seed, index);
        let mut given = integers(&p.question);
        let mut numbers = p.numbers.clone();
        given.sort_unstable();
        numbers.sort_unstable();
        prop_assert_eq!(given, numbers);
        let unfilled = [&p.question, &p.solution].iter().any(|text| text.contains(['{', '}']));
        prop_assert!(!unfilled, "{:?}", p);
    }
}

#[test]
fn splits_share_no_computation() {
    let drawn: Vec<HashSet<_>> =
        Split::ALL.iter().map(|&s| generate(s, 20_000, 7).map(|p| computation(&p)).collect()).collect();
    for (i, a) in drawn.iter().enumerate() {
        assert!(a.len() > 2_000, "{} distinct computations in {}", a.len(), Split::ALL[i]);
        for b in &drawn[i + 1..] {
            assert_eq!(a.intersection(b).count(), 0);
        }
    }
}

#[test]
fn a_computation_stays_in_its_split_under_other_words() {
    // The same computations come up in several templates, languages and seeds; each must stay where it was.
    let mut home: HashMap<_, (Split, HashSet<String>)> = HashMap::new();
    for split in Split::ALL {
        for seed in 0..3 {
            for p in generate(split, 10_000, seed) {
                let entry = home.entry(computation(&p)).or_insert_with(|| (split, HashSet::new()));
                assert_eq!(entry.0, split, "{p:?}");
                entry.1.insert(p.question);
            }
        }
    }
    let reworded = home.values().filter(|(_, questions)| questions.len() > 1).count();
    assert!(reworded > 1_000, "only {reworded} computations came up in other words: the check is weak");
}

#[test]
fn split_sizes_are_eighteen_to_one_to_one() {
    let mut counts = HashMap::new();
    for a in 2..=99 {
        for b in 2..=99 {
            *counts.entry(Split::of(Plan::Add, &[a, b])).or_insert(0_i64) += 1;
        }
    }
    let all: i64 = counts.values().sum();
    for split in [Split::Validation, Split::Test] {
        assert!((counts[&split] - all / 20).abs() < all / 100, "{split}: {} of {all}", counts[&split]);
    }
}

#[test]
fn any_problem_can_be_made_alone() {
    let all: Vec<_> = generate(Split::Validation, 50, 3).collect();
    assert_eq!(all.len(), 50);
    assert_eq!(generate(Split::Validation, 50, 3).skip(20).collect::<Vec<_>>(), all[20..]);
    assert_eq!(problem(Split::Validation, 3, 49), all[49]);
    assert_ne!(problem(Split::Validation, 4, 49).question, all[49].question);
    let ids: HashSet<_> = all.iter().map(|p| &p.id).collect();
    assert_eq!(ids.len(), 50);
}

#[test]
fn every_template_is_used_in_both_languages_for_every_plan() {
    let used: HashSet<String> = generate(Split::Train, 5_000, 1).map(|p| p.template).collect();
    let declared: HashSet<String> = templates().iter().map(Template::name).collect();
    assert_eq!(declared.len(), templates().len(), "two templates share a name");
    assert_eq!(used, declared);
    for lang in [Lang::En, Lang::Zh] {
        for plan in Plan::ALL {
            assert!(templates().iter().any(|t| t.lang == lang && t.plan == plan), "{lang:?} {plan:?}");
        }
    }
}

#[test]
fn numbers_beyond_the_bounds_are_refused() {
    assert_eq!(Plan::Add.work(&[12, 30]).unwrap().equations, ["12+30=42"]);
    assert_eq!(Plan::Add.work(&[12, 100]), None, "out of bounds");
    assert_eq!(Plan::Add.work(&[12]), None, "too few numbers");
    assert_eq!(Plan::Sub.work(&[12, 30]), None, "negative");
    assert_eq!(Plan::Div.work(&[100, 7]), None, "a remainder");
    assert_eq!(Plan::SumMul.work(&[30, 30, 3]), None, "60 times 3");
}

#[test]
fn the_first_test_problem_is_what_it_always_was() {
    // Checkpoints quote their accuracy on (split, seed): a change of the generator must not pass unnoticed.
    let p = problem(Split::Test, 1, 0);
    assert_eq!(p.id, "word-problems/test/1/0");
    assert_eq!(p.question, "小明有7块饼干，又买了63块。小明现在有多少块饼干？");
    assert_eq!(p.solution, "小明现在有7+63=70块饼干。\n#### 70");
    let json = serde_json::to_value(&p).unwrap();
    assert_eq!((&json["split"], &json["lang"], &json["plan"]), (&"test".into(), &"zh".into(), &"add".into()));
    assert_eq!(serde_json::from_value::<Problem>(json).unwrap(), p);
}
