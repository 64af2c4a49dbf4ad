//! The budget with which the method takes as much memory in the mean as something else.

use nics_core::models::ModelDims;

use crate::Result;
use crate::budget::schedule;
use crate::cache::CacheConfig;

/// Settings like `base` with the largest budget whose bytes, averaged over the tokens of a reply of `reply` tokens behind
/// `prompt`, stay within `mean_bytes`; `None` where no budget with so few bytes holds all tokens. Nothing is run for it: the
/// books alone tell.
///
/// # Errors
/// Settings that do not fit the model.
pub fn matched(
    base: &CacheConfig,
    dims: &ModelDims,
    prompt: usize,
    reply: usize,
    mean_bytes: f64,
) -> Result<Option<CacheConfig>> {
    let open = CacheConfig { budgets: Vec::new(), budget: None, max_len: None, ..base.clone() };
    let rules = open.rules(dims)?;
    let most = (prompt + reply).saturating_sub(1);
    let mean = |budget: u64| -> Result<Option<f64>> {
        let mut sum = 0.0;
        for rules in rules.chunk_by(|a, b| a == b) {
            let own = crate::ledger::Rules { budget: Some(budget), ..rules[0].clone() };
            if budget < own.least_budget() {
                return Ok(None);
            }
            let found = schedule(&own, prompt, most)?;
            if found.exhausted_at.is_some() {
                return Ok(None);
            }
            sum += found.mean_bytes * rules.len() as f64;
        }
        Ok(Some(sum))
    };
    let dense = rules.iter().map(|r| r.bytes_at(crate::Bits::B16, most)).max().unwrap_or(0);
    // Too little to hold all tokens counts as too little; the mean grows with the budget.
    let (mut low, mut high, mut best) = (0, dense, None);
    while low <= high {
        let budget = low + (high - low) / 2;
        match mean(budget)? {
            Some(bytes) if bytes > mean_bytes => match budget.checked_sub(1) {
                Some(below) => high = below,
                None => break,
            },
            found => {
                if found.is_some() {
                    best = Some(budget);
                }
                low = budget + 1;
            }
        }
    }
    Ok(best.map(|budget| CacheConfig { budgets: vec![budget], ..open }))
}
