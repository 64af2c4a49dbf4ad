//! From points to figures: how far texts are right and what their caches take, over all seeds.
//!
//! Intervals are percentile bootstraps (Efron, 1979) over the texts of each seed, drawn alike for everything that is
//! compared. They say how sure the figures are for these models; how much models differ shows in the rows of each seed.

use nics_base::ci::{Drawn, Draws, Estimate, Grouped};
use nics_base::row::Row;
use nics_datasets::adding_ring::{DIGITS, LINE_TOKENS, TOKENS};

use super::evaluate::paired;
use super::variants::{kivi_name, pm, pm_pages, rtn};
use super::{Point, Study, Table, Variant, Weights, variants};
use crate::{Error, Result};

/// Samples of a bootstrap.
const RESAMPLES: usize = 1000;
/// Tokens that are written behind a first line.
const WRITTEN: usize = TOKENS - LINE_TOKENS;
const WHOLE: &str = "whole texts without a mistake";
const TOKEN: &str = "tokens right";
const RECALL: &str = "first lines recalled";
const MEAN: &str = "time-averaged bytes of a text's cache";

/// What holds for every row of a report.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// As rows name it.
    pub preset: String,
    /// The models.
    pub model: String,
}

/// What a difference has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Above 0.
    Ahead,
    /// 0 or more.
    NotBehind,
    /// Anything: it is told, not claimed.
    Told,
}

/// A difference between two caches with the same peak budget, on the ring.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Of what.
    pub name: String,
    /// The first over the second.
    pub estimate: Estimate,
    /// What is claimed.
    pub claim: Claim,
}

/// What the method is said to be worth.
#[derive(Debug, Clone, PartialEq)]
pub struct Claims {
    /// All differences.
    pub differences: Vec<Difference>,
}

impl Claims {
    /// Whether the claims of the nano experiment hold: at equal peak budget the method is ahead of RTN and KIVI, and shrinking
    /// page by page is at least as good as halving whole layers.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the first that does not.
    pub fn check(&self) -> Result<()> {
        for Difference { name, estimate, claim } in &self.differences {
            let (holds, expected) = match claim {
                Claim::Ahead => (estimate.value > 0.0, "above 0"),
                Claim::NotBehind => (estimate.value >= 0.0, "0 or more"),
                Claim::Told => continue,
            };
            if !holds {
                let found = format!("{:.3}", estimate.value);
                return Err(Error::Setting { field: name.clone(), found, expected: expected.into() });
            }
        }
        Ok(())
    }
}

/// Texts whose first `tokens` tokens are right.
fn prefix(points: &[&Point], tokens: usize) -> Grouped {
    points.iter().map(|p| p.prefix.iter().map(|n| f64::from(u8::from(*n >= tokens))).collect()).collect()
}

fn token_accuracy(points: &[&Point]) -> Grouped {
    points.iter().map(|p| p.tokens.iter().map(|n| *n as f64 / WRITTEN as f64).collect()).collect()
}

fn recalled(points: &[&Point]) -> Grouped {
    points.iter().map(|p| p.recalled.iter().map(|n| f64::from(u8::from(*n == DIGITS))).collect()).collect()
}

/// Makes rows.
struct Maker<'a> {
    about: &'a About,
    seeds: &'a [(u64, Vec<Point>)],
    draws: Draws,
    rows: Vec<Row>,
}

