//! Progress on stderr: a bar with rate and time left on a terminal, silence in a pipe.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Progress of one long operation.
#[derive(Debug, Clone)]
pub struct Progress(ProgressBar);

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
        Self(ProgressBar::hidden())
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
        Self(bar)
    }

    /// `by` more items are done.
    pub fn inc(&self, by: u64) {
        self.0.inc(by);
    }

    /// `done` items are done, for operations that resume in the middle or count themselves.
    pub fn set(&self, done: u64) {
        self.0.set_position(done);
    }

    /// Starts the rate at the present position, so that resumed items do not count as fast ones.
    pub fn start_at(&self, done: u64) {
        self.0.set_position(done);
        self.0.reset_eta();
    }

    /// Changes the label, for example to carry the present loss.
    pub fn label(&self, label: impl Into<String>) {
        self.0.set_message(label.into());
    }

    /// Prints a line above the bar (to stderr, also without a terminal).
    pub fn line(&self, text: impl AsRef<str>) {
        self.0.suspend(|| eprintln!("{}", text.as_ref()));
    }

    /// How many items are done.
    pub fn position(&self) -> u64 {
        self.0.position()
    }

    /// Ends the operation and clears the bar.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
