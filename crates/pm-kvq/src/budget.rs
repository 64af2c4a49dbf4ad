//! Budgets, and what they lead to: at how many tokens each width begins, and where a budget ends.

use crate::ledger::{Ledger, Rules};
use crate::{Bits, Result};

/// The reference's budget of a layer, in bytes: `tokens` tokens at `bits` bits, as if there were neither sink nor window,
/// scales nor zeros.
pub fn official(bits: Bits, kv_heads: usize, head_dim: usize, tokens: usize) -> u64 {
    bits.bytes(2 * kv_heads * head_dim * tokens) as u64
}

/// The budget of a layer, in bytes, with which its first `tokens` tokens never fall below `bits`: sink and window at their
/// fullest are in it, and scales and zeros when [`Rules::count`] counts them.
pub fn exact(rules: &Rules, bits: Bits, tokens: usize) -> u64 {
    // The bytes fall whenever a block leaves the window, so the most are found within the last two.
    let from = tokens.saturating_sub(2 * rules.window);
    let enough = (from..=tokens).map(|n| rules.bytes_at(bits, n)).max().unwrap_or(0);
    enough.max(rules.bytes_at(bits, (rules.sink + rules.window).min(tokens)))
}

/// From some number of tokens on, the widths of the middle.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Stage {
    /// Tokens kept when it begins.
    pub tokens: usize,
    /// The narrowest width.
    pub narrowest: Bits,
    /// The widest width.
    pub widest: Bits,
    /// Bits a value, over all tokens.
    pub mean_bits: f64,
}

/// What a budget leads to.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Schedule {
    /// Stages, the first at the prompt.
    pub stages: Vec<Stage>,
    /// The number of tokens that no longer fits, if there is one.
    pub exhausted_at: Option<usize>,
    /// Tokens that fit.
    pub reached: usize,
    /// The most bytes of codes and exact values.
    pub peak_payload: usize,
    /// The most bytes, scales and zeros included.
    pub peak_bytes: usize,
    /// Bytes, scales and zeros included, averaged over the tokens after the prompt.
    pub mean_bytes: f64,
}

/// Runs a layer's books from `prompt` tokens, read in one piece, up to `most`.
///
/// # Errors
/// Rules that [`Rules::check`] refuses.
pub fn schedule(rules: &Rules, prompt: usize, most: usize) -> Result<Schedule> {
    rules.check()?;
    let mut ledger = Ledger::new(rules);
    let mut schedule = Schedule {
        stages: Vec::new(),
        exhausted_at: None,
        reached: 0,
        peak_payload: 0,
        peak_bytes: 0,
        mean_bytes: 0.0,
    };
    let (mut steps, mut sum) = (0u64, 0u64);
    for tokens in 1..=most.max(prompt) {
        if !ledger.append(rules, 1) {
            schedule.exhausted_at = Some(tokens);
            break;
        }
        schedule.reached = tokens;
        let (payload, parameters) = ledger.bytes(&rules.shape);
        schedule.peak_payload = schedule.peak_payload.max(payload);
        schedule.peak_bytes = schedule.peak_bytes.max(payload + parameters);
        if tokens < prompt {
            continue;
        }
        steps += 1;
        sum += (payload + parameters) as u64;
        let (narrowest, widest) = ledger.widths().unwrap_or((ledger.bits(), ledger.bits()));
        if schedule.stages.last().is_none_or(|s| (s.narrowest, s.widest) != (narrowest, widest)) {
            schedule.stages.push(Stage {
                tokens,
                narrowest,
                widest,
                mean_bits: ledger.mean_bits(&rules.shape),
            });
        }
    }
    schedule.mean_bytes = if steps == 0 { 0.0 } else { sum as f64 / steps as f64 };
    Ok(schedule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Count, Shape, Shrink, WindowMode};
    use proptest::prelude::*;

    fn rules() -> impl Strategy<Value = Rules> {
        (
            0usize..4,
            1usize..20,
            prop::sample::select(vec![WindowMode::Block, WindowMode::Sliding]),
            prop::sample::select(vec![Shrink::Layer, Shrink::Oldest, Shrink::Newest]),
            prop::sample::select(vec![Count::Payload, Count::Total]),
            prop::sample::select(Bits::ALL.to_vec()),
        )
            .prop_map(|(sink, window, mode, shrink, count, floor)| Rules {
                shape: Shape { kv_heads: 2, head_dim: 64, group: 64, exact: 2 },
                sink,
                window,
                mode,
                init: Bits::B16,
                floor,
                shrink,
                budget: None,
                count,
            })
    }

    proptest! {
        #[test]
        fn an_exact_budget_is_enough_and_no_byte_less(mut rules in rules(), tokens in 1usize..200) {
            let budget = exact(&rules, rules.floor, tokens);
            let end = |budget: u64, rules: &mut Rules| {
                rules.budget = Some(budget);
                rules.check().is_ok().then(|| schedule(rules, 0, tokens).unwrap().exhausted_at)
            };
            if let Some(end) = end(budget, &mut rules) {
                prop_assert_eq!(end, None);
            }
            if let Some(end) = end(budget - 1, &mut rules) {
                prop_assert!(end.is_some());
            }
        }

        #[test]
        fn the_books_do_not_depend_on_pieces(mut rules in rules(), pieces in prop::collection::vec(1usize..40, 1..8), budget in 20_000u64..60_000) {
            rules.budget = Some(budget);
            let (mut one, mut many) = (Ledger::new(&rules), Ledger::new(&rules));
            let whole = one.append(&rules, pieces.iter().sum());
            let mut each = true;
            for n in pieces {
                let room = many.has_room(&rules);
                let mut next = many.clone();
                prop_assert_eq!(next.append(&rules, 1), room);
                each &= many.append(&rules, n);
            }
            prop_assert_eq!(whole, each);
            prop_assert_eq!(one, many);
        }

        #[test]
        fn cutting_back_is_exact_where_it_says_so(mut rules in rules(), n in 1usize..150, cut in 0usize..150, more in 0usize..80, budget in 20_000u64..60_000) {
            rules.budget = Some(budget);
            let cut = cut.min(n);
            let mut ledger = Ledger::new(&rules);
            ledger.append(&rules, n);
            let exact = ledger.exact_from().is_some_and(|from| cut >= from);
            ledger.truncate(&rules, cut);
            prop_assert_eq!(ledger.tokens(), cut);
            prop_assert_eq!(ledger.exact_from().is_some(), exact);
            ledger.append(&rules, more);
            prop_assert_eq!(ledger.tokens(), cut + more);
            let sum: usize = ledger.pages().iter().map(|p| p.tokens).sum();
            prop_assert_eq!(sum, ledger.middle() + ledger.window());
            if exact {
                let mut fresh = Ledger::new(&rules);
                fresh.append(&rules, cut + more);
                prop_assert_eq!(ledger, fresh);
            }
        }
    }
}
