//! The width of each layer, from a sensitivity and a budget: the paper's integer program, solved exactly.
//!
//! Minimise `Σ_i s[b_i][i]` subject to `Σ_i b_i · unit ≤ budget`, where `unit` is what one bit of every stored value of a
//! layer takes. All costs are multiples of `unit`, so dynamic programming over the total width finds the optimum in
//! `layers · widths · Σ b` steps.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Bits, Error, Result};

/// Bytes that one bit of width takes in a layer of `kv_heads · head_dim` channels over `tokens` tokens.
pub fn unit(kv_heads: usize, head_dim: usize, tokens: usize) -> f64 {
    (2 * kv_heads * head_dim * tokens) as f64 / 8.0
}

/// What was chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Allocation {
    /// Width of each layer.
    pub widths: Vec<Bits>,
    /// Bytes of each layer.
    pub bytes: Vec<f64>,
    /// Summed sensitivity.
    pub objective: f64,
}

/// Chooses one of `choices` for each layer.
///
/// `sensitivity` has, for each of `choices` at least, one number a layer. `unit` and `budget` are bytes. Of several optima
/// the one of the lowest total width is taken, then that whose widths come first in order.
///
/// # Errors
/// No choice, choices without a sensitivity, lists of several lengths, numbers that are not finite, or a budget that not
/// even the narrowest widths fit.
pub fn allocate(
    sensitivity: &BTreeMap<Bits, Vec<f64>>,
    choices: &[Bits],
    unit: f64,
    budget: f64,
) -> Result<Allocation> {
    let mut choices = choices.to_vec();
    choices.sort_unstable();
    choices.dedup();
    let costs: Vec<&Vec<f64>> = choices
        .iter()
        .map(|bits| {
            sensitivity.get(bits).ok_or_else(|| {
                Error::Input(format!(
                    "the sensitivity has no entry for {} bits; measure it at that width",
                    bits.get()
                ))
            })
        })
        .collect::<Result<_>>()?;
    let (Some(narrowest), Some(first)) = (choices.first(), costs.first()) else {
        return Err(Error::Input("no width to choose from".into()));
    };
    let layers = first.len();
    if layers == 0 || costs.iter().any(|c| c.len() != layers) {
        return Err(Error::Input("sensitivities of all widths have one number for each layer".into()));
    }
    if costs.iter().any(|c| c.iter().any(|s| !s.is_finite())) {
        return Err(Error::Input("the sensitivity has values that are not finite".into()));
    }
    if !(unit > 0.0 && unit.is_finite() && budget.is_finite()) {
        return Err(Error::Input(format!(
            "a unit of {unit} bytes and a budget of {budget} bytes make no problem"
        )));
    }
    let most_useful = layers * choices.iter().map(|b| b.get() as usize).max().unwrap_or(0);
    let units = ((budget / unit + 1e-9).floor().max(0.0) as usize).min(most_useful);
    if units < layers * narrowest.get() as usize {
        let needed = layers as f64 * f64::from(narrowest.get()) * unit;
        return Err(Error::InfeasibleBudget { needed, given: budget });
    }
    // `best[i][u]`: the least sum over layers `i..` with widths that sum to exactly `u`. From the back, so that the walk
    // from the front can take the smallest width first.
    let mut best = vec![vec![f64::INFINITY; units + 1]; layers + 1];
    best[layers][0] = 0.0;
    for i in (0..layers).rev() {
        for u in 0..=units {
            best[i][u] = least(&choices, &costs, &best[i + 1], i, u).map_or(f64::INFINITY, |(sum, _)| sum);
        }
    }
    // The first of equal sums has the lowest total.
    let mut left = (0..=units).fold(0, |least, u| if best[0][u] < best[0][least] { u } else { least });
    let objective = best[0][left];
    let mut widths = Vec::with_capacity(layers);
    for i in 0..layers {
        let Some((_, bits)) = least(&choices, &costs, &best[i + 1], i, left) else {
            return Err(Error::Input("the sensitivities are too large to add".into()));
        };
        widths.push(bits);
        left -= bits.get() as usize;
    }
    let bytes = widths.iter().map(|b| f64::from(b.get()) * unit).collect();
    Ok(Allocation { widths, bytes, objective })
}

/// The least sum over layer `i` and those after it (`after`) with widths that sum to `u`, and the width of layer `i`; the
/// narrower of equal ones.
fn least(choices: &[Bits], costs: &[&Vec<f64>], after: &[f64], i: usize, u: usize) -> Option<(f64, Bits)> {
    let mut best: Option<(f64, Bits)> = None;
    for (bits, cost) in choices.iter().zip(costs) {
        let Some(left) = u.checked_sub(bits.get() as usize) else { continue };
        let sum = cost[i] + after[left];
        if sum.is_finite() && best.is_none_or(|(least, _)| sum < least) {
            best = Some((sum, *bits));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_other_choice_is_better(
            costs in prop::collection::vec((0u8..6, 0u8..6, 0u8..6), 1..6),
            budget in 0u32..60,
        ) {
            let choices = [Bits::B8, Bits::B2, Bits::B4];
            let of = |pick: fn(&(u8, u8, u8)) -> u8| costs.iter().map(|c| f64::from(pick(c)) * 1e-8).collect::<Vec<_>>();
            let sensitivity = BTreeMap::from([(Bits::B2, of(|c| c.0)), (Bits::B4, of(|c| c.1)), (Bits::B8, of(|c| c.2))]);
            // Every combination, in the order of preference.
            let mut all: Vec<Vec<Bits>> = vec![vec![]];
            for _ in &costs {
                all = all.iter().flat_map(|head| choices.map(|b| [head.clone(), vec![b]].concat())).collect();
            }
            let total = |w: &[Bits]| w.iter().map(|b| b.get()).sum::<u32>();
            let sum = |w: &[Bits]| w.iter().enumerate().map(|(i, b)| (sensitivity[b][i] * 1e8).round() as u64).sum::<u64>();
            let expected = all.into_iter().filter(|w| total(w) <= budget).min_by_key(|w| (sum(w), total(w), w.clone()));
            let found = allocate(&sensitivity, &choices, 3.0, f64::from(budget) * 3.0);
            match (expected, found) {
                (None, found) => prop_assert!(found.is_err()),
                // Sums of floats may tell apart what is equal in integers, so the objective alone is compared.
                (Some(w), Ok(found)) => prop_assert_eq!(sum(&found.widths), sum(&w)),
                (Some(_), Err(e)) => prop_assert!(false, "{e}"),
            }
        }
    }
}
