//! Result rows: what every experiment writes, and all that a report is made of.
//!
//! A row is one line of a JSON Lines file. Numbers that JSON cannot write stay readable: not-a-number is `null`, the
//! infinities are `"inf"` and `"-inf"`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::jsonl;

/// One measured value and everything needed to read it.
///
/// ```
/// use nics_base::{ci, row::Row};
///
/// let row = Row {
///     method: "megrez".into(),
///     variant: "baseline".into(),
///     preset: "nano".into(),
///     metric: "accuracy".into(),
///     value: 0.93,
///     higher_is_better: true,
///     n: Some(1000),
///     ci: Some(ci::wilson(930, 1000)),
///     ..Row::default()
/// };
/// row.validate()?;
/// # Ok::<(), nics_base::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Row {
    /// Method crate, for example `megrez`.
    pub method: String,
    /// What is compared within a table: the method's setting or a baseline's name.
    #[serde(default)]
    pub variant: String,
    /// `nano`, `paper`, or a user's own.
    #[serde(default)]
    pub preset: String,
    /// Checkpoint: hub id or folder name.
    #[serde(default)]
    pub model: String,
    /// Dataset and split.
    #[serde(default)]
    pub dataset: String,
    /// What was measured, for example `accuracy`.
    pub metric: String,
    /// The measurement; not a number where it failed.
    #[serde(with = "number")]
    pub value: f64,
    /// Unit of `value`; empty for plain numbers.
    #[serde(default)]
    pub unit: String,
    /// Whether a larger `value` is a better one.
    #[serde(default)]
    pub higher_is_better: bool,
    /// Number of items behind the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u64>,
    /// 95 % confidence interval, low and high; see [`ci`](crate::ci).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ci: Option<[f64; 2]>,
    /// Seed of everything random behind the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Device, for example `cpu` or `cuda:0`, with its model where speed matters.
    #[serde(default)]
    pub device: String,
    /// Number format of the computation, for example `float32`.
    #[serde(default)]
    pub dtype: String,
    /// Wall time of the measurement in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wall_s: Option<f64>,
    /// The paper's value where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paper: Option<f64>,
    /// Position along the horizontal axis when the metric is measured along something: rows that differ in `x` alone
    /// make a line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<f64>,
    /// What `x` is, with its unit, for example `context (tokens)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x_label: Option<String>,
}

impl Row {
    /// Checks what a report relies on: a method, a metric, an interval in order and around nothing odd, a finite `x`.
    pub fn validate(&self) -> Result<()> {
        let bad = |reason: &str| {
            let (method, metric) = (self.method.clone(), self.metric.clone());
            Err(Error::BadRow { method, metric, reason: reason.to_owned() })
        };
        if self.method.is_empty() {
            return bad("the method is empty; expected the crate's name");
        }
        if self.metric.is_empty() {
            return bad("the metric is empty; expected what was measured");
        }
        if let Some([low, high]) = self.ci
            && (!low.is_finite() || !high.is_finite() || low > high)
        {
            return bad(&format!(
                "confidence interval [{low}, {high}]: expected two finite numbers in order"
            ));
        }
        if self.x.is_some_and(|x| !x.is_finite()) {
            return bad("x is not finite; leave it out where there is none");
        }
        Ok(())
    }
}

/// Reads and validates the rows of a file; a torn last line is left out.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Row>> {
    let path = path.as_ref();
    let rows: Vec<Row> = jsonl::read(path)?;
    for (i, row) in rows.iter().enumerate() {
        row.validate().map_err(|e| Error::CorruptLine {
            path: path.to_owned(),
            line: i + 1,
            reason: e.to_string(),
        })?;
    }
    Ok(rows)
}

/// Validates `rows` and writes them as one file, atomically.
pub fn write(path: impl AsRef<Path>, rows: &[Row]) -> Result<()> {
    rows.iter().try_for_each(Row::validate)?;
    jsonl::write(path, rows)
}

/// Numbers as JSON can carry them.
mod number {
    use serde::{Deserialize, Deserializer, Serializer, de};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(f64),
        Text(String),
        Nothing,
    }

    // The signature is serde's.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        match *value {
            v if v.is_nan() => to.serialize_none(),
            f64::INFINITY => to.serialize_str("inf"),
            f64::NEG_INFINITY => to.serialize_str("-inf"),
            v => to.serialize_f64(v),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        match Written::deserialize(from)? {
            Written::Number(v) => Ok(v),
            Written::Nothing => Ok(f64::NAN),
            Written::Text(text) if text == "inf" => Ok(f64::INFINITY),
            Written::Text(text) if text == "-inf" => Ok(f64::NEG_INFINITY),
            Written::Text(text) => Err(de::Error::custom(format!(
                "value {text:?} is no number; expected a number, null, inf or -inf"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(value: f64) -> Row {
        Row { method: "m".into(), metric: "accuracy".into(), value, ..Row::default() }
    }

    #[test]
    fn rows_round_trip_with_odd_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let full =
            Row { n: Some(3), ci: Some([0.1, 0.9]), x: Some(2.0), x_label: Some("步".into()), ..row(0.5) };
        write(&path, &[full.clone(), row(f64::NAN), row(f64::INFINITY), row(f64::NEG_INFINITY)]).unwrap();
        let back = read(&path).unwrap();
        assert_eq!(back[0], full);
        assert!(back[1].value.is_nan());
        assert_eq!(back[2].value.to_bits(), f64::INFINITY.to_bits());
        assert_eq!(back[3].value.to_bits(), f64::NEG_INFINITY.to_bits());
    }

    #[test]
    fn a_minimal_line_is_enough_and_a_wrong_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let good = r#"{"method": "m", "metric": "x", "value": 1}"#;
        std::fs::write(&path, format!("{good}\n")).unwrap();
        assert_eq!(read(&path).unwrap().len(), 1);
        for (bad, why) in [
            (r#"{"method": "m", "metric": "x"}"#, "missing field `value`"),
            (r#"{"method": "m", "metric": "x", "value": "fast"}"#, "\"fast\" is no number"),
            (r#"{"method": "", "metric": "x", "value": 1}"#, "the method is empty"),
            (r#"{"method": "m", "metric": "x", "value": 1, "ci": [2, 1]}"#, "[2, 1]"),
        ] {
            std::fs::write(&path, format!("{good}\n{bad}\n")).unwrap();
            let e = read(&path).unwrap_err().to_string();
            assert!(e.contains("line 2") && e.contains(why), "{e}");
        }
    }
}
