//! The adding ring: every line follows from the one before, recall repeats the first, splits are disjoint.

use std::collections::BTreeMap;

use nics_datasets::adding_ring::{
    DIGITS, LINE_TOKENS, LINES, MODULUS, RECALL_ID, TOKENS, Task, next, problem, problems, split, vocabulary,
};
use nics_datasets::word_problems::Split;

#[test]
fn every_line_is_the_sum_of_neighbours_of_the_one_before() {
    for index in 0..100 {
        let text = problem(Split::Train, 3, index).text(Task::Ring);
        let words: Vec<&str> = text.split(' ').collect();
        assert_eq!(words.len(), TOKENS);
        let lines: Vec<&[&str]> = words.chunks(LINE_TOKENS).collect();
        assert!(lines.iter().all(|line| line[DIGITS] == ";"), "{text}");
        let digit = |line: usize, i: usize| lines[line][i % DIGITS].parse::<u32>().unwrap();
        for line in 1..LINES {
            for i in 0..DIGITS {
                assert_eq!(digit(line, i), (digit(line - 1, i) + digit(line - 1, i + 1)) % MODULUS, "{text}");
            }
        }
    }
}

#[test]
fn recall_differs_in_the_last_line_alone() {
    let words = vocabulary();
    for problem in problems(Split::Test, 0, 50) {
        for lines in [2, 4, LINES] {
            let (ring, recall) = (problem.ids(Task::Ring, lines), problem.ids(Task::Recall, lines));
            let same = ring.len() - LINE_TOKENS - 1;
            assert_eq!(ring[..same], recall[..same]);
            assert_eq!(words[recall[same] as usize], "=");
            assert_eq!(recall[same + 1..], problem.prompt());
        }
    }
}

#[test]
fn lines_may_be_recalled_at_any_place_and_the_ring_goes_on_from_there() {
    let problem = problem(Split::Train, 5, 3);
    for (first, second) in (1..LINES).flat_map(|a| (a + 1..LINES).map(move |b| (a, b))) {
        let mut expected = Vec::new();
        for lines in [first, second - first, LINES - second] {
            expected.extend(problem.ids(Task::Ring, lines));
            *expected.last_mut().unwrap() = RECALL_ID;
        }
        *expected.last_mut().unwrap() = problem.prompt()[DIGITS];
        assert_eq!(problem.ids_recalling(LINES, &[second, first]), expected);
    }
    assert_eq!(problem.ids_recalling(LINES, &[LINES - 1]), problem.ids(Task::Recall, LINES));
    assert_eq!(problem.ids_recalling(LINES, &[0, LINES]), problem.ids(Task::Ring, LINES));
}

#[test]
fn a_known_text_stays_what_it_is() {
    assert_eq!(next([3, 1, 4, 0, 2, 2, 1]), [4, 0, 4, 2, 4, 3, 4]);
    assert_eq!(vocabulary(), ["<unk>", "<eos>", ";", "=", "0", "1", "2", "3", "4"]);
}

#[test]
fn splits_share_no_first_line_and_problems_are_their_own() {
    let mut owner = BTreeMap::new();
    let mut count = BTreeMap::new();
    for which in Split::ALL {
        for problem in problems(which, 1, 400) {
            assert_eq!(split(problem.first), which);
            assert_eq!(*owner.entry(problem.first).or_insert(which), which);
            *count.entry(which.name()).or_insert(0) += 1;
        }
    }
    assert_eq!(count.values().sum::<usize>(), 1200);
    assert_eq!(problem(Split::Train, 7, 9), problem(Split::Train, 7, 9));
    assert_ne!(problem(Split::Train, 7, 9).first, problem(Split::Train, 8, 9).first);
    assert_ne!(problem(Split::Train, 7, 9).first, problem(Split::Train, 7, 10).first);
    assert_eq!(problem(Split::Validation, 2, 5).id, "adding-ring/validation/2/5");
}
