//! Reports from rows alone: Markdown for a repository, one self-contained HTML page (inline style, inline SVG) for a
//! browser.
//!
//! Rows of one method and preset make a section; within it, rows that agree in model, dataset, metric and unit make a
//! table with one plot. Rows that carry an `x` are drawn as lines over it, others as points with their intervals. The
//! text depends on the rows and on nothing else, so that rendering twice gives the same bytes.

mod html;
mod markdown;
mod plot;
mod table;

use std::path::Path;

use crate::artefact::write_atomic;
use crate::error::Result;
use crate::row::Row;

/// A rendered report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Contents of `report.md`.
    pub markdown: String,
    /// Contents of `report.html`.
    pub html: String,
}

impl Report {
    /// Renders `rows` under a title. Every row must be [valid](Row::validate).
    pub fn render(title: &str, rows: &[Row]) -> Result<Self> {
        rows.iter().try_for_each(Row::validate)?;
        let sections = table::sections(rows);
        Ok(Self { markdown: markdown::render(title, &sections), html: html::render(title, &sections)? })
    }

    /// Writes `report.md` and `report.html` into `dir`.
    pub fn write(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        write_atomic(dir.join("report.md"), &self.markdown)?;
        write_atomic(dir.join("report.html"), &self.html)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ci::wilson;

    fn accuracy(variant: &str, right: u64) -> Row {
        Row {
            method: "megrez".into(),
            variant: variant.into(),
            preset: "nano".into(),
            model: "megrez-text".into(),
            dataset: "arithmetic/test".into(),
            metric: "accuracy".into(),
            value: right as f64 / 1000.0,
            higher_is_better: true,
            n: Some(1000),
            ci: Some(wilson(right, 1000)),
            seed: Some(0),
            device: "cpu".into(),
            dtype: "float32".into(),
            wall_s: Some(12.25),
            ..Row::default()
        }
    }

    fn line(variant: &str, x: f64, value: f64) -> Row {
        Row {
            metric: "latency".into(),
            unit: "ms".into(),
            value,
            higher_is_better: false,
            ci: value.is_finite().then_some([value * 0.9, value * 1.1]),
            x: Some(x),
            x_label: Some("context (tokens)".into()),
            n: None,
            ..accuracy(variant, 0)
        }
    }

    fn rows() -> Vec<Row> {
        let mut rows = vec![accuracy("trained", 931), accuracy("shuffled <weights> & \"more\" | pipes", 12)];
        rows[0].paper = Some(0.95);
        for (i, x) in [128.0, 512.0, 1024.0, 2048.0].into_iter().enumerate() {
            rows.push(line("dense", x, 2.0 + i as f64));
            rows.push(line("sliding", x, if i == 2 { f64::NAN } else { 1.5 + 0.3 * i as f64 }));
        }
        rows
    }

    #[test]
    fn rendering_is_deterministic_and_self_contained() {
        let a = Report::render("nics", &rows()).unwrap();
        assert_eq!(a, Report::render("nics", &rows()).unwrap());
        assert_eq!(a.html.matches("<svg").count(), 2, "one plot for each table");
        for outside in ["http-equiv", "<link", "<script", "src=", "@import"] {
            assert!(!a.html.contains(outside), "{outside}");
        }
    }

    #[test]
    fn names_are_escaped_in_both_forms() {
        let report = Report::render("a <b>", &rows()).unwrap();
        assert!(!report.html.contains("<weights>") && !report.html.contains("<b>"));
        assert!(report.html.contains("shuffled &lt;weights&gt; &amp; &quot;more&quot;"));
        let line = report.markdown.lines().find(|l| l.contains("shuffled")).unwrap();
        assert!(line.contains(r"\| pipes") && line.contains(r"&lt;weights>"), "{line}");
    }

    #[test]
    fn tables_show_values_intervals_and_the_paper() {
        let markdown = Report::render("nics", &rows()).unwrap().markdown;
        let header = markdown.lines().find(|l| l.starts_with("| variant")).unwrap();
        assert_eq!(
            header,
            "| variant | value | 95 % interval | n | paper | seed | device | dtype | wall (s) |"
        );
        let best = markdown.lines().find(|l| l.starts_with("| trained")).unwrap();
        assert_eq!(
            best,
            "| trained | **0.931** | 0.9136 to 0.9451 | 1000 | 0.95 | 0 | cpu | float32 | 12.25 |"
        );
        assert!(markdown.contains("lower is better"));
    }

    #[test]
    fn missing_values_are_said_and_not_drawn() {
        let report = Report::render("nics", &rows()).unwrap();
        assert!(report.markdown.lines().any(|l| l.starts_with("| sliding | 1024 | n/a |")));
        assert!(!report.html.contains("NaN"));
        let mut alone = accuracy("failed", 0);
        (alone.value, alone.ci) = (f64::NAN, None);
        let report = Report::render("nics", &[alone]).unwrap();
        assert!(!report.html.contains("<svg"));
        let nothing = Report::render("nics", &[]).unwrap();
        assert!(nothing.markdown.contains("No rows") && nothing.html.contains("No rows"));
    }

    #[test]
    fn extreme_values_can_be_drawn() {
        for value in [0.0, 1e300, -1e300, 1e-300, f64::INFINITY, f64::MAX] {
            let mut row = accuracy("one", 1);
            (row.value, row.ci) = (value, None);
            let mut other = row.clone();
            other.variant = "two".into();
            other.value = 1.0;
            Report::render("nics", &[row.clone(), other.clone()]).unwrap();
            (row.x, other.x) = (Some(1.0), Some(1.0));
            Report::render("nics", &[row, other]).unwrap();
        }
    }

    #[test]
    fn an_invalid_row_is_refused() {
        let mut row = accuracy("one", 1);
        row.metric.clear();
        assert!(Report::render("nics", &[row]).is_err());
    }

    #[test]
    fn files_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let report = Report::render("nics", &rows()).unwrap();
        report.write(dir.path()).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("report.md")).unwrap(), report.markdown);
        assert_eq!(std::fs::read_to_string(dir.path().join("report.html")).unwrap(), report.html);
    }
}
