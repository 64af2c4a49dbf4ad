//! From a case to text for people and to result rows.

use std::fmt::Write;

use nics_base::row::Row;

use super::figure::{Case, Run};

/// Middle and quartiles.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Spread {
    low: f64,
    median: f64,
    high: f64,
}

impl Spread {
    /// Quantiles between the values, not a number without any.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
            let place = part * last as f64;
            let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Self { low: at(0.25), median: at(0.5), high: at(0.75) }
    }
}

/// How much longer a peer took than the subject, round by round.
fn ratio(peer: &Run, subject: &Run) -> Spread {
    Spread::of(peer.seconds.iter().zip(&subject.seconds).map(|(peer, subject)| peer / subject).collect())
}

/// The bandwidth that limits a case: that of its device, or else the machine's.
fn limit(case: &Case, machine: f64) -> f64 {
    case.bandwidth.unwrap_or(machine)
}

/// Part of the limit that the subject reaches: the time that reading takes at `bandwidth`, over its own.
fn share(case: &Case, subject: Spread, bandwidth: f64) -> Option<f64> {
    Some(case.bytes? as f64 / bandwidth / subject.median)
}

/// Part of its time that the server takes for itself: what the generator behind it would not need.
fn overhead(case: &Case) -> Option<f64> {
    let [server, generator] = case.runs.as_slice() else { return None };
    (case.suite == "serve").then(|| 1.0 - ratio(generator, server).median)
}

/// A few lines: what, time, share of the limit; each peer with its time and ratio.
pub fn text(case: &Case, bandwidth: f64) -> String {
    let mut text = String::new();
    let Some((subject, peers)) = case.runs.split_first() else {
        for absent in &case.absent {
            let _ = writeln!(text, "{}: not measured: {}", case.suite, absent.why);
        }
        return text;
    };
    let bandwidth = limit(case, bandwidth);
    let time = Spread::of(subject.seconds.clone());
    let _ = write!(
        text,
        "{}: {} {} a {} ({} to {})",
        case.id(),
        subject.who,
        duration(time.median),
        case.per,
        duration(time.low),
        duration(time.high)
    );
    if let Some(share) = share(case, time, bandwidth) {
        let _ = write!(text, ", {:.0} % of {:.1} GB/s", 100.0 * share, bandwidth / 1e9);
    }
    let _ = writeln!(text, "{}", error(subject));
    for peer in peers {
        let time = Spread::of(peer.seconds.clone());
        let ratio = ratio(peer, subject);
        let _ = writeln!(
            text,
            "    {:<20} {:>10}   {:.2} times ours ({:.2} to {:.2}){}",
            peer.who,
            duration(time.median),
            ratio.median,
            ratio.low,
            ratio.high,
            error(peer)
        );
    }
    if let Some(overhead) = overhead(case) {
        let _ = writeln!(text, "    the server's own part: {:.1} % of its time", 100.0 * overhead);
    }
    for absent in &case.absent {
        let _ = writeln!(text, "    {:<20} absent: {}", absent.who, absent.why);
    }
    text
}

fn error(run: &Run) -> String {
    run.error.map_or(String::new(), |error| format!(", relative error {error:.1e}"))
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.2} µs", s * 1e6),
    }
}

/// A row for each time, for each ratio with its quartiles, and for the share of the limit.
pub fn rows(case: &Case, bandwidth: f64, preset: &str, cpu: &str) -> Vec<Row> {
    let Some((subject, peers)) = case.runs.split_first() else { return Vec::new() };
    let bandwidth = limit(case, bandwidth);
    let row = |run: &Run, metric: &str, value: f64, unit: &str, higher_is_better| Row {
        variant: run.who.clone(),
        preset: preset.to_owned(),
        model: case.model.clone(),
        dataset: format!("{}, {}", case.suite, case.name),
        metric: metric.to_owned(),
        value,
        unit: unit.to_owned(),
        higher_is_better,
        n: Some(run.seconds.len() as u64),
        seed: Some(case.seed),
        device: case.device.clone().unwrap_or_else(|| format!("cpu: {cpu}, {} threads", case.threads)),
        dtype: case.dtype.clone(),
        x: Some(case.x),
        x_label: Some(case.x_label.clone()),
        ..of_ours()
    };
    let seconds = format!("seconds per {}", case.per);
    let mut rows = Vec::new();
    for run in &case.runs {
        rows.push(row(run, &seconds, Spread::of(run.seconds.clone()).median, "s", false));
        rows.extend(run.error.map(|error| row(run, "relative error", error, "", false)));
    }
    for peer in peers {
        let ratio = ratio(peer, subject);
        for (metric, value) in [
            ("time relative to ours", ratio.median),
            ("time relative to ours, lower quartile", ratio.low),
            ("time relative to ours, upper quartile", ratio.high),
        ] {
            rows.push(row(peer, metric, value, "", false));
        }
    }
    if let Some(share) = share(case, Spread::of(subject.seconds.clone()), bandwidth) {
        rows.push(row(subject, "share of read bandwidth", share, "", true));
    }
    if let Some(overhead) = overhead(case) {
        rows.push(row(subject, "server's own part of its time", overhead, "", false));
    }
    rows
}

