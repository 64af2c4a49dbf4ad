//! Rows in sections and tables, with the columns that have something to say.

use crate::row::Row;

/// Rows of one method and preset.
pub struct Section<'a> {
    pub method: &'a str,
    pub preset: &'a str,
    pub tables: Vec<Table<'a>>,
}

/// Rows that agree in everything but variant, seed, device and `x`.
pub struct Table<'a> {
    pub rows: Vec<&'a Row>,
}

/// One column: its heading and its text for a row.
pub struct Column {
    pub heading: String,
    pub numeric: bool,
    cell: fn(&Row) -> Option<String>,
}

impl Column {
    pub fn cell(&self, row: &Row) -> String {
        (self.cell)(row).unwrap_or_default()
    }
}

/// Sections in order of method and preset; tables and rows in the order of the experiment.
pub fn sections(rows: &[Row]) -> Vec<Section<'_>> {
    let mut sections: Vec<Section> = Vec::new();
    for row in rows {
        let key = (row.method.as_str(), row.preset.as_str());
        let at = sections.iter().position(|s| (s.method, s.preset) == key).unwrap_or_else(|| {
            sections.push(Section { method: key.0, preset: key.1, tables: Vec::new() });
            sections.len() - 1
        });
        let section = &mut sections[at];
        match section.tables.iter_mut().find(|t| t.takes(row)) {
            Some(table) => table.rows.push(row),
            None => section.tables.push(Table { rows: vec![row] }),
        }
    }
    sections.sort_by_key(|s| (s.method, s.preset));
    sections
}

impl Section<'_> {
    pub fn title(&self) -> String {
        if self.preset.is_empty() {
            self.method.to_owned()
        } else {
            format!("{} ({})", self.method, self.preset)
        }
    }
}

impl Table<'_> {
    fn takes(&self, row: &Row) -> bool {
        let key = |r: &Row| {
            let (x, label) = (r.x.is_some(), r.x_label.clone());
            (
                r.model.clone(),
                r.dataset.clone(),
                r.metric.clone(),
                r.unit.clone(),
                r.higher_is_better,
                x,
                label,
            )
        };
        key(self.first()) == key(row)
    }

    /// A row to read what all rows share from; a table has at least one.
    pub fn first(&self) -> &Row {
        self.rows[0]
    }

    /// `accuracy on arithmetic/test, megrez-text`.
    pub fn title(&self) -> String {
        let row = self.first();
        let mut title = self.axis();
        if !row.dataset.is_empty() {
            title = format!("{title} on {}", row.dataset);
        }
        if !row.model.is_empty() {
            title = format!("{title}, {}", row.model);
        }
        title
    }

    /// Metric and unit.
    pub fn axis(&self) -> String {
        let row = self.first();
        if row.unit.is_empty() { row.metric.clone() } else { format!("{} ({})", row.metric, row.unit) }
    }

    pub fn direction(&self) -> &'static str {
        if self.first().higher_is_better { "higher is better" } else { "lower is better" }
    }

    pub fn x_label(&self) -> &str {
        self.first().x_label.as_deref().unwrap_or("x")
    }

    /// The columns in which at least one row has something.
    pub fn columns(&self) -> Vec<Column> {
        let column = |heading: &str, numeric, cell| Column { heading: heading.to_owned(), numeric, cell };
        let all = [
            column("variant", false, |r| non_empty(&r.variant)),
            column(self.x_label(), true, |r| r.x.map(number)),
            column("value", true, |r| Some(number(r.value))),
            column("95 % interval", true, |r| r.ci.map(|[l, h]| format!("{} to {}", number(l), number(h)))),
            column("n", true, |r| r.n.map(|n| n.to_string())),
            column("paper", true, |r| r.paper.map(number)),
            column("seed", true, |r| r.seed.map(|s| s.to_string())),
            column("device", false, |r| non_empty(&r.device)),
            column("dtype", false, |r| non_empty(&r.dtype)),
            column("wall (s)", true, |r| r.wall_s.map(number)),
        ];
        all.into_iter().filter(|c| self.rows.iter().any(|r| (c.cell)(r).is_some())).collect()
    }

    /// Whether `row` holds the best value of several, to be set in bold. Lines over `x` have no single best.
    pub fn is_best(&self, row: &Row) -> bool {
        let finite: Vec<f64> = self.rows.iter().map(|r| r.value).filter(|v| v.is_finite()).collect();
        let best = if row.higher_is_better {
            finite.iter().copied().fold(f64::NEG_INFINITY, f64::max)
        } else {
            finite.iter().copied().fold(f64::INFINITY, f64::min)
        };
        row.x.is_none() && finite.len() > 1 && row.value.total_cmp(&best).is_eq()
    }

    /// The row's name in a plot; the seed tells rows of one variant apart.
    pub fn label(&self, row: &Row) -> String {
        let name = if row.variant.is_empty() { &row.metric } else { &row.variant };
        let twins = self.rows.iter().filter(|r| r.variant == row.variant && r.x == row.x).count();
        match row.seed {
            Some(seed) if twins > 1 => format!("{name} (seed {seed})"),
            _ => name.clone(),
        }
    }
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// Four significant digits, whole numbers as they are.
pub fn number(v: f64) -> String {
    if v.is_nan() {
        return "n/a".to_owned();
    }
    if v.is_infinite() {
        return if v > 0.0 { "∞" } else { "-∞" }.to_owned();
    }
    let size = v.abs();
    if size < 1e15 && v.fract() == 0.0 {
        return format!("{v}");
    }
    if !(1e-4..1e6).contains(&size) {
        return format!("{v:.3e}");
    }
    let decimals = (3 - size.log10().floor() as i32).clamp(0, 8) as usize;
    let text = format!("{v:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_keep_four_digits() {
        for (v, text) in [
            (0.0, "0"),
            (1000.0, "1000"),
            (0.93, "0.93"),
            (0.931_249, "0.9312"),
            (12.345_6, "12.35"),
            (1234.567, "1235"),
            (0.001_234_56, "0.001235"),
            (1.5e-7, "1.500e-7"),
            (-2.25, "-2.25"),
            (f64::NAN, "n/a"),
            (f64::INFINITY, "∞"),
        ] {
            assert_eq!(number(v), text);
        }
    }

    #[test]
    fn sections_sort_and_tables_keep_the_experiments_order() {
        let row = |method: &str, metric: &str, variant: &str| Row {
            method: method.into(),
            metric: metric.into(),
            variant: variant.into(),
            ..Row::default()
        };
        let rows = [row("b", "m", "1"), row("a", "z", "1"), row("a", "m", "1"), row("a", "z", "2")];
        let sections = sections(&rows);
        assert_eq!(sections.iter().map(|s| s.method).collect::<Vec<_>>(), ["a", "b"]);
        let titles: Vec<_> = sections[0].tables.iter().map(Table::title).collect();
        assert_eq!(titles, ["z", "m"]);
        assert_eq!(sections[0].tables[0].rows.len(), 2);
    }
}