/// The rows of a report, and the claims.
///
/// # Errors
/// Seeds that were measured at different points, or not at all.
pub fn figures(study: &Study, about: &About, seeds: &[(u64, Vec<Point>)]) -> Result<(Vec<Row>, Claims)> {
    if seeds.is_empty() {
        return Err(Error::Input("there are no seeds".into()));
    }
    let texts = vec![study.evaluation.sequences; seeds.len()];
    let mut maker =
        Maker { about, seeds, draws: Draws::new(&texts, Drawn::Items, RESAMPLES, 0), rows: Vec::new() };
    // Budgets that do not exist have no points, whatever the seed.
    let is_measured = |v: &&Variant| {
        seeds.iter().any(|(_, points)| points.iter().any(|p| p.key() == (v.name.as_str(), v.weights)))
    };
    let all = variants(study);
    let measured: Vec<&Variant> = all.iter().filter(is_measured).collect();
    for table in tables(&measured) {
        for variant in measured.iter().filter(|v| v.tables.contains(&table)) {
            maker.in_table(&table, variant)?;
        }
    }
    for variant in &measured {
        maker.everything(variant)?;
    }
    let claims = maker.claims()?;
    Ok((maker.rows, claims))
}

/// Every table once, in order; those at a rival's bytes only where the method is in them.
fn tables(all: &[&Variant]) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for table in all.iter().flat_map(|v| &v.tables) {
        let rivals = matches!(table, Table::TruePeak(_) | Table::Average(_));
        let members = all.iter().filter(|v| v.tables.contains(table)).count();
        if !tables.contains(table) && (members > 1 || !rivals) {
            tables.push(table.clone());
        }
    }
    let rank = |table: &Table| match table {
        Table::Peak(bits) => (0, 16 - bits),
        Table::TruePeak(_) => (1, 0),
        Table::Average(_) => (2, 0),
        Table::Ablation(_) => (3, 0),
    };
    tables.sort_by_key(rank);
    tables
}

