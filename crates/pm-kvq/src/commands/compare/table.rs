//! The figures of a comparison, as rows and as tables.

use nics_base::ci::wilson;
use nics_base::row::Row;
use pm_kvq::compare::{Bin, Measured};

use super::Item;

/// Which of a prompt's figures.
type Which = fn(&Item) -> &[Measured];

/// One cache over all prompts.
struct Line {
    name: String,
    peak_payload: Option<f64>,
    peak_bytes: f64,
    mean_bytes: f64,
    bins: Vec<Bin>,
    /// Tokens a second.
    speed: f64,
    exhausted: usize,
    /// Replies of its own that were judged, and those with the right answer.
    judged: usize,
    right: usize,
}

impl Line {
    fn of(name: &str, all: &[&Measured]) -> Self {
        let n = all.len().max(1) as f64;
        let mean = |of: &dyn Fn(&Measured) -> f64| all.iter().map(|m| of(m)).sum::<f64>() / n;
        let mut bins: Vec<Bin> = Vec::new();
        for one in all {
            if bins.len() < one.bins.len() {
                bins.resize(one.bins.len(), Bin::default());
            }
            for (sum, bin) in bins.iter_mut().zip(&one.bins) {
                *sum = sum.and(*bin);
            }
        }
        let payloads: Option<Vec<usize>> = all.iter().map(|m| m.peak_payload).collect();
        let (steps, seconds) = all.iter().fold((0, 0.0), |(n, s), m| (n + m.steps, s + m.seconds));
        Self {
            name: name.to_owned(),
            peak_payload: payloads.map(|p| p.iter().sum::<usize>() as f64 / n),
            peak_bytes: mean(&|m| m.peak_bytes as f64),
            mean_bytes: mean(&|m| m.mean_bytes),
            bins,
            speed: if seconds > 0.0 { steps as f64 / seconds } else { f64::NAN },
            exhausted: all.iter().filter(|m| m.exhausted_at.is_some()).count(),
            judged: all.iter().filter(|m| m.right.is_some()).count(),
            right: all.iter().filter(|m| m.right == Some(true)).count(),
        }
    }

    fn total(&self) -> Bin {
        self.bins.iter().fold(Bin::default(), |sum, bin| sum.and(*bin))
    }
}

/// Caches that were there for every prompt, so that means are over the same ones.
fn lines(items: &[Item], of: Which) -> Vec<Line> {
    let mut names: Vec<&str> = Vec::new();
    for one in items.iter().flat_map(of) {
        if !names.contains(&one.name.as_str()) {
            names.push(&one.name);
        }
    }
    names
        .into_iter()
        .filter_map(|name| {
            let all: Vec<&Measured> = items.iter().flat_map(of).filter(|m| m.name == name).collect();
            (all.len() == items.len()).then(|| Line::of(name, &all))
        })
        .collect()
}

fn share(bin: &Bin) -> f64 {
    bin.agreed as f64 / bin.tokens.max(1) as f64
}

/// Result rows: of each cache, then of the method at the same average.
pub fn rows(items: &[Item], bin: usize, base: &Row) -> Vec<Row> {
    let mut rows = Vec::new();
    let tables: [(&str, Which); 2] =
        [("", |item| &item.measured), ("pm-kvq at the average of ", |item| &item.matched)];
    for (before, of) in tables {
        for line in lines(items, of) {
            let total = line.total();
            let base = Row {
                variant: format!("{before}{}", line.name),
                dataset: format!("{} prompts", items.len()),
                n: Some(total.tokens as u64),
                ..base.clone()
            };
            let row = |metric: &str, value: f64, unit: &str, higher_is_better: bool| Row {
                metric: metric.into(),
                value,
                unit: unit.into(),
                higher_is_better,
                ..base.clone()
            };
            rows.extend(line.peak_payload.map(|bytes| row("peak bytes of codes", bytes, "bytes", false)));
            rows.push(row("peak bytes", line.peak_bytes, "bytes", false));
            rows.push(row("mean bytes", line.mean_bytes, "bytes", false));
            rows.push(row("divergence", total.mean_kl(), "nats", false));
            rows.push(row("same likeliest token", share(&total), "", true));
            rows.push(row("speed", line.speed, "tokens/s", true));
            if line.judged > 0 {
                let share = line.right as f64 / line.judged as f64;
                let ci = Some(wilson(line.right as u64, line.judged as u64));
                rows.push(Row { n: Some(line.judged as u64), ci, ..row("right answers", share, "", true) });
            }
            for (n, one) in line.bins.iter().enumerate() {
                let at = |row: Row| Row {
                    n: Some(one.tokens as u64),
                    x: Some((n * bin) as f64),
                    x_label: Some("place in the reply (tokens)".into()),
                    ..row
                };
                rows.push(at(row("divergence by place", one.mean_kl(), "nats", false)));
                rows.push(at(row("same likeliest token by place", share(one), "", true)));
            }
        }
    }
    rows
}

/// Both tables for people.
pub fn print(items: &[Item], bin: usize) {
    let kib = |bytes: f64| format!("{:.1}", bytes / 1024.0);
    let measured = lines(items, |item| &item.measured);
    println!(
        "{:<38} {:>12} {:>12} {:>12} {:>12} {:>9} {:>10}",
        "", "codes KiB", "peak KiB", "mean KiB", "divergence", "agreed", "tokens/s"
    );
    for line in &measured {
        let total = line.total();
        let codes = line.peak_payload.map_or("-".into(), kib);
        println!(
            "{:<38} {codes:>12} {:>12} {:>12} {:>12.5} {:>7.1} % {:>10.1}{}{}",
            line.name,
            kib(line.peak_bytes),
            kib(line.mean_bytes),
            total.mean_kl(),
            100.0 * share(&total),
            line.speed,
            if line.judged > 0 {
                format!("  {} of {} answers right", line.right, line.judged)
            } else {
                String::new()
            },
            if line.exhausted > 0 {
                format!("  ended before the end {} times", line.exhausted)
            } else {
                String::new()
            }
        );
    }
    let most = measured.iter().map(|line| line.bins.len()).max().unwrap_or(0);
    if most > 1 {
        println!("\ndivergence (nats) and share of equal likeliest tokens, by place in the reply");
        for line in &measured {
            let cells: Vec<String> = line
                .bins
                .iter()
                .enumerate()
                .map(|(n, one)| format!("{}: {:.5} {:.1} %", n * bin, one.mean_kl(), 100.0 * share(one)))
                .collect();
            println!("{:<38} {}", line.name, cells.join("  "));
        }
    }
    let equal = lines(items, |item| &item.matched);
    if equal.is_empty() {
        return;
    }
    println!("\npm-kvq with as much memory, averaged over the tokens");
    println!("{:<38} {:>12} {:>12} {:>12} {:>12}", "", "mean KiB", "divergence", "pm-kvq KiB", "divergence");
    for line in &equal {
        let Some(other) = measured.iter().find(|m| m.name == line.name) else { continue };
        println!(
            "{:<38} {:>12} {:>12.5} {:>12} {:>12.5}",
            line.name,
            kib(other.mean_bytes),
            other.total().mean_kl(),
            kib(line.mean_bytes),
            line.total().mean_kl()
        );
    }
}
