//! `pm-kvq allocate`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use nics_core::cli::{JsonArg, Size, at_least_one};
use nics_core::device::DtypeSpec;
use nics_core::models::ModelDims;
use pm_kvq::Bits;
use pm_kvq::allocate::{allocate, unit};
use pm_kvq::cache::{BudgetMode, CacheConfig};
use pm_kvq::calibrate::Origin;
use pm_kvq::calibrate::artefact::{Widths, read_sensitivity, write_allocation};

use super::cache::bits;
use super::shape::ModelShape;

/// Chooses the width of each layer so that the summed sensitivity is least within a budget; exact, in no time.
///
/// With --budget-mode exact, the default, a layer's memory is all of it: exact tokens of sink and window at their fullest,
/// scales and zeros. With official it is codes alone, as in the paper.
#[derive(Args)]
pub struct Allocate {
    /// Model: a config.json, a folder with one, or a hub id ORG/NAME or ORG/NAME@REVISION; weights are not read
    #[arg(long, short, value_name = "FILE|FOLDER|ID")]
    model: String,
    /// sensitivity.json of `pm-kvq calibrate`
    #[arg(long, value_name = "FILE")]
    sensitivity: PathBuf,
    /// Memory of a sequence
    #[arg(long, value_name = "SIZE")]
    budget: Size,
    /// Widths in bits to choose from, joined by commas
    #[arg(long, value_name = "BITS", value_delimiter = ',', default_value = "4,2", value_parser = bits)]
    choices: Vec<Bits>,
    /// Tokens that the budget is for
    #[arg(long, value_name = "TOKENS", default_value_t = 32_768, value_parser = at_least_one)]
    max_len: usize,
    /// What a layer's memory is
    #[arg(long, value_enum, default_value_t = Mode::Exact)]
    budget_mode: Mode,
    /// What the model computes in: bf16, f16, f32, or auto (as its configuration says)
    #[arg(long, value_name = "DTYPE", default_value_t = DtypeSpec::Auto)]
    dtype: DtypeSpec,
    /// Where the widths go
    #[arg(long, short, value_name = "FILE", default_value = "allocation.json")]
    out: PathBuf,
    #[command(flatten)]
    json: JsonArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Everything that is stored
    Exact,
    /// Codes alone
    Official,
}

/// What a layer takes, in bytes.
struct Costs {
    /// A bit of width.
    unit: f64,
    /// At any width.
    fixed: f64,
    /// Each choice in all.
    each: Vec<(Bits, f64)>,
}

impl Allocate {
    pub fn run(self) -> Result<()> {
        let shape = ModelShape::read(&self.model)?;
        let dims = shape.dims(self.dtype.resolve(shape.kind));
        let text = std::fs::read_to_string(&self.sensitivity)
            .with_context(|| format!("cannot read {}", self.sensitivity.display()))?;
        // The file says what model it was measured on, and the widths say it on.
        let origin: Origin = serde_json::from_str(&text)
            .with_context(|| format!("{} is no sensitivity", self.sensitivity.display()))?;
        let sensitivity = read_sensitivity(&self.sensitivity, &origin, dims.layers)?;
        let budget = self.budget.0 as u64;
        let Costs { unit, fixed, each } = self.costs(&dims)?;
        let codes = budget as f64 - fixed * dims.layers as f64;
        let mut allocation = match allocate(&sensitivity.totals(), &self.choices, unit, codes) {
            Err(pm_kvq::Error::InfeasibleBudget { needed, .. }) => {
                let needed = needed + fixed * dims.layers as f64;
                return Err(pm_kvq::Error::InfeasibleBudget { needed, given: budget as f64 }.into());
            }
            found => found?,
        };
        let cost = |width: &Bits| each.iter().find(|(bits, _)| bits == width).map_or(0.0, |(_, cost)| *cost);
        allocation.bytes = allocation.widths.iter().map(cost).collect();
        let widths = Widths { allocation, choices: self.choices, budget, max_len: self.max_len };
        write_allocation(&self.out, &origin, &widths)?;
        if self.json.json {
            println!("{}", serde_json::to_string(&widths)?);
            return Ok(());
        }
        let bits: Vec<u32> = widths.allocation.widths.iter().map(|b| b.get()).collect();
        let bytes: f64 = widths.allocation.bytes.iter().sum();
        let mib = f64::from(1 << 20);
        println!("widths of the layers: {bits:?}");
        println!(
            "{:.2} of {:.2} MiB; summed sensitivity {:.3e}",
            bytes / mib,
            budget as f64 / mib,
            widths.allocation.objective
        );
        println!("{}", self.out.display());
        Ok(())
    }

    /// What a layer takes.
    fn costs(&self, dims: &ModelDims) -> Result<Costs> {
        if self.budget_mode == Mode::Official {
            let unit = unit(dims.kv_heads as usize, dims.head_dim as usize, self.max_len);
            let costs = self.choices.iter().map(|bits| (*bits, f64::from(bits.get()) * unit)).collect();
            return Ok(Costs { unit, fixed: 0.0, each: costs });
        }
        let mut costs = Vec::new();
        for bits in &self.choices {
            let settings = CacheConfig {
                min_bits: vec![*bits],
                max_len: Some(self.max_len),
                budget_mode: BudgetMode::Exact,
                ..CacheConfig::default()
            };
            let budget = settings.rules(dims)?.first().and_then(|rules| rules.budget);
            let Some(bytes) = budget else { bail!("the model has no layer") };
            costs.push((*bits, bytes as f64));
        }
        costs.sort_by_key(|(bits, _)| *bits);
        // A line above all choices: where a layer is fullest depends a little on its width, and 16 bits have no scales.
        let slope =
            |pair: &[(Bits, f64)]| (pair[1].1 - pair[0].1) / f64::from(pair[1].0.get() - pair[0].0.get());
        let plain = unit(dims.kv_heads as usize, dims.head_dim as usize, self.max_len);
        // Few tokens are all exact at their fullest: every width then takes the same.
        let unit = costs.windows(2).map(slope).reduce(f64::max).unwrap_or(plain).max(1e-6);
        let fixed =
            costs.iter().map(|(bits, cost)| cost - f64::from(bits.get()) * unit).fold(f64::MIN, f64::max);
        Ok(Costs { unit, fixed, each: costs })
    }
}