/// The limit that shares are measured by.
pub fn bandwidth_row(bandwidths: &[f64], cpu: &str) -> Row {
    Row {
        variant: "machine".to_owned(),
        dataset: "read bandwidth".to_owned(),
        metric: "best of all measurements".to_owned(),
        value: bandwidths.iter().copied().fold(0.0, f64::max),
        unit: "B/s".to_owned(),
        higher_is_better: true,
        n: Some(bandwidths.len() as u64),
        device: format!("cpu: {cpu}"),
        ..of_ours()
    }
}

fn of_ours() -> Row {
    Row { method: "nics-core".to_owned(), ..Row::default() }
}

#[cfg(test)]
mod tests {
    use super::super::figure::Absent;
    use super::*;

    fn case() -> Case {
        let run =
            |who: &str, seconds: &[f64]| Run { who: who.into(), seconds: seconds.to_vec(), error: None };
        Case {
            suite: "decode".into(),
            name: "batch 1".into(),
            dtype: "bf16".into(),
            x: 2048.0,
            x_label: "context (tokens)".into(),
            per: "step".into(),
            model: "tiny".into(),
            threads: 2,
            seed: 1,
            bytes: Some(1_000_000_000),
            device: None,
            bandwidth: None,
            // The third round fell on a slow moment, for both.
            runs: vec![run("ours", &[0.1, 0.1, 0.2]), run("libtorch", &[0.2, 0.22, 0.4])],
            absent: vec![Absent { who: "candle".into(), why: "measured in f32 alone".into() }],
        }
    }

    #[test]
    fn a_case_is_told_with_ratios_of_rounds_and_the_share_of_the_limit() {
        let text = text(&case(), 20e9);
        assert_eq!(
            text,
            "decode/bf16/batch 1/context 2048: ours 100.00 ms a step (100.00 ms to 150.00 ms), 50 % of 20.0 GB/s\n    \
             libtorch              220.00 ms   2.00 times ours (2.00 to 2.10)\n    \
             candle               absent: measured in f32 alone\n"
        );
    }

    #[test]
    fn rows_are_valid_and_say_what_they_are_of() {
        let rows = rows(&case(), 20e9, "", "a processor");
        for row in &rows {
            row.validate().unwrap();
        }
        let find = |variant: &str, metric: &str| {
            rows.iter().find(|r| r.variant == variant && r.metric == metric).map(|r| r.value)
        };
        assert_eq!(find("libtorch", "seconds per step"), Some(0.22));
        assert_eq!(find("libtorch", "time relative to ours"), Some(2.0));
        assert_eq!(find("ours", "share of read bandwidth"), Some(0.5));
        assert!(find("ours", "time relative to ours").is_none());
        assert!(rows.iter().all(|r| r.x == Some(2048.0) && r.n == Some(3)));
        bandwidth_row(&[1e9, 2e9], "a processor").validate().unwrap();
    }

    #[test]
    fn a_device_has_its_own_limit_and_a_case_without_runs_says_why() {
        let case = Case { device: Some("cuda: a card".into()), bandwidth: Some(40e9), ..case() };
        assert!(text(&case, 20e9).contains("25 % of 40.0 GB/s"));
        let rows = rows(&case, 20e9, "", "a processor");
        assert!(rows.iter().all(|r| r.device == "cuda: a card"));
        assert!(rows.iter().any(|r| r.metric == "share of read bandwidth" && (r.value - 0.25).abs() < 1e-9));
        let none = Case { runs: Vec::new(), ..case };
        assert_eq!(text(&none, 20e9), "decode: not measured: measured in f32 alone\n");
    }

    #[test]
    fn quartiles_of_few_values() {
        assert_eq!(Spread::of(vec![3.0]), Spread { low: 3.0, median: 3.0, high: 3.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0, 5.0]), Spread { low: 2.0, median: 3.0, high: 4.0 });
        assert!(Spread::of(Vec::new()).median.is_nan());
    }
}
