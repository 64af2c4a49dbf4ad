//! Progress on stderr: a bar with rate and time left on a terminal, silence in a pipe.
//!
//! With `NICS_PROGRESS=lines` a pipe gets one plain line every few seconds instead: that is how `xtask` shows the
//! progress of the steps whose output it logs.

use std::io::{IsTerminal, stderr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between two lines in a pipe.
const LINES_EVERY: Duration = Duration::from_secs(5);

/// Progress of one long operation.
#[derive(Debug, Clone)]
pub struct Progress {
    bar: ProgressBar,
    lines: Option<Arc<Lines>>,
}

/// When the last line was printed, for a stderr that is no terminal.
#[derive(Debug)]
struct Lines {
    started: Instant,
    /// Milliseconds after `started`.
    last: AtomicU64,
    /// Where this run began counting.
    from: AtomicU64,
}

impl Progress {
    /// A bar over `total` items, called `label`.
    pub fn new(total: u64, label: impl Into<String>) -> Self {
        Self::styled(Some(total), "{msg} [{bar:30}] {pos}/{len} {per_sec} eta {eta}", label.into())
    }

    /// A bar over `total` bytes.
    pub fn bytes(total: u64, label: impl Into<String>) -> Self {
        let template =
            "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} eta {eta}";
        Self::styled(Some(total), template, label.into())
    }

    /// A spinner with the time passed, where the end is unknown.
    pub fn spinner(label: impl Into<String>) -> Self {
        Self::styled(None, "{spinner} {msg} {elapsed}", label.into())
    }

    /// No output at all, for `--quiet` and for libraries without a terminal.
    pub fn hidden() -> Self {
        Self { bar: ProgressBar::hidden(), lines: None }
    }

    fn styled(total: Option<u64>, template: &str, label: String) -> Self {
        // Draws nothing where stderr is no terminal.
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(8));
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("=> "));
        bar.set_message(label);
        if total.is_none() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let wanted = std::env::var("NICS_PROGRESS").is_ok_and(|v| v == "lines") && !stderr().is_terminal();
        let lines = wanted.then(|| {
            Arc::new(Lines { started: Instant::now(), last: AtomicU64::new(0), from: AtomicU64::new(0) })
        });
        Self { bar, lines }
    }

    /// `by` more items are done.
    pub fn inc(&self, by: u64) {
        self.bar.inc(by);
        self.print_line();
    }

    /// `done` items are done, for operations that resume in the middle or count themselves.
    pub fn set(&self, done: u64) {
        self.bar.set_position(done);
        self.print_line();
    }

    /// Prints where we are, unless a line was printed a moment ago.
    fn print_line(&self) {
        let Some(lines) = &self.lines else { return };
        let now = lines.started.elapsed().as_millis() as u64;
        let last = lines.last.load(Ordering::Relaxed);
        let due = now.saturating_sub(last) >= LINES_EVERY.as_millis() as u64;
        if due && lines.last.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            let (done, total) = (self.bar.position(), self.bar.length());
            let since = lines.started.elapsed();
            eprintln!(
                "{}",
                line(&self.bar.message(), done, total, lines.from.load(Ordering::Relaxed), since)
            );
        }
    }

    /// Starts the rate at the present position, so that resumed items do not count as fast ones.
    pub fn start_at(&self, done: u64) {
        self.bar.set_position(done);
        self.bar.reset_eta();
        if let Some(lines) = &self.lines {
            lines.from.store(done, Ordering::Relaxed);
        }
    }

    /// Changes the label, for example to carry the present loss.
    pub fn label(&self, label: impl Into<String>) {
        self.bar.set_message(label.into());
    }

    /// Prints a line above the bar (to stderr, also without a terminal).
    pub fn line(&self, text: impl AsRef<str>) {
        self.bar.suspend(|| eprintln!("{}", text.as_ref()));
    }

    /// How many items are done.
    pub fn position(&self) -> u64 {
        self.bar.position()
    }

    /// Ends the operation and clears the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// `eval 120/1000 (12 %) eta 3 min`, from the items done since `from`.
fn line(label: &str, done: u64, total: Option<u64>, from: u64, since: Duration) -> String {
    let Some(total) = total.filter(|&t| t > 0) else { return format!("{label} {done}") };
    let text = format!("{label} {done}/{total} ({} %)", done.saturating_mul(100) / total);
    let (1.., left @ 1..) = (done.saturating_sub(from), total.saturating_sub(done)) else { return text };
    let seconds = since.as_secs_f64() * left as f64 / (done - from) as f64;
    let (left, unit) = if seconds < 90.0 { (seconds, "s") } else { (seconds / 60.0, "min") };
    format!("{text} eta {left:.0} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_is_left() {
        let after = |s| Duration::from_secs(s);
        assert_eq!(line("eval", 120, Some(1000), 20, after(10)), "eval 120/1000 (12 %) eta 88 s");
        assert_eq!(line("eval", 120, Some(1000), 0, after(60)), "eval 120/1000 (12 %) eta 7 min");
        assert_eq!(line("eval", 1000, Some(1000), 0, after(60)), "eval 1000/1000 (100 %)");
        assert_eq!(line("eval", 5, Some(10), 5, after(60)), "eval 5/10 (50 %)");
        assert_eq!(line("files", 5, None, 0, after(60)), "files 5");
    }

    #[test]
    fn positions_count_without_a_terminal() {
        for bar in [Progress::new(10, "items"), Progress::bytes(10, "bytes"), Progress::spinner("x")] {
            bar.start_at(4);
            bar.inc(2);
            assert_eq!(bar.position(), 6);
            bar.finish();
        }
    }
}
