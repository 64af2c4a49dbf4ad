//! The symbol grid: answers are what the picture shows, splits are disjoint, nuisance is where it should be.

use std::collections::BTreeMap;

use nics_datasets::symbol_grid::{
    CELL, CELLS, EDGE, EOS, EOS_ID, HALF, IMAGE, IMAGE_ID, LEVELS, Line, NOISE, Nuisance, SIDE, SYMBOL_ID,
    SYMBOLS, ZERO, problem, problems, split, vocabulary,
};
use nics_datasets::word_problems::Split;

const NONE: Nuisance = Nuisance { pixels: 0, std: 0.0 };

/// The number of a pixel of a cell.
fn number(grey: &[u8], cell: usize, pixel: usize) -> f64 {
    let (row, column) = (cell / SIDE * CELL + pixel / CELL, cell % SIDE * CELL + pixel % CELL);
    (f64::from(grey[row * EDGE + column]) - ZERO) / LEVELS
}

fn deviation(values: &[f64]) -> f64 {
    (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt()
}

#[test]
fn words_have_their_ids_and_a_known_text_stays_what_it_is() {
    let words = vocabulary();
    assert_eq!(words.len(), 25);
    assert_eq!((words[EOS_ID as usize].as_str(), words[IMAGE_ID as usize].as_str()), (EOS, IMAGE));
    assert_eq!(words[SYMBOL_ID as usize..].concat(), "ABCDEFGHIJKL");
    for problem in problems(Split::Test, 3, 40) {
        let ids = problem.ids();
        assert_eq!(ids.len(), 5 + SIDE + 1);
        let said: Vec<&str> = ids.iter().map(|id| words[*id as usize].as_str()).collect();
        assert_eq!(said.join(" "), problem.text());
    }
}

#[test]
fn answers_are_rows_and_columns_of_the_grid() {
    for problem in problems(Split::Train, 5, 60) {
        let expected: Vec<usize> = match problem.line {
            Line::Row(row) => problem.cells[row * SIDE..][..SIDE].to_vec(),
            Line::Column(column) => problem.cells.iter().copied().skip(column).step_by(SIDE).collect(),
        };
        assert_eq!(problem.answer().to_vec(), expected, "{}", problem.line);
    }
}

/// The codes are seen by averaging their noise away, and each symbol's pictures are nearest to its own code.
#[test]
fn symbols_are_told_apart_and_noise_is_as_loud_as_it_says() {
    let mut sums = vec![(0.0, [0.0; HALF]); SYMBOLS];
    let all: Vec<_> = problems(Split::Train, 1, 200).collect();
    for problem in &all {
        let grey = problem.grey(NONE);
        for (cell, &symbol) in problem.cells.iter().enumerate() {
            sums[symbol].0 += 1.0;
            for (pixel, sum) in sums[symbol].1.iter_mut().enumerate() {
                *sum += number(&grey, cell, pixel);
            }
        }
    }
    let codes: Vec<[f64; HALF]> = sums.iter().map(|(n, sum)| sum.map(|s| s / n)).collect();
    let (mut right, mut noise) = (0, Vec::new());
    for problem in &all[..50] {
        let grey = problem.grey(NONE);
        for (cell, &symbol) in problem.cells.iter().enumerate() {
            let seen: Vec<f64> = (0..HALF).map(|pixel| number(&grey, cell, pixel)).collect();
            let far = |code: &[f64; HALF]| seen.iter().zip(code).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
            let nearest = (0..SYMBOLS).min_by(|a, b| far(&codes[*a]).total_cmp(&far(&codes[*b])));
            right += usize::from(nearest == Some(symbol));
            noise.extend(seen.iter().zip(&codes[symbol]).map(|(a, b)| a - b));
        }
    }
    assert!(right as f64 > 0.99 * (50 * CELLS) as f64, "{right} of {}", 50 * CELLS);
    assert!((deviation(&noise) - NOISE).abs() < 0.03, "{}", deviation(&noise));
}

#[test]
fn nuisance_is_in_its_pixels_and_leaves_the_code_alone() {
    let problem = problem(Split::Validation, 2, 9);
    let plain = problem.grey(NONE);
    for nuisance in [Nuisance { pixels: HALF, std: 3.0 }, Nuisance { pixels: 6, std: 8.0 }] {
        let grey = problem.grey(nuisance);
        let mut loud = Vec::new();
        for cell in 0..CELLS {
            for pixel in 0..HALF {
                assert_eq!(number(&grey, cell, pixel).to_bits(), number(&plain, cell, pixel).to_bits());
                let value = number(&grey, cell, HALF + pixel);
                if pixel < nuisance.pixels {
                    loud.push(value);
                } else {
                    assert!(value.abs() < 0.2, "{value}");
                }
            }
        }
        assert!((deviation(&loud) / nuisance.std - 1.0).abs() < 0.15, "{}", deviation(&loud));
        assert_eq!(problem.rgb(nuisance).len(), 3 * EDGE * EDGE);
        assert!(problem.rgb(nuisance).chunks(3).zip(&grey).all(|(rgb, level)| rgb == [*level; 3]));
    }
}

#[test]
fn splits_share_no_problem_and_problems_are_their_own() {
    let mut owner = BTreeMap::new();
    for which in Split::ALL {
        for problem in problems(which, 1, 300) {
            assert_eq!(split(&problem.cells, problem.line), which);
            assert_eq!(owner.insert(problem.text() + &format!("{:?}", problem.cells), which), None);
        }
    }
    assert_eq!(problem(Split::Train, 7, 9), problem(Split::Train, 7, 9));
    assert_ne!(problem(Split::Train, 7, 9).cells, problem(Split::Train, 8, 9).cells);
    assert_ne!(problem(Split::Train, 7, 9).grey(NONE), problem(Split::Train, 7, 10).grey(NONE));
    assert_eq!(problem(Split::Test, 2, 5).id, "symbol-grid/test/2/5");
}
