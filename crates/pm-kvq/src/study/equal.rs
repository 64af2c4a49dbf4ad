//! Budgets that make the method take what a rival takes.

use nics_core::models::ModelDims;
use nics_datasets::adding_ring::LINE_TOKENS;

use crate::budget::schedule;
use crate::cache::CacheConfig;
use crate::ledger::Rules;
use crate::nano::ROWS;
use crate::{Error, Result};

/// Budgets are tried in steps of so many bytes.
const STEP: u64 = 32;

/// `config` with the largest budget of each layer at which a text takes at most `bytes`: on average over the tokens
/// written, or at its peak. `None` where no budget does.
///
/// # Errors
/// Settings that do not fit the model.
pub(super) fn equal(
    dims: &ModelDims,
    config: &CacheConfig,
    bytes: f64,
    average: bool,
) -> Result<Option<CacheConfig>> {
    let rules = config.rules(dims)?;
    let rules = rules.first().ok_or_else(|| Error::Input("the model has no layer".into()))?;
    let layer = bytes / dims.layers as f64;
    let fits = |budget: u64| -> Result<bool> {
        let rules = Rules { budget: Some(budget), ..rules.clone() };
        if rules.check().is_err() {
            return Ok(false);
        }
        let schedule = schedule(&rules, LINE_TOKENS, ROWS)?;
        let taken = if average { schedule.mean_bytes } else { schedule.peak_bytes as f64 };
        Ok(schedule.exhausted_at.is_none() && taken <= layer)
    };
    let most = rules.shape.payload(crate::Bits::B16) as u64 * ROWS as u64;
    let mut budget = most.next_multiple_of(STEP);
    while budget > 0 {
        if fits(budget)? {
            return Ok(Some(CacheConfig { budgets: vec![budget], ..config.clone() }));
        }
        budget -= STEP;
    }
    Ok(None)
}
