//! `/metrics`, in the text format of Prometheus.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::driver::Stats;
use super::engine::Counter;

/// Names that are written elsewhere on the page.
const OTHERS: [&str; 4] =
    ["http_requests_total", "time_to_first_token_seconds", "inter_token_seconds", "request_seconds"];

/// Whether a counter of the engine can stand on the page.
pub(super) fn fits(counter: &Counter) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    counter.name.starts_with(|c: char| c.is_ascii_lowercase())
        && counter.name.bytes().all(plain)
        && !OTHERS.contains(&counter.name)
        && !counter.help.contains(['\n', '\\'])
}

/// Counts of the HTTP side.
#[derive(Default)]
pub(super) struct Metrics {
    requests: Mutex<BTreeMap<(String, u16), u64>>,
    /// From the request's head to its first token.
    pub first_token: Histogram,
    /// Between two tokens of a choice.
    pub inter_token: Histogram,
    seconds: Histogram,
}

impl Metrics {
    /// A request has ended. `route` is one of the table's, so that nobody can make up further ones.
    pub fn request(&self, route: &str, status: u16, took: Duration) {
        self.seconds.observe(took);
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((route.to_owned(), status)).or_default() += 1;
    }

    /// The page.
    pub fn page(&self, stats: &Stats) -> String {
        let mut out = String::new();
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        head(
            &mut out,
            "nics_http_requests_total",
            "counter",
            "Requests that have ended, by route and status.",
        );
        for ((route, status), n) in requests {
            let _ = writeln!(out, "nics_http_requests_total{{route=\"{route}\",status=\"{status}\"}} {n}");
        }
        let engine = &stats.engine;
        let step_seconds = stats.step_time_total.as_secs_f64();
        let own = [
            ("queue_requests", "Requests that wait, wholly or in part.", stats.queued as f64),
            ("queue_limit_requests", "The most that may wait.", stats.queue_limit as f64),
            ("running_requests", "Requests of which the engine holds a sequence.", stats.running as f64),
            ("running_sequences", "Sequences that the engine holds.", engine.running as f64),
            ("kv_bytes", "Bytes reserved for keys and values.", engine.kv_bytes as f64),
            ("kv_limit_bytes", "The most that may be reserved.", engine.kv_limit_bytes as f64),
            ("requests_accepted_total", "Requests that were queued.", stats.accepted_total as f64),
            (
                "requests_rejected_total",
                "Requests refused because the queue was full.",
                stats.busy_total as f64,
            ),
            ("sequences_finished_total", "Sequences that ended by themselves.", stats.finished_total as f64),
            ("sequences_failed_total", "Sequences that failed.", stats.failed_total as f64),
            (
                "sequences_cancelled_total",
                "Sequences that were cancelled: the client went, or a stop string was met.",
                stats.cancelled_total as f64,
            ),
            ("prompt_tokens_total", "Prompt tokens computed.", engine.prompt_tokens_total as f64),
            (
                "prompt_tokens_reused_total",
                "Prompt tokens taken from kept prefixes.",
                engine.prompt_tokens_reused_total as f64,
            ),
            ("generated_tokens_total", "Tokens written.", engine.generated_tokens_total as f64),
            ("engine_steps_total", "Steps that ran a model.", engine.steps_total as f64),
            ("engine_step_seconds_total", "Time inside the engine's steps.", step_seconds),
        ];
        let engines = stats.counters.iter().filter(|c| fits(c)).map(|c| (c.name, c.help, c.value));
        let mut written = BTreeSet::new();
        for (name, help, value) in own.into_iter().chain(engines) {
            if !written.insert(name) {
                continue; // A name means one thing.
            }
            let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
            head(&mut out, &format!("nics_{name}"), kind, help);
            let _ = writeln!(out, "nics_{name} {value}");
        }
        self.first_token.write(
            &mut out,
            "nics_time_to_first_token_seconds",
            "From a request to its first token.",
        );
        self.inter_token.write(&mut out, "nics_inter_token_seconds", "Between two tokens of a sequence.");
        self.seconds.write(&mut out, "nics_request_seconds", "From a request to the end of its reply.");
        out
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Upper edges of the buckets, in microseconds.
const EDGES: [u64; 16] = [
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    300_000_000,
];

/// Durations by bucket.
#[derive(Default)]
pub(super) struct Histogram {
    /// The last one is for what is beyond the last edge.
    buckets: [AtomicU64; EDGES.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    pub fn observe(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = EDGES.iter().position(|edge| micros <= *edge).unwrap_or(EDGES.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, "histogram", help);
        let mut sum = 0;
        for (edge, n) in
            EDGES.iter().map(|e| (*e as f64 / 1e6).to_string()).chain(["+Inf".into()]).zip(&self.buckets)
        {
            sum += n.load(Ordering::Relaxed);
            let _ = writeln!(out, "{name}_bucket{{le=\"{edge}\"}} {sum}");
        }
        let _ = writeln!(out, "{name}_sum {}", self.micros.load(Ordering::Relaxed) as f64 / 1e6);
        let _ = writeln!(out, "{name}_count {sum}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engines_counters_stand_beside_the_servers() {
        let counter = |name, value| Counter { name, help: "Help.", value };
        let counters = vec![
            counter("cups_total", 3.0),
            counter("cup_height", 0.5),
            counter("Cups", 1.0),
            counter("a{b=\"c\"}", 1.0),
            counter("", 1.0),
            counter("queue_requests", 77.0),
            counter("request_seconds", 77.0),
            Counter { name: "lines", help: "one\ntwo", value: 1.0 },
        ];
        let page = Metrics::default().page(&Stats { counters, ..Stats::default() });
        assert!(page.contains("# TYPE nics_cups_total counter\nnics_cups_total 3\n"), "{page}");
        assert!(page.contains("# TYPE nics_cup_height gauge\nnics_cup_height 0.5\n"));
        assert!(
            !page.contains("77")
                && !page.contains("Cups")
                && !page.contains("a{")
                && !page.contains("nics_lines")
        );
        assert_eq!(page.matches("# TYPE nics_queue_requests ").count(), 1);
    }
}
