//! Records to result rows.

use std::collections::BTreeMap;

use nics_base::ci::{bootstrap_mean, wilson};
use nics_base::row::Row;

use super::Record;

/// Rows of a set of records: accuracy over all items (micro) with Wilson's interval, accuracy of each subject, and, where
/// there are several subjects, their mean (macro) with a bootstrap interval. `common` holds what is alike in all rows:
/// variant, preset, model, device, dtype, seed.
pub fn rows(records: &[Record], common: &Row) -> Vec<Row> {
    let mut tasks: BTreeMap<&str, BTreeMap<&str, (u64, u64)>> = BTreeMap::new();
    for record in records {
        let counts = tasks.entry(&record.task).or_default().entry(&record.subject).or_default();
        counts.0 += u64::from(record.correct);
        counts.1 += 1;
    }
    let mut rows = Vec::new();
    for (task, subjects) in tasks {
        let row = |metric: &str, value: f64, n: u64, ci: Option<[f64; 2]>| Row {
            dataset: task.to_owned(),
            metric: metric.to_owned(),
            value,
            higher_is_better: true,
            n: Some(n),
            ci,
            ..common.clone()
        };
        let proportion = |metric: &str, right: u64, n: u64| {
            row(metric, right as f64 / n as f64, n, Some(wilson(right, n)))
        };
        let (right, n) = subjects.values().fold((0, 0), |sum, c| (sum.0 + c.0, sum.1 + c.1));
        rows.push(proportion("accuracy", right, n));
        if subjects.len() > 1 {
            let each: Vec<f64> = subjects.values().map(|&(right, n)| right as f64 / n as f64).collect();
            let mean = each.iter().sum::<f64>() / each.len() as f64;
            let ci = bootstrap_mean(&each, 2000, common.seed.unwrap_or(0));
            rows.push(row("accuracy, mean of subjects", mean, n, ci));
            rows.extend(
                subjects.iter().map(|(s, &(right, n))| proportion(&format!("accuracy, {s}"), right, n)),
            );
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_macro_and_subjects_differ_as_they_should() {
        let record = |subject: &str, correct| Record {
            index: 0,
            id: String::new(),
            task: "mmlu".into(),
            subject: subject.into(),
            prompt_hash: String::new(),
            output: String::new(),
            extracted: None,
            gold: String::new(),
            correct,
            tokens: 0,
            logprobs: Vec::new(),
        };
        let records =
            [record("a", true), record("a", true), record("a", true), record("a", false), record("b", false)];
        let rows = rows(&records, &Row { method: "megrez".into(), ..Row::default() });
        let value = |metric: &str| rows.iter().find(|r| r.metric == metric).unwrap().value;
        assert!((value("accuracy") - 0.6).abs() < 1e-12);
        assert!((value("accuracy, mean of subjects") - 0.375).abs() < 1e-12);
        assert!((value("accuracy, a") - 0.75).abs() < 1e-12);
        for row in &rows {
            row.validate().unwrap();
        }
    }
}