impl Maker<'_> {
    fn row(&self, variant: &Variant) -> Row {
        let with = if variant.weights == Weights::Outliers { ", outliers in the keys" } else { "" };
        Row {
            method: "pm-kvq".into(),
            variant: variant.name.clone(),
            preset: self.about.preset.clone(),
            model: self.about.model.clone(),
            dataset: format!("adding-ring/test{with}"),
            device: "cpu".into(),
            dtype: "float32".into(),
            ..Row::default()
        }
    }

    fn push(&mut self, metric: String, values: &Grouped, row: Row) {
        let estimate = self.draws.estimate(|w| w.mean(values));
        self.rows.push(Row {
            metric,
            value: estimate.value,
            ci: Some(estimate.interval),
            higher_is_better: true,
            n: Some(values.iter().map(|v| v.len() as u64).sum()),
            ..row
        });
    }

    /// The rows of a variant in a table, along its bytes.
    fn in_table(&mut self, table: &Table, variant: &Variant) -> Result<()> {
        let points = paired(self.seeds, &variant.name, variant.weights)?;
        let (at, by_average) = match table {
            Table::Peak(bits) => (format!("at a peak of {bits} bits a value"), false),
            Table::TruePeak(rival) => (format!("at the peak bytes of {rival}"), false),
            Table::Average(rival) => (format!("at the average bytes of {rival}"), true),
            Table::Ablation(what) => (format!("ablation: {what}"), false),
        };
        let bytes = |p: &&Point| if by_average { p.mean_bytes } else { p.peak_bytes as f64 };
        let x = points.iter().map(bytes).sum::<f64>() / points.len().max(1) as f64;
        let label = if by_average { MEAN } else { "peak bytes of a text's cache" };
        let row = Row { x: Some(x.round()), x_label: Some(label.into()), ..self.row(variant) };
        let values = [
            (WHOLE, prefix(&points, WRITTEN)),
            (TOKEN, token_accuracy(&points)),
            (RECALL, recalled(&points)),
        ];
        for (metric, values) in values {
            self.push(format!("{metric}, {at}"), &values, row.clone());
        }
        Ok(())
    }

    /// All figures of a variant, and those of each seed.
    fn everything(&mut self, variant: &Variant) -> Result<()> {
        let points = paired(self.seeds, &variant.name, variant.weights)?;
        for percent in [25, 50, 75] {
            let values = prefix(&points, WRITTEN * percent / 100);
            let row = self.row(variant);
            self.push(format!("texts right up to {percent} %"), &values, row);
        }
        let whole = Row { wall_s: Some(points.iter().map(|p| p.seconds).sum()), ..self.row(variant) };
        self.push(WHOLE.into(), &prefix(&points, WRITTEN), whole);
        self.push(TOKEN.into(), &token_accuracy(&points), self.row(variant));
        self.push(RECALL.into(), &recalled(&points), self.row(variant));
        let n = points.len().max(1) as f64;
        let peak = points.iter().map(|p| p.peak_bytes as f64).sum::<f64>() / n;
        let average = points.iter().map(|p| p.mean_bytes).sum::<f64>() / n;
        for (metric, value) in [("peak bytes of a text's cache", peak), (MEAN, average)] {
            self.rows.push(Row { metric: metric.into(), value, unit: "bytes".into(), ..self.row(variant) });
        }
        for (i, (seed, _)) in self.seeds.iter().enumerate() {
            let one = |values: Grouped| values[i].iter().sum::<f64>() / values[i].len().max(1) as f64;
            for (metric, value) in [
                (WHOLE, one(prefix(&points, WRITTEN))),
                (TOKEN, one(token_accuracy(&points))),
                (RECALL, one(recalled(&points))),
            ] {
                self.rows.push(Row {
                    metric: format!("{metric}, by seed"),
                    value,
                    higher_is_better: true,
                    n: Some(points[i].prefix.len() as u64),
                    seed: Some(*seed),
                    ..self.row(variant)
                });
            }
        }
        Ok(())
    }

    /// Differences on the ring between caches with the same peak budget.
    fn claims(&mut self) -> Result<Claims> {
        let of = |name: &str| paired(self.seeds, name, Weights::Plain);
        let mut differences = Vec::new();
        let mut add = |name: String, a: &Grouped, b: &Grouped, claim: Claim| {
            let estimate = self.draws.estimate(|w| w.mean(a) - w.mean(b));
            differences.push(Difference { name, estimate, claim });
        };
        for bits in [2, 4] {
            let own = of(&pm(bits))?;
            let pages = of(&pm_pages(bits))?;
            for rival in [rtn(bits), kivi_name(bits)] {
                let other = of(&rival)?;
                for (metric, a, b) in [
                    (TOKEN, token_accuracy(&own), token_accuracy(&other)),
                    ("texts right up to 50 %", prefix(&own, WRITTEN / 2), prefix(&other, WRITTEN / 2)),
                ] {
                    add(format!("{} over {rival}, {metric}", pm(bits)), &a, &b, Claim::Ahead);
                }
                let (a, b) = (prefix(&own, WRITTEN), prefix(&other, WRITTEN));
                add(format!("{} over {rival}, {WHOLE}", pm(bits)), &a, &b, Claim::Told);
            }
            for (metric, a, b) in [
                (WHOLE, prefix(&pages, WRITTEN), prefix(&own, WRITTEN)),
                (TOKEN, token_accuracy(&pages), token_accuracy(&own)),
            ] {
                add(format!("F={bits}, pages over layers, {metric}"), &a, &b, Claim::NotBehind);
            }
            let (a, b) = (recalled(&pages), recalled(&own));
            add(format!("F={bits}, pages over layers, {RECALL}"), &a, &b, Claim::Told);
        }
        for Difference { name, estimate, .. } in &differences {
            self.rows.push(Row {
                method: "pm-kvq".into(),
                variant: name.clone(),
                preset: self.about.preset.clone(),
                model: self.about.model.clone(),
                dataset: "adding-ring/test".into(),
                metric: "difference at equal peak budget".into(),
                value: estimate.value,
                ci: Some(estimate.interval),
                higher_is_better: true,
                device: "cpu".into(),
                dtype: "float32".into(),
                ..Row::default()
            });
        }
        Ok(Claims { differences })
    }
}
