//! How far the loading of a model is, on the terminal.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a checkpoint that have been read, and the bar that shows them.
///
/// It appears once loading has taken a moment, where a binary shows warnings: not with `--quiet`, and not in a library whose
/// user has set up no log.
pub(super) struct Loading {
    done: AtomicU64,
    bar: bar::Bar,
}

impl Loading {
    /// The loading of `total` bytes of the checkpoint `name`.
    pub fn new(name: &str, total: u64) -> Self {
        Self { done: AtomicU64::new(0), bar: bar::Bar::new(name, total) }
    }

    /// A tensor of so many bytes has been read.
    pub fn read(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.bar.show(done);
    }
}

#[cfg(feature = "cli")]
mod bar {
    use std::sync::OnceLock;
    use std::time::{Duration, Instant};

    use nics_base::progress::Progress;

    /// Loading that takes less than this shows nothing.
    const MOMENT: Duration = Duration::from_millis(500);

    pub struct Bar {
        label: String,
        total: u64,
        started: Instant,
        shown: OnceLock<Progress>,
    }

    impl Bar {
        pub fn new(name: &str, total: u64) -> Self {
            Self { label: format!("loading {name}"), total, started: Instant::now(), shown: OnceLock::new() }
        }

        pub fn show(&self, done: u64) {
            if self.shown.get().is_none() && self.started.elapsed() < MOMENT {
                return;
            }
            let bar = self.shown.get_or_init(|| {
                let heard = tracing::enabled!(tracing::Level::WARN);
                let bar = if heard { Progress::bytes(self.total, &self.label) } else { Progress::hidden() };
                bar.start_at(done);
                bar
            });
            bar.set(done);
        }
    }

    impl Drop for Bar {
        fn drop(&mut self) {
            if let Some(bar) = self.shown.get() {
                bar.finish();
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_bar_appears_after_a_moment_and_counts_what_was_read_before() {
            let mut bar = Bar::new("model", 100);
            bar.show(10);
            assert!(bar.shown.get().is_none());
            bar.started = Instant::now().checked_sub(MOMENT).unwrap();
            bar.show(30);
            bar.show(40);
            assert_eq!(bar.shown.get().unwrap().position(), 40);
        }
    }
}

#[cfg(not(feature = "cli"))]
mod bar {
    /// Without binaries nothing is shown.
    pub struct Bar;

    impl Bar {
        pub fn new(_: &str, _: u64) -> Self {
            Self
        }

        pub fn show(&self, _: u64) {}
    }
}
